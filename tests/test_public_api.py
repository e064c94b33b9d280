"""The names that users, recipes and docs rely on."""

import inspect
import subprocess
import sys
from dataclasses import fields

import pytest
from peft import LoraConfig, PeftType
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING

import moeadapt
from moeadapt import errors
from moeadapt.tuner import MoeLoraModel
from moeadapt.tuner.register import register

TARGETING = [
    "target_modules",
    "exclude_modules",
    "layers_to_transform",
    "layers_pattern",
    "rank_pattern",
    "alpha_pattern",
    "modules_to_save",
    "trainable_token_indices",
    "use_rslora",
    "lora_dropout",
    "lora_alpha",
    "init_lora_weights",
    "r",
]


def test_public_names_are_these():
    assert sorted(moeadapt.__all__) == [
        "BALANCE",
        "EXPERTS",
        "MoeAdaptCallback",
        "MoeLoraConfig",
        "PRESETS",
        "ROUTERS",
        "Routing",
        "__version__",
        "after_optimizer_step",
        "attach_optimizer",
        "collect_routing",
        "densify",
        "distill",
        "errors",
        "evaluation",
        "export",
        "init_from_adapters",
        "init_routers_kmeans",
        "interpret",
        "load_adapter_checked",
        "loading_options",
        "merge",
        "override_routing",
        "push",
        "report",
        "set_aux_loss_scale",
        "split",
        "step_schedule",
        "surgery",
        "upcycle",
    ]


@pytest.mark.parametrize("name", moeadapt.__all__)
def test_every_public_name_can_be_imported(name):
    assert getattr(moeadapt, name) is not None


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'MoeLoraConfg'"):
        moeadapt.MoeLoraConfg  # noqa: B018


@pytest.mark.parametrize("name", TARGETING)
def test_config_has_the_fields_that_lora_users_know(name):
    ours = {f.name for f in fields(moeadapt.MoeLoraConfig)}
    theirs = {f.name for f in fields(LoraConfig)}
    assert name in ours & theirs


def test_every_error_has_one_root_and_a_builtin():
    classes = [
        c for _, c in inspect.getmembers(errors, inspect.isclass) if c.__module__ == errors.__name__
    ]
    for cls in classes:
        assert issubclass(cls, errors.MoeAdaptError) or issubclass(cls, UserWarning)
    assert issubclass(errors.ConfigError, ValueError)
    assert issubclass(errors.UnsupportedError, NotImplementedError)


def test_importing_registers_the_method():
    assert PEFT_TYPE_TO_CONFIG_MAPPING[PeftType.MOEADAPT] is moeadapt.MoeLoraConfig
    assert PEFT_TYPE_TO_TUNER_MAPPING[PeftType.MOEADAPT] is MoeLoraModel


def test_registering_twice_changes_nothing():
    before = list(PeftType)
    register()
    assert list(PeftType) == before


ORDERS = {
    "moeadapt_first": "import moeadapt, peft",
    "probed_first": (
        "import moeadapt, importlib.util; importlib.util.find_spec('peft');"
        "assert 'peft' not in __import__('sys').modules; import peft"
    ),
    "trainer_first": "import moeadapt; from transformers import Trainer; import peft",
    "peft_first": "import peft, moeadapt",
    "only_the_config": "from moeadapt import MoeLoraConfig; MoeLoraConfig(); import peft",
    "only_the_tuner": "import moeadapt.tuner, peft",
    "only_the_trainers": "import moeadapt.training.recipe, peft",
}


@pytest.mark.parametrize("order", sorted(ORDERS))
def test_the_method_is_registered_whatever_is_imported_first(order):
    probe = f"{ORDERS[order]}; print('MOEADAPT' in peft.mapping.PEFT_TYPE_TO_CONFIG_MAPPING)"
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True)
    assert done.stdout.strip() == "True", done.stderr[-2000:]


def test_importing_moeadapt_alone_imports_neither_torch_nor_peft():
    probe = "import sys, moeadapt; print(sorted({'torch', 'peft'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True)
    assert done.stdout.strip() == "[]"
