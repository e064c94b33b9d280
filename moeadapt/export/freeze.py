"""Training only the experts that were added."""

from typing import Any

import torch
from peft import PeftModel
from torch import Tensor

from moeadapt.export.bank_layout import EXPERT_AXES, columns
from moeadapt.export.rebuild import router_rows
from moeadapt.routers import Router
from moeadapt.tuner.plain import adapter_config, adapter_layers


def freeze_old_experts(model: PeftModel, old: int) -> None:
    """Hide the gradients of all but the new experts and their router rows."""
    new: set[int] = set()
    rows = router_rows(adapter_config(model))
    for layer in adapter_layers(model).values():
        if layer.moe_plans["default"].placement == "unrouted":
            continue
        bank = layer.moe_banks["default"]
        kept = slice(columns(bank, old).start, columns(bank, bank.size.num_experts - 1).stop)
        for name, axis in EXPERT_AXES[type(bank)].items():
            if axis is not None:
                weight = bank.factor(name).weight
                weight.register_hook(_only(axis, kept))
                new.add(id(weight))
        if "default" in layer.moe_heads:
            new |= _freeze_router(layer.moe_heads["default"].router, rows, old)
    for parameter in model.parameters():
        if id(parameter) not in new:
            parameter.requires_grad_(False)


def _freeze_router(router: Router, rows: frozenset[str], old: int) -> set[int]:
    kept = slice(old, router.num_experts)
    new = set()
    for name, parameter in router.named_parameters():
        if parameter.requires_grad and name in rows:
            parameter.register_hook(_only(0, kept))
            new.add(id(parameter))
    return new


def _only(axis: int, kept: slice) -> Any:
    def hide(grad: Tensor) -> Tensor:
        shown = torch.zeros_like(grad)
        index = [slice(None)] * grad.dim()
        index[axis] = kept
        shown[tuple(index)] = grad[tuple(index)]
        return shown

    return hide
