"""Looking into a model with an adapter: its routings, its router statistics, its aux scale."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from moeadapt import stats
from moeadapt.balance import BalanceConfig
from moeadapt.errors import ConfigError, TrainingError
from moeadapt.routing import Routing
from moeadapt.tuner.context import RoutingContext, find_context
from moeadapt.tuner.head import RouterHead


def require_context(model: nn.Module) -> RoutingContext:
    """Return the context of `model`.

    Raises:
        ConfigError: the model has no moeadapt adapter.
    """
    context = find_context(model)
    if context is None:
        raise ConfigError(
            f"this {type(model).__name__} has no mixture of LoRA experts; make one with "
            "get_peft_model(model, MoeLoraConfig(...)) or load one with PeftModel.from_pretrained"
        )
    return context


@contextmanager
def collect_routing(model: nn.Module) -> Iterator[dict[str, list[Routing]]]:
    """Collect every routing that happens inside the `with` block.

    Yields:
        Path of the layer or block -> its routings, one per forward, detached. Not filled inside a
        compiled graph.

    Raises:
        ConfigError: the model has no moeadapt adapter.

    Example:
        >>> with moeadapt.collect_routing(model) as routings:
        ...     _ = model(input_ids=input_ids)
        >>> routings["model.layers.0.mlp"][0].weights.shape
        torch.Size([8, 4])
    """
    context = require_context(model)
    outer, context.collected = context.collected, {}
    try:
        yield context.collected
    finally:
        context.collected = outer


def set_aux_loss_scale(model: nn.Module, scale: float) -> None:
    """Tell the auxiliary losses what the task loss is multiplied by; for your own training loop.

    Args:
        model: the model, in any wrapper.
        scale: the GradScaler's scale (1 without fp16) divided by the gradient accumulation steps.

    Raises:
        ConfigError: the model has no moeadapt adapter, or `scale` is not positive.
    """
    if not scale > 0:
        raise ConfigError(f"scale={scale!r} must be positive: amp scale / accumulation steps")
    require_context(model).set_scale(float(scale))


def pop_router_stats(
    model: nn.Module, reduce: Callable[[Tensor], Tensor] | None = None
) -> dict[str, stats.RouterStats]:
    """Return each trained router's statistics since the last call, and start afresh.

    Counted once per forward that was back-propagated. This is the one place that waits for the
    device, once for all routers.

    Args:
        model: the model, in any wrapper.
        reduce: sums a vector over all processes, each of which must call this function; None:
            this process alone.

    Returns:
        `<adapter>/<layer or block>` -> its statistics.
    """
    heads = heads_of(model)
    counts = {name: head.pop_counts() for name, head in heads.items()}
    if reduce is None:
        counts = {name: packed for name, packed in counts.items() if packed is not None}
    sizes = [heads[name].packed_size for name in counts]
    if not sizes:
        return {}
    found = next((packed for packed in counts.values() if packed is not None), None)
    device = next(model.parameters()).device if found is None else found.device
    together = torch.cat(
        [
            torch.zeros(size, device=device) if packed is None else packed.to(device)
            for packed, size in zip(counts.values(), sizes, strict=True)
        ]
    )
    together = (together if reduce is None else reduce(together)).cpu()
    return {
        name: heads[name].unpack(packed)
        for name, packed in zip(counts, together.split(sizes), strict=True)
        if packed[0] > 0  # forwards
    }


def step_schedule(model: nn.Module, step: int | None) -> None:
    """Use the training values of `MoeLoraConfig.schedule` for one optimizer step.

    The trainers of moeadapt.training and MoeAdaptCallback do it; call it in a loop of your own
    before the forward. They hold in training mode, for the adapters that are trained.

    Args:
        model: the model, in any wrapper.
        step: the optimizer step, counted from 0; None: training is over, the values of inference
            hold in both modes.

    Raises:
        ConfigError: the model has no moeadapt adapter, or `step` is negative.
        TrainingError: routers are to be frozen or warmed up, and the optimizer does not know.

    Example:
        >>> moeadapt.attach_optimizer(model, optimizer)
        >>> for step, inputs in enumerate(loader):
        ...     moeadapt.step_schedule(model, step)
        ...     model(**inputs).loss.backward()
        ...     optimizer.step()
        ...     moeadapt.after_optimizer_step(model)
        ...     optimizer.zero_grad()
    """
    if step is not None and step < 0:
        raise ConfigError(f"step={step}: optimizer steps are counted from 0")
    for name, head in heads_of(model).items():
        trained = step is not None and (head.schedule is None or head.trains)
        if (
            trained
            and not head.optimizer_attached
            and head.schedule is not None
            and head.schedule.acts_on_optimizer
        ):
            raise TrainingError(
                f"router {name!r}: its schedule freezes or warms up the router, which the "
                "optimizer has to know: call moeadapt.attach_optimizer(model, optimizer) before "
                "the first step"
            )
        head.set_step(step if trained else None)


def after_optimizer_step(
    model: nn.Module,
    reduce: Callable[[Tensor], Tensor] | None = None,
    *,
    step: int | None = None,
) -> None:
    """Change what gradients do not train: selection biases, adaptive coefficients, live experts.

    Does nothing, and does not communicate, where no router or loss asks for it.

    Args:
        model: the model, in any wrapper.
        reduce: sums a tensor over all processes, each of which must call this function; None:
            over those of torch.distributed, or this one alone.
        step: the optimizer step, so that a second call for the same one does nothing; None: every
            call counts.

    Raises:
        ConfigError: the model has no moeadapt adapter.
    """
    reduce = _all_reduce if reduce is None else reduce
    heads = [head for head in heads_of(model).values() if head.acts_after_step]
    if step is not None:
        heads = [head for head in heads if head.followed_step != step]
        for head in heads:
            head.followed_step = step
    if not heads:
        return
    device = next(model.parameters()).device
    counts = [head.step_counts() for head in heads]
    sizes = [head.packed_size for head in heads]
    together = torch.cat(
        [
            torch.zeros(size, device=device) if packed is None else packed.to(device)
            for packed, size in zip(counts, sizes, strict=True)
        ]
    )
    for head, packed in zip(heads, reduce(together).split(sizes), strict=True):
        head.after_step(packed)


def balance_of(model: nn.Module) -> dict[str, dict[str, BalanceConfig]]:
    """Return each router's balance losses by name, under the names of `pop_router_stats`."""
    return {name: head.balance for name, head in heads_of(model).items()}


def prepare_stats(model: nn.Module, device: torch.device) -> None:
    """Make every router's counters on `device`; a compiled graph cannot."""
    context = require_context(model)
    context.scale(device)
    for head in heads_of(model).values():
        head.sink(device)


def router_counts(model: nn.Module) -> dict[str, Tensor]:
    """Return a copy of what `pop_router_stats` would read; routers without counts are left out."""
    found = {name: head.counts() for name, head in heads_of(model).items()}
    return {name: counts for name, counts in found.items() if counts is not None}


def set_router_counts(model: nn.Module, counts: Mapping[str, Tensor]) -> None:
    """Go back to `counts`, from `router_counts` between two optimizer steps."""
    for name, head in heads_of(model).items():
        head.set_counts(counts.get(name))


def heads_of(model: nn.Module) -> dict[str, RouterHead]:
    """Return what routes in `model`: `<adapter>/<layer or block>` -> its head."""
    context = require_context(model)
    return {
        f"{adapter}/{name}": head
        for adapter, heads in context.heads.items()
        for name, head in heads.items()
    }


def _all_reduce(tensor: Tensor) -> Tensor:
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return tensor
    total = tensor.clone()
    torch.distributed.all_reduce(total)
    return total
