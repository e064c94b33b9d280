"""Shortcuts step aside where somebody would notice: hooks, patches, activations, threads."""

import threading

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from moeadapt.dispatch import dispatch, dispatch_reference
from moeadapt.errors import UnsupportedError
from moeadapt.experts.generation import Generation
from tests.samples import OUT, E, T, hidden, make_bank
from tests.tiny import adapted, batch, labels_of, logits


def layers_of(model: nn.Module) -> nn.ModuleList:
    """Return the decoder layers of a small Llama with an adapter."""
    return model.base_model.model.model.layers


@pytest.mark.parametrize("kind", ["block", "ffn", "glu"])
def test_a_second_thread_is_refused_and_the_first_one_is_right(kind):
    """The routing of a running block belongs to the model."""
    model, inputs = adapted("llama", kind).eval(), batch()
    inside, done, found = threading.Event(), threading.Event(), []

    def wait(*_):
        if threading.current_thread() is not threading.main_thread():
            inside.set()
            assert done.wait(60)

    # In the middle of the first FFN.
    layers_of(model)[0].mlp.act_fn.register_forward_hook(wait)
    alone = logits(model, inputs)
    thread = threading.Thread(target=lambda: found.append(logits(model, inputs)))
    thread.start()
    assert inside.wait(60)
    with pytest.raises(UnsupportedError, match="another thread"):
        logits(model, inputs)
    done.set()
    thread.join()
    assert torch.equal(found[0], alone)
    assert torch.equal(logits(model, inputs), alone)


def test_a_hook_on_the_activation_is_called_and_heard():
    model = adapted("llama", "ffn").eval()
    before = logits(model, batch())
    for layer in layers_of(model):
        layer.mlp.act_fn.register_forward_hook(lambda module, args, out: out * 0)
    assert (logits(model, batch()) - before).abs().max() > 1e-4


def test_an_activation_with_a_parameter_gets_its_gradient():
    class Swish(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.beta = nn.Parameter(torch.ones(()))

        def forward(self, x):
            return x * torch.sigmoid(self.beta * x)

    model, inputs = adapted("llama", "ffn").train(), batch()
    for layer in layers_of(model):
        layer.mlp.act_fn = Swish()
    model(**inputs, labels=labels_of(inputs)).loss.backward()
    assert all(layer.mlp.act_fn.beta.grad is not None for layer in layers_of(model))


def test_an_activation_that_works_in_place_trains_as_one_that_does_not():
    gradients = []
    for inplace in (False, True):
        model, inputs = adapted("llama", "ffn").train(), batch()
        for layer in layers_of(model):
            layer.mlp.act_fn = nn.ReLU(inplace=inplace)
        model(**inputs, labels=labels_of(inputs)).loss.backward()
        grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        gradients.append(grads)
    assert gradients[0].keys() == gradients[1].keys()
    for name, value in gradients[0].items():
        assert_close(gradients[1][name], value)


def test_an_ffn_whose_class_is_patched_later_runs_the_patch(monkeypatch):
    model = adapted("llama", "ffn").eval()
    before = logits(model, batch())
    cls = type(layers_of(model)[0].mlp)

    def silent(self, x):
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x)) * 0

    monkeypatch.setattr(cls, "forward", silent)
    assert (logits(model, batch()) - before).abs().max() > 1e-4


@pytest.mark.parametrize("kind", ["block", "ffn"])
def test_a_linear_in_eval_mode_sees_nothing_of_its_neighbours_dropout(kind):
    model = adapted("llama", kind, lora_dropout=0.5, init_lora_weights=False).train()
    attention = layers_of(model)[0].self_attn
    block = kind == "block"
    parts = (attention.k_proj, attention.v_proj) if block else (layers_of(model)[0].mlp.up_proj,)
    first = layers_of(model)[0]
    parent = first.self_attn if block else first.mlp
    for part in parts:
        part.eval()
    seen = []
    parts[0].register_forward_hook(lambda module, args, out: seen.append(out.detach().clone()))
    x = torch.randn(1, 5, 32)
    reader = attention.q_proj if block else first.mlp.gate_proj
    for seed in (0, 1):
        torch.manual_seed(seed)
        reader.moe_blocks["default"].enter(parent, (x,), {})
        reader(x)
        parts[0](x)
    assert torch.equal(*seen)


