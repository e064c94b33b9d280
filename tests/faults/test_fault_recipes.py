"""Cases 106 and 107: a mistake in a recipe is refused with its file and line, exit code 2."""

from pathlib import Path

import pytest

from moeadapt.training.recipe import parse_recipe
from tests.faults.cli import ROOT, Answer, call
from tests.tiny import saved_base
from tests.toy import toy_tokenizer

HEAD = "model_name_or_path: x\noutput_dir: unused\nuse_cpu: true\nbf16: false\n"
FIRST = HEAD.count("\n") + 1
"""The line after `HEAD`."""


def refused(text: str, folder: Path, verb: str = "validate") -> str:
    """Return what the command line says of a recipe, which must be one message and exit 2."""
    recipe = folder / "recipe.yaml"
    recipe.write_bytes(text.encode("utf-8", "surrogateescape"))
    before = sorted(folder.rglob("*"))
    found = call(verb, "sft", "--config", str(recipe))
    assert found.code == 2, found
    assert found.out == ""
    assert "Traceback" not in found.err
    assert sorted(folder.rglob("*")) == before, "nothing is written"
    lines = [line for line in found.err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, found.err
    return lines[0].removeprefix("error: ").replace(str(recipe), "recipe.yaml")


UNKNOWN = {
    "near": (
        "learning_rat: 1\n",
        0,
        "unknown setting 'learning_rat'; did you mean 'learning_rate'",
    ),
    "far": ("zzzzqqqq: 1\n", 0, "unknown setting 'zzzzqqqq'"),
    "near, nested": ("moe:\n  r: 4\n  num_expert: 3\n", 2, "did you mean 'num_experts'?"),
    "near, router": ("moe:\n  router:\n    name: top_k\n    kk: 2\n", 3, "unknown field 'kk'"),
    "no word": ("1: 2\n", 0, "unknown setting 1"),
    "a class to build": ("_target_: os.system\n", 0, "unknown setting '_target_'"),
    "lora": ("lora:\n  r: 4\n  rang: 3\n", 2, "unknown setting 'rang'"),
}


@pytest.mark.parametrize("verb", ["train", "validate", "plan"])
@pytest.mark.parametrize(("text", "line", "message"), list(UNKNOWN.values()), ids=list(UNKNOWN))
def test_fault_106_an_unknown_key_is_refused_with_its_line(
    text: str, line: int, message: str, verb: str, tmp_path: Path
) -> None:
    said = refused(HEAD + text, tmp_path, verb)
    assert said.startswith(f"recipe.yaml:{FIRST + line}: ")
    assert message in said


def test_fault_106_an_unknown_flag_is_refused_with_the_nearest_one() -> None:
    found: Answer = call("train", "sft", "--model_name_or_path", "x", "--learning-rat", "1")
    assert found.code == 2
    assert "flags: unknown setting 'learning_rat'; did you mean 'learning_rate'?" in found.err


TYPES = {
    "word for a number": ("learning_rate: abc\n", 0, "invalid float value: 'abc'"),
    "list for a number": ("max_steps: [1, 2]\n", 0, "must be one value, not a list"),
    "mapping for a number": ("seed: 1\nmax_steps: {a: 1}\n", 1, "invalid int value"),
    "no such choice": ("dtype: float31\n", 0, "invalid choice: 'float31'"),
    "string for an integer": ("moe:\n  num_experts: 4\n  r: '8'\n", 2, "r='8': input should be"),
    "float for an integer": ("moe:\n  r: 8.0\n", 1, "r=8.0: input should be a valid integer"),
    "number for a section": ("moe: 3\n", 0, "'moe' must be a mapping"),
    "option of a router": ("moe:\n  router: {name: top_k,\n    k: two}\n", 2, "k='two'"),
}

RANGES = {
    "batch": ("per_device_train_batch_size: 0\n", 0, "must be at least 1"),
    "rate": ("learning_rate: -1.0e-3\n", 0, "must be at least 0"),
    "nan": ("learning_rate: .nan\n", 0, "must be a finite number"),
    "infinite": ("max_grad_norm: .inf\n", 0, "must be a finite number"),
    "seed": ("seed: 99999999999999999999\n", 0, "must be at most 4294967295"),
    "options": ("gradient_checkpointing_kwargs: 5\n", 0, "must be a mapping of settings"),
    "no such file": ("deepspeed: /nope.json\n", 0, "deepspeed"),
    "beta": ("adam_beta1: 1.0\n", 0, "must be in [0, 1)"),
    "router's rate": ("router_learning_rate: -1.0\n", 0, "must be a finite number > 0"),
    "rank": ("moe:\n  num_experts: 4\n  r: 0\n", 2, "greater than or equal to 1"),
    "dropout": ("moe:\n  lora_dropout: 1.5\n", 1, "less than 1"),
    "k": ("moe:\n  num_experts: 4\n  router:\n    name: top_k\n    k: 9\n", 4, "k=9 is larger"),
    "balance": ("moe:\n  r: 4\n  balance:\n    switch: -0.1\n", 3, "'switch': coef=-0.1"),
    "alpha": ("moe:\n  lora_alpha: .nan\n", 1, "finite"),
    "schedule": ("moe:\n  r: 2\n  schedule:\n    k: {start: 0, steps: 3}\n", 3, "start=0"),
    "lora": ("lora:\n  lora_alpha: 3\n  r: -1\n", 2, "lora.r=-1"),
    "lora targets": ("lora:\n  target_modules: 5\n", 1, "lora.target_modules=5 must be a name"),
    "temperature": ("moe:\n  router: {name: top_k, temperature: 1.0e-38}\n", 1, "temperature"),
    "together": (
        "eval_strategy: steps\nsave_strategy: epoch\nload_best_model_at_end: true\n",
        2,
        "requires the save and eval strategy to match",
    ),
}

YAML = {
    "key twice": ("max_steps: 1\nbf16: true\n", 1, "'bf16' is set a second time, first in line 4"),
    "key twice, nested": ("moe:\n  r: 1\n  r: 2\n", 2, "'r' is set a second time, first in line 6"),
    "key twice, flow": ("moe: {r: 1,\n  r: 2}\n", 1, "'r' is set a second time"),
    "alias": ("a: &a [1, 1]\nb: *a\n", 1, "aliases (*name) are not read"),
    "merge key": ("<<: {max_steps: 1}\n", 0, "unknown setting '<<'"),
    "explicit merge": ("!!merge x: {max_steps: 1}\n", 0, "is not read: a recipe is plain data"),
    "deep": ("a: " + "[" * 100_000 + "\n", 0, "nested more than 20 levels deep"),
    "digits": ("max_steps: " + "9" * 5000 + "\n", 0, "is no value that a recipe can hold"),
    "a tab": ("\tmax_steps: 1\n", 0, "found character '\\t'"),
    "open bracket": ("moe: [1\n", 1, "but got '<stream end>'"),
    "two documents": ("---\na: 1\n", 0, "expected a single document"),
    "nul": ("a: \0\n", 0, "special characters are not allowed"),
    "bytes": ("a: \udcff\n", 0, "not UTF-8 text"),
    "set": ("moe: !!set {a}\n", 0, "'tag:yaml.org,2002:set' is not read"),
}

ALL = {**TYPES, **RANGES, **YAML}


@pytest.mark.parametrize(("text", "line", "message"), list(ALL.values()), ids=list(ALL))
def test_fault_107_a_wrong_recipe_is_refused_with_its_line(
    text: str, line: int, message: str, tmp_path: Path
) -> None:
    said = refused(HEAD + text, tmp_path)
    assert said.startswith(f"recipe.yaml:{FIRST + line}: ")
    assert message in said


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "recipe.yaml:1: the recipe is empty"),
        ("# only a comment\n", "recipe.yaml:1: the recipe is empty"),
        ("- a\n", "recipe.yaml:1: a recipe is a mapping of settings, found a list"),
        ("\n\n3\n", "recipe.yaml:3: a recipe is a mapping of settings, found a int"),
        ("#" * (1 << 20) + "\n", "recipe.yaml: larger than 1048576 bytes"),
    ],
    ids=["empty", "comment", "list", "number", "large"],
)
def test_fault_107_a_file_that_is_no_recipe_is_refused(
    text: str, message: str, tmp_path: Path
) -> None:
    assert refused(text, tmp_path).startswith(message)


