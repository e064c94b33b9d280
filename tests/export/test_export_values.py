"""A written mixture is the adapter, in every pair of classes, after save and load."""

import importlib

import pytest
import torch
from torch.testing import assert_close
from transformers import AutoModelForCausalLM

import moeadapt
from moeadapt.errors import UnsupportedError
from moeadapt.export import receipt as receipts
from moeadapt.export.receipt import Receipt
from moeadapt.export.verify import load_strictly
from tests.export.bases import FFN, base, token_ids
from tests.tiny import adapt, logits, moe_config

parity = importlib.import_module("moeadapt.export.parity")

TOLERANCE = {"rtol": 0.0, "atol": 1e-4}
TEXT = {"input_ids": token_ids()}


def router(name, **options):
    return {"router": {"name": name, "init_std": 0.5, **options}}


def mixture(name, kind="ffn", **overrides):
    return adapt(base(name), moe_config(kind, **overrides))


def check(model, out, target="auto", **settings):
    """Export `model`, and compare by its own forward, apart from what the receipt says."""
    receipt = moeadapt.export(model, out, target, **settings)
    expected = logits(model, TEXT)
    plain = logits(model.get_base_model(), TEXT)
    with model.disable_adapter():
        without = logits(model, TEXT)
    assert_close(plain, expected)
    assert (without - expected).abs().max() > 0.1
    found = load_strictly(out)
    for implementation in ("eager", "grouped_mm"):
        found.set_experts_implementation(implementation)
        assert_close(logits(found, TEXT), expected, **TOLERANCE)
    return receipt


WHOLE = {
    "llama": "mixtral",
    "llama, tied, llama3 rope": "mixtral",
    "llama, attention biases": "granite_moe",
    "mistral, window": "mixtral",
    "phi3": "mixtral",
    "qwen2": "qwen2_moe",
    "qwen3": "qwen3_moe",
    "olmo2": "flex_olmo",
    "granite": "granite_moe",
    "ernie4_5": "ernie4_5_moe",
    "cohere2": "cohere2_moe",
    "hunyuan": "hunyuan_moe_v1",
}


@pytest.mark.parametrize("name", WHOLE)
def test_a_mixture_of_whole_ffns_with_attention_lora_is_its_stock_class(name, tmp_path):
    receipt = check(mixture(name), tmp_path / "moe")
    assert (receipt.target, receipt.num_experts, receipt.top_k) == (WHOLE[name], 4, 2)
    assert receipt.settings["merged_linears"] == (4 if name == "phi3" else 8)


@pytest.mark.parametrize("name", ["qwen3_5", "lfm2"])
def test_a_mixture_without_attention_lora_is_its_stock_class(name, tmp_path):
    targets = ["gate_proj", "up_proj", "down_proj"] if name == "qwen3_5" else ["w1", "w2", "w3"]
    options = router("sigmoid" if name == "lfm2" else "top_k", k=2)
    receipt = check(mixture(name, target_modules=targets, **options), tmp_path / "moe")
    assert receipt.target == f"{name}_moe"


def test_a_base_that_amplifies_rounding_is_compared_in_float64(tmp_path, monkeypatch):
    # How much it amplifies depends on the order of sums; any rounding at all is too much here.
    monkeypatch.setattr(receipts, "TOLERANCE", 1e-9)
    monkeypatch.setattr(receipts, "RELATIVE_TOLERANCE", 1e-12)
    receipt = moeadapt.export(mixture("qwen3_5"), tmp_path / "moe")
    assert receipt.measured.max_logit_difference > receipt.tolerance
    assert receipt.settings["float64_difference"] < 1e-4
    assert receipt.settings["merged_linears"] == 9


SMALL = [
    ("llama", "top_k", "granite_moe_shared"),
    ("llama", "sigmoid", "glm4_moe"),
    ("phi3", "top_k", "granite_moe_shared"),
    ("phi3", "sigmoid", "glm4_moe"),
    ("qwen2", "top_k", "qwen2_moe"),
    ("qwen2", "sigmoid", "glm4_moe"),
    ("qwen3", "sigmoid", "glm4_moe"),
    ("qwen3_5", "top_k", "qwen3_5_moe"),
    ("granite", "top_k", "granite_moe_shared"),
    ("ernie4_5", "top_k", "ernie4_5_moe"),
    ("cohere2", "top_k", "cohere2_moe"),
]


