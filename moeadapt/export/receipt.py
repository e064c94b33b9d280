"""What a written checkpoint is and how it was checked: `export_receipt.json`, and a text."""

import json
import math
import platform
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import safetensors
import torch
import transformers

from moeadapt.errors import ConfigError
from moeadapt.export.engines import Verdict
from moeadapt.export.shards import DTYPE_NAMES, PlannedTensor
from moeadapt.version import __version__

RECEIPT = "export_receipt.json"

TOLERANCE, RELATIVE_TOLERANCE = 1e-4, 1e-5
"""Largest difference of float32 logits: in logits, and over the largest logit where that is more.

Models whose logits reach 40 differ by 1e-4 from themselves when only the order of sums changes.
"""


GROSS = 0.05
"""Mean logit difference over the largest logit that no rounding to 16 bits explains."""


@dataclass(frozen=True, kw_only=True)
class Measured:
    """Two models on the same tokens, in the dtype that `dtype` names.

    Attributes:
        tokens: positions compared.
        dtype: of both models while they ran.
        largest_logit: of the reference, absolute.
        max_logit_difference: largest absolute difference, in logits.
        mean_logit_difference: mean absolute difference, in logits.
        kl: mean KL divergence of the new model from the reference, nats per token.
        argmax_agreement: share of positions with the same best token.
        routing_agreement: per layer, share of chosen experts in common; None where the reference
            has no router.
    """

    tokens: int
    dtype: str
    largest_logit: float
    max_logit_difference: float
    mean_logit_difference: float
    kl: float
    argmax_agreement: float
    routing_agreement: tuple[float, ...] | None = None

    @property
    def float32_tolerance(self) -> float:
        """Largest difference that rounding explains where everything is float32, in logits."""
        return max(TOLERANCE, RELATIVE_TOLERANCE * self.largest_logit)

    @property
    def is_beyond_rounding(self) -> bool:
        """Whether the mean difference is more than rounding to 16 bits explains."""
        return not self.mean_logit_difference <= GROSS * self.largest_logit


@dataclass(frozen=True, kw_only=True)
class Receipt:
    """What was written, from what, and how far it is from the reference.

    Attributes:
        kind: upcycle or export.
        target: the stock class, a key of `EXPORTERS`.
        base_type: model type of the dense base.
        num_experts: experts per layer on disk.
        top_k: experts per token.
        settings: everything else the caller chose, as JSON data.
        source_sha256: name of a source -> SHA-256 of its weights.
        dtype: name of a dtype -> bytes on disk.
        bytes_on_disk: of the weights, all files.
        base_bytes: of the dense base's weights.
        engines: what each engine does with the checkpoint.
        measured: the comparison with the reference; None if it was not asked for.
        tolerance: largest allowed logit difference, in logits; None where none is promised.
        versions: package -> version.
    """

    kind: str
    target: str
    base_type: str
    num_experts: int
    top_k: int
    settings: dict[str, Any]
    source_sha256: dict[str, str]
    dtype: dict[str, int]
    bytes_on_disk: int
    base_bytes: int
    engines: tuple[Verdict, ...]
    measured: Measured | None
    tolerance: float | None
    versions: dict[str, str] = field(default_factory=lambda: versions())

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON data."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> "Receipt":
        """Return the receipt that `to_dict` described."""
        fields = dict(data)
        fields["engines"] = tuple(Verdict(**verdict) for verdict in data["engines"])
        if data["measured"] is not None:
            measured = dict(data["measured"])
            if measured["routing_agreement"] is not None:
                measured["routing_agreement"] = tuple(measured["routing_agreement"])
            fields["measured"] = Measured(**measured)
        return cls(**fields)

    @classmethod
    def load(cls, folder: str | Path) -> "Receipt":
        """Read the receipt of a written checkpoint.

        Raises:
            ConfigError: the folder has none, or it is damaged.
        """
        path = Path(folder) / RECEIPT
        try:
            return cls.from_dict(json.loads(path.read_text(encoding="utf-8")))
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ConfigError(f"{path} is no receipt: {error}") from error

    def text(self) -> str:
        """Return the receipt for reading."""
        rows = [
            ("written", f"{self.kind} of {self.base_type} to {self.target}"),
            ("experts", f"{self.num_experts} per layer, {self.top_k} per token"),
            ("size", f"{_size(self.bytes_on_disk)} (base {_size(self.base_bytes)})"),
            ("dtype", ", ".join(f"{n} {_size(size)}" for n, size in self.dtype.items())),
            *_measured_rows(self.measured, self.tolerance),
            *((verdict.engine, f"{verdict.status}: {verdict.reason}") for verdict in self.engines),
            *((f"sha256 {name}", digest) for name, digest in self.source_sha256.items()),
            ("versions", ", ".join(f"{n} {version}" for n, version in self.versions.items())),
        ]
        width = max(len(label) for label, _ in rows)
        return "\n".join(f"{label:{width}}  {value}" for label, value in rows)


