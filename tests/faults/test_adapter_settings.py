"""What adapter_config.json may say: cases 28 to 44 and 48, 49, without 37."""

import json
import subprocess
import sys
import time
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftConfig, PeftModel, get_peft_model

from moeadapt import MoeLoraConfig
from moeadapt.errors import ConfigError
from moeadapt.tuner.checks import matching
from tests.faults.loading_kit import (
    MANIFEST,
    SETTINGS,
    assert_loads,
    assert_refused,
    base_model,
    by_from_pretrained,
    edit_settings,
    expected_logits,
    fresh,
    natively,
    quiet,
    refusal,
    reseal,
)
from tests.tiny import adapt, batch, logits, moe_config


@pytest.mark.parametrize("fields", [{"r": 10**9}, {"num_experts": 10**6}, {"r": 10**30}])
def test_fault_028_absurd_sizes_are_refused_before_they_are_allocated(tmp_path, fields):
    folder = edit_settings(fresh(tmp_path), **fields)
    tracemalloc.start()
    start = time.monotonic()
    with refusal(f"{next(iter(fields))}"):
        by_from_pretrained(base_model(), folder)
    assert time.monotonic() - start < 1
    assert tracemalloc.get_traced_memory()[1] < 20 << 20
    tracemalloc.stop()
    assert_refused(folder, "largest tensor holds|too many digits", cli="r" in fields)


@pytest.mark.parametrize("value", ["8", 8.0, True, None, -1, 0])
def test_fault_029_a_rank_that_is_no_positive_integer_is_refused(tmp_path, value):
    folder = edit_settings(fresh(tmp_path), r=value)
    assert_refused(folder, r"adapter_config.json: .*r=.*(integer|greater than)")


@pytest.mark.parametrize("k", [0, -1, 5, "2", 1.5])
def test_fault_030_experts_per_token_out_of_range_are_refused(tmp_path, k):
    folder = edit_settings(fresh(tmp_path), router={"name": "top_k", "k": k})
    assert_refused(folder, f"adapter_config.json: .*k={k!r}")


@pytest.mark.parametrize("value", ["NaN", "Infinity", "-Infinity"])
@pytest.mark.parametrize("field", ["lora_alpha", "temperature"])
def test_fault_031_numbers_that_are_not_finite_are_refused(tmp_path, field, value):
    folder, number = fresh(tmp_path), float(value)
    fields: dict[str, Any] = {"lora_alpha": number}
    if field == "temperature":
        fields = {"router": {"name": "top_k", "k": 2, "temperature": number}}
    edit_settings(folder, **fields)
    assert value in (folder / SETTINGS).read_text()
    assert_refused(folder, f"adapter_config.json: .*{field}")


@pytest.mark.parametrize(
    "fields",
    [
        {"lora_dropout": 1.5},
        {"lora_dropout": -0.1},
        {"balance": {"switch": -0.01}},
        {"balance": {"switch": {"coef": -1}}},
    ],
)
def test_fault_032_shares_and_coefficients_out_of_range_are_refused(tmp_path, fields):
    assert_refused(edit_settings(fresh(tmp_path), **fields), "adapter_config.json: ")


BROKEN = {
    "cut": (b'{\n  "peft_type": "MOEADAPT",\n  "r": ', "line 3, column 8"),
    "a list": (b"[1, 2]", "line 1, column 1: is a list"),
    "a number": (b"7", "line 1, column 1: is a int"),
    "empty": (b"", "is empty"),
    "10 MB": (b'{"a": ' * (10 << 20), "is larger than"),
    "nested": (b'{\n"a": ' + b"[" * 10**5, "line 2, column 37: nested more than 32 deep"),
    "no utf-8": (b'{"a": "\xff"}', "UTF-8"),
    "a field twice": (b'{"peft_type": "MOEADAPT", "r": 1, "r": 2}', "'r' is there twice"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_fault_033_settings_that_are_no_object_are_refused_with_line_and_column(tmp_path, name):
    content, match = BROKEN[name]
    folder = fresh(tmp_path)
    (folder / SETTINGS).write_bytes(content)
    assert_refused(folder, f"adapter_config.json: .*{match}", cli=not name.startswith("a "))
    (folder / MANIFEST).unlink()  # then the tensors' names say whose adapter it is
    with refusal(match):
        PeftConfig.from_pretrained(folder)


@pytest.mark.parametrize("value", ["absent", None, 7])
def test_fault_034_settings_without_a_type_are_refused(tmp_path, value):
    folder = edit_settings(fresh(tmp_path), peft_type=value)
    path = folder / SETTINGS
    if value == "absent":
        settings = json.loads(path.read_text())
        settings.pop("peft_type")
        path.write_text(json.dumps(settings))
        reseal(folder)
    assert_refused(folder, "peft_type is ")


def test_fault_035_unknown_fields_warn_once_and_are_listed(tmp_path):
    folder = edit_settings(fresh(tmp_path), num_expert=3, zeta=[1])
    with pytest.warns(UserWarning, match="unknown fields") as caught:
        model = by_from_pretrained(base_model(), folder).eval()
    natively(base_model(), folder)  # a second warning would be an error
    told = [str(w.message) for w in caught if "unknown" in str(w.message).lower()]
    assert len(told) == 1
    assert "['num_expert', 'zeta'] are ignored; did you mean 'num_experts'" in told[0]
    assert torch.equal(logits(model, batch()), expected_logits())


@pytest.mark.parametrize("where", ["settings", "manifest"])
def test_fault_036_a_newer_format_is_refused_with_the_version_that_reads_it(tmp_path, where):
    folder = fresh(tmp_path)
    newer = {"format_version": 2, "moeadapt_version": "9.1.0"}
    if where == "settings":
        edit_settings(folder, **newer)
    else:
        path = folder / MANIFEST
        path.write_text(json.dumps({**json.loads(path.read_text()), **newer}))
    assert_refused(folder, r"format_version=2.*needs moeadapt >= 9\.1\.0")


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"router": {"name": "topk"}}, "unknown router 'topk'.*did you mean 'top_k'"),
        ({"router": "os.system"}, "unknown router 'os.system'; one of"),
        ({"experts": "lorra"}, "unknown .*'lorra'.*did you mean 'lora'"),
        ({"balance": {"swich": 0.1}}, "unknown .*'swich'.*did you mean 'switch'"),
        ({"placement": "os"}, "placement='os'"),
        ({"task_type": "os"}, "Invalid task type: 'os'"),
    ],
)
def test_fault_038_a_name_that_is_not_registered_is_refused_with_the_nearest(
    tmp_path, fields, words
):
    assert_refused(edit_settings(fresh(tmp_path), **fields), f"adapter_config.json: .*{words}")