@pytest.mark.parametrize(("name", "scoring", "target"), SMALL)
def test_small_experts_beside_the_ffn_are_their_stock_class(name, scoring, target, tmp_path):
    receipt = check(mixture(name, "glu", **router(scoring, k=2)), tmp_path / "moe")
    assert receipt.target == target
    # 6 hidden units are filled up to what grouped kernels take.
    assert (receipt.settings["expert_width"], receipt.settings["shared_width"]) == (8, FFN)


VARIANTS = {
    "all experts, softmax": ("llama", "ffn", router("soft"), (4, 4)),
    "random": ("llama", "ffn", router("random", k=2), (4, 2)),
    "gumbel": ("llama", "ffn", router("gumbel"), (4, 4)),
    "straight-through": ("llama", "ffn", router("gumbel", straight_through=True), (4, 1)),
    "uniform": ("llama", "ffn", {"router": "uniform"}, (4, 4)),
    "all of top_k, unnormalised": ("llama", "ffn", router("top_k", k=4, normalize="none"), (4, 4)),
    "one, renormalised": (
        "llama", "ffn", router("top_k", k=1, normalize="renorm", freeze=True), (4, 1),
    ),
    "temperature": ("llama", "ffn", router("top_k", k=2, temperature=0.5), (4, 2)),
    "null, one expert": (
        "llama",
        "ffn",
        router("top_k", k=1, null_experts=2, normalize="renorm", freeze=True),
        (6, 1),
    ),
    "null, all experts": ("llama", "ffn", router("top_k", k=6, null_experts=2), (4, 4)),
    "null, all experts, unnormalised": (
        "llama", "ffn", router("top_k", k=6, null_experts=2, normalize="none"), (6, 6),
    ),
    "null, small experts": (
        "qwen2", "glu", router("top_k", k=2, null_experts=2, normalize="none"), (6, 2),
    ),
    "switch, small experts": ("qwen2", "glu", router("switch"), (4, 1)),
    "sigmoid, scaled": ("qwen3", "glu", router("sigmoid", k=2, scale=2.5, renorm=False), (4, 2)),
    "shared": ("llama", "ffn", {"n_shared": 2}, (4, 2)),
    "shared, fused linears": ("phi3", "ffn", {"n_shared": 1}, (4, 2)),
    "shared, small experts": ("llama", "glu", {"n_shared": 2}, (4, 2)),
    "shared, small experts counted in units": (
        "llama", "glu", {"n_shared": 1, **router("sigmoid", k=2)}, (4, 2),
    ),
    "granular": ("llama", "ffn", {"granularity": 2}, (8, 4)),
    "schedule": (
        "llama",
        "ffn",
        {"schedule": {"temperature": {"start": 4.0, "end": 0.5, "steps": 9}, "k_inference": 3}},
        (4, 3),
    ),
    "segments of the base": ("llama", "ffn", {"init_lora_weights": "svd_segments"}, (4, 2)),
    "ranks": (
        "llama", "ffn", {"experts": {"name": "heterogeneous", "ranks": [2, 4, 4, 6]}}, (4, 2),
    ),
    "shared A": ("llama", "ffn", {"experts": "shared_a"}, (4, 2)),
    "shared B": ("llama", "ffn", {"experts": "shared_b"}, (4, 2)),
    "rank patterns": ("llama", "ffn", {"rank_pattern": {"up_proj": 6, "q_proj": 3}}, (4, 2)),
    "one layer": (
        "qwen3",
        "ffn",
        {"layers_to_transform": [1], "target_modules": ["gate_proj", "up_proj", "down_proj"]},
        (4, 2),
    ),
    "one layer, small experts": (
        "qwen2", "glu", {"layers_to_transform": [0], "target_modules": ["down_proj"]}, (4, 2),
    ),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:.*never trains the router")
@pytest.mark.parametrize("case", VARIANTS)
def test_settings_are_carried_over_exactly(case, tmp_path):
    name, kind, overrides, expected = VARIANTS[case]
    receipt = check(mixture(name, kind, **overrides), tmp_path / "moe")
    assert (receipt.num_experts, receipt.top_k) == expected


@pytest.mark.parametrize(
    ("name", "kind", "options"),
    [
        ("ernie4_5", "ffn", router("top_k", k=2)),
        ("ernie4_5", "ffn", router("top_k", k=1, normalize="renorm", freeze=True)),
        ("llama", "glu", router("sigmoid", k=2)),
        ("llama", "glu", router("sigmoid", k=1)),
    ],
)
def test_a_selection_bias_is_written_where_the_class_has_one(name, kind, options, tmp_path):
    model = mixture(name, kind, balance={"loss_free": 0.001}, **options)
    before = logits(model, TEXT)
    for module in model.modules():
        if getattr(module, "selection_bias", None) is not None:
            module.selection_bias.copy_(torch.tensor([0.4, -0.3, 0.0, 0.2]))
    assert (logits(model, TEXT) - before).abs().max() > 0.1
    check(model, tmp_path / "moe")


def test_a_selection_bias_on_sigmoids_does_not_go_to_a_class_of_softmax(tmp_path):
    model = mixture("ernie4_5", balance={"loss_free": 0.001}, **router("sigmoid", k=1))
    for module in model.modules():
        if getattr(module, "selection_bias", None) is not None:
            module.selection_bias.copy_(torch.tensor([0.4, -0.3, 0.0, 0.2]))
    with pytest.raises(UnsupportedError, match="sigmoid"):
        moeadapt.export(model, tmp_path / "moe")


def test_a_head_trained_in_full_is_written(tmp_path):
    model = mixture("llama", modules_to_save=["lm_head"])
    with torch.no_grad():
        trained = model.get_base_model().lm_head.modules_to_save["default"].weight
        trained.mul_(1.5)
    check(model, tmp_path / "moe")
    assert_close(load_strictly(tmp_path / "moe").lm_head.weight, trained, rtol=0.0, atol=0.0)


@pytest.mark.parametrize(
    ("name", "kind", "options"), [("qwen3", "ffn", {}), ("llama", "glu", router("sigmoid", k=2))]
)
def test_greedy_generation_is_the_same_for_64_tokens(name, kind, options, tmp_path):
    model = mixture(name, kind, **options)
    moeadapt.export(model, tmp_path / "moe")
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "moe", dtype=torch.float32)
    settings = {"max_new_tokens": 64, "min_new_tokens": 64, "do_sample": False}
    prompt = token_ids(rows=1, length=5)
    expected = model.generate(input_ids=prompt, **settings)
    assert expected.shape == (1, 69)
    assert torch.equal(found.generate(input_ids=prompt, **settings), expected)


