"""Small FFNs beside the frozen FFN, against the mixture written out, in float64.

Letters: T tokens, D width of the model, I width of the base FFN, E experts, M width of one.
"""

import copy
import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model_state_dict
from torch import Tensor, nn
from torch.testing import assert_close
from transformers import AutoModelForCausalLM, Phi3Config
from transformers.pytorch_utils import Conv1D

import moeadapt
from moeadapt import MoeLoraConfig
from moeadapt.dispatch import dispatch
from moeadapt.errors import ConfigError, UnsupportedError
from moeadapt.training.plan import plan_model
from moeadapt.training.recipe import parse_recipe
from moeadapt.tuner import MoeLoraLinear
from tests.peft import reference as ref
from tests.samples import OUT, T, factors_of, hidden, make_bank
from tests.structure.trace import MATRIX_PRODUCTS, SYNCHRONISING, names, recorded
from tests.tiny import HIDDEN, MODERN, adapt, adapted, batch, gradients, logits, moe_config, tiny

RECIPE = Path(__file__).parents[2] / "configs/sft/smollm2_mixlora.yaml"
E, M, SCALE = 4, 6, 1.5
WIDE = 64
"""Width of the base FFN of the tiny models, but for gpt2."""
FFN = {"gpt2": ["mlp.c_fc", "mlp.c_proj"], "opt": ["fc1", "fc2"]}
GATED = ["mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"]
ROUTING: dict[str, tuple[Any, ref.Weigh]] = {
    "top_2": ({"name": "top_k", "k": 2, "init_std": 0.5}, ref.top_k(2)),
    "top_1": ({"name": "top_k", "k": 1, "init_std": 0.5}, ref.top_1),
    "uniform": ("uniform", ref.everyone),
}
names_of_models = pytest.mark.parametrize("name", ["llama", "gemma", "gpt2", "opt"])


# --- the definition


def linears_of(model: nn.Module, name: str) -> list[nn.Module]:
    """Return the linears of the second layer's FFN: its input depends on the first layer's."""
    found = {n: m for n, m in model.named_modules() if ".1." in n}
    return [next(m for n, m in found.items() if n.endswith(end)) for end in FFN.get(name, GATED)]


def times(linear: Any, x: Tensor) -> Tensor:
    """Apply the base linear to one token."""
    base = getattr(linear, "base_layer", linear)
    y = (base.weight.T if isinstance(base, Conv1D) else base.weight) @ x
    return y if base.bias is None else y + base.bias


def base_ffn(act: Any, linears: list[nn.Module], x: Tensor) -> Tensor:
    """Apply the frozen FFN to one token."""
    first, *middle, last = linears
    h = act(times(first, x))
    return times(last, h * times(middle[0], x) if middle else h)


def small_ffn(act: Any, layer: Any, e: int, x: Tensor) -> Tensor:
    """Apply one expert to one token."""
    gate, up, down = (
        getattr(layer, f"moeadapt_glu_{f}")["default"].weight for f in ("gate", "up", "down")
    )
    h = [act(gate[e * M + i] @ x) * (up[e * M + i] @ x) for i in range(M)]
    return SCALE * sum(down[:, e * M + i] * h[i] for i in range(M))


