"""What `all-linear` of a plain LoRA means on a stock mixture: attention, routers and experts.

Letters: E experts.
"""

import copy
from typing import Any

from peft import LoraConfig, PeftConfig
from torch import nn
from transformers.pytorch_utils import Conv1D

STACKED = 3
"""Axes of the parameter that holds one matrix of all experts."""


def fit_to_stock_moe(config: PeftConfig, model: nn.Module) -> PeftConfig:
    """Return `config` with the targets that `all-linear` stands for on a mixture's class.

    transformers keeps the experts of a layer in stacked parameters, and most routers in modules
    that are no `nn.Linear`; PEFT's own `all-linear` reaches those of some classes alone. Shared
    experts are left out: an upcycled checkpoint has them empty, or holding the base.

    Any other config, one that names its targets, and a dense model give back `config` itself.
    """
    if not isinstance(config, LoraConfig) or config.target_parameters:
        return config
    if not isinstance(config.target_modules, str) or config.target_modules != "all-linear":
        return config
    stacks = {
        name: parameter.shape[0]
        for name, parameter in model.named_parameters()
        if parameter.dim() == STACKED and name.split(".")[-2] == "experts"
    }
    if not stacks:
        return config
    blocks = {name.rsplit(".", 2)[0]: count for name, count in stacks.items()}
    modules, parameters = _outside(model, tuple(f"{block}." for block in blocks)), set(stacks)
    for block, count in blocks.items():
        name, module = _router(model.get_submodule(block), count)
        if isinstance(module, nn.Linear):
            modules.append(f"{block}.{name}")
        else:
            parameters.add(f"{block}.{name}.weight")
    fitted = copy.deepcopy(config)
    fitted.target_modules = set(modules)
    fitted.target_parameters = sorted({_below_layer(name) for name in parameters})
    return fitted


def _outside(model: nn.Module, blocks: tuple[str, ...]) -> list[str]:
    head: Any = getattr(model, "get_output_embeddings", lambda: None)()
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | Conv1D)
        and module is not head
        and not name.startswith(blocks)
    ]


def _router(block: nn.Module, num_experts: int) -> tuple[str, nn.Module]:
    """Return the module of `block` whose weight has a row per expert."""
    return next(
        (name, module)
        for name, module in block.named_modules()
        if getattr(getattr(module, "weight", None), "ndim", 0) == 2  # noqa: PLR2004
        and len(module.weight) == num_experts  # type: ignore[arg-type]
        and "shared" not in name
    )


def _below_layer(name: str) -> str:
    """Return the part of a parameter's name that is the same in every layer."""
    parts = name.split(".")
    number = max(i for i, part in enumerate(parts) if part.isdigit())
    return ".".join(parts[number + 1 :])
