"""Names, types, shapes and numbers of an adapter's tensors: cases 15 to 27."""

import shutil
from typing import Any

import pytest
import torch
from peft import PeftModel, set_peft_model_state_dict
from safetensors.torch import load_file

import moeadapt
from moeadapt.errors import AdapterFileError
from tests.faults.loading_kit import (
    PREFIX,
    ROUTER,
    WEIGHTS,
    A,
    assert_loads,
    assert_refused,
    assert_untouched,
    base_model,
    by_from_pretrained,
    by_replacing,
    edit_header,
    edit_settings,
    edit_tensors,
    expected_logits,
    fresh,
    refusal,
    shelf,
    state,
)
from tests.tiny import adapt, batch, logits, moe_config, tiny

BASE_WEIGHTS = [
    "base_model.model.lm_head.weight",
    "base_model.model.model.embed_tokens.weight",
    PREFIX + "self_attn.q_proj.base_layer.weight",
    PREFIX + "self_attn.q_proj.weight",
    PREFIX + "input_layernorm.weight",
]


def test_fault_015_half_of_the_tensors_missing_is_refused_with_names_and_count(tmp_path):
    folder = edit_tensors(fresh(tmp_path), lambda t: dict(list(t.items())[::2]))
    assert_refused(folder, r"lacks 16 tensors \(('\S+', ){5}\.\.\.\) of the 32")


@pytest.mark.parametrize("empty", [True, False])
def test_fault_016_no_tensor_or_only_wrong_ones_is_refused(tmp_path, empty):
    def change(tensors: dict[str, Any]) -> dict[str, Any]:
        return {} if empty else {"x." + name: t for name, t in tensors.items()}

    folder = edit_tensors(fresh(tmp_path), change)
    assert_refused(folder, "lacks 32 tensors" if empty else "holds 32 tensors.*lacks 32")


@pytest.mark.parametrize("name", BASE_WEIGHTS)
def test_fault_017_an_extra_base_weight_is_refused(tmp_path, name):
    shape = (
        tiny("llama")
        .state_dict()[name.removeprefix("base_model.model.").replace(".base_layer", "")]
        .shape
    )
    folder = edit_tensors(fresh(tmp_path), lambda t: {**t, name: torch.ones(shape)})
    assert_refused(folder, "would overwrite the base model's own weights")
    with refusal("would overwrite"):
        by_replacing(base_model(), folder)


def test_fault_017_a_base_weight_in_a_dictionary_is_refused_too(tmp_path):
    base = base_model()
    before = state(base)
    model = adapt(base, moe_config("block"))
    tensors = load_file(shelf() / "adapter" / WEIGHTS)
    with refusal("not the adapter's"):
        set_peft_model_state_dict(model, {**tensors, BASE_WEIGHTS[0]: torch.ones(128, 32)})
    assert_untouched(base, before)
    assert_untouched(model.unload(), before)


def test_fault_017_the_caller_may_let_base_weights_in(tmp_path):
    head = torch.ones(128, 32)
    folder = edit_tensors(fresh(tmp_path), lambda t: {**t, BASE_WEIGHTS[0]: head})
    model = moeadapt.load_adapter_checked(base_model(), folder, allow_base_weights=True)
    assert torch.equal(model.get_base_model().lm_head.weight, head)


def test_fault_018_an_extra_tensor_of_our_own_is_refused(tmp_path):
    name = PREFIX + "self_attn.q_proj.moeadapt_lora_C.weight"
    folder = edit_tensors(fresh(tmp_path), lambda t: {**t, name: torch.ones(3)})
    assert_refused(folder, "holds 1 tensor .*lora_C.*which its settings do not make")


def test_fault_019_a_type_that_no_adapter_has_is_refused(tmp_path):
    folder = edit_tensors(fresh(tmp_path), lambda t: t.update({A: t[A].to(torch.float8_e4m3fn)}))
    assert_refused(folder, "lora_A.weight': unknown type 'F8_E4M3'; one of .*'F32'")


@pytest.mark.parametrize("dtype", [torch.int8, torch.bool, torch.int64])
def test_fault_019_tensors_of_integers_are_refused(tmp_path, dtype):
    folder = edit_tensors(fresh(tmp_path), lambda t: t.update({A: t[A].to(dtype)}))
    assert_refused(folder, "lora_A.weight' is .*must be .'F16', 'BF16', 'F32', 'F64'.")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_fault_020_other_floats_are_cast_to_what_the_layer_has(tmp_path, dtype):
    folder = edit_tensors(fresh(tmp_path), lambda t: {name: x.to(dtype) for name, x in t.items()})
    saved = load_file(folder / WEIGHTS)
    model = by_from_pretrained(base_model(), folder)
    for name, tensor in model.state_dict().items():
        if "moeadapt_" in name:
            assert tensor.dtype == torch.float32
            assert torch.equal(tensor, saved[name.replace(".default", "")].float())
    half = PeftModel.from_pretrained(base_model().to(torch.bfloat16), folder)
    routers = [t for n, t in half.state_dict().items() if "moeadapt_router" in n]
    assert {t.dtype for t in routers} == {torch.float32}


