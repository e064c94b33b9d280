"""What no stock class computes is refused with the reason, before anything is written."""

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model

import moeadapt
from moeadapt.errors import ConfigError, ExportError, UnsupportedError
from moeadapt.export.refusals import FITTING, ROUTER_REASONS, active_adapter
from moeadapt.routers import ROUTERS
from tests.export.bases import base
from tests.tiny import adapt, moe_config, tiny

FFN_LINEARS = ["gate_proj", "up_proj", "down_proj"]


def router(name, **options):
    return {"router": {"name": name, **options}}


REFUSED = {
    "placement linear": ("llama", "layer", {}, r"placement='linear'.*Train with placement='ffn'"),
    "routed attention": ("llama", "block", {}, "attention included"),
    "top_p": ("llama", "ffn", router("top_p"), "reach p.*'name': 'top_k'"),
    "threshold": ("llama", "ffn", router("threshold"), "as many experts as pass it"),
    "sequence": ("llama", "ffn", router("top_k", per="sequence"), "once per sequence"),
    "bias": ("llama", "glu", router("soft", bias=True), r"learned bias \(bias=True\)"),
    "norm": ("llama", "ffn", router("top_k", norm="rms"), "norm='rms'"),
    "costs": ("llama", "ffn", router("top_k", cost_aware=0.5), "cost_aware"),
    "unnormalised": ("llama", "ffn", router("top_k", k=1), r"k=1 leaves.*normalize='renorm'"),
    "switch": ("llama", "ffn", router("switch"), "no stock class has such a remainder"),
    "null": ("llama", "ffn", router("top_k", null_experts=1), "divides by the sum of all chosen"),
    "null, unnormalised": (
        "llama", "ffn", router("top_k", null_experts=1, normalize="none"), "takes the rest",
    ),
    "sigmoid of whole ffns": (
        "llama", "ffn", router("sigmoid"), r"computes a sigmoid; train with .*'top_k'",
    ),
    "sigmoid that scales": ("lfm2", "ffn", router("sigmoid", scale=2.0), "scale=2.0: its weights"),
    "softmax beside a sigmoid class": (
        "qwen3", "glu", router("top_k"), r"glm4_moe.*computes a softmax; train with .*'sigmoid'",
    ),
    "unnormalised where it is always normalised": (
        "granite", "glu", router("switch"), "always normalises",
    ),
    "one layer": (
        "llama",
        "ffn",
        {"layers_to_transform": [1], "target_modules": FFN_LINEARS},
        "a mixture in every layer",
    ),
    "experts per layer": ("llama", "ffn", {"experts_pattern": [2, 4]}, "different numbers"),
    "tokens": ("llama", "ffn", {"trainable_token_indices": [3]}, "single rows of the embedding"),
    "a tied head trained in full": (
        "llama, tied, llama3 rope", "ffn", {"modules_to_save": ["lm_head"]}, "shares between",
    ),
    "a convolution with experts": ("lfm2", "ffn", router("sigmoid"), "exclude_modules"),
}  # fmt: skip


@pytest.fixture(autouse=True)
def nothing_is_written(tmp_path):
    yield
    assert list(tmp_path.iterdir()) == []


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")
@pytest.mark.parametrize("case", REFUSED)
def test_what_no_class_computes_is_refused_with_the_reason(case, tmp_path):
    name, kind, overrides, message = REFUSED[case]
    if name == "lfm2" and "conv" not in case:
        overrides = {**overrides, "target_modules": ["w1", "w2", "w3"]}
    model = adapt(base(name), moe_config(kind, **overrides))
    with pytest.raises(UnsupportedError, match=message):
        moeadapt.export(model, tmp_path / "moe")


def test_every_router_fits_or_has_a_reason():
    assert set(ROUTERS) == set(FITTING) | set(ROUTER_REASONS)
    assert not set(FITTING) & set(ROUTER_REASONS)


