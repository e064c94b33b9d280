"""Tiny mixtures in float64, their data, and the slow definitions that the answers are held to."""

import math
from functools import cache

import torch
from torch import Tensor, nn

import moeadapt
from moeadapt.tuner.inspect import heads_of
from tests.tiny import adapted, batch, logits

KINDS = ("layer", "block", "ffn", "glu")
EXPERTS = 4


def model_of(kind: str, **fields):
    """Return a mixture of four experts, two per token, whose experts do something.

    Without other fields it is the same one each time: no question may change it.
    """
    return adapted("llama", kind, **fields).double().eval() if fields else _usual(kind)


@cache
def _usual(kind: str):
    return adapted("llama", kind).double().eval()


@cache
def model_with_idle_expert(kind: str):
    """Return a mixture with one expert per token, whose expert 3 no token ever uses."""
    model = model_of(kind, router={"name": "top_k", "k": 1, "init_std": 0.5})
    for head in heads_of(model).values():
        (gate,) = [p for p in head.router.parameters() if p.shape[0] == EXPERTS]
        with torch.no_grad():
            # Of x and -x one is above 0, which is what expert 3 always gets.
            gate[1] = -gate[0]
            gate[3] = 0
    return model


def items(count: int = 2) -> list[dict]:
    """Return batches of three rows, padded on the left, of two domains."""
    return [{**batch(seed=seed), "domain": ["red", "blue", "red"]} for seed in range(count)]


def inputs_of(item: dict) -> dict[str, Tensor]:
    """Return what the model is called with."""
    return {name: item[name] for name in ("input_ids", "attention_mask") if name in item}


def token_losses(model: nn.Module, item: dict, **override) -> list[list[float]]:
    """Return -log p of each token of each row that follows a real token, one by one."""
    inputs = inputs_of(item)
    if override:
        with moeadapt.override_routing(model, **override):
            out = logits(model, inputs)
    else:
        out = logits(model, inputs)
    ids, real = inputs["input_ids"], inputs["attention_mask"]
    labels = item.get("labels", ids)
    rows = []
    for row in range(len(ids)):
        losses = []
        for t in range(1, ids.shape[1]):
            if real[row, t] and real[row, t - 1]:
                chances = torch.softmax(out[row, t - 1], -1)
                losses.append(-math.log(chances[labels[row, t]]))
        rows.append(losses)
    return rows


def mean_loss(model: nn.Module, data: list[dict], **override) -> float:
    """Return the mean over all tokens of all rows."""
    every = [x for item in data for row in token_losses(model, item, **override) for x in row]
    return sum(every) / len(every)


def zeroed(experts, layers=None):
    """Return the edit that sets experts' weights to zero, in some layers."""

    def edit(layer, routing):
        weights = routing.expert_weights.clone()
        if layers is None or layer in layers:
            for expert in experts:
                weights[:, expert] = 0
        return weights

    return edit


def answers_of(model: nn.Module, item: dict, number: int = 0) -> dict:
    """Return the item with the `number`-th most probable tokens of `model` as labels."""
    inputs = inputs_of(item)
    labels = inputs["input_ids"].clone()
    labels[:, 1:] = logits(model, inputs)[:, :-1].argsort(-1, descending=True)[..., number]
    return {**item, "labels": labels}
