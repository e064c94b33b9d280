"""The base model of a mixture as a second module tree over the same tensors, and LoRA on it.

Nothing of the base is copied, so a mixture and a plain LoRA can be compared in one process.

Letters: D in, O out, R rank.
"""

import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from peft import LoraConfig, PeftModel, get_peft_model, set_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import get_peft_model_state_dict
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from moeadapt.errors import ConfigError
from moeadapt.hidden_folder import new_folder
from moeadapt.tuner.adapter_layer import PREFIX
from moeadapt.tuner.block import Block
from moeadapt.tuner.config import MoeLoraConfig
from moeadapt.tuner.context import detach_context, remove_hooks
from moeadapt.tuner.inspect import require_context
from moeadapt.tuner.layer import MoeLoraLinear


@dataclass(frozen=True, kw_only=True)
class Pair:
    """What a LoRA of scale 1 adds to one linear: `b @ a`."""

    a: Float[Tensor, "R D"]
    b: Float[Tensor, "O R"]

    @property
    def rank(self) -> int:
        """R."""
        return self.a.shape[0]


def adapter_layers(model: nn.Module, adapter: str = "default") -> dict[str, MoeLoraLinear]:
    """Return the target linears of `adapter` by their path in the base model.

    Raises:
        ConfigError: the model has no such adapter.
    """
    require_context(model)
    layers = {
        m.moe_plans[adapter].key: m
        for m in model.modules()
        if isinstance(m, MoeLoraLinear) and adapter in m.moe_banks
    }
    if not layers:
        raise ConfigError(f"the model has no moeadapt adapter {adapter!r}")
    return layers


def adapter_config(model: nn.Module, adapter: str = "default") -> MoeLoraConfig:
    """Return the settings of `adapter`.

    Raises:
        ConfigError: the model has no such adapter, or is no PEFT model.
    """
    adapter_layers(model, adapter)
    configs: Any = getattr(model, "peft_config", {})
    if not isinstance(model, PeftModel) or adapter not in configs:
        raise ConfigError(
            f"adapter {adapter!r} sits in a {type(model).__name__}; give the PeftModel that "
            "get_peft_model or PeftModel.from_pretrained returned, without other wrappers"
        )
    return configs[adapter]


def shared_base(model: PeftModel) -> nn.Module:
    """Return the base model without adapters, over the same parameters and buffers."""
    base = model.get_base_model()
    tensors = [*base.parameters(), *base.buffers()]
    bare = copy.deepcopy(base, {id(tensor): tensor for tensor in tensors})
    remove_hooks(bare, Block)
    detach_context(bare)
    for name, module in list(bare.named_modules()):
        inner, (parent, _, child) = _inside(module), name.rpartition(".")
        # What lay inside a wrapper that is gone is not put back.
        if inner is not None and getattr(bare.get_submodule(parent), child, None) is module:
            setattr(bare.get_submodule(parent), child, inner)
    for leftover in ("peft_config", "_hf_peft_config_loaded"):
        vars(bare).pop(leftover, None)
    return bare


def _inside(module: nn.Module) -> Any:
    if isinstance(module, BaseTunerLayer):
        return module.get_base_layer()
    return module.original_module if isinstance(module, AuxiliaryTrainingWrapper) else None


def plain_lora(
    model: PeftModel,
    pairs: Mapping[str, Pair],
    *,
    adapter: str = "default",
) -> PeftModel:
    """Return an ordinary PEFT LoRA of scale 1 on the base of `model`, whose tensors it shares.

    What `adapter` trains in full (`modules_to_save`, tokens) comes along.

    Args:
        model: a PEFT model with a mixture.
        pairs: path of a target linear -> what is added to it.
        adapter: the mixture that the settings are taken from.
    """
    flags = {id(p): p.requires_grad for p in model.parameters()}
    base = shared_base(model)
    config = _lora_config(adapter_config(model, adapter), base, pairs)
    with torch.random.fork_rng(devices=[]):
        lora = get_peft_model(base, config)
    for parameter in model.parameters():
        parameter.requires_grad_(flags[id(parameter)])
    lora.peft_config["default"].base_model_name_or_path = config.base_model_name_or_path
    rest = get_peft_model_state_dict(model, adapter_name=adapter, save_embedding_layers=False)
    rest = {name: tensor for name, tensor in rest.items() if f".{PREFIX}" not in name}
    if rest:
        set_peft_model_state_dict(lora, {k: v.detach().clone() for k, v in rest.items()})
    with torch.no_grad():
        for key, pair in pairs.items():
            layer: Any = lora.get_base_model().get_submodule(key)
            layer.lora_A["default"].weight.copy_(pair.a)
            layer.lora_B["default"].weight.copy_(pair.b)
    return lora.eval()


def _lora_config(moe: MoeLoraConfig, base: nn.Module, pairs: Mapping[str, Pair]) -> LoraConfig:
    rank = max(pair.rank for pair in pairs.values())
    # Alpha follows the rank, so the scale is 1 also for a reader that ignores the patterns.
    ranks = {f"^{key}": pair.rank for key, pair in pairs.items() if pair.rank != rank}
    return LoraConfig(
        task_type=moe.task_type,
        base_model_name_or_path=moe.base_model_name_or_path,
        revision=moe.revision,
        r=rank,
        lora_alpha=rank,
        rank_pattern=ranks,
        alpha_pattern=dict(ranks),
        target_modules=_targets(base, pairs),
        fan_in_fan_out=any(isinstance(base.get_submodule(key), Conv1D) for key in pairs),
        modules_to_save=moe.modules_to_save,
        trainable_token_indices=moe.trainable_token_indices,
    )


def _targets(base: nn.Module, pairs: Mapping[str, Pair]) -> list[str]:
    """Return the last parts of the names where they say the same, since engines read those."""
    short = {key.rpartition(".")[2] for key in pairs}
    hit = {name for name, _ in base.named_modules() if name.rpartition(".")[2] in short}
    return sorted(short if hit == set(pairs) else pairs)


def save_plain(lora: PeftModel, out: Path) -> None:
    """Write a plain LoRA into the folder `out`, as PEFT does.

    Raises:
        ConfigError, ExportError: see `new_folder`.
    """
    need = sum(p.numel() * p.element_size() for p in _own(lora))
    with new_folder(out, need) as folder:
        lora.save_pretrained(str(folder), save_embedding_layers=False)


def _own(lora: PeftModel) -> Iterator[Tensor]:
    yield from get_peft_model_state_dict(lora, save_embedding_layers=False).values()