@pytest.mark.parametrize("name", sorted(ROUTER_REASONS))
def test_a_router_that_no_class_has_is_refused_by_name(name, tmp_path):
    options = {"k": 2} if name == "rank_wise" else {}
    model = adapt(base("llama"), moe_config("ffn", **router(name, **options)))
    with pytest.raises(UnsupportedError, match=f"router '{name}' .*What can be exported"):
        moeadapt.export(model, tmp_path / "moe")


def test_a_base_without_a_class_is_refused(tmp_path):
    model = adapt(tiny("gemma"), moe_config("ffn"))
    with pytest.raises(UnsupportedError, match="no stock mixture class holds 'gemma'"):
        moeadapt.export(model, tmp_path / "moe")


def test_a_base_that_is_no_language_model_is_refused(tmp_path):
    model = tiny("llama", auto=transformers.AutoModelForSequenceClassification)
    with pytest.raises(UnsupportedError, match="LlamaForSequenceClassification"):
        moeadapt.export(adapt(model, moe_config("ffn", task_type="SEQ_CLS")), tmp_path / "moe")


def test_a_quantised_base_is_refused(tmp_path):
    model = adapt(base("llama"), moe_config("ffn"))
    model.get_base_model().is_quantized = True
    with pytest.raises(UnsupportedError, match="load it in bfloat16 or float32"):
        moeadapt.export(model, tmp_path / "moe")


def test_several_active_adapters_are_refused(tmp_path):
    model = adapt(base("llama"), moe_config("glu"))
    model.add_adapter("other", moe_config("glu"))
    model.base_model.set_adapter(["default", "other"])
    with pytest.raises(UnsupportedError, match="2 active.*set_adapter"):
        moeadapt.export(model, tmp_path / "moe")


def test_a_disabled_adapter_is_refused(tmp_path):
    model = adapt(base("llama"), moe_config("ffn"))
    with model.disable_adapter(), pytest.raises(UnsupportedError, match="disabled"):
        moeadapt.export(model, tmp_path / "moe")


def test_an_ordinary_lora_and_a_bare_model_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="takes the PeftModel"):
        active_adapter(base("llama"))
    lora = get_peft_model(base("llama"), LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(ConfigError, match="no mixture of LoRA experts"):
        moeadapt.export(lora, tmp_path / "moe")


def test_a_selection_bias_that_the_class_lacks_is_refused(tmp_path):
    model = adapt(base("llama"), moe_config("ffn", balance={"loss_free": 0.001}))
    for module in model.modules():
        if getattr(module, "selection_bias", None) is not None:
            module.selection_bias.add_(torch.arange(4.0))
    with pytest.raises(UnsupportedError, match=r"selection bias.*loss_free"):
        moeadapt.export(model, tmp_path / "moe")


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"target": "mixtrl"}, ConfigError, "did you mean 'mixtral'"),
        ({"target": "qwen3_moe"}, UnsupportedError, "what can"),
        ({"engines": ["vlm"]}, ConfigError, "did you mean 'vllm'"),
        ({"dtype": torch.int8}, ConfigError, r"torch\.int8"),
        ({"probe": ["text"]}, ConfigError, "token ids"),
        ({"probe": [[]]}, ConfigError, "no tokens"),
        ({"tolerance": 0.0}, ExportError, r"differ by .* in float32 .*allowed 0\.0e\+00"),
    ],
)
def test_a_wrong_setting_is_refused(settings, error, message, tmp_path):
    model = adapt(base("llama"), moe_config("ffn"))
    with pytest.raises(error, match=message):
        moeadapt.export(model, tmp_path / "moe", **settings)


def test_an_engine_that_would_be_wrong_is_refused_with_what_to_change(tmp_path):
    model = adapt(base("qwen2, tied, yarn"), moe_config("ffn"))
    with pytest.raises(UnsupportedError, match=r"never renormalises.*untie=True"):
        moeadapt.export(model, tmp_path / "moe", engines=["llama.cpp"])