IMPORTS = """
import sys, warnings
warnings.simplefilter("ignore")
import torch, peft, transformers, moeadapt
from transformers import AutoModelForCausalLM
from peft import PeftModel, AutoPeftModelForCausalLM
folder, good, base = sys.argv[1:]
load = AutoModelForCausalLM.from_pretrained
for adapter in (good, folder):  # whatever a good one imports is imported
    before = set(sys.modules)
    PeftModel.from_pretrained(load(base), adapter)
    load(base).load_adapter(adapter)
    AutoPeftModelForCausalLM.from_pretrained(adapter)
print(sorted(set(sys.modules) - before), "antigravity" in sys.modules)
"""


@pytest.mark.parametrize("words", [{"": float("nan")}, {"parent_library": 1}, {"a": ["b"]}])
def test_fault_031_a_mapping_of_names_holds_names(tmp_path, words):
    assert_refused(edit_settings(fresh(tmp_path), auto_mapping=words), "must map names to names")


def test_fault_039_nothing_that_a_file_names_is_imported(tmp_path):
    from tests.faults.loading_kit import shelf

    names = {
        "auto_mapping": {"base_model_class": "x", "parent_library": "antigravity"},
        "megatron_core": "antigravity",
        "_target_": "antigravity.x",
        "class_path": "antigravity.x",
        "_attn_implementation_internal": "antigravity/x",
    }
    folder = edit_settings(fresh(tmp_path), **names)
    command = [folder, shelf() / "adapter", shelf() / "base"]
    done = subprocess.run(
        [sys.executable, "-c", IMPORTS, *map(str, command)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.split("\n")[-2] == "[] False"


def test_fault_040_a_wish_to_run_code_is_ignored_with_a_warning(tmp_path):
    folder = edit_settings(fresh(tmp_path), trust_remote_code=True)
    with pytest.warns(UserWarning, match="trust_remote_code=True is ignored"):
        model = by_from_pretrained(base_model(), folder)
    assert not hasattr(model.peft_config["default"], "trust_remote_code")


@pytest.mark.parametrize("field", ["tokenizer_kwargs", "model_kwargs", "from_pretrained_kwargs"])
def test_fault_041_arguments_for_loaders_are_refused(tmp_path, field):
    folder = edit_settings(fresh(tmp_path), **{field: {"trust_remote_code": True}})
    assert_refused(folder, f"field '{field}': .*only from its caller")


def test_fault_042_targets_that_match_nothing_are_refused_and_some_warn(tmp_path):
    folder = edit_settings(fresh(tmp_path), target_modules=["query"])
    assert_refused(folder, "target_modules=.*matches no module")
    names = [f"{kind}_proj" for kind in ("q", "k", "v", "o", "gate", "up", "down")]
    edit_settings(folder, target_modules=[*names, "query"])
    with pytest.warns(UserWarning, match=r"\['query'\] match nothing .* other 7 match 14 modules"):
        by_from_pretrained(base_model(), folder)
    edit_settings(folder, target_modules=["q_proj"])
    assert_refused(folder, "holds 24 tensors|holds .* which its settings do not make")


@pytest.mark.parametrize(
    "pattern", [r"(.+)+\d\dx", r"((\w|\.)*)*x", r"(.*)*(.*)*(.*)*\d\dx", ".*.*.*.*.*.*.*.*.*x"]
)
def test_fault_043_a_pattern_that_never_ends_is_refused_in_time(tmp_path, pattern):
    folder = edit_settings(fresh(tmp_path), target_modules=pattern)
    start = time.monotonic()
    with refusal("target_modules takes longer", ConfigError):
        by_from_pretrained(base_model(), folder)
    assert time.monotonic() - start < 2  # half a second of it is another interpreter's


@pytest.mark.parametrize("field", ["rank_pattern", "alpha_pattern"])
def test_fault_043_more_patterns_than_can_be_matched_are_refused(tmp_path, field):
    folder = edit_settings(fresh(tmp_path), **{field: {f"a{i}": 1 for i in range(60_000)}})
    start = time.monotonic()
    with refusal(f"{field} has 60000 patterns; at most 2048", ConfigError):
        by_from_pretrained(base_model(), folder)
    assert time.monotonic() - start < 15  # it took minutes


def test_fault_043_as_many_patterns_as_allowed_are_matched_in_time():
    patterns = {f"layers.{i}.none": 1 for i in range(2047)} | {"q_proj": 2}
    start = time.monotonic()
    found = {matching(patterns, f"model.layers.{i}.self_attn.q_proj", 3) for i in range(100)}
    assert found == {2}
    assert matching(patterns, "model.layers.0.self_attn.k_proj", 3) == 3
    assert time.monotonic() - start < 15  # PEFT compiles each pattern anew: minutes


def test_fault_043_usual_patterns_are_matched(tmp_path):
    pattern = r"model\.layers\.(0|1)\.((self_attn|mlp)\.)+(q|k|v|o|gate|up|down)_proj"
    assert_loads(edit_settings(fresh(tmp_path), target_modules=pattern))


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"layers_to_transform": [0, 7]}, r"names layers \[7\], and this model has 0 to 1"),
        ({"layers_to_transform": -1}, r"names layers \[-1\]"),
        ({"experts_pattern": [4, 4, 4]}, "lists 3 groups of layers, which do not divide the 2"),
    ],
)
def test_fault_044_layers_that_do_not_exist_are_refused(tmp_path, fields, words):
    more = {} if "experts_pattern" in fields else {"target_modules": ["q_proj"]}
    assert_refused(edit_settings(fresh(tmp_path), **fields, **more), words)


