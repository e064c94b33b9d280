"""Every shipped recipe parses and builds; mistakes in one are refused with what is valid."""

from pathlib import Path

import pytest
import yaml
from peft import LoraConfig, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from transformers import AutoModelForSequenceClassification

from moeadapt.errors import ConfigError
from moeadapt.training.objectives import OBJECTIVES
from moeadapt.training.plan import plan_model
from moeadapt.training.recipe import parse_recipe, parse_script
from moeadapt.tuner import MoeLoraLinear
from tests.tiny import tiny

ROOT = Path(__file__).parents[2]
RECIPES = sorted(p for p in ROOT.glob("configs/*/*.yaml") if p.parent.name in OBJECTIVES)
CPU = ["--use_cpu", "--bf16", "false"]
ARCHITECTURE = {"smollm2": "llama", "smollm2-135m": "llama", "qwen3": "qwen3", "llama3.2": "llama"}

recipes = pytest.mark.parametrize("path", RECIPES, ids=lambda p: f"{p.parent.name}/{p.stem}")


def parse(path, *flags):
    return parse_recipe(path.parent.name, str(path), [*CPU, *flags])


def test_there_is_a_recipe_for_every_objective():
    assert {path.parent.name for path in RECIPES} == set(OBJECTIVES)


@recipes
def test_a_recipe_builds_on_a_model_of_its_architecture(path):
    recipe = parse(path)
    model = tiny(ARCHITECTURE[path.stem.split("_")[0]])
    if recipe.adapter.task_type == "SEQ_CLS":
        config = model.config
        config.num_labels = 1
        model = AutoModelForSequenceClassification.from_config(config)
    targets = recipe.adapter.target_modules
    adapted = get_peft_model(model, recipe.adapter)
    layers = [m for m in adapted.modules() if isinstance(m, BaseTunerLayer)]
    assert {isinstance(layer, MoeLoraLinear) for layer in layers} == {recipe.is_mixture}
    linears = 5 if getattr(recipe.adapter, "placement", None) == "glu" else 7
    assert len(layers) == 2 * (linears if targets == "all-linear" else len(targets))


@recipes
def test_a_recipe_says_where_it_writes_and_which_model(path):
    values = yaml.safe_load(path.read_text())
    assert values["output_dir"].startswith("outputs/")
    assert values["model_name_or_path"]
    assert path.read_text().startswith("# ")


def test_flags_win_over_the_file_also_when_nested():
    recipe = parse(
        ROOT / "configs/sft/smollm2_mixlora.yaml",
        *["--learning_rate", "3e-4", "--moe.r=2", "--moe.router.k", "1", "--max-steps", "7"],
    )
    assert recipe.trainer_args.learning_rate == 3e-4
    assert recipe.adapter.r == 2
    assert recipe.adapter.router["k"] == 1
    assert recipe.adapter.router["name"] == "top_k"
    assert recipe.trainer_args.max_steps == 7


def test_numbers_may_be_written_with_an_exponent(tmp_path):
    path = tmp_path / "r.yaml"
    shipped = (ROOT / "configs/sft/smollm2_mixlora.yaml").read_text()
    path.write_text(shipped.replace("switch: 0.01", "switch: 1e-3"))
    assert parse_recipe("sft", str(path), CPU).adapter.balance["switch"]["coef"] == 1e-3
    recipe = parse_recipe("sft", str(path), [*CPU, "--moe.balance.switch", "2e-3"])
    assert recipe.adapter.balance["switch"]["coef"] == 2e-3


@pytest.mark.parametrize("name", ["save_strategy", "eval_strategy"])
def test_the_word_no_is_a_word(name, tmp_path):
    shipped = ROOT / "configs/sft/smollm2_mixlora.yaml"
    recipe = parse(shipped, f"--{name}", "no")
    assert getattr(recipe.trainer_args, name) == "no"
    path = tmp_path / "r.yaml"
    path.write_text(shipped.read_text() + f"{name}: no\n")
    assert getattr(parse_recipe("sft", str(path), CPU).trainer_args, name) == "no"


def test_a_coefficient_in_the_file_can_be_given_in_full_as_a_flag():
    path = ROOT / "configs/sft/smollm2_mixlora.yaml"
    recipe = parse(path, "--moe.balance.switch.coef", "0.1")
    assert recipe.adapter.balance == {"switch": {"coef": 0.1}}


