"""Talks to the hub: what a repository holds, and one commit; every failure is a `HubError`."""

import json
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, constants, get_token
from huggingface_hub.errors import (
    EntryNotFoundError,
    HfHubHTTPError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import get_session

from moeadapt.adapter_format.settings import MANIFEST
from moeadapt.errors import HubError
from moeadapt.hub.parcel import CARD
from moeadapt.version import __version__

TIMEOUT = 120.0
"""Seconds to wait for the next sign of the hub; the library would wait for ever."""

REASONS = {
    400: "the hub does not accept the request",
    401: "the hub does not accept the token, or got none: `hf auth login`, HF_TOKEN or --token",
    403: "the token may not write there: make one with write access, or push to a name of yours",
    404: "there is no such repository, or the token does not see it: check the name and the token",
    409: "somebody else changed the repository at the same time; push again",
    412: "somebody else changed the repository at the same time; push again",
    413: "the hub refuses files of this size",
    429: "the hub refuses more requests for now; wait some minutes, then push again",
}


@dataclass(frozen=True, kw_only=True)
class RemoteState:
    """What is there.

    Attributes:
        exists: whether the repository is there.
        has_branch: whether the branch is there.
        sha: the commit that this describes; None: there is none.
        private: whether only its owner sees it; None: there is none.
        files: names in it.
        readme: the text of README.md; None: there is none.
        sealed: files that the manifest there names: written by an earlier push.
    """

    exists: bool = False
    has_branch: bool = False
    sha: str | None = None
    private: bool | None = None
    files: tuple[str, ...] = ()
    readme: str | None = None
    sealed: tuple[str, ...] = ()


class Remote:
    """One repository of the hub, with a token that is kept in no message and no file."""

    def __init__(self, repo_id: str, token: str | None = None) -> None:
        """Find the token; sends nothing.

        Args:
            repo_id: owner/name.
            token: of the hub; None: HF_TOKEN, or that of `hf auth login`.

        Raises:
            HubError: there is no token, or HF_HUB_OFFLINE is set.
        """
        if constants.is_offline_mode():
            raise HubError(
                f"cannot push to {repo_id}: HF_HUB_OFFLINE is set; unset it, or use --dry-run"
            )
        found = token or get_token()
        if not found:
            raise HubError(
                f"cannot push to {repo_id}: there is no token; run `hf auth login`, set HF_TOKEN, "
                "or give --token"
            )
        self.repo_id, self.token = repo_id, found
        self._api = HfApi(token=found, library_name="moeadapt", library_version=__version__)

    def state(self, revision: str | None) -> RemoteState:
        """Look at the repository; changes nothing.

        Raises:
            HubError: the hub cannot be asked.
        """
        with self._talking("look at"):
            try:
                info = self._api.repo_info(self.repo_id, revision=revision, timeout=TIMEOUT)
            except RevisionNotFoundError:
                found = self._api.repo_info(self.repo_id, timeout=TIMEOUT)
                return RemoteState(exists=True, private=found.private)
            except RepositoryNotFoundError as error:
                if _status(error) == 401:  # noqa: PLR2004
                    raise
                return RemoteState()
        files = tuple(sorted(sibling.rfilename for sibling in info.siblings or ()))
        texts = {n: self._read(n, info.sha) for n in (CARD, MANIFEST) if n in files}
        return RemoteState(
            exists=True,
            has_branch=True,
            sha=info.sha,
            private=info.private,
            files=files,
            readme=texts.get(CARD),
            sealed=_sealed(texts.get(MANIFEST)),
        )

    def _read(self, name: str, sha: str | None) -> str | None:
        with self._talking(f"read {name} of"), tempfile.TemporaryDirectory() as cache:
            try:
                path = self._api.hf_hub_download(self.repo_id, name, revision=sha, cache_dir=cache)
            except EntryNotFoundError:
                return None
            return Path(path).read_text(encoding="utf-8")

    def commit(
        self,
        files: Mapping[str, bytes | Path],
        stale: tuple[str, ...],
        state: RemoteState,
        *,
        message: str,
        revision: str | None,
        create_pr: bool,
        private: bool | None,
    ) -> Any:
        """Send one commit, into a new repository if there is none.

        Args:
            files: name -> content.
            stale: names of files that go away.
            state: what `state` returned; a commit made since then is not overwritten.
            message: of the commit.
            revision: the branch, made if it is not there; None: main.
            create_pr: open a pull request instead.
            private: of a new repository; None: what the account says.

        Raises:
            HubError: the hub refuses, or cannot be reached; the repository is as it was, or new and
                empty.
        """
        made = ""
        if not state.exists:
            with self._talking("make"):
                self._api.create_repo(self.repo_id, private=private)
            made = "the repository was made and is empty"
        if revision is not None and not state.has_branch:
            with self._talking(f"make the branch {revision} of", made):
                self._api.create_branch(self.repo_id, branch=revision, exist_ok=True)
        operations = [
            *(CommitOperationDelete(path_in_repo=name) for name in stale),
            *(CommitOperationAdd(path_in_repo=n, path_or_fileobj=c) for n, c in files.items()),
        ]
        with self._talking("push to", made or "nothing in the repository was changed"):
            return self._api.create_commit(
                self.repo_id,
                operations,
                commit_message=message,
                revision=revision,
                create_pr=create_pr,
                parent_commit=state.sha,
            )

    @contextmanager
    def _talking(self, doing: str, left: str = "") -> Iterator[None]:
        """Turn what the libraries raise into a `HubError`, without what they know of requests."""
        session = get_session()
        before, session.timeout = session.timeout, TIMEOUT
        try:
            yield
        except Exception as error:
            if not _is_of_hub(error):
                raise
            reason = _reason(error).replace(self.token, "***")
            end = f"; {left}" if left else ""
            problem = HubError(f"cannot {doing} {self.repo_id}: {reason}{end}")
        else:
            return
        finally:
            session.timeout = before
        raise problem from None


def _is_of_hub(error: Exception) -> bool:
    libraries = {cls.__module__.partition(".")[0] for cls in type(error).__mro__}
    return bool(libraries & {"httpx", "httpx2", "huggingface_hub", "hf_xet"}) or isinstance(
        error, OSError | ValueError | RuntimeError
    )


def _status(error: BaseException) -> int | None:
    return getattr(getattr(error, "response", None), "status_code", None)


def _reason(error: BaseException) -> str:
    status = _status(error)
    if status is None and isinstance(error, RuntimeError) and error.__cause__ is not None:
        return _reason(error.__cause__)  # of one of several uploads
    if isinstance(error, OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE is set"
    if status is not None:
        said = getattr(error, "server_message", None)
        own = f" (the hub says: {said})" if isinstance(error, HfHubHTTPError) and said else ""
        known = REASONS.get(status)
        if known is None:
            known = "the hub has a problem of its own; push again later" if status >= 500 else ""  # noqa: PLR2004
        return f"{status}: {known}{own}" if known else f"{status}{own}"
    kind = type(error).__name__
    if "Timeout" in kind:
        return f"the hub did not answer in time ({kind}); push again"
    return f"the connection broke, or there is none: {kind}: {error}; push again"


def _sealed(manifest: str | None) -> tuple[str, ...]:
    try:
        files = json.loads(manifest or "{}").get("files", {})
        return tuple(str(name) for name in files)
    except (ValueError, AttributeError, TypeError):
        return ()