def test_an_input_changed_between_two_linears_is_read_again():
    def outputs(change: bool):
        model = adapted("llama", "block", init_lora_weights=False).eval()
        attention = layers_of(model)[0].self_attn
        x = torch.randn(1, 5, 32, generator=torch.Generator().manual_seed(0))
        attention.q_proj.moe_blocks["default"].enter(attention, (x,), {})
        weights = attention.q_proj.moe_blocks["default"].routing("default").weights
        attention.q_proj(x)
        if change:
            x.mul_(2)
        flat = x.view(-1, 32)
        bank = attention.k_proj.moe_banks["default"]
        slow = dispatch_reference(flat, weights, bank, attention.k_proj.base_layer(flat))
        return attention.k_proj(x).view(-1, slow.shape[-1]), slow

    with torch.no_grad():
        for change in (False, True):
            assert_close(*outputs(change))


def test_a_base_output_that_somebody_keeps_is_not_written_to():
    model = adapted("llama", "layer", init_lora_weights=False).eval()
    linear = layers_of(model)[0].self_attn.q_proj
    kept = torch.randn(5, 32)
    linear.base_layer.forward = lambda x: kept
    with torch.no_grad():
        before = kept.clone()
        linear(torch.randn(1, 5, 32))
    assert torch.equal(kept, before)


@pytest.mark.parametrize("form", ["concat", "grouped", "gather"])
def test_an_unused_slot_of_an_expert_that_overflows_is_harmless_in_every_form(form):
    bank = make_bank("lora", 8, 8)
    for name in bank.factor_names:
        bank.factor(name).half()
    with torch.no_grad():
        bank.factor("lora_A").weight[bank.size.rank :] = 6e4
    bank.impl = form
    weights = torch.zeros(T, E).half()
    weights[:, 0] = 1.0
    x = torch.ones(T, 8).half()
    if form == "grouped" and bank.size.rank % 8:
        with pytest.raises(UnsupportedError, match="multiples"):
            dispatch(x, weights, bank, torch.zeros(T, 8).half(), max_active=2)
        return
    y = dispatch(x, weights, bank, torch.zeros(T, 8).half(), max_active=2)
    assert y.isfinite().all()


class Cache:
    """Anything that can be followed."""


def test_a_kept_copy_is_that_of_the_matrix_and_not_of_its_address():
    generation, cache = Generation(), Cache()
    generation.enter(cache)
    with torch.no_grad():
        for value in range(50):
            matrix = nn.Parameter(torch.full((3, 3), float(value)))
            assert generation.cast(matrix, torch.bfloat16)[0, 0] == value
            del matrix


def test_a_new_prompt_and_the_end_of_the_cache_drop_every_copy():
    generation, cache = Generation(), Cache()
    matrix = torch.ones(3, 3)
    with torch.no_grad():
        generation.enter(cache)
        generation.cast(matrix, torch.bfloat16)
        matrix.data.mul_(2)
        generation.enter(cache, tokens=5)
        assert generation.cast(matrix, torch.bfloat16)[0, 0] == 2
        del cache
        assert not generation._kept
        assert not generation.keeps


def test_matrices_that_do_not_tell_when_they_change_are_not_kept():
    generation, cache = Generation(), Cache()
    with torch.inference_mode():
        matrix = torch.ones(3, 3)
        generation.enter(cache)
        generation.cast(matrix, torch.bfloat16)
        matrix.mul_(-3)
        assert generation.cast(matrix, torch.bfloat16)[0, 0] == -3


def test_a_cache_that_cannot_be_followed_is_a_forward_without_one():
    generation = Generation()
    generation.enter([])
    assert not generation.keeps


def test_a_weight_of_zero_keeps_its_gradient_in_float16():
    """Straight-through samples are 0 in value and not in gradient."""
    found = {}
    for dtype in (torch.float16, torch.float32):
        torch.manual_seed(0)
        bank = make_bank("lora")
        for name in bank.factor_names:
            bank.factor(name).to(dtype)
        weights = torch.zeros(T, E, dtype=dtype, requires_grad=True)
        x, onto = hidden().to(dtype) * 0.1, torch.zeros(T, OUT, dtype=dtype)
        dispatch(x, weights, bank, onto).sum().backward()
        found[dtype] = weights.grad.float()
    assert found[torch.float32].abs().max() > 1e-3
    assert_close(found[torch.float16], found[torch.float32], rtol=2e-2, atol=2e-2)
