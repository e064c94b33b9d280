"""What the loopback hub answers, one function per kind of request."""

import base64
import hashlib
import json
import re
from dataclasses import dataclass, field
from typing import Any

from tests.hub.repositories import MAIN, Commit, NoRepository, NoRevision, Repository

_REPO = r"(?P<repo>[^/]+/[^/]+)"

ROUTES = {
    "whoami": re.compile(r"/api/whoami-v2"),
    "validate": re.compile(r"/api/validate-yaml"),
    "create": re.compile(r"/api/repos/create"),
    "preupload": re.compile(rf"/api/models/{_REPO}/preupload/(?P<revision>.+)"),
    "commit": re.compile(rf"/api/models/{_REPO}/commit/(?P<revision>.+)"),
    "branch": re.compile(rf"/api/models/{_REPO}/branch/(?P<revision>.+)"),
    "tree": re.compile(rf"/api/models/{_REPO}/tree/(?P<revision>[^/]+|refs/pr/\d+)(/.*)?"),
    "info": re.compile(rf"/api/models/{_REPO}(/revision/(?P<revision>.+))?"),
    "batch": re.compile(rf"/{_REPO}\.git/info/lfs/objects/batch"),
    "upload": re.compile(r"/uploads/(?P<oid>[0-9a-f]{64})"),
    "resolve": re.compile(rf"/{_REPO}/resolve/(?P<revision>refs/pr/\d+|[^/]+)/(?P<file>.+)"),
}

LARGE = (".safetensors", ".png")
"""Files that go through the storage of large files."""


@dataclass
class Request:
    """One request."""

    method: str
    names: dict[str, str | None]
    query: dict[str, str]
    content: bytes
    authorization: str

    def json(self) -> Any:
        """Return the body as JSON."""
        return json.loads(self.content)


@dataclass
class Response:
    """One answer: JSON or bytes; `said` and `code` of a refusal are in its headers, too."""

    data: Any = None
    status: int = 200
    said: str = ""
    code: str = ""
    more: dict[str, str] = field(default_factory=dict)

    def body(self) -> bytes:
        """Return the bytes."""
        if isinstance(self.data, bytes):
            return self.data
        told = {**(self.data or {}), "error": self.said} if self.said else self.data
        return json.dumps(told).encode()

    def headers(self) -> dict[str, str]:
        """Return the headers."""
        kind = "application/octet-stream" if isinstance(self.data, bytes) else "application/json"
        told = {"X-Error-Code": self.code} if self.code else {}
        told |= {"X-Error-Message": self.said} if self.said else {}
        return {"Content-Type": kind, **told, **self.more}


def respond(hub: Any, name: str, request: Request) -> Response:
    """Answer one request."""
    signed = request.authorization == f"Bearer {hub.token}"
    if request.authorization and not signed:
        return Response(status=401, said="Invalid user token.")
    try:
        if name in ("create", "commit", "branch", "preupload", "batch", "whoami") and not signed:
            return Response(status=401, said="Invalid username or password.")
        return globals()[f"_{name}"](hub, request, signed)
    except NoRepository:
        status = 404 if signed else 401
        return Response(status=status, said="Repository not found", code="RepoNotFound")
    except NoRevision as error:
        said = f"Invalid rev id: {error}"
        return Response(status=404, said=said, code="RevisionNotFound")


def _repository(hub: Any, request: Request, signed: bool) -> Repository:
    found = hub.repositories.get(request.names["repo"])
    if found is None or (found.private and not signed):
        raise NoRepository
    return found


def _whoami(hub: Any, request: Request, signed: bool) -> Response:
    access = {"accessToken": {"role": "write", "displayName": "loopback"}}
    return Response({"type": "user", "name": "ann", "orgs": [], "auth": access})


def _validate(hub: Any, request: Request, signed: bool) -> Response:
    return Response({"errors": [], "warnings": []})


def _create(hub: Any, request: Request, signed: bool) -> Response:
    asked = request.json()
    name = f"{asked.get('organization') or 'ann'}/{asked['name']}"
    where = {"url": f"{hub.url}/{name}", "id": name, "name": name}
    if name in hub.repositories:
        return Response(where, status=409, said="You already created this model repo")
    # Today's client says `visibility`, older ones `private`.
    private = asked.get("private") or asked.get("visibility") == "private"
    hub.repositories[name] = Repository(private=bool(private))
    return Response(where)