@pytest.mark.parametrize(
    ("given", "resume"), [("last", True), ("true", True), ("false", None), ("out/x", "out/x")]
)
def test_resuming_takes_a_folder_or_last(given, resume):
    path = ROOT / "configs/sft/smollm2_mixlora.yaml"
    assert parse(path, "--resume_from_checkpoint", given).resume == resume


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--learning_rat", "1"], "flags: unknown setting 'learning_rat'; did you mean"),
        (["--moe.num_expert", "4"], "moe: unknown setting 'num_expert'; did you mean 'num_exp"),
        (["--moe.router.k", "9"], "k=9 is larger than num_experts=4; choose k in 1..4"),
        (["--moe.router", "topk"], "unknown router 'topk'.*did you mean 'top_k'"),
        (["--moe.r", "'8'"], "r='8': input should be a valid integer"),
        (["--learning_rate", "abc"], "learning-rate: invalid float value: 'abc'"),
        (["--moe.task_type", "SEQ_CLS"], "but sft trains CAUSAL_LM"),
        (["--moe.r.x", "1"], "'r' is 8, which has no settings"),
        (["--load_in_4bit", "--load_in_8bit"], "load_in_4bit and load_in_8bit exclude"),
        (["stray"], "unexpected argument 'stray'"),
    ],
)
def test_a_mistake_is_refused_with_what_is_valid(flags, message):
    with pytest.raises(ConfigError, match=message.replace("(", r"\(")):
        parse(ROOT / "configs/sft/smollm2_mixlora.yaml", *flags)


def test_an_unknown_objective_lists_the_valid_ones():
    with pytest.raises(ConfigError, match=r"unknown objective 'stf'.*did you mean 'sft'"):
        parse_recipe("stf")


@pytest.mark.parametrize("text", ["- a\n- b\n", "", "a: [1\n"])
def test_a_file_that_is_no_mapping_is_refused(tmp_path, text):
    path = tmp_path / "r.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=r"r\.yaml"):
        parse_recipe("sft", str(path), CPU)


def test_a_missing_file_is_refused():
    with pytest.raises(ConfigError, match="cannot read the recipe"):
        parse_recipe("sft", "no/such.yaml", CPU)


def test_the_plan_counts_what_training_would_train():
    recipe = parse(ROOT / "configs/sft/smollm2_mixlora.yaml")
    plan = plan_model(tiny("llama"), recipe)
    trained = get_peft_model(tiny("llama"), recipe.adapter)
    assert plan.trainable == sum(p.numel() for p in trained.parameters() if p.requires_grad)
    assert plan.base == sum(p.numel() for p in tiny("llama").parameters())
    # k=2 of 4 experts: half of every FFN expert bank is idle; attention LoRA is always on.
    routed = [
        m
        for m in trained.modules()
        if isinstance(m, MoeLoraLinear) and m.moe_plans["default"].placement == "ffn"
    ]
    banks = [m.moe_banks["default"] for m in routed]
    weights = sum(b.factor(n).weight.numel() for b in banks for n in b.factor_names)
    assert plan.trainable - plan.active == weights // 2


LORA = ["--model_name_or_path", "x", "--output_dir", "unused", *CPU]


def test_a_plain_lora_has_the_settings_of_peft():
    recipe = parse_recipe("sft", None, [*LORA, "--lora.r", "4", "--lora.use_rslora", "true"])
    assert isinstance(recipe.adapter, LoraConfig)
    assert not recipe.is_mixture
    assert (recipe.adapter.r, recipe.adapter.use_rslora) == (4, True)
    assert recipe.adapter.task_type == "CAUSAL_LM"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--lora.r", "4", "--moe.r", "4"], "exclude each other"),
        (["--lora.rang", "4"], "unknown setting 'rang'"),
        (["--lora", "4"], "must be a mapping"),
        (["--lora.task_type", "SEQ_CLS"], "leave it out"),
        (["--lora.r", "4", "--router_learning_rate", "1e-3"], "no routers of its own"),
        (["--lora.layers_pattern", "h"], "lora: "),
        (["--lora.r", "-1"], "lora.r=-1 must be"),
        (["--lora.r", "abc"], "lora.r='abc' must be"),
        (["--lora.lora_alpha", "x"], "lora.lora_alpha='x' must be"),
        (["--lora.lora_dropout", "1.5"], r"in \[0, 1\)"),
    ],
)
def test_mistakes_in_a_plain_lora_are_refused(flags, message):
    with pytest.raises(ConfigError, match=message):
        parse_recipe("sft", None, [*LORA, *flags])


def test_a_script_of_the_mixture_refuses_a_plain_lora(capsys):
    with pytest.raises(SystemExit) as stop:
        parse_script("sft", [*LORA, "--lora.r", "4"])
    assert stop.value.code == 2
    assert "moeadapt train sft" in capsys.readouterr().err
