"""What a check found, and what a check is."""

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

Level = Literal["ok", "skipped", "warning", "error"]

Scope = Literal["environment", "folder", "adapter", "base"]


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One thing that was found.

    Attributes:
        check: name of the check.
        level: ok; skipped: could not be looked at; warning: look at it; error: loading or resuming
            is refused, or would go wrong.
        what: what was found, and where.
        why: why it matters; empty where all is well.
        cure: what to do; empty where there is nothing to do.
    """

    check: str
    level: Level
    what: str
    why: str = ""
    cure: str = ""

    def to_dict(self) -> dict[str, str]:
        """Return JSON data."""
        return asdict(self)


@dataclass(kw_only=True)
class Subject:
    """What is examined.

    Attributes:
        folder: an adapter, a checkpoint, or a training run's output; None: the environment only.
        base: the base model to compare with; None: none.
        facts: what checks leave for later ones, by name.
    """

    folder: Path | None = None
    base: str | None = None
    facts: dict[str, Any] = field(default_factory=dict)

    @property
    def place(self) -> Path:
        """The folder, for checks that are run only with one."""
        assert self.folder is not None
        return self.folder


@dataclass(frozen=True, kw_only=True)
class Check:
    """One check.

    Attributes:
        scope: what it needs: nothing, a folder, a folder with an adapter, or that and a base.
        line: what holds if it finds nothing.
        why: why it matters.
        run: yields what is wrong; what it raises is a finding, too.
    """

    scope: Scope
    line: str
    why: str
    run: Callable[[Subject], Iterator[Finding]]