TAGS = ("object/apply:os.system", "object/new:os.system", "name:os.system", "module:os", "tuple")


@pytest.mark.parametrize("tag", TAGS)
def test_fault_107_a_tag_that_builds_objects_is_refused_and_builds_none(
    tag: str, tmp_path: Path
) -> None:
    marker = tmp_path / "marker"
    said = refused(f"{HEAD}moe: !!python/{tag} ['touch {marker}']\n", tmp_path)
    assert said.startswith(f"recipe.yaml:{FIRST}: ")
    assert "is not read: a recipe is plain data" in said
    assert not marker.exists()


def test_fault_107_a_yaml_bomb_is_refused_before_it_grows(tmp_path: Path) -> None:
    levels = [f"l{i}: &l{i} [{', '.join([f'*l{i - 1}'] * 9)}]" for i in range(1, 40)]
    bomb = "l0: &l0 [x]\n" + "\n".join(levels) + "\n"
    assert refused(bomb, tmp_path).startswith("recipe.yaml:2: ")


def test_fault_107_a_flag_is_named_and_not_the_line_that_it_replaces(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(HEAD + "moe:\n  r: 4\n  lora_dropout: 2.0\n")
    both = ["validate", "sft", "--config", str(recipe), "--moe.r"]
    assert f"{recipe}:{FIRST + 2}: MoeLoraConfig: lora_dropout" in call(*both, "4").err
    recipe.write_text(HEAD + "moe:\n  r: 4\n")
    assert "error: flags: MoeLoraConfig: r=-1" in call(*both, "-1").err


def test_fault_107_every_line_of_a_shipped_recipe_is_named_when_it_is_wrong(tmp_path: Path) -> None:
    """Each setting of the shipped recipe in turn gets a value that no setting can have."""
    shipped = (ROOT / "configs/sft/smollm2_mixlora.yaml").read_text().splitlines()
    numbers = {
        i for i, line in enumerate(shipped) if line.split(" #")[0].rstrip()[-1:].isdecimal()
    } - {i for i, line in enumerate(shipped) if line.startswith("#")}
    assert len(numbers) > 6
    for number in numbers:
        broken = list(shipped)
        key = broken[number].partition(":")[0]
        broken[number] = f"{key}: [no, number]"
        said = refused("\n".join(broken) + "\n", tmp_path)
        assert said.startswith(f"recipe.yaml:{number + 1}: "), (key, said)


@pytest.mark.parametrize(
    ("text", "line", "field"),
    [
        ("trust_remote_code: true\n", FIRST, "trust_remote_code"),
        (
            "model_init_kwargs:\n  trust_remote_code: true\n",
            FIRST + 1,
            "model_init_kwargs.trust_remote_code",
        ),
    ],
)
def test_fault_040_a_recipe_that_wants_to_run_code_is_told_that_it_does_not(
    text: str, line: int, field: str, tmp_path: Path
) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(HEAD + text)
    with pytest.warns(UserWarning, match=rf"recipe.yaml:{line}: {field} is ignored"):
        parse_recipe("sft", str(path))


@pytest.mark.parametrize("verb", ["validate", "train"])
@pytest.mark.parametrize("section", ["moe", "lora"])
def test_fault_107_targets_that_the_base_lacks_are_refused_with_their_line(
    verb: str, section: str, tmp_path: Path
) -> None:
    base, rows = saved_base("llama", tmp_path), tmp_path / "rows.jsonl"
    toy_tokenizer().save_pretrained(base)
    rows.write_text('{"prompt": "w1", "completion": " w2"}\n')
    path = tmp_path / "recipe.yaml"
    path.write_text(
        f"model_name_or_path: {base}\ndataset_name: {rows}\noutput_dir: {tmp_path / 'out'}\n"
        f"use_cpu: true\nbf16: false\n{section}:\n  r: 2\n  target_modules: [nowhere]\n"
    )
    found = call(verb, "sft", "--config", str(path))
    assert found.code == 2, found.err
    assert f"error: {path}:8: " in found.err
    assert "nowhere" in found.err
