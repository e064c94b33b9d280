"""Where each setting of a run was written, so that a message can say it."""

import re
from collections.abc import Mapping

Path = tuple[str, ...]
"""Keys from the outermost: `("moe", "router", "k")`."""

FLAGS = "flags"


class Places:
    """The places of the settings of one run: `file:line`, or `flags`."""

    def __init__(self, lines: Mapping[Path, str] | None = None, default: str = FLAGS) -> None:
        """Start with the settings of a file.

        Args:
            lines: path of a setting -> `file:line`.
            default: place of what was not written anywhere: the file.
        """
        self._lines = dict(lines or {})
        self._default = default

    def set_by_flag(self, key: str) -> None:
        """Note that a flag gave `key`, with dots between its parts, and all below it."""
        path = tuple(key.split("."))
        self._lines = {p: line for p, line in self._lines.items() if p[: len(path)] != path}
        self._lines[path] = FLAGS

    def of(self, *path: str) -> str:
        """Return the place of a setting, or of the nearest one around it."""
        for length in range(len(path), 0, -1):
            if path[:length] in self._lines:
                return self._lines[path[:length]]
        return self._default

    def mentioned(self, message: str, *section: str) -> str:
        """Return the place of the setting that a message is about.

        Messages name the setting that is wrong first, from the outside in: `router 'top_k': k=9
        ...`. So this follows the words of the message down the settings that were written.

        Args:
            message: of an error that knows settings, but not where they were written.
            section: path of the settings that it can be about.
        """
        found: Path = section
        for word in re.findall(r"\w+", message):
            below = [
                path
                for path in self._lines
                if len(path) > len(found) and path[: len(found)] == found and path[-1] == word
            ]
            if section or found:
                nearest = sorted(below, key=len)[:2]
            else:
                nearest = [path for path in below if len(path) == 1]
            if len(nearest) == 1 or (nearest and len(nearest[0]) < len(nearest[1])):
                found = nearest[0]
        return self.of(*found)
