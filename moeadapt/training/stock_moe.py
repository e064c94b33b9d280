"""What `all-linear` of a plain LoRA means on a stock mixture: attention, routers and experts.

Letters: E experts.
"""

import copy
from typing import Any

from peft import LoraConfig, PeftConfig
from peft.tuners.tuners_utils import check_target_module_exists
from torch import nn
from transformers.pytorch_utils import Conv1D

from moeadapt.errors import ConfigError

STACKED = 3
"""Axes of the parameter that holds one matrix of all experts."""

SHARED = "shared"
"""In the name of the modules beside the experts that every token uses."""


def stacked_experts(model: nn.Module) -> dict[str, int]:
    """Return the parameters that hold a matrix of every expert, and E."""
    return {
        name: parameter.shape[0]
        for name, parameter in model.named_parameters()
        if parameter.dim() == STACKED and name.split(".")[-2] == "experts"
    }


def fit_to_stock_moe(config: PeftConfig, model: nn.Module) -> PeftConfig:
    """Return `config` with the targets that `all-linear` stands for on a mixture's class.

    transformers keeps the experts of a layer in stacked parameters, and most routers in modules
    that are no `nn.Linear`; PEFT's own `all-linear` reaches those of some classes alone. Shared
    experts are left out: an upcycled checkpoint has them empty, or holding the base.

    Any other config, one that names its targets, and a dense model give back `config` itself.

    Raises:
        ConfigError: the config has dropout, which PEFT does not have for stacked parameters; or a
            layer of experts has no router that could be found.
    """
    if not isinstance(config, LoraConfig) or config.target_parameters:
        return config
    if config.target_modules != "all-linear":
        return config
    stacks = stacked_experts(model)
    if not stacks:
        return config
    if config.lora_dropout:
        raise ConfigError(
            f"lora_dropout={config.lora_dropout}: PEFT has no dropout for the stacked experts of "
            f"{type(model).__name__}; leave it out, or name target_modules without experts"
        )
    blocks = {name.rsplit(".", 2)[0]: count for name, count in stacks.items()}
    modules, parameters = _outside(model, tuple(f"{block}." for block in blocks)), set(stacks)
    for block, count in blocks.items():
        name, module = _router(model, block, count)
        if isinstance(module, nn.Linear):
            modules.append(name)
        else:
            parameters.add(f"{name}.weight")
    fitted = copy.deepcopy(config)
    fitted.target_modules = [name for name in modules if not _excluded(config, name)]
    kept = {name for name in parameters if not _excluded(config, name, name.rpartition(".")[0])}
    fitted.target_parameters = sorted({_below_layer(name) for name in kept}) or None
    fitted.exclude_modules = None
    return fitted


def _outside(model: nn.Module, blocks: tuple[str, ...]) -> list[str]:
    head: Any = getattr(model, "get_output_embeddings", lambda: None)()
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | Conv1D)
        and module is not head
        and not name.startswith(blocks)
        and SHARED not in name
    ]


def _router(model: nn.Module, block: str, num_experts: int) -> tuple[str, nn.Module]:
    """Return the module of `block` whose weight has a row per expert."""
    for name, module in model.get_submodule(block).named_modules():
        shape = getattr(getattr(module, "weight", None), "shape", ())
        if len(shape) == 2 and shape[0] == num_experts and SHARED not in name:  # noqa: PLR2004
            return f"{block}.{name}", module
    raise ConfigError(
        f"{block} of {type(model).__name__} has {num_experts} experts and no router with a row for "
        "each; name target_modules and target_parameters yourself"
    )


def _excluded(config: LoraConfig, *names: str) -> bool:
    """Whether `exclude_modules` matches one of the names, as PEFT reads it."""
    if not config.exclude_modules:
        return False
    probe = LoraConfig(target_modules=config.exclude_modules)
    return any(bool(check_target_module_exists(probe, name)) for name in names)


def _below_layer(name: str) -> str:
    """Return the part of a parameter's name that is the same in every layer."""
    parts = name.split(".")
    number = max(i for i, part in enumerate(parts) if part.isdigit())
    return ".".join(parts[number + 1 :])
