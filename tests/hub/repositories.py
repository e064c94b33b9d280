"""Repositories in memory: commits that hold whole trees, branches, pull requests."""

import hashlib
from dataclasses import dataclass, field

MAIN = "main"


class NoRepository(Exception):
    """There is none of that name, or the caller may not see it."""


class NoRevision(Exception):
    """The repository has no such branch or commit."""


@dataclass(frozen=True)
class Commit:
    """One commit and its whole tree."""

    sha: str
    parent: str | None
    title: str
    files: dict[str, bytes]


@dataclass
class Repository:
    """One repository."""

    private: bool = False
    commits: dict[str, Commit] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    pulls: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        first = Commit("0" * 39 + "1", None, "initial commit", {".gitattributes": b"\n"})
        self.commits[first.sha] = first
        self.branches[MAIN] = first.sha

    def at(self, revision: str) -> Commit:
        """Return the commit of a branch, of a pull request, or of that id."""
        sha = self.branches.get(revision, revision)
        if sha not in self.commits:
            raise NoRevision(revision)
        return self.commits[sha]

    def add(
        self,
        revision: str,
        title: str,
        changes: dict[str, bytes | None],
        as_pull: bool = False,
    ) -> Commit:
        """Commit changes, None: deleted; on the branch, or as a pull request against it."""
        parent = self.at(revision)
        files = {**parent.files, **{k: v for k, v in changes.items() if v is not None}}
        for name, content in changes.items():
            if content is None:
                del files[name]
        told = repr([parent.sha, title, sorted(files.items())]).encode()
        commit = Commit(hashlib.sha1(told).hexdigest(), parent.sha, title, files)
        self.commits[commit.sha] = commit
        if as_pull:
            revision = f"refs/pr/{len(self.pulls) + 1}"
            self.pulls.append(commit.sha)
        self.branches[revision] = commit.sha
        return commit
