"""Cases 47, 74, 75 and 76: names of adapters, several of them, and what they may sit on."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import MixtralConfig, MixtralForCausalLM

from moeadapt.errors import ConfigError
from moeadapt.tuner.adapter_name import check_adapter_name
from moeadapt.tuner.context import find_context
from tests.tiny import MODERN, adapt, adapted, batch, logits, moe_config, tiny

pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore:Already found a `peft_config`:UserWarning"),
    pytest.mark.filterwarnings("ignore:Adapter name '' should not be contained:UserWarning"),
]

NAMES = {
    "parent": "../../x",
    "absolute": "/abs",
    "folder": "a/b",
    "dot": "a.b",
    "empty": "",
    "nul": "a\0b",
    "windows": "C:\\x",
    "long": "x" * 300,
    "emoji": "\N{GRINNING FACE}",
    "space": "a b",
    "newline": "default\n",
    "option": "-x",
    "of torch": "keys",
}

names = pytest.mark.parametrize("name", list(NAMES.values()), ids=list(NAMES))

RULE = r"1 to 64 ASCII letters, digits, '_' and '-'|attribute of that name"


def state(model: nn.Module) -> tuple[Any, dict[str, Tensor]]:
    """Return everything that a refusal must leave alone."""
    types = [(name, type(module)) for name, module in model.named_modules()]
    hooks = [len(m._forward_pre_hooks) + len(m._forward_hooks) for m in model.modules()]
    attributes = sorted(vars(model)), sorted(getattr(model, "peft_config", {}))
    return (types, hooks, attributes), {n: p.clone() for n, p in model.state_dict().items()}


def assert_untouched(model: nn.Module, before: tuple[Any, dict[str, Tensor]]) -> None:
    """Compare with `state` of before."""
    after = state(model)
    assert after[0] == before[0]
    assert after[1].keys() == before[1].keys()
    assert all(torch.equal(value, before[1][name]) for name, value in after[1].items())


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a folder with an adapter."""
    folder = tmp_path_factory.mktemp("outer") / "inner"
    adapted("llama", "block").save_pretrained(folder / "adapter")
    return folder


ENTRIES: dict[str, Callable[[Any, Any, str], Any]] = {
    "get_peft_model": lambda model, name, path: get_peft_model(
        model, moe_config("block"), adapter_name=name
    ),
    "from_pretrained": lambda model, name, path: PeftModel.from_pretrained(
        model, path, adapter_name=name
    ),
    "native add": lambda model, name, path: model.add_adapter(moe_config("block"), name),
    "native load": lambda model, name, path: model.load_adapter(path, name),
}


@names
@pytest.mark.parametrize("enter", list(ENTRIES.values()), ids=list(ENTRIES))
def test_fault_047_a_first_adapter_with_such_a_name_is_refused(
    enter: Callable[[Any, Any, str], Any], name: str, saved: Path
) -> None:
    model = tiny("llama")
    if enter is ENTRIES["native add"] and not name:
        return  # transformers itself takes it for "default"
    before, files = state(model), sorted(saved.parent.rglob("*"))
    with pytest.raises(ConfigError, match=RULE):
        enter(model, name, str(saved / "adapter"))
    assert_untouched(model, before)
    assert find_context(model) is None
    assert sorted(saved.parent.rglob("*")) == files
    ENTRIES["native add"](model, "good", "")


@names
@pytest.mark.parametrize("entry", ["add_adapter", "load_adapter"])
def test_fault_047_a_second_adapter_with_such_a_name_is_refused(
    entry: str, name: str, saved: Path
) -> None:
    model = adapted("llama", "block")
    before, files = state(model), sorted(saved.parent.rglob("*"))
    with pytest.raises(ConfigError, match=RULE):
        if entry == "add_adapter":
            model.add_adapter(name, moe_config("block"))
        else:
            model.load_adapter(str(saved / "adapter"), name)
    assert_untouched(model, before)
    assert sorted(saved.parent.rglob("*")) == files


def test_fault_047_what_is_no_string_is_no_name() -> None:
    with pytest.raises(ConfigError, match="adapter name 3 is a int; a name is 1 to 64"):
        check_adapter_name(3)


def test_fault_047_ordinary_names_are_allowed() -> None:
    model = tiny("llama")
    for name in ("a", "9", "my-adapter_v2", "x" * 64):
        model.add_adapter(moe_config("block"), name)


def native(*names: str) -> Any:
    """Return a model with adapters of these `CONFIGS`, added the way of transformers."""
    model = tiny("llama")
    for name in names:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model.add_adapter(CONFIGS[name](), name)
    return model.eval()


CONFIGS: dict[str, Callable[[], Any]] = {
    "moe": lambda: moe_config("block"),
    "other": lambda: moe_config("layer", num_experts=2),
    "lora": lambda: LoraConfig(target_modules=["q_proj"], init_lora_weights=False),
}


@pytest.mark.parametrize(("one", "two"), [("moe", "other"), ("moe", "lora"), ("lora", "moe")])
def test_fault_074_native_adapters_beside_each_other_do_not_mix(one: str, two: str) -> None:
    model = native(one, two)
    for name in (two, one):
        model.set_adapter(name)
        assert torch.equal(logits(model, batch()), logits(native(name), batch()))
    model.disable_adapters()
    assert torch.equal(logits(model, batch()), logits(tiny("llama"), batch()))


