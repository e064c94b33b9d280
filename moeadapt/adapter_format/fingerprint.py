"""Tells whether a base model is the one an adapter was trained on.

Three things are kept of a base: the fields of its configuration that shape it, its vocabulary, and
a few numbers of a few weights. The numbers are kept twice: as a hash, equal only for the same
weights in the same type, and rounded to bfloat16, since the same base is often loaded in another
type. A base whose numbers cannot be read (quantised, sharded, offloaded) is told by its
configuration alone.
"""

import hashlib
from typing import Any

import torch
from torch import Tensor, nn

from moeadapt.errors import AdapterFileError

FIELDS = (
    "model_type",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "hidden_act",
)
TENSORS, SAMPLES = 8, 32
"""Weights looked at, and numbers of each."""

TOLERANCE = 2**-6
"""Largest relative difference of the same number in two types: twice two roundings to bfloat16."""

FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
_SKIPPED = ("moeadapt_", "lora_", ".modules_to_save.", "token_adapter", "original_module")


def fingerprint(model: nn.Module) -> dict[str, Any]:
    """Return what identifies `model` as a base, adapters on it left out: plain data of a few kB.

    Example:
        >>> fingerprint(base)["config"]["hidden_size"]
        2048
    """
    config: Any = getattr(model, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    fields = {name: getattr(text, name, None) for name in FIELDS}
    return {
        "config": {k: v for k, v in fields.items() if isinstance(v, int | str)},
        "vocab_size": getattr(text, "vocab_size", None),
        "name": getattr(model, "name_or_path", None) or None,
        "revision": getattr(config, "_commit_hash", None),
        "weights": _weights(model),
    }


def _weights(model: nn.Module) -> dict[str, Any]:
    """Return the samples by name; empty where they cannot be read."""
    names = {}
    for name, tensor in model.named_parameters():
        if not any(part in name for part in _SKIPPED):
            names[name.replace(".base_layer.", ".").replace("._fsdp_wrapped_module", "")] = tensor
    # Embeddings change with the vocabulary, and heads with the task.
    inside = sorted(name for name in names if any(part.isdigit() for part in name.split(".")))
    step = max(1, len(inside) // TENSORS)
    chosen = inside[::step][:TENSORS]
    if not all(_is_readable(names[name]) for name in chosen):
        return {}
    return {name: _sample(names[name]) for name in chosen}


def _is_readable(tensor: Tensor) -> bool:
    plain = type(tensor.data) is Tensor and type(tensor) in (nn.Parameter, Tensor)
    return plain and tensor.dtype in FLOATS and not tensor.is_meta and tensor.numel() > 0


def _sample(tensor: Tensor) -> dict[str, Any]:
    flat = tensor.detach().reshape(-1)
    step = max(1, flat.numel() // SAMPLES)
    values = flat[::step][:SAMPLES].cpu()
    exact = values.to(torch.float64).numpy().astype("<f8").tobytes()
    return {
        "dtype": str(tensor.dtype).removeprefix("torch."),
        "shape": list(tensor.shape),
        "sha256": hashlib.sha256(exact).hexdigest(),
        "values": [float(f"{v:.4g}") for v in values.to(torch.bfloat16).tolist()],
    }


def compare(saved: dict[str, Any], found: dict[str, Any], where: str) -> tuple[bool, list[str]]:
    """Compare the base an adapter was trained on with the one at hand.

    Args:
        saved: `base` of a manifest, from a file: of any shape.
        found: `fingerprint` of the base at hand.
        where: the adapter, named in messages.

    Returns:
        Whether it certainly is the same base, and what else a user should be told.

    Raises:
        AdapterFileError: it is another base.
    """
    config, here = _dict(saved.get("config")), found["config"]
    for name in FIELDS:
        if name in config and name in here and config[name] != here[name]:
            what = "hidden" if name == "hidden_size" else name
            raise AdapterFileError(
                f"{where} was made for {what} {config[name]!r}, this base has {here[name]!r}. "
                f"{_CURE}"
            )
    weights, same = _dict(saved.get("weights")), False
    if weights and found["weights"]:
        same = _compare_weights(weights, found["weights"], where)
    notes = []
    if saved.get("vocab_size") != found["vocab_size"] and None not in (
        saved.get("vocab_size"),
        found["vocab_size"],
    ):
        notes.append(
            f"{where} was trained with a vocabulary of {saved['vocab_size']!r}, this base has "
            f"{found['vocab_size']!r}: resize it if the adapter needs its tokens"
        )
    for name in ("name", "revision"):
        old, new = saved.get(name), found[name]
        if old and new and old != new and not same:
            notes.append(
                f"{where} was trained on base {name} {old!r}, this is {new!r}; that they are "
                "equal could not be checked to the last digit"
            )
    return same, notes


_CURE = (
    "Load the base it was trained on; if this one is meant, load inside "
    "moeadapt.loading_options(allow_other_base=True)."
)


def _compare_weights(saved: dict[str, Any], found: dict[str, Any], where: str) -> bool:
    """Return whether all numbers are equal to the last digit; refuse if some are not even close."""
    same = True
    for name, old in saved.items():
        new, old = found.get(name), _dict(old)
        if new is None:
            # Which weights are sampled depends on what is trained in full; the others tell.
            same = False
            continue
        if old.get("sha256") == new["sha256"]:
            continue
        same = False
        if old.get("shape") != new["shape"] or not _are_close(old.get("values"), new["values"]):
            raise AdapterFileError(
                f"{where} was trained on another base: weight {name!r} holds other numbers. {_CURE}"
            )
    return same


def _are_close(old: Any, new: list[float]) -> bool:
    if not isinstance(old, list) or len(old) != len(new):
        return False
    if not all(type(v) in (int, float) for v in old):
        return False
    a, b = torch.tensor(old, dtype=torch.float64), torch.tensor(new, dtype=torch.float64)
    # Numbers far below the others are rounded to zero by some types.
    floor = b.abs().max() * 1e-4
    return bool(((a - b).abs() <= TOLERANCE * b.abs() + floor).all())


def _dict(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}