def test_fault_048_names_of_folders_in_settings_reach_no_folder(tmp_path):
    for fields in ({"router": "../../x"}, {"experts": {"name": "../x"}}, {"balance": {"../x": 1}}):
        (tmp_path / str(len(str(fields)))).mkdir()
        folder = edit_settings(fresh(tmp_path / str(len(str(fields)))), **fields)
        assert_refused(folder, r"unknown .*'\.\./", cli=False)
    folder = edit_settings(fresh(tmp_path), subfolder="../../x", expert_names=["../a", "/b"])
    with pytest.warns(UserWarning, match=r"unknown fields \['expert_names', 'subfolder'\]"):
        model = by_from_pretrained(base_model(), folder)
    model.save_pretrained(tmp_path / "again")
    assert {p.name for p in tmp_path.iterdir()} >= {"again"}
    assert not [p for p in Path(tmp_path).rglob("*") if p.name in ("x", "a", "b")]


def test_fault_049_names_that_start_alike_do_not_mix(tmp_path):
    with quiet():  # PEFT warns of names that are in our prefix
        model = get_peft_model(base_model(), moe_config("block"), adapter_name="a").eval()
    model.add_adapter("ab", moe_config("block"))
    outputs = {}
    for name in ("a", "ab"):
        model.set_adapter(name)
        outputs[name] = logits(model, batch())
    assert not torch.allclose(outputs["a"], outputs["ab"])
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(base_model(), tmp_path / "ab", "ab").eval()
    with quiet():
        again.load_adapter(tmp_path / "a", "a")
    for name in ("a", "ab", "a"):
        again.set_adapter(name)
        assert torch.equal(logits(again, batch()), outputs[name])
    again.set_adapter("ab")
    again.delete_adapter("a")
    assert torch.equal(logits(again, batch()), outputs["ab"])


def test_settings_of_other_methods_pass_untouched(tmp_path):
    from peft import LoraConfig

    get_peft_model(base_model(), LoraConfig(target_modules=["q_proj"])).save_pretrained(tmp_path)
    path = tmp_path / SETTINGS
    assert not (tmp_path / MANIFEST).exists()
    assert PeftConfig.from_pretrained(tmp_path).peft_type == "LORA"
    PeftModel.from_pretrained(base_model(), tmp_path)
    path.write_text("[")
    with pytest.raises(json.JSONDecodeError):
        PeftConfig.from_pretrained(tmp_path)
    assert isinstance(adapt(base_model(), MoeLoraConfig(target_modules=["q_proj"])), PeftModel)
