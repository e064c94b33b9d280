"""A preset is data: overrides win by the documented rule, and each one is tested and shipped."""

import json
from pathlib import Path

import pytest
import torch

from moeadapt import PRESETS, MoeLoraConfig
from moeadapt.errors import ConfigError
from moeadapt.training.recipe import parse_recipe
from tests.tiny import adapt, batch, gradients, logits, tiny

ROOT = Path(__file__).parents[2]

# What a model of two layers and 16 key features needs.
SMALL = {"goat": {"num_experts": 4}, "mola": {"experts_pattern": [4, 8]}}

presets = pytest.mark.parametrize("name", sorted(PRESETS))


def test_the_presets_are_these():
    assert sorted(PRESETS) == [
        "adamoe",
        "adamole",
        "deepseek",
        "dynmoe",
        "flylora",
        "goat",
        "hydralora",
        "ldmole",
        "loramoe",
        "mixlora",
        "mola",
        "molora",
        "mov",
        "omoe",
        "remoe",
        "smora",
        "soft",
        "switch",
    ]


@presets
def test_a_preset_makes_a_config_that_survives_json(name):
    config = MoeLoraConfig.preset(name)
    plain = json.loads(json.dumps(config.to_dict()))
    plain.pop("peft_type")
    assert MoeLoraConfig(**plain).to_dict() == config.to_dict()


@presets
def test_a_preset_has_a_reference_and_a_recipe(name):
    assert (ROOT / f"tests/presets/test_{name}.py").exists()
    recipe = ROOT / f"configs/sft/smollm2_{name}.yaml"
    assert f"preset: {name}" in recipe.read_text()


@presets
def test_a_preset_trains_from_the_base_model_on(name):
    config = MoeLoraConfig.preset(name, task_type="CAUSAL_LM", **SMALL.get(name, {}))
    base, model = tiny("llama").double(), adapt(tiny("llama"), config).double()
    # GOAT's residual equals its experts only for weights of 1 / E.
    if name != "goat":
        torch.testing.assert_close(logits(model, batch()), logits(base, batch()))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        found = gradients(model.train(), batch())
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert set(found) == trained
    assert all(bool(gradient.isfinite().all()) for gradient in found.values())
    banks = [n for n in found if "router" not in n]
    assert any(bool(found[n].any()) for n in banks)


def test_presets_cannot_be_changed_through_a_config():
    config = MoeLoraConfig.preset("mixlora")
    config.router["k"] = 7
    config.target_modules = None
    assert MoeLoraConfig.preset("mixlora").router["k"] == 2
    config = MoeLoraConfig.preset("mola")
    config.experts_pattern.append(10)
    assert MoeLoraConfig.preset("mola").experts_pattern == [2, 4, 6, 8]


@pytest.mark.parametrize("name", ["mixlra", None, ["mixlora"]])
def test_an_unknown_preset_is_refused(name):
    with pytest.raises(ConfigError, match="unknown preset .*one of .*'mixlora'"):
        MoeLoraConfig.preset(name)


def test_an_unknown_preset_is_answered_with_the_nearest():
    with pytest.raises(ConfigError, match="did you mean 'mixlora'"):
        MoeLoraConfig.preset("mixlra")


def test_any_field_wins_over_the_preset():
    config = MoeLoraConfig.preset("mixlora", num_experts=4, r=2, target_modules=["up_proj"])
    assert (config.num_experts, config.r, config.target_modules) == (4, 2, {"up_proj"})
    assert config.placement == "ffn"


@pytest.mark.parametrize("router", [{"k": 1}, {"name": "top_k", "k": 1}])
def test_options_of_the_same_router_are_merged(router):
    merged = MoeLoraConfig.preset("adamoe", router=router).router
    assert (merged["k"], merged["null_experts"]) == (1, 4)


@pytest.mark.parametrize("router", ["soft", {"name": "soft", "temperature": 2.0}])
def test_another_router_replaces_the_preset_s(router):
    config = MoeLoraConfig.preset("adamoe", router=router)
    assert config.router == MoeLoraConfig(router=router).router


def test_options_of_the_same_experts_are_merged():
    assert MoeLoraConfig.preset("flylora", experts="random_a").experts["k"] == 8
    merged = MoeLoraConfig.preset("flylora", experts={"sparsity": 0.5}).experts
    assert (merged["name"], merged["k"], merged["sparsity"]) == ("random_a", 8, 0.5)


@pytest.mark.parametrize(
    ("given", "names"),
    [
        ({"z_loss": 0.1}, {"l1_sparsity", "z_loss"}),
        ({"l1_sparsity": None, "z_loss": 0.1}, {"z_loss"}),
        ({}, set()),
        (None, set()),
    ],
)
def test_balance_losses_are_added_or_left_out(given, names):
    assert set(MoeLoraConfig.preset("remoe", balance=given).balance) == names


@pytest.mark.parametrize("given", [1e-4, {"coef": 1e-4}])
def test_a_new_coefficient_keeps_the_other_options(given):
    loss = MoeLoraConfig.preset("remoe", balance={"l1_sparsity": given}).balance["l1_sparsity"]
    assert (loss["coef"], loss["target"]) == (1e-4, 0.125)


def test_a_wrong_field_is_refused_as_without_a_preset():
    with pytest.raises(ConfigError, match="k=9 is larger than num_experts=8"):
        MoeLoraConfig.preset("mixlora", router={"k": 9})


def test_a_recipe_names_a_preset_and_what_differs(tmp_path):
    path = tmp_path / "r.yaml"
    path.write_text(
        "model_name_or_path: x\noutput_dir: outputs/x\n"
        "moe: {preset: mixlora, num_experts: 4, router: {k: 1}}\n"
    )
    flags = ["--use_cpu", "--bf16", "false", "--moe.balance.switch", "0.1"]
    moe = parse_recipe("sft", str(path), flags).adapter
    assert (moe.placement, moe.num_experts, moe.router["k"]) == ("ffn", 4, 1)
    assert moe.balance == {"switch": {"coef": 0.1}}
    with pytest.raises(ConfigError, match="moe: unknown setting 'num_expert'"):
        parse_recipe("sft", str(path), [*flags, "--moe.num_expert", "2"])
    with pytest.raises(ConfigError, match="unknown preset 'mola2'"):
        parse_recipe("sft", str(path), [*flags, "--moe.preset", "mola2"])
