"""What a caller may allow when an adapter is loaded; never read from a file."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace


@dataclass(frozen=True, kw_only=True)
class LoadOptions:
    """What is let through although it is refused otherwise.

    Attributes:
        allow_nonfinite: tensors may hold NaN or infinity.
        allow_other_base: the base may differ from the one the adapter was trained on.
        allow_base_weights: the file may hold weights of the base model itself, which then replace
            those of the loaded one, such as embeddings that were resized.
    """

    allow_nonfinite: bool = False
    allow_other_base: bool = False
    allow_base_weights: bool = False


_OPTIONS: ContextVar[LoadOptions] = ContextVar("moeadapt_load_options", default=LoadOptions())  # noqa: B039


def options() -> LoadOptions:
    """Return what the caller allows here."""
    return _OPTIONS.get()


@contextmanager
def loading_options(
    *,
    allow_nonfinite: bool = False,
    allow_other_base: bool = False,
    allow_base_weights: bool = False,
) -> Iterator[None]:
    """Allow what loading refuses, for every way to load an adapter inside the block.

    Args:
        allow_nonfinite: see `LoadOptions`.
        allow_other_base: see `LoadOptions`.
        allow_base_weights: see `LoadOptions`.

    Example:
        >>> with moeadapt.loading_options(allow_other_base=True):
        ...     model = PeftModel.from_pretrained(base, "adapters/math")
    """
    chosen = {
        "allow_nonfinite": allow_nonfinite,
        "allow_other_base": allow_other_base,
        "allow_base_weights": allow_base_weights,
    }
    token = _OPTIONS.set(replace(_OPTIONS.get(), **{k: True for k, v in chosen.items() if v}))
    try:
        yield
    finally:
        _OPTIONS.reset(token)