@pytest.mark.parametrize(
    ("value", "words"), [(float("nan"), "1 NaN and 0"), (float("-inf"), "0 NaN and 1")]
)
@pytest.mark.parametrize("name", [A, ROUTER])
def test_fault_021_a_number_that_is_not_finite_is_refused(tmp_path, name, value, words):
    folder = edit_tensors(fresh(tmp_path), lambda t: t[name].view(-1)[3:4].fill_(value) and None)
    assert_refused(folder, f"tensor '{name}' holds {words} infinite numbers")
    with refusal("not finite|holds"):
        by_replacing(base_model(), folder)
    model = moeadapt.load_adapter_checked(base_model(), folder, allow_nonfinite=True)
    with moeadapt.loading_options(allow_nonfinite=True):
        model.load_adapter(folder, "again")
    key = name.replace(".weight", ".again.weight")
    assert model.state_dict()[key].isfinite().sum() == model.state_dict()[key].numel() - 1


def test_fault_021_a_number_that_overflows_when_it_is_cast_is_refused(tmp_path):
    folder = edit_tensors(fresh(tmp_path), lambda t: t.update({A: t[A].double() * 1e300}))
    assert_refused(folder, "holds 0 NaN and .* infinite", cli=False)


def test_fault_022_numbers_at_the_end_of_the_range_warn(tmp_path):
    folder = edit_tensors(fresh(tmp_path), lambda t: t[A].view(-1)[:1].fill_(2e38) and None)
    with pytest.warns(UserWarning, match="lora_A.weight' holds 2e.38"):
        by_from_pretrained(base_model(), folder)


def test_fault_023_another_rank_than_the_settings_is_refused_with_both(tmp_path):
    folder = edit_settings(fresh(tmp_path), r=8)
    assert_refused(folder, "The file has rank 4, its settings say 8")


def test_fault_024_other_experts_than_the_settings_are_refused_with_both(tmp_path):
    folder = edit_settings(fresh(tmp_path), num_experts=3)
    assert_refused(folder, "The file has 4 experts, its settings say 3")


@pytest.mark.parametrize("sealed", [True, False])
def test_fault_025_a_router_of_another_width_is_refused_with_both(tmp_path, sealed):
    """By the manifest's word on the base, and by the shapes alone."""
    wide = tiny("llama", hidden_size=48, intermediate_size=96, num_hidden_layers=2)
    folder = tmp_path / "adapter"
    adapt(wide, moe_config("block")).save_pretrained(folder)
    edit_settings(folder, base_model_name_or_path=str(shelf() / "base"))
    if sealed:
        assert_refused(folder, "made for hidden 48, this base has 32", cli=False)
        return
    shutil.copy(shelf() / "adapter" / "moeadapt_manifest.json", folder)
    edit_settings(folder)
    assert_refused(folder, "made for hidden 48, this base has 32", cli=False)


def test_fault_026_a_transposed_tensor_is_refused(tmp_path):
    name = PREFIX + "mlp.gate_proj.moeadapt_lora_A.weight"
    folder = edit_tensors(fresh(tmp_path), lambda t: t.update({name: t[name].T.contiguous()}))
    assert_refused(folder, r"gate_proj.*\[32, 16\] instead of \[16, 32\].*It is transposed")


def test_fault_027_the_order_of_the_tensors_does_not_matter(tmp_path):
    folder = fresh(tmp_path)
    before = (folder / WEIGHTS).read_bytes()
    edit_header(folder, lambda h: dict(reversed(h.items())))
    assert (folder / WEIGHTS).read_bytes() != before
    assert_loads(folder)


def test_a_refused_adapter_can_be_followed_by_a_good_one(tmp_path):
    """Nothing of the refusal stays behind, in the model or in what loading remembers."""
    bad = edit_settings(fresh(tmp_path), r=8)
    base = base_model()
    for load in (lambda: PeftModel.from_pretrained(base, bad), lambda: base.load_adapter(str(bad))):
        with pytest.raises(AdapterFileError):
            load()
    model = PeftModel.from_pretrained(base, shelf() / "adapter").eval()
    assert torch.equal(logits(model, batch()), expected_logits())
    before = state(tiny("llama"))
    with pytest.raises(AdapterFileError):
        model.load_adapter(str(bad), "bad")
    assert list(model.peft_config) == ["default"]
    assert_untouched(model.unload(), before)