@pytest.mark.parametrize(("first", "second"), [("moe", "lora"), ("lora", "moe")])
def test_fault_074_peft_refuses_another_type_beside_a_mixture(first: str, second: str) -> None:
    model = adapt(tiny("llama"), CONFIGS[first]())
    before, expected = state(model), logits(model, batch())
    with pytest.raises(ValueError, match="Cannot combine adapters with different peft types"):
        model.add_adapter("second", CONFIGS[second]())
    assert_untouched(model, before)
    assert torch.equal(logits(model, batch()), expected)


def test_fault_074_a_deleted_active_adapter_leaves_the_other() -> None:
    model = adapted("llama", "block")
    model.add_adapter("other", CONFIGS["other"]())
    model.set_adapter("other")
    expected = logits(model, batch())
    model.set_adapter("default")
    with pytest.warns(UserWarning, match="was active which is now deleted"):
        model.delete_adapter("default")
    assert torch.equal(logits(model, batch()), expected)
    with pytest.raises(ValueError, match="does not exist"):
        model.delete_adapter("default")
    assert torch.equal(logits(model, batch()), expected)


def test_fault_074_a_name_loaded_twice_is_the_same_adapter(saved: Path) -> None:
    model = adapted("llama", "block", seed=5)
    expected = logits(adapted("llama", "block"), batch())
    assert not torch.equal(logits(model, batch()), expected)
    for _ in range(2):
        model.load_adapter(str(saved / "adapter"), "default")
        assert torch.equal(logits(model.eval(), batch()), expected)
    with pytest.raises(ValueError, match="already exists"):
        model.add_adapter("default", CONFIGS["other"]())
    assert torch.equal(logits(model, batch()), expected)


TIED = ["gemma", "gpt2", "opt"]


def is_tied(base: Any) -> bool:
    """Whether head and embedding are one parameter."""
    head, embedding = base.get_output_embeddings(), base.get_input_embeddings()
    head = head.get_base_layer() if hasattr(head, "get_base_layer") else head
    return head.weight is embedding.weight


@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`:UserWarning")
@pytest.mark.parametrize("name", TIED)
def test_fault_075_a_tied_head_stays_tied_and_travels(name: str, tmp_path: Path) -> None:
    targets = {"target_modules": ["lm_head"]}
    with pytest.warns(UserWarning, match="tied layer is part of the adapter"):
        model = adapt(tiny(name), moe_config("layer", **targets))
    base = logits(tiny(name), batch())
    changed = logits(model, batch())
    assert not torch.equal(changed, base)
    assert is_tied(model.get_base_model())
    model.save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match="tied layer is part of the adapter"):
        again = PeftModel.from_pretrained(tiny(name), tmp_path).eval()
    assert torch.equal(logits(again, batch()), changed)
    assert is_tied(again.get_base_model())
    plain = again.unload()
    assert is_tied(plain)
    assert torch.equal(logits(plain, batch()), base)


@pytest.mark.parametrize("name", TIED)
def test_fault_075_a_tied_head_that_is_trained_in_full_is_never_untied_silently(name: str) -> None:
    with pytest.warns(UserWarning, match="tied layer is part of the adapter"):
        model = adapt(tiny(name), moe_config("block", modules_to_save=["lm_head"]))
    base: Any = model.get_base_model()
    head = base.get_output_embeddings()
    assert head.original_module.weight is base.get_input_embeddings().weight
    copied = head.modules_to_save["default"].weight
    assert copied is not head.original_module.weight
    assert torch.equal(copied, head.original_module.weight)


def mixtral() -> Any:
    """Return a tiny stock mixture, whose experts are fused 3-D parameters."""
    fields: dict[str, Any] = {**MODERN, "num_local_experts": 4, "num_experts_per_tok": 2}
    return MixtralForCausalLM(MixtralConfig(**fields)).eval()


UNSUPPORTED: dict[str, tuple[Callable[[], Any], list[str]]] = {
    "embedding": (lambda: tiny("llama"), ["embed_tokens"]),
    "norm": (lambda: tiny("gpt2"), ["c_fc", "ln_1"]),
    "block": (lambda: tiny("llama"), ["mlp"]),
    "fused experts": (mixtral, ["q_proj", "experts"]),
}


@pytest.mark.parametrize(("build", "targets"), list(UNSUPPORTED.values()), ids=list(UNSUPPORTED))
def test_fault_076_an_unsupported_layer_is_refused_with_what_is_supported(
    build: Callable[[], Any], targets: list[str]
) -> None:
    model = build()
    before = state(model)
    with pytest.raises(ConfigError, match=r"cannot hold LoRA experts; supported: torch.nn.Linear"):
        get_peft_model(model, moe_config("layer", target_modules=targets))
    assert_untouched(model, before)


def test_fault_076_fused_parameters_are_refused_by_name() -> None:
    with pytest.raises(ConfigError, match="target_parameters=.* is not supported"):
        moe_config("layer", target_parameters=["mlp.experts.gate_up_proj"])


def test_fault_076_conv1d_is_supported() -> None:
    model = adapted("gpt2", "layer")
    assert not torch.equal(logits(model, batch()), logits(tiny("gpt2"), batch()))