def _measured_rows(measured: Measured | None, tolerance: float | None) -> list[tuple[str, str]]:
    if measured is None:
        return [("checked", "no: load it once with verify=True before you rely on it")]
    promise = "no promise" if tolerance is None else f"allowed {tolerance:.0e}"
    rows = [
        ("logit difference", f"max {measured.max_logit_difference:.1e} ({promise})"),
        ("", f"mean {measured.mean_logit_difference:.1e}, {measured.dtype}"),
        ("largest logit", f"{measured.largest_logit:.1f}"),
        ("KL", f"{measured.kl:.1e} nats per token over {measured.tokens} tokens"),
        ("same best token", f"{measured.argmax_agreement:.1%}"),
    ]
    if measured.routing_agreement is not None:
        worst = min(measured.routing_agreement)
        rows.append(("same experts", f"{worst:.1%} in the worst layer"))
    return rows


def _size(count: int) -> str:
    for unit, scale in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if count >= scale:
            return f"{count / scale:.2f} {unit}"
    return f"{count} B"


def bytes_by_dtype(tensors: Iterable[PlannedTensor]) -> dict[str, int]:
    """Return name of a dtype -> bytes of the planned tensors in it."""
    sizes: dict[str, int] = {}
    for tensor in tensors:
        name = DTYPE_NAMES[tensor.dtype]
        sizes[name] = sizes.get(name, 0) + tensor.nbytes
    return sizes


def bytes_of(dense: Mapping[str, tuple[tuple[int, ...], torch.dtype]]) -> int:
    """Return the bytes of tensors given as name -> shape and dtype."""
    return sum(math.prod(shape) * dtype.itemsize for shape, dtype in dense.values())


def versions() -> dict[str, str]:
    """Return the versions that a result depends on."""
    return {
        "moeadapt": __version__,
        "python": platform.python_version(),
        "safetensors": safetensors.__version__,
        "torch": str(torch.__version__),
        "transformers": transformers.__version__,
    }


def compare(
    reference: Sequence[torch.Tensor], found: Sequence[torch.Tensor], dtype: torch.dtype
) -> Measured:
    """Return how far the logits `found` are from `reference`, text by text."""
    differences, divergences, agreements = [], [], []
    for a, b in zip(reference, found, strict=True):
        a, b = a.double().flatten(0, -2), b.double().flatten(0, -2)
        differences.append((a - b).abs())
        log_a, log_b = a.log_softmax(-1), b.log_softmax(-1)
        divergences.append((log_a.exp() * (log_a - log_b)).sum(-1))
        agreements.append(a.argmax(-1) == b.argmax(-1))
    flat = torch.cat([d.flatten() for d in differences])
    kl = torch.cat(divergences)
    return Measured(
        tokens=kl.numel(),
        dtype=str(dtype).removeprefix("torch."),
        largest_logit=max(float(logits.abs().max()) for logits in reference),
        max_logit_difference=float(flat.max()),
        mean_logit_difference=float(flat.mean()),
        kl=max(float(kl.mean()), 0.0),
        argmax_agreement=float(torch.cat(agreements).double().mean()),
    )
