"""Talks to the hub: what a repository holds, and one commit; every failure is a `HubError`."""

import hashlib
import json
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, constants, get_token
from huggingface_hub.errors import (
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import get_session

from moeadapt.adapter_format.settings import MANIFEST
from moeadapt.errors import AdapterFileError, ConfigError, HubError
from moeadapt.hub.failure import asked_to_commit, file_of, is_of_hub, reason_of, status_of
from moeadapt.hub.parcel import CARD, sha256_of
from moeadapt.version import __version__

TIMEOUT = 120.0
"""Seconds to wait for the next sign of the hub; the library would wait for ever."""


@dataclass(frozen=True, kw_only=True)
class RemoteState:
    """What is there.

    Attributes:
        exists: whether the repository is there.
        has_branch: whether the branch is there; if not, this describes main, which it starts from.
        sha: the commit that this describes; None: there is none.
        private: whether only its owner sees it; None: there is none.
        files: names in it.
        ids: name -> what the hub says of its content: a sha256, or the id of a git blob.
        readme: the text of README.md; None: there is none.
        sealed: files that the manifest there names: written by an earlier push.
    """

    exists: bool = False
    has_branch: bool = False
    sha: str | None = None
    private: bool | None = None
    files: tuple[str, ...] = ()
    ids: Mapping[str, str] = field(default_factory=dict)
    readme: str | None = None
    sealed: tuple[str, ...] = ()

    def holds(self, name: str, content: bytes | Path) -> bool:
        """Whether the file of that name there is known to have this content."""
        known = self.ids.get(name, "")
        if len(known) == len(hashlib.sha256().hexdigest()):
            return known == sha256_of(content)
        data = content if isinstance(content, bytes) else content.read_bytes()
        blob = hashlib.sha1(f"blob {len(data)}\0".encode() + data, usedforsecurity=False)
        return known == blob.hexdigest()


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
        found = find_token(token)
        if found is None:
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
            ConfigError: the card there is not UTF-8.
        """
        has_branch = True
        with self._talking("look at"):
            try:
                info = self._info(revision)
            except RevisionNotFoundError:
                info, has_branch = self._info(None), False
            except RepositoryNotFoundError as error:
                if status_of(error) == 401:  # noqa: PLR2004
                    raise
                return RemoteState()
        there = {sibling.rfilename: sibling for sibling in info.siblings or ()}
        ids = {name: one.lfs.sha256 if one.lfs else one.blob_id for name, one in there.items()}
        return RemoteState(
            exists=True,
            has_branch=has_branch,
            sha=info.sha,
            private=info.private,
            files=tuple(sorted(there)),
            ids={name: known for name, known in ids.items() if known},
            readme=self._card(info.sha) if CARD in there else None,
            sealed=_sealed(self._read(MANIFEST, info.sha)) if MANIFEST in there else (),
        )

    def _info(self, revision: str | None) -> Any:
        return self._api.model_info(
            self.repo_id, revision=revision, files_metadata=True, timeout=TIMEOUT
        )

    def _card(self, sha: str | None) -> str:
        try:
            return self._read(CARD, sha).decode("utf-8")
        except UnicodeDecodeError as error:
            raise ConfigError(
                f"{CARD} of {self.repo_id}: is not UTF-8 at byte {error.start}, so its text cannot "
                "be kept; save it as UTF-8 there, then push again"
            ) from None

    def _read(self, name: str, sha: str | None) -> bytes:
        # What `state` saw is there: that it cannot be found would be a fault, and no empty file.
        with tempfile.TemporaryDirectory() as cache:
            with self._talking(f"read {name} of"):
                path = self._api.hf_hub_download(self.repo_id, name, revision=sha, cache_dir=cache)
            return Path(path).read_bytes()

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
            revision: the branch, made of `state.sha` if it is not there; None: main.
            create_pr: open a pull request instead.
            private: of a new repository; None: what the account says.

        Raises:
            HubError: the hub refuses, or cannot be reached; the files are as they were. A
                repository or a branch that was made for them stays, and the message says so.
            AdapterFileError: a file that is to be sent is gone.
        """
        try:
            operations = [
                *(CommitOperationDelete(path_in_repo=name) for name in stale),
                *(CommitOperationAdd(path_in_repo=n, path_or_fileobj=c) for n, c in files.items()),
            ]
        except (OSError, ValueError) as error:
            raise AdapterFileError(f"{error}; it was there before. Nothing was sent") from None
        made = self._make(state, revision, private)
        with self._talking("push to", made or "nothing in the repository was changed"):
            return self._api.create_commit(
                self.repo_id,
                operations,
                commit_message=message,
                revision=revision,
                create_pr=create_pr,
                parent_commit=state.sha,
            )

    def _make(self, state: RemoteState, revision: str | None, private: bool | None) -> str:
        """Make the repository and the branch that lack, and say which."""
        made = ""
        if not state.exists:
            with self._talking("make", unseen=True):
                self._api.create_repo(self.repo_id, private=private)
            made = "the repository was made and is empty"
        if revision is not None and not state.has_branch:
            with self._talking(f"make the branch {revision} of", made):
                self._api.create_branch(self.repo_id, branch=revision, revision=state.sha)
            branch = f"the branch {revision} was made and holds what main holds"
            made = f"{made}; {branch}" if made else branch
        return made

    @contextmanager
    def _talking(self, doing: str, left: str = "", *, unseen: bool = False) -> Iterator[None]:
        """Turn what the libraries raise into a `HubError`, without what they know of requests."""
        session = get_session()
        before, session.timeout = session.timeout, TIMEOUT
        try:
            yield
        except Exception as error:
            end = f"; {left}" if left else ""
            if status_of(error) is None and asked_to_commit(error):
                end = (
                    "; it is not known whether the commit arrived: look at the repository before "
                    "you push again"
                )
            here = file_of(error)
            if here is None and not is_of_hub(error):
                raise
            reason = reason_of(error).replace(self.token, "***")
            if unseen and status_of(error) == 409:  # noqa: PLR2004
                reason = "it exists, and the token does not see it; push with one that does"
            problem = HubError(f"cannot {doing} {self.repo_id}: {reason}{end}")
            if here is not None:
                problem = AdapterFileError(f"{here}; cannot {doing} {self.repo_id}{end}")
        else:
            return
        finally:
            session.timeout = before
        raise problem from None


def find_token(token: str | None) -> str | None:
    """Return the token to push with: the one given, HF_TOKEN, or that of `hf auth login`."""
    return token or get_token()


def _sealed(manifest: bytes) -> tuple[str, ...]:
    try:
        files = json.loads(manifest).get("files", {})
        return tuple(str(name) for name in files)
    except (ValueError, AttributeError, TypeError):
        return ()