def run(model: PeftModel, linears: list[nn.Module]) -> tuple[Tensor, Tensor]:
    """Run the model and return what entered and left the FFN, with their graph."""
    seen: dict[nn.Module, tuple[Tensor, Tensor]] = {}

    def note(module: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> None:
        seen[module] = (args[0], out)

    handles = [module.register_forward_hook(note) for module in linears]
    model(**batch(rows=2, length=5))
    for handle in handles:
        handle.remove()
    return seen[linears[0]][0], seen[linears[-1]][1]


def assert_same(found: Tensor, expected: Tensor, tensors: list[Tensor]) -> None:
    """Compare values and the gradients of a random function of them."""
    assert_close(found, expected)
    direction = torch.randn_like(found)
    mine = torch.autograd.grad((found * direction).sum(), tensors, retain_graph=True)
    theirs = torch.autograd.grad((expected * direction).sum(), tensors)
    for gradient, wanted in zip(mine, theirs, strict=True):
        assert wanted.abs().max() > 0
        assert_close(gradient, wanted)


@pytest.mark.parametrize("routing", sorted(ROUTING))
@pytest.mark.parametrize("n_shared", [0, 2])
@names_of_models
def test_the_block_is_the_base_ffn_plus_the_weighted_small_ones(name, n_shared, routing):
    spec, weigh = ROUTING[routing]
    model = adapted(name, "glu", router=spec, n_shared=n_shared).double().train()
    linears, act = linears_of(model, name), ref.ACTIVATIONS[name]
    x, found = run(model, linears)
    layer: Any = linears[-1]
    gate = None if routing == "uniform" else layer.moeadapt_router["default"]
    rows = []
    for token in x.flatten(0, -2):
        chosen = ref.routes(gate, E, token, weigh) + [(E + i, 1.0) for i in range(n_shared)]
        mixed = sum(w * small_ffn(act, layer, e, token) for e, w in chosen)
        rows.append(base_ffn(act, linears, token) + mixed)
    factors = [p for n, p in layer.named_parameters() if "moeadapt_glu" in n]
    assert len(factors) == 3
    tensors = [x, *factors, *([] if gate is None else [gate.weight])]
    assert_same(found, torch.stack(rows).view_as(found), tensors)


def test_beside_them_attention_has_an_unrouted_lora_of_rank_r():
    model = adapted("llama", "glu", r=3, lora_alpha=12, rank_pattern={"o_proj": 2}).double()
    for name, rank in (("q_proj", 3), ("o_proj", 2)):
        layer: Any = model.get_submodule(f"base_model.model.model.layers.0.self_attn.{name}")
        assert not len(layer.moeadapt_router)
        a, b = (getattr(layer, f"moeadapt_lora_{f}")["default"].weight for f in "AB")
        assert a.shape == (rank, HIDDEN)
        x = torch.randn(2, 3, HIDDEN, dtype=torch.float64)
        expected = layer.base_layer(x) + 12 / rank * (x @ a.T @ b.T)
        assert_close(layer(x), expected)


@names_of_models
def test_the_tensors_are_flat_matrices_on_the_output_projection(name):
    model = adapted(name, "glu", n_shared=1)
    found = {n: tuple(p.shape) for n, p in model.named_parameters() if "moeadapt_glu" in n}
    end = FFN.get(name, GATED)[-1]
    width = (E + 1) * M
    paths = {n.rpartition(".moeadapt_")[0] for n in found}
    assert len(paths) == 2
    assert all(path.endswith(end) for path in paths)
    for path in paths:
        assert found.pop(f"{path}.moeadapt_glu_gate.default.weight") == (width, HIDDEN)
        assert found.pop(f"{path}.moeadapt_glu_up.default.weight") == (width, HIDDEN)
        assert found.pop(f"{path}.moeadapt_glu_down.default.weight") == (HIDDEN, width)
    assert not found
    for linear in linears_of(model, name)[:-1]:
        assert not isinstance(linear, MoeLoraLinear)


def test_naming_the_output_projection_alone_is_enough():
    models = [
        adapted("llama", "glu", target_modules=targets)
        for targets in (["down_proj"], ["gate_proj", "up_proj", "down_proj"])
    ]
    first, second = (logits(model, batch()) for model in models)
    assert torch.equal(first, second)
    assert (first - logits(tiny("llama"), batch())).abs().max() > 0.1


def test_at_the_start_only_down_is_zero_and_it_learns():
    model = adapted("llama", "glu", init_lora_weights=True)
    tensors = {n: p for n, p in model.named_parameters() if "moeadapt_glu" in n}
    assert all(bool(p.any()) == ("glu_down" not in n) for n, p in tensors.items())
    found = gradients(model.train(), batch())
    assert all(bool(found[n].any()) == ("glu_down" in n) for n in tensors)


def test_a_fused_input_projection_and_another_order_of_the_linears_are_understood():
    base = AutoModelForCausalLM.from_config(Phi3Config(**MODERN)).eval()
    inputs = batch()
    expected = logits(base, inputs)
    fresh = adapt(copy.deepcopy(base), moe_config("glu", init_lora_weights=True))
    assert torch.equal(logits(fresh, inputs), expected)
    ffn = adapt(base, moe_config("glu")).base_model.model.model.layers[0].mlp
    assert ffn.down_proj.moe_banks["default"].activation is ffn.activation_fn

    llama = tiny("llama")
    for layer in llama.model.layers:  # w1, w2, w3: gate, down, up
        layer.mlp.up_proj = layer.mlp._modules.pop("up_proj")
    assert list(llama.model.layers[0].mlp._modules)[:2] == ["gate_proj", "down_proj"]
    state = get_peft_model_state_dict(adapt(llama, moe_config("glu")))
    usual = get_peft_model_state_dict(adapted("llama", "glu"))
    assert state.keys() == usual.keys()


# --- what it costs


def an_ffn(k: int) -> nn.Module:
    router = {"name": "top_k", "k": k, "init_std": 0.5}
    model = adapted("llama", "glu", router=router, balance={"switch": 0.1}, num_experts=5).train()
    moeadapt.set_aux_loss_scale(model, 1.0)
    ffn = model.base_model.model.model.layers[0].mlp
    ffn(torch.randn(1, 3, HIDDEN, requires_grad=True)).sum().backward()  # makes the counters
    return ffn


@pytest.mark.parametrize("k", [1, 2, 5])
def test_a_step_costs_the_same_for_every_k_and_has_no_axis_of_experts_and_outputs(k):
    tokens = 101

    def kernels(slots: int) -> list[Any]:
        ffn, x = an_ffn(slots), torch.randn(1, tokens, HIDDEN, requires_grad=True)
        with recorded() as found:
            ffn(x).sum().backward()
        return found

    found = kernels(k)
    assert not SYNCHRONISING & set(names(found))
    assert max(kernel.size for kernel in found) == tokens * WIDE
    products = [kernel for kernel in found if kernel.name in MATRIX_PRODUCTS]
    # Forward: 3 of the base, 3 of the experts, the router; backward: 3, and 2 of each other.
    assert len(products) == 7 + 3 + 2 * 4
    if k > 1:
        assert len([k for k in kernels(3) if k.name in MATRIX_PRODUCTS]) == len(products)


def test_a_plan_counts_them():
    recipe = parse_recipe("sft", str(RECIPE), ["--use_cpu", "--bf16", "false"])
    moe = moe_config("glu", target_modules=["down_proj"], n_shared=1)
    recipe = replace(recipe, adapter=moe)
    plan = plan_model(tiny("llama"), recipe)
    one, gate = 3 * HIDDEN * M, E * HIDDEN
    assert plan.trainable == 2 * ((E + 1) * one + gate)
    assert plan.active == 2 * (3 * one + gate)
    assert (plan.targets, plan.routers) == (2, 2)


# --- beside others


def test_it_adds_up_with_an_adapter_that_changes_the_output_projection():
    model = adapted("llama", "glu").double()
    model.add_adapter("other", moe_config("layer", target_modules=["down_proj"]))
    model.double().eval()
    ffn = model.base_model.model.model.layers[0].mlp
    x = torch.randn(1, 7, HIDDEN, dtype=torch.float64)
    found = {}
    for active in (["default"], ["other"], ["default", "other"]):
        model.base_model.set_adapter(active)
        found[len(found)] = ffn(x)
    with model.disable_adapter():
        base = ffn(x)
    assert (found[0] - base).abs().max() > 0.1
    assert (found[1] - base).abs().max() > 0.1
    assert_close(found[2], found[0] + found[1] - base)


def test_a_copy_uses_its_own_activation():
    for copied in (copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))):
        model = adapted("gemma", "glu")
        twin = copied(model)
        for each in (model, twin):
            ffn = each.base_model.model.model.layers[1].mlp
            assert ffn.down_proj.moe_banks["default"].activation is ffn.act_fn
        assert torch.equal(logits(twin, batch()), logits(model, batch()))