def _branch(hub: Any, request: Request, signed: bool) -> Response:
    repository = _repository(hub, request, signed)
    name = str(request.names["revision"])
    if name in repository.branches:
        return Response(status=409, said="Reference already exists")
    start = json.loads(request.content or b"{}").get("startingPoint") or MAIN
    repository.branches[name] = repository.at(start).sha
    return Response({})


def _preupload(hub: Any, request: Request, signed: bool) -> Response:
    repository = _repository(hub, request, signed)
    repository.at(str(request.names["revision"]))
    files = [
        {
            "path": file["path"],
            "uploadMode": "lfs" if file["path"].endswith(LARGE) else "regular",
            "shouldIgnore": False,
            "oid": None,
        }
        for file in request.json()["files"]
    ]
    return Response({"files": files})


def _batch(hub: Any, request: Request, signed: bool) -> Response:
    _repository(hub, request, signed)
    objects = [
        {**one, "actions": {"upload": {"href": f"{hub.url}/uploads/{one['oid']}"}}}
        for one in request.json()["objects"]
    ]
    return Response({"transfer": "basic", "objects": objects})


def _upload(hub: Any, request: Request, signed: bool) -> Response:
    assert hashlib.sha256(request.content).hexdigest() == request.names["oid"]
    hub.uploaded[str(request.names["oid"])] = request.content
    return Response(b"")


def _commit(hub: Any, request: Request, signed: bool) -> Response:
    repository = _repository(hub, request, signed)
    revision = str(request.names["revision"])
    title, changes = "", {}
    for line in request.content.splitlines():
        item = json.loads(line)
        value = item["value"]
        if item["key"] == "header":
            title, parent = value["summary"], value.get("parentCommit")
            if parent and parent != repository.at(revision).sha:
                return Response(status=412, said="A commit has happened since.")
        elif item["key"] == "file":
            changes[value["path"]] = base64.b64decode(value["content"])
        elif item["key"] == "lfsFile":
            changes[value["path"]] = hub.uploaded[value["oid"]]
        elif item["key"] == "deletedFile":
            changes[value["path"]] = None
    as_pull = request.query.get("create_pr") == "1"
    made = repository.add(revision, title, changes, as_pull=as_pull)
    where = f"{hub.url}/{request.names['repo']}"
    pull = f"{where}/discussions/{len(repository.pulls)}" if as_pull else None
    told = {"success": True, "commitOid": made.sha, "commitUrl": f"{where}/commit/{made.sha}"}
    return Response({**told, "pullRequestUrl": pull, "hookOutput": ""})


def _tree(hub: Any, request: Request, signed: bool) -> Response:
    commit = _at(hub, request, signed)
    return Response(
        [
            {"type": "file", "path": name, "size": len(content), "oid": _oid(content)}
            for name, content in commit.files.items()
        ]
    )


def _info(hub: Any, request: Request, signed: bool) -> Response:
    repository, commit = _repository(hub, request, signed), _at(hub, request, signed)
    name = request.names["repo"]
    return Response(
        {
            "_id": "1",
            "id": name,
            "modelId": name,
            "sha": commit.sha,
            "private": repository.private,
            "gated": False,
            "disabled": False,
            "downloads": 0,
            "likes": 0,
            "tags": [],
            "siblings": [_sibling(*file) for file in commit.files.items()],
        }
    )


def _resolve(hub: Any, request: Request, signed: bool) -> Response:
    commit = _at(hub, request, signed)
    content = commit.files.get(str(request.names["file"]))
    if content is None:
        more = {"X-Repo-Commit": commit.sha}
        return Response(status=404, said="Entry not found", code="EntryNotFound", more=more)
    return Response(content, more={"ETag": f'"{_oid(content)}"', "X-Repo-Commit": commit.sha})


def _at(hub: Any, request: Request, signed: bool) -> Commit:
    return _repository(hub, request, signed).at(request.names["revision"] or MAIN)


def _sibling(name: str, content: bytes) -> dict[str, Any]:
    blob = hashlib.sha1(f"blob {len(content)}\0".encode() + content).hexdigest()
    told: dict[str, Any] = {"rfilename": name, "size": len(content), "blobId": blob}
    if name.endswith(LARGE):
        # As on the hub: the blob is a pointer, whose id says nothing of the content.
        sha256 = hashlib.sha256(content).hexdigest()
        pointer = {"sha256": sha256, "size": len(content), "pointerSize": 130}
        told |= {"blobId": hashlib.sha1(sha256.encode()).hexdigest(), "lfs": pointer}
    return told


def _oid(content: bytes) -> str:
    return hashlib.sha1(content).hexdigest()
