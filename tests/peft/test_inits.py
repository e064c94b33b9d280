"""Starts that are computed: from the base weight, from data, from trained adapters."""

import json
import math
import os
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from torch.testing import assert_close
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, TorchAoConfig

import moeadapt
from moeadapt.errors import ConfigError
from moeadapt.tuner import MoeLoraLinear
from moeadapt.tuner.init import spherical_kmeans
from tests.tiny import KINDS, LORA_KINDS, adapt, adapted, batch, gradients, logits, moe_config, tiny

SVD = {"init_lora_weights": "svd_segments", "r": 2}
TARGETS = ["q_proj", "down_proj"]


def layers(model: nn.Module, adapter: str = "default") -> dict[str, MoeLoraLinear]:
    return {m.moe_plans[adapter].key: m for m in model.modules() if isinstance(m, MoeLoraLinear)}


# --- segments of the base weight


def test_experts_start_from_the_segments_of_the_papers_formula():
    for layer in layers(adapted("llama", "layer", **SVD)).values():
        bank, weight = layer.moe_banks["default"], layer.base_layer.weight.detach()
        scale = math.sqrt(3 * layer.in_features / 2)
        u, s, vh = torch.linalg.svd(weight, full_matrices=False)
        assert bank.size.scale == scale
        for e in range(4):
            first = e * (len(s) // 4)
            part = sum(s[first + i] * torch.outer(u[:, first + i], vh[first + i]) for i in range(2))
            # rho = 10; the two square roots of 1 / (s rho) leave 1 / 10 of the segment.
            assert_close(bank.delta_weight(e).detach(), part / 10, rtol=1e-4, atol=1e-5)
        a, b = bank.factor("lora_A").weight, bank.factor("lora_B").weight
        assert_close(a.norm(dim=-1), b.norm(dim=0), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", LORA_KINDS)
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_equal_weights_start_as_the_base_and_the_base_is_never_changed(name, kind):
    base, inputs = tiny(name), batch()
    before = {n: p.clone() for n, p in base.state_dict().items()}
    expected = logits(base, inputs)
    model = adapt(base, moe_config(kind, router="uniform", n_shared=1, **SVD))
    if kind != "ffn":
        assert_close(logits(model, inputs), expected, rtol=1e-4, atol=1e-4)
    with model.disable_adapter():
        assert torch.equal(logits(model, inputs), expected)
    after = model.unload()
    assert all(torch.equal(p, before[n]) for n, p in after.state_dict().items())
    assert torch.equal(logits(after, inputs), expected)


def test_uneven_weights_mix_what_is_left_of_the_base_with_the_segments():
    layer = layers(adapted("llama", "layer", **SVD))["model.layers.0.mlp.down_proj"]
    bank, weight = layer.moe_banks["default"], layer.base_layer.weight
    x = torch.randn(5, layer.in_features)
    routed = layer.moe_heads["default"](x)
    deltas = [bank.delta_weight(e) for e in range(4)]
    left = weight - sum(deltas) / 4
    expected = x @ left.T + sum(routed[:, e : e + 1] * (x @ d.T) for e, d in enumerate(deltas))
    assert_close(layer(x), expected, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(layer(x), x @ weight.T, rtol=1e-2, atol=1e-2)


def test_what_is_subtracted_stays_when_the_experts_are_trained():
    layer = layers(adapted("llama", "layer", **SVD))["model.layers.0.mlp.down_proj"]
    before = [layer.moe_banks["default"].delta_weight(e).detach() for e in range(4)]
    layer.moeadapt_lora_B["default"].weight.data.zero_()
    x = torch.randn(5, layer.in_features)
    left = layer.base_layer.weight - sum(before) / 4
    assert_close(layer(x), x @ left.T, rtol=1e-4, atol=1e-4)


def test_a_trained_adapter_is_the_same_after_loading_to_train_on(tmp_path):
    model = adapted("llama", "block", **SVD)
    for name, p in model.named_parameters():
        if p.requires_grad:
            p.data.add_(0.1 * torch.randn_like(p), alpha=1.0 if "lora" in name else 0.0)
    expected = logits(model, batch())
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(tiny("llama"), tmp_path, is_trainable=True).eval()
    assert torch.equal(logits(again, batch()), expected)
    assert gradients(again, batch()).keys() == gradients(model, batch()).keys()
    sparing = PeftModel.from_pretrained(tiny("llama"), tmp_path, low_cpu_mem_usage=True).eval()
    assert torch.equal(logits(sparing, batch()), expected)


def test_two_adapters_subtract_each_their_own():
    model = adapted("llama", "layer", router="uniform", **SVD)
    model.add_adapter("other", moe_config("layer", router="uniform", **{**SVD, "r": 3}))
    model.base_model.set_adapter(["default", "other"])
    assert_close(logits(model, batch()), logits(tiny("llama"), batch()), rtol=1e-4, atol=1e-4)


def quantization(name: str) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if name == "torchao":
            pytest.importorskip("torchao")
            from torchao.quantization import Int8WeightOnlyConfig

            return TorchAoConfig(Int8WeightOnlyConfig())
        pytest.importorskip("bitsandbytes")
    if name == "bnb8":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.float32)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore:MatMul8bitLt:UserWarning")
@pytest.mark.parametrize("name", ["bnb4", "bnb8", "torchao"])
def test_a_quantised_base_gives_its_segments_and_stays(name, tmp_path):
    config = quantization(name)
    tiny("llama", hidden_size=64, intermediate_size=128, head_dim=32).save_pretrained(tmp_path)
    base = AutoModelForCausalLM.from_pretrained(
        tmp_path, quantization_config=config, device_map={"": "cpu"}, dtype=torch.float32
    ).eval()
    expected = logits(base, batch())
    model = adapt(base, moe_config("layer", router="uniform", **SVD))
    for layer in layers(model).values():
        assert layer.moe_banks["default"].delta_weight(3).any()
    assert_close(logits(model, batch()), expected, rtol=1e-3, atol=1e-3)
    with model.disable_adapter():
        assert torch.equal(logits(model, batch()), expected)


# --- routers from data


def inputs_of(model: nn.Module, inputs: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Return what each linear sees at real tokens."""
    seen, mask = {}, inputs["attention_mask"].bool()
    found = layers(model)
    handles = [
        m.register_forward_pre_hook(lambda _, args, k=k: seen.update({k: args[0][mask]}))
        for k, m in found.items()
    ]
    logits(model, inputs)
    for handle in handles:
        handle.remove()
    return seen


def test_clusters_become_the_gate():
    torch.manual_seed(0)
    centres = torch.linalg.qr(torch.randn(6, 4))[0].T
    own = torch.arange(200) % 4
    x = centres[own] * (1 + torch.rand(200, 1)) + 0.05 * torch.randn(200, 6)
    found = spherical_kmeans(x, 4, 10, torch.Generator().manual_seed(1))
    cosine = found @ centres.T
    assert (cosine.amax(-1) > 0.99).all()
    assert sorted(cosine.argmax(-1).tolist()) == [0, 1, 2, 3]


@pytest.mark.parametrize("kind", KINDS)
def test_every_gate_follows_the_inputs_of_its_own_layer(kind):
    model = adapted("llama", kind, router={"name": "top_k", "bias": True})
    routers = [h["default"].router for h in [m.moe_heads for m in layers(model).values()] if h]
    before = [r.weight.detach().clone() for r in routers]
    rows = [r.weight.shape for r in routers]
    moeadapt.init_routers_kmeans(model, [batch(), batch(seed=1)])
    for old, router, shape in zip(before, routers, rows, strict=True):
        assert router.weight.shape == shape
        assert not torch.allclose(router.weight, old)
        length = router.weight.norm(dim=-1).mean()
        assert_close(length, old.norm(dim=-1).mean(), rtol=1e-4, atol=1e-5)
        assert_close(router.weight.sum(0), torch.zeros(shape[1]), rtol=0, atol=1e-5)
    assert router.weight.requires_grad


def test_inputs_of_one_cluster_go_to_one_expert():
    # With zero B the new routing of one layer does not change the inputs of the next.
    model = adapted("llama", "layer", init_lora_weights=True)
    inputs = batch(rows=4, length=12)
    moeadapt.init_routers_kmeans(model, [inputs], steps=50)
    for key, x in inputs_of(model, inputs).items():
        layer = layers(model)[key]
        weight = layer.moe_heads["default"].router.weight
        x = nn.functional.normalize(x, dim=-1)
        own = (x @ weight.T).argmax(-1)
        assert len(own.unique()) == 4
        # A fixed point of the iteration: each input is nearest to the mean of its own group.
        means = torch.stack([x[own == e].mean(0) for e in range(4)])
        nearest = (x @ nn.functional.normalize(means, dim=-1).T).argmax(-1)
        assert torch.equal(nearest, own)


def test_padding_and_the_global_seed_do_not_matter():
    inputs = batch()
    other = {**inputs, "input_ids": inputs["input_ids"].clone()}
    other["input_ids"][inputs["attention_mask"] == 0] = 77
    gates = []
    for seed, each in enumerate((inputs, other)):
        model = adapted("llama", "layer")
        torch.manual_seed(seed)
        moeadapt.init_routers_kmeans(model, [each])
        gates.append([p for n, p in model.named_parameters() if "router" in n])
    for a, b in zip(*gates, strict=True):
        assert_close(a, b)
    moeadapt.init_routers_kmeans(model, [inputs], seed=5)
    assert any(not torch.equal(a, b) for a, b in zip(*gates, strict=True))


def test_the_model_is_left_in_the_modes_it_was_in():
    model = adapted("llama", "layer").train()
    model.get_submodule("base_model.model.model.layers.0").eval()
    before = [m.training for m in model.modules()]
    hooks = [len(m._forward_pre_hooks) for m in model.modules()]
    moeadapt.init_routers_kmeans(model, [batch()])
    assert [m.training for m in model.modules()] == before
    assert [len(m._forward_pre_hooks) for m in model.modules()] == hooks


@pytest.mark.parametrize(
    ("router", "message"),
    [
        ("uniform", "UniformRouter"),
        ({"name": "cosine", "dim": 4}, "CosineRouter"),
        ({"name": "top_k", "per": "sequence"}, "per='sequence'"),
        ({"name": "top_k", "null_experts": 2}, r"gate of shape \[6, 32\]"),
    ],
)
def test_a_router_without_such_a_gate_is_refused_and_unchanged(router, message):
    model = adapted("llama", "layer", router=router)
    before = {n: p.clone() for n, p in model.state_dict().items()}
    with pytest.raises(ConfigError, match=message):
        moeadapt.init_routers_kmeans(model, [batch()])
    assert all(torch.equal(p, before[n]) for n, p in model.state_dict().items())


def test_too_few_tokens_are_refused():
    model = adapted("llama", "layer")
    for fields in ({"batches": []}, {"batches": [batch()], "max_tokens": 3}):
        with pytest.raises(ConfigError, match="real tokens, fewer than its 4 experts"):
            moeadapt.init_routers_kmeans(model, **fields)
    with pytest.raises(ConfigError, match="no mixture"):
        moeadapt.init_routers_kmeans(tiny("llama"), [batch()])


# --- experts from adapters


def trained(folder, seed: int, base: str = "llama", **fields: Any) -> str:
    """Save a random LoRA adapter."""
    config = LoraConfig(
        **{"r": 3, "lora_alpha": 5, "target_modules": TARGETS, "init_lora_weights": False, **fields}
    )
    path = folder / f"{base}-{seed}"
    adapt(tiny(base), config, seed=seed).save_pretrained(path)
    return str(path)


def target(**fields: Any) -> PeftModel:
    return adapted("llama", "layer", target_modules=TARGETS, init_lora_weights=True, **fields)


@pytest.mark.parametrize("rslora", [False, True])
def test_each_expert_adds_what_its_adapter_added(rslora, tmp_path):
    folders = [
        trained(tmp_path, 0, use_rslora=rslora),
        trained(tmp_path, 1, r=1, alpha_pattern={"q_proj": 7}),
        trained(tmp_path, 2, rank_pattern={"down_proj": 2}),
        trained(tmp_path, 3, r=4),
    ]
    model = target(n_shared=1)
    moeadapt.init_from_adapters(model, folders)
    for e, folder in enumerate(folders):
        theirs = PeftModel.from_pretrained(tiny("llama"), folder)
        for key, layer in layers(model).items():
            other = theirs.get_submodule(f"base_model.model.{key}")
            found = layer.moe_banks["default"].delta_weight(e)
            assert_close(found, other.get_delta_weight("default"))
    for layer in layers(model).values():
        assert not layer.moe_banks["default"].delta_weight(4).any()


def test_uneven_experts_take_adapters_of_their_ranks(tmp_path):
    folders = [trained(tmp_path, seed, r=rank) for seed, rank in enumerate((1, 4))]
    spec = {"name": "heterogeneous", "ranks": [1, 4]}
    model = target(num_experts=2, experts=spec)
    moeadapt.init_from_adapters(model, folders)
    for e, folder in enumerate(folders):
        theirs = PeftModel.from_pretrained(tiny("llama"), folder)
        for key, layer in layers(model).items():
            other = theirs.get_submodule(f"base_model.model.{key}")
            found = layer.moe_banks["default"].delta_weight(e)
            assert_close(found, other.get_delta_weight("default"))
    with pytest.raises(ConfigError, match="has rank 4, more than the 1 of expert 0"):
        moeadapt.init_from_adapters(model, folders[::-1])


def test_one_expert_is_the_adapters_model(tmp_path):
    folder = trained(tmp_path, 0)
    model = target(num_experts=1, router="uniform")
    moeadapt.init_from_adapters(model, [folder])
    theirs = PeftModel.from_pretrained(tiny("llama"), folder).eval()
    assert_close(logits(model, batch()), logits(theirs, batch()), rtol=1e-4, atol=1e-4)


def test_unused_ranks_can_still_be_trained(tmp_path):
    model = target(num_experts=1, router="uniform")
    moeadapt.init_from_adapters(model, [trained(tmp_path, 0)])
    grads = gradients(model, batch())
    for name, grad in grads.items():
        if "lora_B" in name:
            assert grad[:, 3].any()


def _break_config(**fields):
    def change(folder):
        path = Path(folder, "adapter_config.json")
        path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))

    return change


def _break_file(change):
    def apply(folder):
        path = f"{folder}/adapter_model.safetensors"
        save_file(change(load_file(path)), path)

    return apply


def _remove(name):
    return lambda folder: Path(folder, name).unlink()


def _garbage(folder):
    Path(folder, "adapter_model.safetensors").write_bytes(b"no tensors")


def _pipe(folder):
    path = Path(folder, "adapter_model.safetensors")
    path.unlink()
    os.mkfifo(path)


BROKEN = {
    "no tensors": (_remove("adapter_model.safetensors"), "has no adapter_model.safetensors"),
    "no config": (_remove("adapter_config.json"), "has no adapter_config.json"),
    "damaged": (_garbage, "cut off or no safetensors file"),
    "method": (_break_config(peft_type="IA3"), "is no LoRA adapter"),
    "dora": (_break_config(use_dora=True), "it uses use_dora"),
    "bias": (_break_config(bias="all"), "it uses bias"),
    "pissa": (_break_config(init_lora_weights="pissa_niter_4"), "changes the base"),
    "alpha": (_break_config(lora_alpha="much"), "lora_alpha='much'"),
    "stranger": (_break_file(lambda t: {**t, "x.magnitude": torch.ones(2)}), "'x.magnitude'"),
    "half": (
        _break_file(lambda t: {n: v for n, v in t.items() if "0.mlp.down_proj.lora_B" not in n}),
        "do not belong together",
    ),
    "modules": (
        _break_file(lambda t: {n: v for n, v in t.items() if "q_proj" not in n}),
        "other modules.*'model.layers.0.self_attn.q_proj'",
    ),
    "nan": (_break_file(lambda t: {n: v * float("nan") for n, v in t.items()}), "NaN"),
    "infinite alpha": (_break_config(lora_alpha=float("nan")), "no finite number"),
    "list of alphas": (_break_config(alpha_pattern=["x"]), "must map patterns to numbers"),
    "no pattern": (_break_config(alpha_pattern={"(": 1}), "not a valid regular expression"),
    "endless": (
        _break_config(alpha_pattern={r"(.+)+\d\dx": 8}),
        "the pattern in alpha_pattern takes longer",
    ),
    "many": (
        _break_config(alpha_pattern={f"a{i}": 1 for i in range(3000)}),
        "has 3000 patterns; at most 2048",
    ),
    "no rank": (
        _break_file(
            lambda t: {n: v[:0] if "lora_A" in n else v[:, :0].clone() for n, v in t.items()}
        ),
        "do not belong together",
    ),
    "vector": (
        _break_file(lambda t: {n: v[:, 0].clone() if "lora_B" in n else v for n, v in t.items()}),
        "do not belong together",
    ),
    "pipe": (_pipe, "is a pipe, not a file"),
    "shape": (
        _break_file(lambda t: {n: v[:, :9].clone() if "lora_A" in n else v for n, v in t.items()}),
        "maps 9 -> 32, but the model's maps 64 -> 32",
    ),
}


@pytest.mark.parametrize(("change", "message"), list(BROKEN.values()), ids=list(BROKEN))
def test_a_bad_last_folder_changes_nothing(change, message, tmp_path):
    folders = [trained(tmp_path, seed) for seed in range(4)]
    change(folders[-1])
    model = target()
    before = {n: p.clone() for n, p in model.state_dict().items()}
    with pytest.raises(ConfigError, match=message):
        moeadapt.init_from_adapters(model, folders)
    assert all(torch.equal(p, before[n]) for n, p in model.state_dict().items())


def test_adapters_that_do_not_fit_the_experts_are_refused(tmp_path):
    folders = [trained(tmp_path, seed) for seed in range(4)]
    with pytest.raises(ConfigError, match="3 adapters for the 4 routed experts"):
        moeadapt.init_from_adapters(target(), folders[:3])
    with pytest.raises(ConfigError, match="has rank 3, more than the 2 of expert 0; raise r"):
        moeadapt.init_from_adapters(target(r=2), folders)
    with pytest.raises(ConfigError, match="no moeadapt adapter 'other'"):
        moeadapt.init_from_adapters(target(), folders, adapter="other")
    for fields in ({"experts": "shared_a"}, {"init_lora_weights": "svd_segments", "r": 4}):
        with pytest.raises(ConfigError, match="cannot start from LoRA adapters"):
            moeadapt.init_from_adapters(adapted("llama", "layer", **fields), folders)
    with pytest.raises(ConfigError, match="no routed experts under placement='ffn'"):
        moeadapt.init_from_adapters(adapted("llama", "ffn"), folders)
    with pytest.raises(ConfigError, match="no mixture"):
        moeadapt.init_from_adapters(get_peft_model(tiny("llama"), LoraConfig()), folders)
