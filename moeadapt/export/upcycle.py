"""Turns a dense checkpoint, its fine-tuned copies or its LoRA adapters into a stock mixture.

Steps: 1. read configurations and headers, choose the target, refuse what cannot be; 2. make the
gates; 3. write tensor by tensor; 4. load the result and compare it with the base; 5. write the
receipt and give the folder its name.

Letters: D hidden width, E experts, N copies of the FFN, G parts of each.

Source: Komatsuzaki et al. 2023 (Sparse Upcycling), https://arxiv.org/abs/2212.05055, for copies;
Sukhbaatar et al. 2024 (Branch-Train-MiX), https://arxiv.org/abs/2403.07816, section 2.2, for
several checkpoints: FFNs become experts, the rest is averaged. See `variants` for what changes an
FFN.
"""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from moeadapt.errors import ConfigError, ExportError, did_you_mean
from moeadapt.export import gates
from moeadapt.export.adapted_source import open_variant
from moeadapt.export.dense import ffn_pieces
from moeadapt.export.engines import Verdict, check_engines
from moeadapt.export.progress import byte_progress
from moeadapt.export.receipt import RECEIPT, Measured, Receipt, compare
from moeadapt.export.shards import DTYPE_NAMES, plan
from moeadapt.export.source import Source, open_source
from moeadapt.export.targets import MoeShape, Target, find_target
from moeadapt.export.upcycle_job import Job
from moeadapt.export.variants import Variation
from moeadapt.export.verify import load_strictly, logits_of, probe_ids
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
    gate_std: float = 0.02,
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
        base: the dense checkpoint's folder, or a model in memory.
        out_dir: a folder that does not exist yet, or is empty.
        num_experts: copies of the FFN, at least 2; the number of `sources` if they are given. On
            disk it is `granularity` times as many.
        top_k: copies used per token, in [1, num_experts]; with 1 and `norm_topk` the weight is
            always 1, and the router never learns.
        target: a key of `EXPORTERS`, or `"auto"`.
        sources: one folder per expert, each a fine-tuned copy of `base` or a plain LoRA adapter of
            it. What is not FFN is averaged over them.
        noise: standard deviation of noise on every expert, over that of the matrix, at least 0.
        drop: share of hidden units drawn anew in every expert, in [0, 1].
        granularity: experts that each copy is cut into, at least 1; divides the FFN's width.
        gate_init: `"random"`, `"hidden"` or `"kmeans"`.
        gate_texts: for hidden a list of prompts per copy, for kmeans one list; each a string, or
            token ids.
        gate_std: standard deviation of random router rows, above 0.
        norm_topk: whether a token's weights sum to 1; without it copies are not the base.
        untie: write the output head as its own tensor where the base shares it.
        engines: where it must run: transformers, vllm, sglang, llama.cpp.
        dtype: on disk; that of the base if None.
        seed: of everything random.
        verify: load the result and compare it with the base; needs room for one model in float32.
        tolerance: largest logit difference in float32 where the experts are copies; None: 1e-4, or
            1e-5 of the largest logit if that is more.
        max_shard_bytes: largest file, unless one tensor is larger.

    Returns:
        The receipt, also written to `export_receipt.json`.

    Raises:
        ConfigError: a setting is out of range, a folder is not what it should be, the output is
            occupied or the disk too full.
        UnsupportedError: no class holds such a mixture of this base, or an engine would be wrong.
        ExportError: the result does not load, or is not the base where it should be.

    Example:
        >>> moeadapt.upcycle("Qwen3-0.6B", "qwen3-moe", num_experts=4, top_k=2)
    """
    dense = open_source(base)
    experts = [open_variant(dense, folder) for folder in sources]
    copies = _count(num_experts, len(experts))
    variation = Variation(noise=noise, drop=drop, granularity=granularity)
    if not 1 <= top_k <= copies:
        raise ConfigError(f"top_k={top_k}: in [1, num_experts={copies}]")
    chosen = _target(dense, target, copies, top_k, variation, norm_topk=norm_topk, untie=untie)
    found = check_engines(chosen, engines)
    ids = _gate_ids(dense, gate_init, gate_texts, copies)
    job = Job(dense, experts or [dense] * copies, chosen, variation, seed)
    tensors = plan(chosen, dense.tensors(), dtype)
    exact = variation.is_exact and not experts and norm_topk
    with CheckpointWriter(out_dir, tensors, max_shard_bytes) as writer:
        rows = _gates(base, job, gate_init, ids, copies, gate_std)
        with byte_progress("upcycle", writer.nbytes) as progress:
            for count in job.write(writer, rows):
                progress.add(count)
        _write_config(writer, chosen, tensors)
        if dense.folder is not None:
            writer.copy_companions(dense.folder)
        writer.complete()
        measured = _compare(base, writer.folder, chosen) if verify else None
        allowed = None
        if measured is not None and exact:
            allowed = measured.float32_tolerance if tolerance is None else tolerance
            _require(measured, allowed)
        settings = {
            **{"noise": noise, "drop": drop, "granularity": granularity, "seed": seed},
            **{"gate_init": gate_init, "gate_std": gate_std, "norm_topk": norm_topk},
            **{"untie": untie, "sources": [str(folder) for folder in sources]},
        }
        receipt = _receipt(job, settings, found, measured, allowed, writer, tensors)
        writer.write_json(RECEIPT, receipt.to_dict())
        writer.finish()
    return receipt


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
        expert_width=width // parts,
        norm_topk=norm_topk,
        untie=untie,
    )
    return cls(dense.config, shape)


def _gate_ids(dense: Source, gate_init: str, texts: Any, copies: int) -> list[Any]:
    """Check `gate_init` and its texts before anything is written; return token ids."""
    if gate_init not in gates.GATE_INITS:
        raise ConfigError(
            f"unknown gate_init {gate_init!r}; one of {list(get_args(gates.GateInit))}"
            f"{did_you_mean(gate_init, gates.GATE_INITS)}"
        )
    if (gate_init == "random") != (texts is None):
        raise ConfigError(f"gate_init={gate_init!r} {'takes no' if texts else 'needs'} gate_texts")
    if texts is None:
        return []
    if gate_init == "kmeans":
        return _encode(dense, texts)
    if len(texts) != copies or any(isinstance(group, str | Tensor) for group in texts):
        raise ConfigError(f"gate_init='hidden' needs {copies} lists of prompts, one per expert")
    return [_encode(dense, group) for group in texts]


def _encode(dense: Source, texts: Sequence[Any]) -> list[Tensor]:
    if all(isinstance(text, Tensor) for text in texts):
        return list(texts)
    if dense.folder is None:
        raise ConfigError("gate_texts of a model in memory must be token ids, not text")
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            dense.folder, trust_remote_code=False, local_files_only=True
        )
    except (OSError, ValueError) as error:
        raise ConfigError(f"{dense.folder} has no tokenizer for gate_texts: {error}") from error
    return [torch.tensor(tokenizer(text)["input_ids"]) for text in texts]


def _dense_model(base: str | Path | PreTrainedModel, dtype: torch.dtype | None) -> PreTrainedModel:
    if isinstance(base, PreTrainedModel):
        return base
    model = AutoModelForCausalLM.from_pretrained(
        base, dtype=dtype or "auto", trust_remote_code=False, local_files_only=True
    )
    return model.eval()


def _gates(
    base: str | Path | PreTrainedModel,
    job: Job,
    gate_init: str,
    ids: list[Any],
    copies: int,
    std: float,
) -> dict[int, Tensor]:
    if gate_init == "random":
        if not 0 < std < float("inf"):
            raise ConfigError(f"gate_std={std}: above 0; equal rows send all tokens one way")
        width = job.target.dense.hidden_size
        return gates.random_gates(job.target.moe_layers(), copies, width, std, job.seed)
    model = _dense_model(base, None)
    if gate_init == "hidden":
        return gates.hidden_gates(model, ids)
    return gates.kmeans_gates(model, ids, copies, job.seed)


def _write_config(writer: CheckpointWriter, target: Target, tensors: list[Any]) -> None:
    config = target.config()
    widest = max(tensors, key=lambda tensor: tensor.nbytes).dtype
    config.dtype = widest
    writer.write_json("config.json", {**config.to_dict(), **target.json_fields()})


def _compare(base: str | Path | PreTrainedModel, folder: Path, target: Target) -> Measured:
    ids = probe_ids(target.dense.vocab_size, target.dense.max_position_embeddings)
    if isinstance(base, PreTrainedModel):
        dtype, mode = next(base.parameters()).dtype, base.training
        reference = logits_of(base.eval(), ids)
        base.train(mode)
    else:
        dtype = torch.float32
        reference = logits_of(_dense_model(base, dtype), ids)
    return compare(reference, logits_of(load_strictly(folder, dtype), ids), dtype)


def _require(measured: Measured, tolerance: float) -> None:
    if not measured.max_logit_difference <= tolerance:
        raise ExportError(
            f"the copies are not the base: logits differ by {measured.max_logit_difference:.1e} in "
            f"{measured.dtype}, allowed {tolerance:.1e}"
        )


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
    sizes: dict[str, int] = {}
    for tensor in tensors:
        name = DTYPE_NAMES[tensor.dtype]
        sizes[name] = sizes.get(name, 0) + tensor.nbytes
    base = job.dense.tensors().values()
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
        dtype=sizes,
        bytes_on_disk=writer.nbytes,
        base_bytes=sum(torch.Size(shape).numel() * kind.itemsize for shape, kind in base),
        engines=tuple(engines),
        measured=measured,
        tolerance=tolerance,
    )