def test_the_model_stays_as_it_was(tmp_path):
    model = mixture("llama").train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    flags = [p.requires_grad for p in model.parameters()]
    moeadapt.export(model, tmp_path / "moe")
    after = model.state_dict()
    assert model.training
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert [p.requires_grad for p in model.parameters()] == flags


def test_the_receipt_says_what_was_written(tmp_path):
    model = mixture("llama", "glu", **router("sigmoid", k=2))
    receipt = moeadapt.export(model, tmp_path / "moe", probe=[token_ids(1, 7)[0], [5, 6, 7]])
    assert Receipt.load(tmp_path / "moe") == receipt
    assert (receipt.kind, receipt.base_type, receipt.tolerance) == ("export", "llama", 1e-4)
    assert receipt.bytes_on_disk == (tmp_path / "moe" / "model.safetensors").stat().st_size
    assert receipt.dtype == {"F32": sum(receipt.dtype.values())}
    assert receipt.bytes_on_disk > receipt.base_bytes
    assert {verdict.engine for verdict in receipt.engines} >= {"transformers", "llama.cpp"}
    assert receipt.measured.tokens == 10
    assert receipt.measured.routing_agreement == (1.0, 1.0)
    assert set(receipt.settings["logit_difference"]) == {"eager", "grouped_mm"}
    assert receipt.source_sha256["base"] != receipt.source_sha256["adapter"]
    with torch.no_grad():
        next(p for n, p in model.named_parameters() if "glu_down" in n).add_(1e-3)
    other = moeadapt.export(model, tmp_path / "other")
    assert other.source_sha256["base"] == receipt.source_sha256["base"]
    assert other.source_sha256["adapter"] != receipt.source_sha256["adapter"]