def test_dropout_is_what_the_experts_see_and_not_the_router():
    model = adapted("llama", "glu", lora_dropout=0.5, target_modules=["down_proj"]).train()
    found = []
    for _ in range(2):
        with moeadapt.collect_routing(model) as routings:
            found.append(logits(model, batch()))
        first = routings["model.layers.0.mlp"][0].weights
        if len(found) == 1:
            expected = first
    assert torch.equal(first, expected)
    assert not torch.allclose(*found)


def test_an_expert_that_is_not_chosen_may_overflow_in_float16():
    bank = make_bank("glu")
    for factor in factors_of(bank):
        factor.data = factor.data.half()
    x = hidden().half().requires_grad_()
    weights = torch.zeros(T, bank.size.num_experts)
    weights[:, 0] = 1
    expected = dispatch(x, weights, bank, torch.zeros(T, OUT, dtype=torch.float16))
    for name in ("glu_gate", "glu_up"):
        bank.factor(name).weight.data[bank.size.rank :] = 6e4  # every other expert
    assert torch.isinf(x @ bank.factor("glu_up").weight.T).any()
    y = dispatch(x, weights, bank, torch.zeros(T, OUT, dtype=torch.float16))
    assert torch.equal(y, expected)
    grads = torch.autograd.grad(y.square().sum(), [x, *factors_of(bank)])
    assert all(torch.isfinite(g).all() for g in grads)


