"""The errors a user can cause, one root for all of them; and the warning about routing.

Each class also inherits the builtin it refines, so code that catches `ValueError` or
`NotImplementedError` keeps working. Add a class only when a caller would want to handle it
differently from its siblings. A message names the value, where it came from, what is allowed and
what to do.
"""

import difflib
from collections.abc import Iterable


class MoeAdaptError(Exception):
    """Root of every error that moeadapt raises on purpose."""


class ConfigError(MoeAdaptError, ValueError):
    """A setting is unknown, of the wrong type, out of range, or contradicts another one."""


class AdapterFileError(ConfigError):
    """A file of a saved adapter is damaged, or does not fit its settings, the base or this version.

    Nothing of the base model has been touched.
    """


class MissingPackageError(ConfigError, ImportError):
    """An optional package is not installed; says which extra of moeadapt brings it."""


class UnsupportedError(MoeAdaptError, NotImplementedError):
    """The request is well formed, but a routed mixture cannot do it; names what can."""


class TrainingError(MoeAdaptError, RuntimeError):
    """A training run would go wrong silently if it went on."""


class TrainingStopped(MoeAdaptError, SystemExit):
    """A signal stopped the training, after a complete checkpoint.

    A script that does not catch it ends with its exit code.

    Attributes:
        exit_code: 143 after SIGTERM, 130 after SIGINT; also `code`, which Python looks at.
    """

    def __init__(self, message: str, code: int) -> None:
        """Say what was saved, and how to go on."""
        super().__init__(message)
        self.code = self.exit_code = code


class AssetError(MoeAdaptError, OSError):
    """A file that has to be downloaded or converted could not be had, or is not what it claims."""


class HubError(MoeAdaptError, OSError):
    """A hub refuses, or cannot be reached; what lies on it is as it was, unless the message says.

    No message holds a token.
    """


class ExportError(MoeAdaptError, ValueError):
    """A written checkpoint would not be what was asked for: tensors lack, or answers differ."""


class RoutingWarning(UserWarning):
    """Training goes on, but the routers do not do what a mixture is for; says what to do."""


def did_you_mean(word: object, known: Iterable[str]) -> str:
    """Return `"; did you mean 'x'?"` for the nearest known word, or an empty string.

    Example:
        >>> did_you_mean("topk", ["top_k", "uniform"])
        "; did you mean 'top_k'?"
    """
    near = difflib.get_close_matches(str(word), sorted(known), n=1, cutoff=0.6)
    return f"; did you mean {near[0]!r}?" if near else ""
