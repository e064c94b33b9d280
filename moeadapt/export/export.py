"""Writes a trained mixture as a stock checkpoint that loads without moeadapt, and checks it.

Steps: 1. refuse what no stock class computes; 2. choose the class and check the engines; 3. write
tensor by tensor; 4. load the result and compare it with the adapter; 5. write the receipt and give
the folder its name.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor

from moeadapt.errors import ConfigError
from moeadapt.export.choice import BIASES, choose_target
from moeadapt.export.engines import Verdict
from moeadapt.export.mixture import Mixture
from moeadapt.export.parity import Checked, check_parity
from moeadapt.export.progress import byte_progress
from moeadapt.export.receipt import RECEIPT, Receipt, bytes_by_dtype, bytes_of
from moeadapt.export.refusals import active_adapter
from moeadapt.export.shards import DTYPE_NAMES, common_dtype, plan
from moeadapt.export.targets import Target
from moeadapt.export.verify import probe_ids
from moeadapt.export.writer import DEFAULT_SHARD_BYTES, CheckpointWriter
from moeadapt.routers import ROUTERS


def export(
    model: PeftModel,
    out_dir: str | Path,
    target: str = "auto",
    engines: Iterable[str] = ("transformers",),
    dtype: torch.dtype | None = None,
    probe: Sequence[Any] | None = None,
    tolerance: float | None = None,
    *,
    untie: bool = False,
    verify: bool = True,
    tokenizer: Any = None,
    max_shard_bytes: int = DEFAULT_SHARD_BYTES,
) -> Receipt:
    """Write the active adapter and its base as one stock mixture of experts.

    Args:
        model: a PeftModel whose adapter has placement `ffn` or `glu`; it stays as it is.
        out_dir: a folder that does not exist yet, or is empty.
        target: a key of `EXPORTERS`, or `"auto"`.
        engines: where it must run: transformers, vllm, sglang, llama.cpp.
        dtype: on disk; that of the base if None.
        probe: texts as token ids, to compare the models on; random ids if None.
        tolerance: largest allowed logit difference; None: 1e-4, or 1e-5 of the largest logit if
            that is more, where base and checkpoint are float32, and no promise otherwise.
        untie: write the output head as its own tensor where the base shares it.
        verify: load the result on the base's device and compare; needs room for both models.
        tokenizer: is saved along; without it, the files of a base that is a local folder.
        max_shard_bytes: largest file, unless one tensor is larger.

    Returns:
        The receipt, also written to `export_receipt.json`.

    Raises:
        ConfigError: a setting is out of range, the output is occupied or the disk too full.
        UnsupportedError: no stock class computes this mixture, or an engine would be wrong; says
            why and what works.
        ExportError: the result does not load, or is not the adapter; nothing is left behind.

    Example:
        >>> moeadapt.export(model, "my-mixtral", engines=["transformers", "vllm"])
    """
    if not verify and (probe is not None or tolerance is not None):
        raise ConfigError("probe and tolerance say how to compare, and verify=False does not")
    adapter = active_adapter(model)
    mode = model.training
    model.eval()
    try:
        mixture = Mixture(model, _folder(model.peft_config[adapter].base_model_name_or_path))
        chosen, found = choose_target(mixture, target, list(engines), untie=untie)
        ids = _probe(probe, chosen)
        tensors = plan(chosen, mixture.source.tensors(), dtype)
        with CheckpointWriter(out_dir, tensors, max_shard_bytes) as writer:
            with byte_progress("export", writer.nbytes) as progress:
                for count in _write(mixture, chosen, writer):
                    progress.add(count)
            _write_files(model, mixture, chosen, writer, tensors, tokenizer)
            writer.complete()
            checked = Checked()
            if verify:
                checked = check_parity(model, mixture, writer.folder, ids, tensors, tolerance)
            receipt = _receipt(mixture, chosen, found, checked, writer, tensors)
            writer.write_json(RECEIPT, receipt.to_dict())
            writer.finish()
    finally:
        model.train(mode)
    return receipt


def _folder(name: str | None) -> Path | None:
    return Path(name) if name and Path(name).is_dir() else None


def _probe(probe: Sequence[Any] | None, target: Target) -> list[Tensor]:
    if probe is None:
        return probe_ids(target.dense.vocab_size, target.dense.max_position_embeddings)
    if isinstance(probe, str) or any(isinstance(text, str) for text in probe) or not len(probe):
        raise ConfigError("probe: texts as token ids, for example tokenizer(text)['input_ids']")
    ids = [torch.as_tensor(text, dtype=torch.long).reshape(-1) for text in probe]
    if any(text.numel() == 0 for text in ids):
        raise ConfigError("probe: a text has no tokens")
    return ids


def _write(mixture: Mixture, target: Target, writer: CheckpointWriter) -> Iterator[int]:
    """Write every tensor; yield the bytes of each."""
    source = mixture.source
    for name in source.tensors():
        for copy in target.copies(name):
            yield writer.write(copy.name, source.read(name, copy.rows))
    for layer in target.moe_layers():
        yield writer.write_matrix(target.router(layer), mixture.gate(layer))
        bias = mixture.selection_bias(layer)
        for fill in target.fills(layer):
            value = torch.full(fill.shape, fill.value)
            if bias is not None and fill.name.endswith(BIASES):
                value = bias.reshape(fill.shape)
            yield writer.write(fill.name, value)
        base = mixture.base_ffn(layer)
        for expert in range(mixture.num_experts):
            matrices = mixture.expert(layer, expert, base)
            for place, matrix in zip(target.expert(layer, expert), matrices, strict=True):
                yield writer.write_matrix(place, matrix)
        places = target.shared(layer) if mixture.additive else None
        if places is not None:
            always = mixture.shared(layer, base, target.shape.shared_width)
            always = replace(always, down=always.down * target.shared_down_scale)
            for place, matrix in zip(places, always, strict=True):
                yield writer.write_matrix(place, matrix)


def _write_files(
    model: PeftModel,
    mixture: Mixture,
    target: Target,
    writer: CheckpointWriter,
    tensors: list[Any],
    tokenizer: Any,
) -> None:
    config = target.config()
    config.dtype = max(tensors, key=lambda tensor: tensor.nbytes).dtype
    writer.write_json("config.json", {**config.to_dict(), **target.json_fields()})
    if mixture.source.folder is not None:
        writer.copy_companions(mixture.source.folder)
    if tokenizer is not None:
        tokenizer.save_pretrained(str(writer.folder))
    settings: Any = getattr(model.get_base_model(), "generation_config", None)
    if settings is not None:
        settings.save_pretrained(str(writer.folder))


def _receipt(
    mixture: Mixture,
    target: Target,
    engines: list[Verdict],
    checked: Checked,
    writer: CheckpointWriter,
    tensors: list[Any],
) -> Receipt:
    config, dense = mixture.config, mixture.source.tensors()
    shape = target.shape
    first: Any = mixture.routers[mixture.moe_layers[0]]
    return Receipt(
        kind="export",
        target=target.name,
        base_type=target.dense.model_type,
        num_experts=shape.num_experts,
        top_k=shape.top_k,
        settings={
            "adapter": mixture.adapter,
            "base": config.base_model_name_or_path,
            "base_dtype": DTYPE_NAMES[common_dtype(dense)],
            "dense_layers": list(shape.dense_layers),
            "expert_width": shape.expert_width,
            "granularity": config.granularity,
            "float64_difference": checked.float64_difference,
            "logit_difference": {n: m.max_logit_difference for n, m in checked.measured.items()},
            "merged_linears": mixture.merged_linears,
            "n_shared": config.n_shared,
            "norm_topk": shape.norm_topk,
            "null_experts": mixture.rule.null_experts,
            "placement": config.placement,
            "router": ROUTERS.name_of(config.router_config),
            "shared_width": shape.shared_width,
            "temperature": getattr(first, "temperature", 1.0),
            "untie": shape.untie,
        },
        source_sha256={"base": mixture.source.fingerprint(), "adapter": mixture.fingerprint()},
        dtype=bytes_by_dtype(tensors),
        bytes_on_disk=writer.nbytes,
        base_bytes=bytes_of(dense),
        engines=tuple(engines),
        measured=checked.worst,
        tolerance=checked.allowed,
    )
