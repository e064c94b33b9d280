"""Listens to a running model: how long each expert's answer is, and what whole FFNs answer.

Letters: T tokens, E chosen experts of a layer, D in, O out.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from moeadapt.interpret.scope import active_adapter
from moeadapt.tuner.layer import MoeLoraLinear


class Watch:
    """The linears of some layers and blocks, and the experts of interest."""

    def __init__(self, model: nn.Module, chosen: Mapping[str, tuple[int, ...]]) -> None:
        """Find the linears that the routers named in `chosen` route for."""
        self._adapter = active_adapter(model)
        self._chosen = chosen
        self._linears: dict[str, list[MoeLoraLinear]] = {name: [] for name in chosen}
        for module in model.modules():
            if not isinstance(module, MoeLoraLinear) or self._adapter not in module.moe_plans:
                continue
            plan = module.moe_plans[self._adapter]
            router = plan.key if plan.block is None else plan.block.path
            if plan.placement != "unrouted" and router in chosen:
                self._linears[router].append(module)

    @contextmanager
    def lengths(self) -> Iterator[dict[str, dict[str, Float[Tensor, "T E"]]]]:
        """Collect `||expert_e(x)||`, layer -> linear -> [T, E]; nothing for placement `ffn`."""
        found: dict[str, dict[str, Tensor]] = {name: {} for name in self._linears}
        handles = []
        for name, linears in self._linears.items():
            for linear in linears:
                if linear.moe_plans[self._adapter].placement != "ffn":
                    hook = self._measure(found[name], self._chosen[name])
                    handles.append(linear.register_forward_pre_hook(hook))
        try:
            yield found
        finally:
            for handle in handles:
                handle.remove()

    def _measure(self, found: dict[str, Tensor], experts: tuple[int, ...]) -> Any:
        def hook(linear: MoeLoraLinear, args: tuple[Any, ...]) -> None:
            plan, bank = linear.moe_plans[self._adapter], linear.moe_banks[self._adapter]
            own = source = args[0]
            if plan.placement == "glu":
                source = linear.moe_blocks[self._adapter].routing(self._adapter).input
            x = source.reshape(-1, source.shape[-1])
            dtype = torch.promote_types(x.dtype, torch.float32)
            onto = None
            if bank.needs_base:
                onto = linear.base_layer(own).reshape(x.shape[0], -1).to(dtype)
            answers = (bank.apply_one(x.to(dtype), expert, onto) for expert in experts)
            columns = [answer.norm(dim=-1).cpu() for answer in answers]
            found[plan.key] = torch.stack(columns, -1) if columns else x.new_zeros(len(x), 0).cpu()

        return hook

    @contextmanager
    def outputs(self) -> Iterator[dict[str, Float[Tensor, "T O"]]]:
        """Collect what each FFN of placement `ffn` answers, block -> [T, O]."""
        found: dict[str, Tensor] = {}
        handles = []
        for name, linears in self._linears.items():
            for linear in linears:
                plan = linear.moe_plans[self._adapter]
                # The output projection adds up the experts; it is the one not reading the input.
                if plan.placement == "ffn" and not plan.reads_input:
                    handles.append(linear.register_forward_hook(_keep(found, name)))
        try:
            yield found
        finally:
            for handle in handles:
                handle.remove()


def _keep(found: dict[str, Tensor], name: str) -> Any:
    def hook(_: nn.Module, args: Any, output: Tensor) -> None:
        dtype = torch.promote_types(output.dtype, torch.float32)
        found[name] = output.reshape(-1, output.shape[-1]).to(dtype)

    return hook
