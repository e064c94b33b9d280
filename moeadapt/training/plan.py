"""What a recipe will cost, counted on a model without weights."""

from dataclasses import asdict, dataclass
from typing import Any

from peft import get_peft_model
from peft.tuners.lora.layer import ParamWrapper
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from moeadapt.training.base_model import empty_base
from moeadapt.training.recipe import Recipe
from moeadapt.training.stock_moe import fit_to_stock_moe
from moeadapt.tuner.context import find_context
from moeadapt.tuner.layer import MoeLoraLinear

_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "auto": 2}
_GIB = 2**30


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The costs of a run.

    Attributes:
        base: parameters of the base model.
        trainable: parameters that are trained.
        active: trained parameters that one token uses: the chosen experts, and the routers.
        targets: target linears; of an upcycled base also routers and stacks of experts.
        routers: routers of the adapter.
        adapter_bytes: size of the saved adapter, in bytes.
        memory_bytes: estimate of weights, gradients and optimizer state, in bytes; activations
            come on top and depend on the batch.
    """

    base: int
    trainable: int
    active: int
    targets: int
    routers: int
    adapter_bytes: int
    memory_bytes: int

    def to_dict(self) -> dict[str, int]:
        """Return plain data."""
        return asdict(self)

    def rows(self) -> list[tuple[str, str]]:
        """Return label and value of each line of a table."""
        share = self.trainable / max(self.base, 1)
        return [
            ("base parameters", f"{self.base:,}"),
            ("trainable parameters", f"{self.trainable:,} ({share:.2%} of the base)"),
            ("active per token", f"{self.active:,}"),
            ("target linears", f"{self.targets:,}"),
            ("routers", f"{self.routers:,}"),
            ("adapter file", f"{self.adapter_bytes / 2**20:.1f} MiB"),
            ("memory without activations", f"{self.memory_bytes / _GIB:.2f} GiB (estimate)"),
        ]


def plan_recipe(recipe: Recipe, *, offline: bool = False) -> Plan:
    """Build the recipe's model without weights, inject the adapter, and count.

    Args:
        recipe: the run.
        offline: read nothing from the network.

    Raises:
        AssetError: the base model's configuration cannot be read.
        ConfigError: the targets do not exist in the base model.
    """
    return plan_model(empty_base(recipe.run, recipe.objective, offline=offline), recipe)


def plan_model(model: nn.Module, recipe: Recipe) -> Plan:
    """Count on `model`, which may be on the meta device; it gets the adapter."""
    base = sum(p.numel() for p in model.parameters())
    adapter = fit_to_stock_moe(recipe.adapter, model)
    with recipe.naming_targets():
        peft_model: Any = get_peft_model(model, adapter, low_cpu_mem_usage=True)  # type: ignore[arg-type]
    trainable = sum(p.numel() for p in peft_model.parameters() if p.requires_grad)
    layers = [m for m in peft_model.modules() if isinstance(m, BaseTunerLayer)]
    context = find_context(peft_model)
    heads = {} if context is None else context.heads.get("default", {})
    idle = sum(_idle(layer) for layer in layers if isinstance(layer, MoeLoraLinear))
    idle += _idle_stacked(peft_model)
    run = recipe.run
    weight_bytes = 0.5625 if run.load_in_4bit else 1 if run.load_in_8bit else _BYTES[run.dtype]
    # Trained weights are float32, with a gradient and Adam's two moments.
    return Plan(
        base=base,
        trainable=trainable,
        active=trainable - idle,
        targets=len(layers),
        routers=len(heads),
        adapter_bytes=4 * trainable,
        memory_bytes=int(base * weight_bytes) + 16 * trainable,
    )


def _idle_stacked(model: Any) -> int:
    """LoRA parameters of a stock mixture's experts that one token leaves unused."""
    layers = [m for m in model.modules() if isinstance(m, ParamWrapper) and m.num_experts > 1]
    if not layers:
        return 0
    active = model.config.num_experts_per_tok
    return sum(
        sum(p.numel() for p in (*layer.lora_A.parameters(), *layer.lora_B.parameters()))
        * (layer.num_experts - active)
        // layer.num_experts
        for layer in layers
    )


def _idle(layer: MoeLoraLinear) -> int:
    """Expert parameters of the layer that one token leaves unused, at least."""
    bank, block = layer.moe_banks["default"], layer.moe_blocks.get("default")
    owner = layer if block is None else block.owners["default"]
    if "default" not in owner.moe_heads:
        return 0
    unused = bank.size.num_experts - owner.moe_heads["default"].router.max_active
    per_expert = sum(bank.factor(name).weight.numel() for name in bank.factor_names)
    return per_expert * unused // bank.size.total_experts