# --- refusals

GLU = {"placement": "glu", "experts": {"name": "glu", "dim": M}}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"placement": "glu"}, r"experts=\{'name': 'glu', 'dim': 128\}"),
        ({"placement": "glu", "experts": "shared_a"}, "change a single linear"),
        ({"experts": "glu"}, r"placement='linear'.*Use placement='glu'"),
        ({"placement": "ffn", "experts": "glu"}, r"placement='ffn'.*Use placement='glu'"),
        ({**GLU, "granularity": 2}, "granularity=2 .*'glu', which set the width"),
        ({**GLU, "init_lora_weights": "gaussian"}, "'gaussian' does not go with experts 'glu'"),
        ({**GLU, "init_lora_weights": "svd_segments"}, "'svd_segments' starts LoRA experts"),
        ({**GLU, "experts": {"name": "glu", "dim": 0}}, "dim=0"),
        ({**GLU, "experts": {"name": "glu", "scale": 0.0}}, "scale=0.0"),
    ],
)
def test_what_contradicts_it_is_refused_at_construction(fields, message):
    with pytest.raises(ConfigError, match=message):
        MoeLoraConfig(target_modules="all-linear", **fields)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"target_modules": ["up_proj"]}, r"output of 'model.layers.0.mlp.down_proj', which is"),
        ({"target_modules": ["q_proj"]}, "placement='glu' found no FFN among"),
        ({"rank_pattern": {"down_proj": 2}}, "rank_pattern gives .*down_proj' 2, but experts"),
        ({"alpha_pattern": {r".*\.mlp\..*": 2}}, "alpha_pattern gives"),
        ({"balance": {"orthogonal": 0.1}}, "GluBank do not have"),
    ],
)
def test_what_does_not_fit_the_model_is_refused_before_it_is_touched(fields, message):
    base = tiny("llama")
    with pytest.raises(ConfigError, match=message):
        adapt(base, moe_config("glu", **fields))
    assert not [m for m in base.modules() if isinstance(m, MoeLoraLinear)]


def test_an_ffn_that_does_not_show_its_parts_is_refused():
    with pytest.raises(ConfigError, match=r"cannot tell the output projection .* 0 do not have"):
        adapt(tiny("llama", intermediate_size=HIDDEN), moe_config("glu"))
    base = tiny("llama")
    for layer in base.model.layers:
        del layer.mlp.act_fn
    with pytest.raises(ConfigError, match=r"activation of the base FFN, .*'act_fn'"):
        adapt(base, moe_config("glu"))


def test_one_expert_is_no_matrix():
    with pytest.raises(UnsupportedError, match="no matrix"):
        make_bank("glu").delta_weight(0)
