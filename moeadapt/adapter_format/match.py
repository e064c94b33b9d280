"""Compares the tensors a file says it holds with those that settings and base need."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

from moeadapt.adapter_format.header import FLOATS, TensorInfo
from moeadapt.errors import AdapterFileError, did_you_mean

SHOWN = 5
"""Names listed before the count of the rest."""


@dataclass(frozen=True, kw_only=True)
class TensorSpec:
    """What a tensor must be.

    Attributes:
        shape: its shape.
        is_float: whether it holds floating-point numbers, of any width; else integers.
        base_dim: the dimension that is a width of the base; None: none.
        expert_dim: the dimension that grows with the number of experts; None: none.
        rank: rank of one expert, where `expert_dim` is experts times rank; None: it is not.
        required: whether it may not be missing.
    """

    shape: tuple[int, ...]
    is_float: bool = True
    base_dim: int | None = None
    expert_dim: int | None = None
    rank: int | None = None
    required: bool = True


def check_tensors(
    found: Mapping[str, TensorInfo],
    expected: Mapping[str, TensorSpec],
    path: Path,
    base_names: Collection[str] = (),
    allow_base_weights: bool = False,
) -> None:
    """Refuse a file whose tensors are not exactly the expected ones.

    Args:
        found: what the header says.
        expected: what settings and base need.
        path: the file, named in messages.
        base_names: tensors of the base model, as a file would name them.
        allow_base_weights: let those through.

    Raises:
        AdapterFileError: lists the first `SHOWN` tensors at fault, counts them, says what to do.
    """
    extra = [name for name in found if name not in expected]
    of_base = [name for name in extra if name in base_names]
    if of_base and not allow_base_weights:
        raise AdapterFileError(
            f"{path}: holds {some(of_base)}, which would overwrite the base model's own weights. "
            "An adapter must not; if you trust it (embeddings are saved like this when the "
            "vocabulary was resized), load it inside "
            "moeadapt.loading_options(allow_base_weights=True)"
        )
    missing = [name for name, spec in expected.items() if spec.required and name not in found]
    extra = [name for name in extra if name not in of_base]
    if extra:
        hint = did_you_mean(extra[0], missing) if missing else ""
        raise AdapterFileError(
            f"{path}: holds {some(extra)}, which its settings do not make on this base{hint}"
            f"{_also(missing)}. {_CURE}"
        )
    if missing:
        raise AdapterFileError(
            f"{path}: lacks {some(missing)} of the {len(expected)} that its settings make on this "
            f"base. {_CURE}"
        )
    for name in found:
        if name in expected:
            _check_type(name, found[name], expected[name], path)
    wrong = [n for n in found if n in expected and found[n].shape != expected[n].shape]
    if wrong:
        raise AdapterFileError(_shapes(wrong, found, expected, path))


_CURE = (
    "The file is damaged, belongs to other settings, or was trained on another base: take the "
    "adapter_config.json that was saved with it, and the base it names."
)


def some(names: Collection[str]) -> str:
    """Return how many tensors there are, and the names of the first."""
    shown = ", ".join(repr(name) for name in list(names)[:SHOWN])
    word = "tensor" if len(names) == 1 else "tensors"
    return f"{len(names)} {word} ({shown}{', ...' if len(names) > SHOWN else ''})"


def _also(missing: list[str]) -> str:
    return f"; it also lacks {some(missing)}" if missing else ""


def _check_type(name: str, info: TensorInfo, spec: TensorSpec, path: Path) -> None:
    if spec.is_float == (info.dtype in FLOATS):
        return
    allowed = list(FLOATS) if spec.is_float else "an integer type"
    raise AdapterFileError(
        f"{path}: tensor {name!r} is {info.dtype}; it must be {allowed}. Save the adapter again "
        "from the model it was trained in."
    )


def _shapes(
    wrong: list[str],
    found: Mapping[str, TensorInfo],
    expected: Mapping[str, TensorSpec],
    path: Path,
) -> str:
    lines = [
        f"{name!r} has shape {list(found[name].shape)} instead of {list(expected[name].shape)}"
        for name in wrong[:SHOWN]
    ]
    more = f"; and {len(wrong) - SHOWN} more" if len(wrong) > SHOWN else ""
    # Routers first: they read the hidden states, whatever the width of a layer.
    causes = [
        _cause(found[name].shape, expected[name], "hidden" if "_router." in name else "width")
        for name in sorted(wrong, key=lambda name: "_router." not in name)
    ]
    # The number of experts shows in the routers, where no rank is mixed in.
    order = ("experts", "hidden", "transposed", "rank")
    best = sorted((c for c in causes if c), key=lambda c: order.index(c[0]))
    reason = f" {best[0][1]}." if best else f" {_CURE}"
    return f"{path}: {'; '.join(lines)}{more}.{reason}"


def _cause(found: tuple[int, ...], spec: TensorSpec, width: str) -> tuple[str, str] | None:
    """Return what makes the shape differ: a word for it, and a sentence with both numbers."""
    if len(found) != len(spec.shape):
        return None
    differ = [i for i, (a, b) in enumerate(zip(found, spec.shape, strict=True)) if a != b]
    if len(found) > 1 and tuple(reversed(found)) == spec.shape:
        return "transposed", "It is transposed: save it as the layer holds it"
    if spec.base_dim in differ:
        a, b = found[spec.base_dim], spec.shape[spec.base_dim]
        return "hidden", (
            f"The adapter was made for {width} {a}, this base has {b}: load the base that it was "
            "trained on"
        )
    if differ != [spec.expert_dim] or spec.expert_dim is None:
        return None
    a, b = found[spec.expert_dim], spec.shape[spec.expert_dim]
    if spec.rank is None:
        return "experts", (
            f"The file has {a} experts, its settings say {b}: take the adapter_config.json that "
            "was saved with it"
        )
    rank = a * spec.rank / b
    return "rank", (
        f"The file has rank {rank:g}, its settings say {spec.rank}, for the number of experts that "
        "they name: take the adapter_config.json that was saved with it"
    )
