"""Turns a dense checkpoint, its fine-tuned copies or its LoRA adapters into a stock mixture.

Steps: 1. read configurations, headers and texts, choose the target, refuse what cannot be; 2. make
the gates; 3. write tensor by tensor; 4. load the result and compare it with the base; 5. write the
receipt and give the folder its name.

Letters: D hidden width, E experts, N copies of the FFN, G parts of each.

Source: Komatsuzaki et al. 2023 (Sparse Upcycling), https://arxiv.org/abs/2212.05055, for copies;
Sukhbaatar et al. 2024 (Branch-Train-MiX), https://arxiv.org/abs/2403.07816, section 2.2, for
several checkpoints: FFNs become experts, the rest is averaged. See `variants` for what changes an
FFN.
"""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from moeadapt.embedded import resolve_model
from moeadapt.errors import ConfigError
from moeadapt.export import gates
from moeadapt.export.adapted_source import open_variant
from moeadapt.export.dense import ffn_pieces, whole_strides
from moeadapt.export.engines import Verdict, check_engines
from moeadapt.export.gate_settings import GateSettings, read_gate_settings
from moeadapt.export.progress import byte_progress
from moeadapt.export.receipt import RECEIPT, Measured, Receipt, bytes_by_dtype, bytes_of
from moeadapt.export.shards import plan
from moeadapt.export.source import Source, open_source
from moeadapt.export.targets import MoeShape, Target, find_target
from moeadapt.export.upcycle_check import (
    compare_copies,
    dense_model,
    promised,
    require_copies,
)
from moeadapt.export.upcycle_job import Job
from moeadapt.export.variants import Variation
from moeadapt.export.writer import DEFAULT_SHARD_BYTES, CheckpointWriter


def upcycle(
    base: str | Path | PreTrainedModel,
    out_dir: str | Path,
    num_experts: int | None = None,
    top_k: int = 2,
    target: str = "auto",
    *,
    sources: Sequence[str | Path] = (),
    noise: float = 0.0,
    drop: float = 0.0,
    granularity: int = 1,
    gate_init: str = "random",
    gate_texts: Any = None,
    gate_std: float | None = None,
    norm_topk: bool = True,
    untie: bool = False,
    engines: Iterable[str] = (),
    dtype: torch.dtype | None = None,
    seed: int = 0,
    verify: bool = True,
    tolerance: float | None = None,
    max_shard_bytes: int = DEFAULT_SHARD_BYTES,
) -> Receipt:
    """Write a mixture of whole FFNs as a stock checkpoint of transformers, and check it.

    Args:
        base: the dense checkpoint's folder, an `embedded:` name, or a model in memory.
        out_dir: a folder that does not exist yet, or is empty.
        num_experts: copies of the FFN, at least 2; the number of `sources` if they are given. On
            disk it is `granularity` times as many.
        top_k: copies used per token, in [1, num_experts]; with 1 and `norm_topk` the weight is
            always 1, and the router never learns.
        target: a key of `EXPORTERS`, or `"auto"`.
        sources: one folder or `embedded:` name per expert, each a fine-tuned copy of `base` or a
            plain LoRA adapter of it. What is not FFN is averaged over them.
        noise: standard deviation of noise on every expert, over that of the matrix, at least 0.
        drop: share of hidden units drawn anew in every expert, in [0, 1].
        granularity: experts that each copy is cut into, at least 1; divides the FFN's width.
        gate_init: `"random"`, `"hidden"` or `"kmeans"`.
        gate_texts: for hidden a list of prompts per copy, for kmeans one list; each a string, or
            token ids [tokens] as a list or tensor of int. A model in memory takes ids only.
        gate_std: standard deviation of random router rows, above 0; None: 0.02. Only for random.
        norm_topk: whether a token's weights sum to 1; without it copies are not the base.
        untie: write the output head as its own tensor where the base shares it.
        engines: where it must run: transformers, vllm, sglang, llama.cpp.
        dtype: on disk; that of the base if None.
        seed: of everything random.
        verify: load the result and compare it with the base; needs room for one model in float32,
            for a model in memory in its dtype and on its device.
        tolerance: largest logit difference, at least 0, where the experts are copies and verified;
            None: 1e-4, or 1e-5 of the largest logit if that is more.
        max_shard_bytes: largest file, unless one tensor is larger.

    Returns:
        The receipt, also written to `export_receipt.json`.

    Raises:
        ConfigError: a setting is out of range or without effect, a folder or text is not what it
            should be, the output is occupied or the disk too full.
        UnsupportedError: no class holds such a mixture of this base, or an engine would be wrong.
        ExportError: the result does not load, is not the base where it should be, or the disk does
            not take it.
        AssetError: an `embedded:` model cannot be had.

    Example:
        >>> moeadapt.upcycle("Qwen3-0.6B", "qwen3-moe", num_experts=4, top_k=2)
    """
    dense = open_source(base)
    experts = [open_variant(dense, _resolved(folder)) for folder in sources]
    copies = _count(num_experts, len(experts))
    variation = Variation(noise=noise, drop=drop, granularity=granularity)
    if not 1 <= top_k <= copies:
        raise ConfigError(f"top_k={top_k}: in [1, num_experts={copies}]")
    exact = variation.is_exact and not experts and norm_topk
    _check_tolerance(tolerance, verify=verify, exact=exact)
    chosen = _target(dense, target, copies, top_k, variation, norm_topk=norm_topk, untie=untie)
    found = check_engines(chosen, engines)
    first = read_gate_settings(dense, copies, gate_init, gate_texts, gate_std)
    job = Job(dense, experts or [dense] * copies, chosen, variation, seed)
    tensors = plan(chosen, dense.tensors(), dtype)
    # before the gates, which take a while, so that an occupied place is told first
    writer = CheckpointWriter(out_dir, tensors, max_shard_bytes)
    rows = _gates(base, job, first, copies)
    with writer:
        with byte_progress("upcycle", writer.nbytes) as progress:
            for count in job.write(writer, rows):
                progress.add(count)
        _write_config(writer, chosen, tensors)
        if dense.folder is not None:
            writer.copy_companions(dense.folder)
        writer.complete()
        measured = compare_copies(base, job, writer.folder) if verify else None
        allowed = None
        if measured is not None and exact:
            allowed = promised(measured, tolerance, dense.tensors(), dtype)
            require_copies(measured, allowed)
        settings = {
            **{"noise": noise, "drop": drop, "granularity": granularity, "seed": seed},
            **{"gate_init": gate_init, "gate_std": first.std, "norm_topk": norm_topk},
            **{"untie": untie, "sources": [str(folder) for folder in sources]},
        }
        receipt = _receipt(job, settings, found, measured, allowed, writer, tensors)
        writer.write_json(RECEIPT, receipt.to_dict())
        writer.finish()
    return receipt


