"""Editing the experts of a trained mixture: drop, merge, add, reorder.

Every function leaves its model alone and returns a new one over the same base tensors, whose
settings, experts and routers agree; save it with `result.model.save_pretrained(folder)`.

Source: merging similar experts instead of dropping them: Li et al. 2024 (MC-SMoE),
https://arxiv.org/abs/2310.01334, section 3.1. We differ: experts are low-rank, so their similarity
is that of their deltas, by Gram matrices, and a merged one is truncated to the rank of one.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor

from moeadapt.errors import ConfigError, UnsupportedError, did_you_mean
from moeadapt.experts.shared_b import SharedBBank
from moeadapt.export.bank_layout import columns
from moeadapt.export.freeze import freeze_old_experts
from moeadapt.export.rebuild import Sources, check_editable, head_of, heads, rebuild
from moeadapt.export.residual import measure
from moeadapt.export.similar import group_similar
from moeadapt.tuner.plain import adapter_config, adapter_layers
from moeadapt.tuner.probe import Batch, Loss, measure_loss, read_batches

Named = Sequence[int] | Mapping[str, Sequence[int]]
"""Experts, the same for all routers, or for each layer or block that routes."""


@dataclass(frozen=True, kw_only=True)
class SurgeryResult:
    """An edited mixture.

    Attributes:
        model: the new PEFT model.
        experts: layer or block that routes -> the old experts that each new one is made of.
        before: held-out loss of the old mixture; None: there was no data.
        after: held-out loss of the new one.
    """

    model: PeftModel
    experts: dict[str, list[list[int]]]
    before: Loss | None = None
    after: Loss | None = None


class _Edit:
    """One edit of a mixture: its layers and routers, and the data to look at it with."""

    def __init__(self, model: Any, adapter: str, data: Any, options: Mapping[str, Any]) -> None:
        check_editable(adapter_config(model, adapter))
        self.model, self.adapter = model, adapter
        self.layers = adapter_layers(model, adapter)
        self.heads = heads(self.layers, adapter)
        self.batches: list[Batch] | None = None
        if data is not None:
            self.batches = read_batches(data, **options)

    @property
    def num_experts(self) -> int:
        key = next(iter(self.heads.values()))[0]
        return self.layers[key].moe_banks[self.adapter].size.num_experts

    def orders(self, named: Named) -> dict[str, list[int]]:
        """Return the experts that `named` lists for each router, checked."""
        if isinstance(named, Mapping):
            wrong = sorted(named.keys() ^ self.heads.keys())
            if wrong:
                raise ConfigError(
                    f"{wrong[:3]} are on one side only; list every router: {sorted(self.heads)}"
                )
            found = {head: list(named[head]) for head in self.heads}
        else:
            found = {head: list(named) for head in self.heads}
        for head, experts in found.items():
            bad = [e for e in experts if not 0 <= e < self.num_experts]
            if bad or len(set(experts)) < len(experts):
                raise ConfigError(
                    f"experts {experts} of {head!r}: list each of 0..{self.num_experts - 1} at "
                    "most once"
                )
        return found

    def finish(
        self, orders: Mapping[str, Sequence[Sources]], router: Mapping[str, Any] | None
    ) -> SurgeryResult:
        """Make the new model and measure both."""
        new = rebuild(self.model, self.adapter, orders, router)
        before = after = None
        if self.batches is not None:
            before, after = measure_loss(self.model, self.batches), measure_loss(new, self.batches)
        made = {head: [[e for e, _ in one] for one in order] for head, order in orders.items()}
        return SurgeryResult(model=new, experts=made, before=before, after=after)


def drop_experts(
    model: PeftModel,
    experts: Named | None = None,
    *,
    count: int | None = None,
    by: str | None = None,
    data: Iterable[Any] | None = None,
    router: Mapping[str, Any] | None = None,
    adapter: str = "default",
    **options: Any,
) -> SurgeryResult:
    """Leave experts out; the router's rows of the others stay.

    Args:
        model: the PEFT model with the mixture.
        experts: which ones, for all routers or per router; None: `count` of them by `by`.
        count: how many of each router, 1 to one less than there are; needs `data`.
        by: with `count`: `usage` (also None): those with the least mean routing weight on `data`;
            `error`: those whose weighted answers on `data` are smallest, over all linears of the
            router.
        data: see `moeadapt.merge`; also what the losses are measured on.
        router: settings of the router that change, for example `{"k": 1}`.
        adapter: which adapter.
        options: `tokenizer`, `domains`, `batch_size`, `max_length`.

    Raises:
        ConfigError: no such expert, number or `by`, or the router does not fit what is left.
        UnsupportedError: the adapter cannot be edited, see `check_editable`.
    """
    if (experts is None) == (count is None):
        raise ConfigError("name the experts to drop, or give count= and data=, not both")
    if by is not None and by not in _MEASURES:
        raise ConfigError(f"by={by!r} must be 'usage' or 'error'{did_you_mean(by, _MEASURES)}")
    if experts is not None and by is not None:
        raise ConfigError(f"by={by!r} chooses experts for count=; leave it out beside experts=")
    edit = _Edit(model, adapter, data, options)
    if count is not None and not 1 <= count < edit.num_experts:
        raise ConfigError(f"count={count} must be in 1..{edit.num_experts - 1}")
    if experts is not None:
        dropped = edit.orders(experts)
    else:
        shares = _MEASURES[by or "usage"](edit)
        dropped = {head: one.argsort(stable=True)[:count].tolist() for head, one in shares.items()}
    counts = {len(found) for found in dropped.values()}
    if len(counts) > 1 or not 0 < min(counts) < edit.num_experts:
        raise ConfigError(
            f"dropping {sorted(counts)} experts per router: drop the same number everywhere, 1 to "
            f"{edit.num_experts - 1}"
        )
    orders = {
        head: [((e, 1.0),) for e in range(edit.num_experts) if e not in gone]
        for head, gone in dropped.items()
    }
    return edit.finish(orders, router)


def merge_experts(
    model: PeftModel,
    num_experts: int,
    *,
    data: Iterable[Any] | None = None,
    router: Mapping[str, Any] | None = None,
    adapter: str = "default",
    **options: Any,
) -> SurgeryResult:
    """Merge the most similar experts of each router until `num_experts` are left.

    Similar: the cosine of what two experts add to the weights, over all linears of the router. A
    merged expert is the mean of its parts, truncated to the rank of one, its router row the mean of
    their rows; with `data`, weighted by how much they are used.

    Args:
        model: the PEFT model with the mixture.
        num_experts: how many are left, 1 to one less than now.
        data: see `moeadapt.merge`; also what the losses are measured on.
        router: settings of the router that change, for example `{"k": 1}`.
        adapter: which adapter.
        options: `tokenizer`, `domains`, `batch_size`, `max_length`.

    Raises:
        ConfigError: the number is out of range, or does not fit the router.
        UnsupportedError: the adapter cannot be edited, see `check_editable`.
    """
    edit = _Edit(model, adapter, data, options)
    if not 1 <= num_experts < edit.num_experts:
        raise ConfigError(f"num_experts={num_experts} must be in 1..{edit.num_experts - 1}")
    usage = None if edit.batches is None else _usage(edit)
    orders: dict[str, list[Sources]] = {}
    for head, keys in edit.heads.items():
        amounts = [1.0] * edit.num_experts if usage is None else usage[head].tolist()
        orders[head] = group_similar(
            [edit.layers[key] for key in keys], adapter, amounts, num_experts
        )
    return edit.finish(orders, router)


def add_experts(
    model: PeftModel,
    count: int = 1,
    *,
    freeze_old: bool = False,
    data: Iterable[Any] | None = None,
    router: Mapping[str, Any] | None = None,
    adapter: str = "default",
    **options: Any,
) -> SurgeryResult:
    """Add experts that add nothing yet, each with a small random router row.

    Args:
        model: the PEFT model with the mixture.
        count: how many per router, >= 1.
        freeze_old: hide the gradients of the old experts, of their router rows and of all that is
            always on, until the model is saved and loaded. Train without weight decay then, which
            needs no gradient.
        data: see `moeadapt.merge`; what the losses are measured on.
        router: settings of the router that change.
        adapter: which adapter.
        options: `tokenizer`, `domains`, `batch_size`, `max_length`.

    Raises:
        ConfigError: `count` is not positive, or does not fit the router.
        UnsupportedError: the adapter cannot be edited, see `check_editable`.
    """
    edit = _Edit(model, adapter, data, options)
    if count < 1:
        raise ConfigError(f"count={count} must be at least 1")
    old = edit.num_experts
    order: list[Sources] = [((e, 1.0),) for e in range(old)]
    order += [()] * count
    result = edit.finish(dict.fromkeys(edit.heads, order), router)
    if freeze_old:
        freeze_old_experts(result.model, old)
    return result


def reorder_experts(
    model: PeftModel,
    order: Named,
    *,
    data: Iterable[Any] | None = None,
    adapter: str = "default",
    **options: Any,
) -> SurgeryResult:
    """Put the experts into another order, which changes nothing but their numbers.

    Args:
        model: the PEFT model with the mixture.
        order: new expert i is the old expert `order[i]`; for all routers, or per router.
        data: see `moeadapt.merge`; what the losses are measured on.
        adapter: which adapter.
        options: `tokenizer`, `domains`, `batch_size`, `max_length`.

    Raises:
        ConfigError: `order` does not list every expert once.
        UnsupportedError: the adapter cannot be edited, see `check_editable`.
    """
    edit = _Edit(model, adapter, data, options)
    found = edit.orders(order)
    for head, experts in found.items():
        if len(experts) != edit.num_experts:
            raise ConfigError(
                f"order {experts} of {head!r} must list each of the {edit.num_experts} experts"
            )
    orders = {head: [((e, 1.0),) for e in experts] for head, experts in found.items()}
    return edit.finish(orders, None)


def _measured(edit: _Edit) -> Any:
    if edit.batches is None:
        raise ConfigError("data= is needed to see how much each expert is used")
    return measure(edit.model, edit.layers, edit.batches, adapter=edit.adapter)


def _usage(edit: _Edit) -> dict[str, Tensor]:
    """Return each router's mean weights."""
    return {
        head_of(edit.layers[key], edit.adapter): moments.weights for key, moments in _measured(edit)
    }


def _errors(edit: _Edit) -> dict[str, Tensor]:
    """Return each router's E|w_e Delta_e x|^2 per expert, over E|d|^2, summed over linears."""
    found: dict[str, Tensor] = {}
    for key, moments in _measured(edit):
        layer = edit.layers[key]
        bank = layer.moe_banks[edit.adapter]
        if isinstance(bank, SharedBBank):
            raise UnsupportedError(
                "experts 'shared_b' are added up before what they share, so one expert's answers "
                "are not seen alone; drop by='usage'"
            )
        own = [columns(bank, e) for e in range(bank.size.num_experts)]
        parts = [((moments.up[:, c].T @ moments.up[:, c]) * moments.g_g[c, c]).sum() for c in own]
        share = torch.stack(parts) / max(moments.norm(), torch.finfo(torch.float64).tiny)
        head = head_of(layer, edit.adapter)
        found[head] = found.get(head, torch.zeros_like(share)) + share
    return found


_MEASURES = {"usage": _usage, "error": _errors}
