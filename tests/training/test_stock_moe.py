"""`all-linear` of a plain LoRA on stock mixtures: what is targeted, left out and counted."""

import pytest
from peft import LoraConfig, get_peft_model

import moeadapt
from moeadapt import MoeLoraConfig
from moeadapt.errors import ConfigError
from moeadapt.export.upcycle import upcycle
from moeadapt.export.verify import load_strictly
from moeadapt.training.plan import plan_model
from moeadapt.training.recipe import parse_recipe
from moeadapt.training.stock_moe import fit_to_stock_moe
from tests.export.bases import base
from tests.tiny import adapt, moe_config

FLAGS = ["--model_name_or_path", "x", "--output_dir", "unused", "--use_cpu", "--bf16", "false"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("moe") / "out"
    upcycle(base("llama"), folder, 4, 2, noise=0.1, verify=False)
    return folder


@pytest.fixture
def mixtral(folder):
    return load_strictly(folder)


def lora(**settings):
    return LoraConfig(**{"r": 2, "target_modules": "all-linear", **settings})


def names(config, model):
    adapted = get_peft_model(model, config)
    return {n for n, p in adapted.named_parameters() if p.requires_grad}


def test_attention_router_and_experts_are_targeted(mixtral):
    fitted = fit_to_stock_moe(lora(), mixtral)
    assert fitted.target_parameters == [
        "mlp.experts.down_proj", "mlp.experts.gate_up_proj", "mlp.gate.weight",
    ]  # fmt: skip
    assert {name.rpartition(".")[2] for name in fitted.target_modules} == {
        "q_proj", "k_proj", "v_proj", "o_proj",
    }  # fmt: skip


@pytest.mark.parametrize(
    "config",
    [
        lora(target_modules=["q_proj"]),
        lora(target_parameters=["mlp.gate.weight"]),
        MoeLoraConfig(target_modules="all-linear"),
    ],
)
def test_other_configs_stay_as_they_are(config, mixtral):
    assert fit_to_stock_moe(config, mixtral) is config


def test_a_dense_model_leaves_the_config_alone():
    config = lora()
    assert fit_to_stock_moe(config, base("llama")) is config


@pytest.mark.parametrize(
    ("excluded", "left"),
    [(["experts"], {"gate", "attention"}), (["gate"], {"experts", "attention"}),
     (r".*mlp.*", {"attention"}), (["q_proj", "k_proj", "v_proj", "o_proj"], {"gate", "experts"})],
)  # fmt: skip
def test_excluded_modules_are_left_out(excluded, left, mixtral):
    found = names(fit_to_stock_moe(lora(exclude_modules=excluded), mixtral), mixtral)
    parts = {"gate": ".mlp.gate.", "experts": ".mlp.experts.", "attention": ".self_attn."}
    assert {part for part, key in parts.items() if any(key in name for name in found)} == left


def test_the_ffn_of_the_base_beside_small_experts_is_left_out(tmp_path):
    router = {"name": "top_k", "k": 2, "init_std": 0.5}
    moeadapt.export(adapt(base("llama"), moe_config("glu", router=router)), tmp_path / "moe")
    model = load_strictly(tmp_path / "moe")
    fitted = fit_to_stock_moe(lora(), model)
    assert not [name for name in fitted.target_modules if "shared" in name]
    assert any("experts" in name for name in fitted.target_parameters)


def test_dropout_is_refused_before_anything_is_built(mixtral):
    with pytest.raises(ConfigError, match="no dropout for the stacked experts"):
        fit_to_stock_moe(lora(lora_dropout=0.1), mixtral)


def test_the_plan_counts_the_experts_of_one_token(mixtral):
    recipe = parse_recipe(
        "sft", None, [*FLAGS, "--lora.r", "2", "--lora.target_modules=all-linear"]
    )
    plan = plan_model(mixtral, recipe)
    experts = sum(
        p.numel() for n, p in mixtral.named_parameters() if "experts" in n and "lora_" in n
    )
    assert experts > 0
    assert plan.active == plan.trainable - experts // 2
    assert plan.trainable == sum(p.numel() for p in mixtral.parameters() if p.requires_grad)
