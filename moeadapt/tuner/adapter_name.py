"""The rule for adapter names: they become parts of module paths, file names and tensor keys."""

import re

from torch import nn

from moeadapt.errors import ConfigError

MAX_LENGTH = 64

_ALLOWED = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*", re.ASCII)

_SHOWN = 40
"""Characters of a refused name that a message repeats."""


def check_adapter_name(name: object) -> None:
    """Refuse a name that is no plain word.

    PEFT makes a module, a subfolder and tensor keys from it: a dot ends a module path, a slash or
    `..` leaves the folder, and a name that torch's own containers use hides what they need.

    Args:
        name: what the caller wants to call an adapter.

    Raises:
        ConfigError: it is not 1 to `MAX_LENGTH` ASCII letters, digits, `_` and `-` that start with
            a letter or digit, or it is an attribute of `torch.nn.ModuleDict`.
    """
    rule = (
        f"a name is 1 to {MAX_LENGTH} ASCII letters, digits, '_' and '-', and starts with a letter "
        "or a digit"
    )
    if not isinstance(name, str):
        raise ConfigError(f"adapter name {name!r} is a {type(name).__name__}; {rule}")
    shown = repr(name[:_SHOWN]) + ("..." if len(name) > _SHOWN else "")
    if len(name) > MAX_LENGTH or not _ALLOWED.fullmatch(name):
        raise ConfigError(f"adapter name {shown} is not allowed: {rule}")
    if hasattr(nn.ModuleDict(), name):
        raise ConfigError(
            f"adapter name {shown} is not allowed: torch.nn.ModuleDict has an attribute of that "
            "name; choose another"
        )
