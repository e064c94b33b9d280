"""What a layer computes inside a whole model against the mixture written out, in float64.

Values and the gradient of every tensor: the input, the router, and A and B of each linear.
"""

from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor
from torch.testing import assert_close

from moeadapt.tuner import MoeLoraLinear
from tests.peft import reference as ref
from tests.tiny import adapted, batch

ATTENTION = {"gpt2": ["attn.c_attn", "attn.c_proj"], "opt": ["q_proj", "k_proj", "out_proj"]}
FFN = {"gpt2": ["mlp.c_fc", "mlp.c_proj"], "opt": ["fc1", "fc2"]}
LLAMA_ATTENTION = ["q_proj", "v_proj", "o_proj"]
LLAMA_FFN = ["gate_proj", "up_proj", "down_proj"]

ROUTING: dict[str, tuple[Any, ref.Weigh]] = {
    "top_2": ({"name": "top_k", "k": 2, "init_std": 0.5}, ref.top_k(2)),
    "top_1": ({"name": "top_k", "k": 1, "init_std": 0.5}, ref.top_1),
    "uniform": ("uniform", ref.everyone),
}


def _layers(model: PeftModel, names: list[str]) -> list[MoeLoraLinear]:
    """Find the named linears of layer 2: its input depends on the first layer's adapter."""
    found = {n: m for n, m in model.named_modules() if isinstance(m, MoeLoraLinear) and ".1." in n}
    return [next(m for n, m in found.items() if n.endswith(name)) for name in names]


def _run(model: PeftModel, layers: list[MoeLoraLinear]) -> dict[MoeLoraLinear, tuple[Tensor, ...]]:
    """Run the model and return (input, output) of each layer, with their graph."""
    seen: dict[MoeLoraLinear, tuple[Tensor, ...]] = {}

    def note(layer: MoeLoraLinear, args: tuple[Tensor, ...], out: Tensor) -> None:
        seen[layer] = (args[0], out)

    handles = [layer.register_forward_hook(note) for layer in layers]
    model(**batch(rows=2, length=5))
    for handle in handles:
        handle.remove()
    return seen


def _assert_same(found: Tensor, expected: Tensor, tensors: list[Tensor]) -> None:
    """Compare values and the gradients of a random function of them."""
    assert_close(found, expected)
    direction = torch.randn_like(found)
    mine = torch.autograd.grad((found * direction).sum(), tensors, retain_graph=True)
    theirs = torch.autograd.grad((expected * direction).sum(), tensors)
    for gradient, wanted in zip(mine, theirs, strict=True):
        assert gradient.abs().max() > 0
        assert_close(gradient, wanted)


def _factors(layers: list[MoeLoraLinear]) -> list[Tensor]:
    return [
        p for m in layers for n, p in m.named_parameters() if "lora" in n and ".default." in f".{n}"
    ]


def _model(name: str, kind: str, spec: Any, n_shared: int = 0, **overrides: Any) -> PeftModel:
    model = adapted(name, kind, router=spec, n_shared=n_shared, **overrides)
    return model.double().train()


@pytest.mark.parametrize("routing", sorted(ROUTING))
@pytest.mark.parametrize("n_shared", [0, 2])
@pytest.mark.parametrize("name", ["llama", "gpt2", "opt"])
def test_a_router_per_layer_is_the_explicit_sum(name: str, n_shared: int, routing: str) -> None:
    spec, weigh = ROUTING[routing]
    model = _model(name, "layer", spec, n_shared)
    targets = ATTENTION.get(name, LLAMA_ATTENTION)[:1] + FFN.get(name, LLAMA_FFN)[-1:]
    for layer in _layers(model, targets):
        x, found = _run(model, [layer])[layer]
        gate = None if routing == "uniform" else layer.moeadapt_router["default"]
        expert = ref.Expert(layer, shared=range(4, 4 + n_shared))
        expected = ref.linear_mixture(expert, gate, 4, x, x, weigh)
        trained = [x, *_factors([layer]), *([] if gate is None else [gate.weight])]
        _assert_same(found, expected, trained)


@pytest.mark.parametrize("n_shared", [0, 1])
@pytest.mark.parametrize("name", ["llama", "gpt2", "opt"])
@pytest.mark.parametrize("where", ["attention", "ffn"])
def test_a_block_routes_all_its_linears_by_its_input(name: str, where: str, n_shared: int) -> None:
    spec, weigh = ROUTING["top_2"]
    model = _model(name, "block", spec, n_shared)
    known, default = (ATTENTION, LLAMA_ATTENTION) if where == "attention" else (FFN, LLAMA_FFN)
    layers = _layers(model, known.get(name, default))
    seen = _run(model, layers)
    routed = seen[layers[0]][0]
    gate = next(m.moeadapt_router["default"] for m in layers if len(m.moeadapt_router))
    for layer in layers:
        x, found = seen[layer]
        expert = ref.Expert(layer, shared=range(4, 4 + n_shared))
        expected = ref.linear_mixture(expert, gate, 4, x, routed, weigh)
        _assert_same(found, expected, [routed, gate.weight, *_factors([layer])])


@pytest.mark.parametrize("routing", sorted(ROUTING))
@pytest.mark.parametrize("n_shared", [0, 2])
@pytest.mark.parametrize("name", ["llama", "gemma", "gpt2", "opt"])
def test_ffn_experts_are_mixlora_token_by_token(name: str, n_shared: int, routing: str) -> None:
    spec, weigh = ROUTING[routing]
    model = _model(name, "ffn", spec, n_shared)
    layers = _layers(model, FFN.get(name, LLAMA_FFN))
    seen = _run(model, layers)
    x, found = seen[layers[0]][0], seen[layers[-1]][1]
    experts = [ref.Expert(m, shared=range(4, 4 + n_shared)) for m in layers]
    make = ref.plain_ffn if len(experts) == 2 else ref.gated_ffn
    ffn = make(ref.ACTIVATIONS[name], *experts)
    gate = None if routing == "uniform" else layers[0].moeadapt_router["default"]
    expected = ref.ffn_mixture(ffn, gate, 4, x, weigh)
    _assert_same(found, expected, [x, *_factors(layers), *([] if gate is None else [gate.weight])])


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt"])
def test_beside_ffn_experts_attention_has_an_unrouted_lora(name: str) -> None:
    model = _model(name, "ffn", ROUTING["top_2"][0])
    (layer,) = _layers(model, ATTENTION.get(name, LLAMA_ATTENTION)[:1])
    assert not len(layer.moeadapt_router)
    x, found = _run(model, [layer])[layer]
    expert = ref.Expert(layer)
    rows = [expert.whole(token, 0) for token in x.flatten(0, -2)]
    _assert_same(found, torch.stack(rows).view_as(found), [x, *_factors([layer])])


def test_rank_and_alpha_patterns_reach_single_layers() -> None:
    patterns = {"rank_pattern": {"down_proj": 2}, "alpha_pattern": {r".*\.1\.mlp\.down_proj": 10}}
    spec, weigh = ROUTING["top_2"]
    model = _model("llama", "layer", spec, **patterns)
    (layer,) = _layers(model, ["down_proj"])
    x, found = _run(model, [layer])[layer]
    expert = ref.Expert(layer, rank=2, scale=10 / 2)
    expected = ref.linear_mixture(expert, layer.moeadapt_router["default"], 4, x, x, weigh)
    _assert_same(found, expected, [x, *_factors([layer])])