def _resolved(folder: str | Path) -> str | Path:
    return resolve_model(folder) if isinstance(folder, str) else folder


def _check_tolerance(tolerance: float | None, *, verify: bool, exact: bool) -> None:
    if tolerance is None:
        return
    if not 0 <= tolerance < float("inf"):
        raise ConfigError(f"tolerance={tolerance}: at least 0 and finite, in logits")
    if not verify:
        raise ConfigError(
            f"tolerance={tolerance} has no effect with verify=False; leave one of them out"
        )
    if not exact:
        raise ConfigError(
            f"tolerance={tolerance} has no effect with sources, noise, drop or norm_topk=False: "
            "such a mixture is not its base, and no difference is refused; leave it out"
        )


def _count(num_experts: int | None, given: int) -> int:
    if num_experts is None:
        num_experts = given
    if given and num_experts != given:
        raise ConfigError(
            f"num_experts={num_experts} for {given} sources: each is one expert; name the base "
            "itself among them for an unchanged one"
        )
    if num_experts < 2:  # noqa: PLR2004
        raise ConfigError(f"num_experts={num_experts}: at least 2 make a mixture")
    return num_experts


def _target(
    dense: Source,
    name: str,
    copies: int,
    top_k: int,
    variation: Variation,
    *,
    norm_topk: bool,
    untie: bool,
) -> Target:
    cls, parts = find_target(name, dense.config), variation.granularity
    width = dense.tensors()[ffn_pieces(dense.config, 0).down.name][0][1]
    if width % parts:
        raise ConfigError(f"granularity={parts} does not divide the FFN's width {width}")
    shape = MoeShape(
        num_experts=copies * parts,
        top_k=top_k * parts,
        expert_width=whole_strides(width // parts),
        norm_topk=norm_topk,
        untie=untie,
    )
    return cls(dense.config, shape)


def _gates(
    base: str | Path | PreTrainedModel, job: Job, first: GateSettings, copies: int
) -> dict[int, Tensor]:
    if first.std is not None:
        width = job.target.dense.hidden_size
        return gates.random_gates(job.target.moe_layers(), copies, width, first.std, job.seed)
    model = dense_model(base, job, None)
    if first.init == "hidden":
        return gates.hidden_gates(model, first.ids)
    return gates.kmeans_gates(model, first.ids[0], copies, job.seed)


def _write_config(writer: CheckpointWriter, target: Target, tensors: list[Any]) -> None:
    config = target.config()
    widest = max(tensors, key=lambda tensor: tensor.nbytes).dtype
    config.dtype = widest
    writer.write_json("config.json", {**config.to_dict(), **target.json_fields()})


def _receipt(
    job: Job,
    settings: dict[str, Any],
    engines: list[Verdict],
    measured: Measured | None,
    tolerance: float | None,
    writer: CheckpointWriter,
    tensors: list[Any],
) -> Receipt:
    sources = [job.dense, *(e for e in dict.fromkeys(job.experts) if e is not job.dense)]
    return Receipt(
        kind="upcycle",
        target=job.target.name,
        base_type=job.target.dense.model_type,
        num_experts=job.target.shape.num_experts,
        top_k=job.target.shape.top_k,
        settings=settings,
        source_sha256={
            "base" if i == 0 else f"expert {i - 1}": source.fingerprint()
            for i, source in enumerate(sources)
        },
        dtype=bytes_by_dtype(tensors),
        bytes_on_disk=writer.nbytes,
        base_bytes=bytes_of(job.dense.tensors()),
        engines=tuple(engines),
        measured=measured,
        tolerance=tolerance,
    )
