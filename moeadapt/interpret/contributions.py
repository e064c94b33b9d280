"""What does each expert add to each token, in a layer's output and in the prediction?

Letters: B rows, S tokens of a row, E chosen experts of a layer.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from moeadapt.interpret.losses import as_batches, counted_tokens, logits_of, real_tokens, token_nll
from moeadapt.interpret.norms import Watch
from moeadapt.interpret.observe import routing_of
from moeadapt.interpret.scope import choose_experts, choose_layers, keep_weights, only_at, without
from moeadapt.routing import Routing
from moeadapt.tuner.inspect import collect_routing
from moeadapt.tuner.override import override_routing
from moeadapt.tuner.probe import Batch, evaluating


@dataclass(frozen=True, kw_only=True)
class LayerContributions:
    """One layer or block. NaN at padding.

    Attributes:
        experts: which experts the columns are [E].
        weights: routing weights.
        norms: length of what is added to an output, in the units of that output. Placement
            `linear` and `glu`: by linear, `|w_e| * ||expert_e(x)||`; `ffn`: under the name of the
            block, `||w_e (FFN_e(x) - FFN(x))||`.
        logprob_change: of the token that follows, in nats, when the expert's weight is 0 for all
            tokens of this layer; below 0: the expert helped. NaN also where no token follows.
            None: not asked for.
        logit_change: of the same token's logit, before the softmax: what the expert does to the
            token itself, and not to its rivals. NaN and None as above.
    """

    experts: tuple[int, ...]
    weights: Float[Tensor, "B S E"]
    norms: dict[str, Float[Tensor, "B S E"]]
    logprob_change: Float[Tensor, "B S E"] | None
    logit_change: Float[Tensor, "B S E"] | None


@dataclass(frozen=True, kw_only=True)
class Contributions:
    """Every chosen layer.

    Attributes:
        logprob: of the token that follows, in nats, as the model routes; NaN where none does.
        logit: of that token, before the softmax.
        layers: layer or block -> its experts.
    """

    logprob: Float[Tensor, "B S"]
    logit: Float[Tensor, "B S"]
    layers: dict[str, LayerContributions]


def contributions(
    model: nn.Module,
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    *,
    layers: Sequence[str] | None = None,
    experts: Sequence[int] | None = None,
    effects: bool = True,
) -> Contributions:
    """Measure each expert at each token. Costs one forward, and one per chosen layer and expert.

    The changes of log-probability and logit are exact, no first-order estimate: the model runs
    without the expert. They hold everything that follows from it, in later layers, their routers
    and later tokens.

    Norms are of each expert by itself; experts that are orthogonalised against each other
    (`orthogonalize`), before that. Those of `ffn` are differences of two outputs in the model's
    own precision: use float32 where the experts change little.

    Args:
        model: the model, in any wrapper.
        input_ids: token ids [B, S].
        attention_mask: 0 at padding [B, S]; None: there is none.
        layers: layers or blocks, named as by `collect_routing`; None: all.
        experts: which ones; None: all.
        effects: whether to measure `logprob_change` and `logit_change`. Without them one forward
            is enough, except with placement `ffn`.

    Raises:
        ConfigError: no mixture, or several, are active; no such layer or expert; ids or mask have
            another shape; the model is no language model.
        UnsupportedError: a layer does not route these tokens one by one.

    Example:
        >>> found = contributions(model, input_ids, layers=["model.layers.0.mlp"])
        >>> found.layers["model.layers.0.mlp"].logprob_change[0, 3]
    """
    chosen = choose_experts(choose_layers(model, layers), experts)
    given = {"input_ids": input_ids, "attention_mask": attention_mask}
    (batch,) = as_batches([{name: x for name, x in given.items() if x is not None}])
    real = real_tokens(batch).cpu()
    watch, found = Watch(model, chosen), {}
    with evaluating(model):
        told, routings, lengths, outputs = _as_routed(model, batch, watch)
        for name, own in chosen.items():
            routing = routing_of(routings, name, real.numel())
            weights = _rows(routing.expert_weights[:, list(own)].cpu(), real)
            norms = {key: _rows(x, real) * weights.abs() for key, x in lengths[name].items()}
            changes: list[Tensor | None] = [None, None]
            if effects or name in outputs:
                others, answers = _without_each(model, batch, watch, name, own)
                changes = [*(others - told.unsqueeze(-1))] if effects else changes
                if name in outputs:
                    lost = [(outputs[name] - rest).norm(dim=-1).cpu() for rest in answers]
                    norms[name] = _rows(_columns(lost, (real.numel(),)), real)
            both = {"logprob_change": changes[0], "logit_change": changes[1]}
            found[name] = LayerContributions(experts=own, weights=weights, norms=norms, **both)
    return Contributions(logprob=told[0], logit=told[1], layers=found)


def _as_routed(
    model: nn.Module, batch: Batch, watch: Watch
) -> tuple[
    Float[Tensor, "2 B S"],
    dict[str, list[Routing]],
    dict[str, dict[str, Tensor]],
    dict[str, Tensor],
]:
    """Run once; return what `_told` does, routings, and what `Watch` saw."""
    with (
        collect_routing(model) as routings,
        override_routing(model, edit=keep_weights),
        watch.lengths() as lengths,
        watch.outputs() as outputs,
    ):
        told = _told(model, batch)
    return told, routings, lengths, outputs


def _without_each(
    model: nn.Module, batch: Batch, watch: Watch, layer: str, experts: Sequence[int]
) -> tuple[Float[Tensor, "2 B S E"], list[Tensor]]:
    """Return what `_told` does without each expert, and what an FFN of placement `ffn` answers."""
    told, answers = [], []
    for expert in experts:
        edit = only_at([layer], without([expert]))
        with override_routing(model, edit=edit), watch.outputs() as outputs:
            told.append(_told(model, batch))
        answers += [outputs[layer]] if layer in outputs else []
    return _columns(told, (2, *batch.labels.shape)), answers


def _columns(columns: Sequence[Tensor], shape: Sequence[int]) -> Tensor:
    """Stack columns of `shape`, of which there may be none."""
    return torch.stack(list(columns), -1) if columns else torch.zeros(*shape, 0)


def _rows(values: Float[Tensor, "T E"], real: Bool[Tensor, "B S"]) -> Float[Tensor, "B S E"]:
    """Put tokens back into rows, NaN at padding."""
    return values.view(*real.shape, values.shape[-1]).masked_fill(~real.unsqueeze(-1), math.nan)


def _told(model: nn.Module, batch: Batch) -> Float[Tensor, "2 B S"]:
    """Return log-probability and logit of the token after each one, NaN where none is counted."""
    logits = logits_of(model, batch)
    counted = counted_tokens(batch).cpu()
    following = batch.labels[:, 1:, None].clamp(min=0).to(logits.device)
    nll = token_nll(logits, batch).cpu()
    own = logits[:, :-1].gather(2, following)[..., 0].cpu().to(nll.dtype)
    out = torch.full((2, *batch.labels.shape), math.nan, dtype=nll.dtype)
    out[:, :, :-1] = torch.stack([-nll, own]).masked_fill(~counted, math.nan)
    return out
