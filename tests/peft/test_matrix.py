"""Every model and kind through every entry point of PEFT.

One test here is one row of the matrix in `docs`; `pytest --collect-only -q` counts its cases.
"""

import pytest
import torch
from peft import (
    AutoPeftModelForCausalLM,
    PeftConfig,
    PeftModel,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    set_peft_model_state_dict,
)
from safetensors.torch import load_file
from torch.testing import assert_close

from moeadapt import MoeLoraConfig
from moeadapt.routers import Router
from tests.peft.saved import Saved
from tests.tiny import CASES, adapt, adapted, batch, logits, moe_config, tiny

pytestmark = pytest.mark.parametrize(("name", "kind"), CASES)


def test_a_fresh_adapter_is_bitwise_the_base(name: str, kind: str) -> None:
    model = adapted(name, kind, init_lora_weights=True)
    assert torch.equal(logits(model, batch()), logits(tiny(name), batch()))


def test_a_random_adapter_is_not_the_base(saved: Saved) -> None:
    assert (saved.logits - saved.base_logits).abs().mean() > 0.1


def test_loading_gives_the_saved_outputs(saved: Saved) -> None:
    model = PeftModel.from_pretrained(saved.base(), saved.adapter_dir).eval()
    assert torch.equal(logits(model, saved.inputs), saved.logits)


def test_loading_under_another_name_gives_the_saved_outputs(saved: Saved) -> None:
    model = PeftModel.from_pretrained(saved.base(), saved.adapter_dir, adapter_name="other").eval()
    assert model.active_adapters == ["other"]
    assert torch.equal(logits(model, saved.inputs), saved.logits)


def test_loading_with_low_cpu_mem_usage_leaves_nothing_on_meta(saved: Saved) -> None:
    model = PeftModel.from_pretrained(saved.base(), saved.adapter_dir, low_cpu_mem_usage=True)
    assert not any(p.is_meta for p in model.parameters())
    assert torch.equal(logits(model.eval(), saved.inputs), saved.logits)


def test_auto_peft_model_finds_the_base_and_the_method(saved: Saved) -> None:
    model = AutoPeftModelForCausalLM.from_pretrained(saved.adapter_dir).eval()
    assert torch.equal(logits(model, saved.inputs), saved.logits)


def test_peft_config_reads_back_what_was_saved(saved: Saved) -> None:
    config = PeftConfig.from_pretrained(saved.adapter_dir)
    assert type(config) is MoeLoraConfig
    written = moe_config(saved.kind).to_dict()
    # "all-linear" is resolved to names, and the base's folder is filled in, when it is applied.
    changed = {"target_modules", "base_model_name_or_path", "inference_mode"}
    read = config.to_dict()
    assert {k for k in written if written[k] != read[k]} == changed


def test_the_file_holds_every_trained_tensor_and_nothing_else(saved: Saved) -> None:
    tensors = load_file(f"{saved.adapter_dir}/adapter_model.safetensors")
    trained = {n: p for n, p in saved.fresh().named_parameters() if p.requires_grad}
    assert {n.replace(".default", "") for n in trained} == set(tensors)
    assert all("moeadapt_" in n for n in tensors)


def test_saving_a_loaded_adapter_writes_the_same_tensors(saved: Saved, tmp_path) -> None:
    PeftModel.from_pretrained(saved.base(), saved.adapter_dir).save_pretrained(tmp_path)
    before = load_file(f"{saved.adapter_dir}/adapter_model.safetensors")
    after = load_file(tmp_path / "adapter_model.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[n], after[n]) for n in before)


def test_a_state_dict_moves_the_adapter(saved: Saved) -> None:
    source = PeftModel.from_pretrained(saved.base(), saved.adapter_dir)
    target = saved.fresh()
    report = set_peft_model_state_dict(target, get_peft_model_state_dict(source))
    assert not report.unexpected_keys
    assert not [key for key in report.missing_keys if "moeadapt_" in key]
    assert torch.equal(logits(target, saved.inputs), saved.logits)


def test_disabling_is_bitwise_the_base_and_leaves_no_trace(saved: Saved) -> None:
    model = PeftModel.from_pretrained(saved.base(), saved.adapter_dir).eval()
    with model.disable_adapter():
        assert torch.equal(logits(model, saved.inputs), saved.base_logits)
    assert torch.equal(logits(model, saved.inputs), saved.logits)


def test_unloading_is_bitwise_the_base_without_hooks(saved: Saved) -> None:
    hooks = sum(len(m._forward_pre_hooks) + len(m._forward_hooks) for m in saved.base().modules())
    model = PeftModel.from_pretrained(saved.base(), saved.adapter_dir).unload()
    left = sum(len(m._forward_pre_hooks) + len(m._forward_hooks) for m in model.modules())
    assert left == hooks
    assert not [n for n, _ in model.named_parameters() if "moeadapt" in n]
    assert torch.equal(logits(model, saved.inputs), saved.base_logits)


def test_a_second_adapter_does_not_disturb_the_first(saved: Saved) -> None:
    model = PeftModel.from_pretrained(saved.base(), saved.adapter_dir).eval()
    other = moe_config(saved.kind, num_experts=3, r=2)
    model.add_adapter("other", other)
    assert torch.equal(logits(model, saved.inputs), saved.logits)
    model.set_adapter("other")
    alone = adapt(tiny(saved.name), moe_config(saved.kind, num_experts=3, r=2))
    set_peft_model_state_dict(alone, get_peft_model_state_dict(model, adapter_name="other"))
    assert torch.equal(logits(model, saved.inputs), logits(alone, saved.inputs))


def test_deleting_an_adapter_leaves_the_other_as_it_was(saved: Saved) -> None:
    model = PeftModel.from_pretrained(saved.base(), saved.adapter_dir).eval()
    model.load_adapter(saved.adapter_dir, "kept")
    model.set_adapter("kept")
    model.delete_adapter("default")
    assert list(model.peft_config) == ["kept"]
    assert not [n for n in model.state_dict() if ".default." in n]
    assert torch.equal(logits(model, saved.inputs), saved.logits)


def test_injection_without_a_wrapper_computes_the_same(saved: Saved) -> None:
    torch.manual_seed(3)
    plain = inject_adapter_in_model(moe_config(saved.kind), saved.base()).eval()
    wrapped = adapt(saved.base(), moe_config(saved.kind), seed=3)
    assert type(plain) is type(saved.base())
    assert torch.equal(logits(plain, saved.inputs), logits(wrapped, saved.inputs))


def test_injection_from_a_state_dict_targets_the_same_modules(saved: Saved) -> None:
    tensors = load_file(f"{saved.adapter_dir}/adapter_model.safetensors")
    tensors = {n.removeprefix("base_model.model."): t for n, t in tensors.items()}
    model = inject_adapter_in_model(moe_config(saved.kind), saved.base(), state_dict=tensors)
    set_peft_model_state_dict(model, tensors)
    assert torch.equal(logits(model.eval(), saved.inputs), saved.logits)


def test_modules_to_save_train_and_travel_with_the_adapter(saved: Saved, tmp_path) -> None:
    untied = {"gpt2": "ln_f", "opt": "final_layer_norm", "gemma": "norm"}.get(saved.name, "lm_head")
    model = adapt(saved.base(), moe_config(saved.kind, modules_to_save=[untied]))
    copies = [p for n, p in model.named_parameters() if ".modules_to_save.default." in n]
    assert copies
    assert all(p.requires_grad for p in copies)
    with torch.no_grad():
        for copy in copies:
            copy.mul_(-1)
    expected = logits(model, saved.inputs)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(saved.base(), str(tmp_path)).eval()
    assert torch.equal(logits(loaded, saved.inputs), expected)
    with loaded.disable_adapter():
        assert torch.equal(logits(loaded, saved.inputs), saved.base_logits)


def test_routers_stay_float32_whatever_the_model_is_cast_to(saved: Saved) -> None:
    model = PeftModel.from_pretrained(saved.base(), saved.adapter_dir)
    for cast in (model.half, model.bfloat16, lambda: model.to(torch.bfloat16)):
        cast()
        routers = [m for m in model.modules() if isinstance(m, Router)]
        assert routers
        assert {p.dtype for m in routers for p in m.parameters()} == {torch.float32}
    assert {p.dtype for n, p in model.named_parameters() if "lora" in n} == {torch.bfloat16}
    result = logits(model.eval(), saved.inputs)
    assert result.dtype == torch.bfloat16
    assert result.isfinite().all()


@pytest.mark.parametrize(("autocast", "dtype"), [(True, torch.float32), (False, torch.bfloat16)])
def test_autocast_adapter_dtype_decides_the_experts_dtype(
    saved: Saved, autocast: bool, dtype: torch.dtype
) -> None:
    model = PeftModel.from_pretrained(
        saved.base().bfloat16(), saved.adapter_dir, autocast_adapter_dtype=autocast
    )
    assert {p.dtype for n, p in model.named_parameters() if "moeadapt_lora" in n} == {dtype}
    assert {p.dtype for n, p in model.named_parameters() if "router" in n} == {torch.float32}
    assert logits(model.eval(), saved.inputs).dtype == torch.bfloat16


def test_layer_status_sees_every_adapted_layer(saved: Saved) -> None:
    model = saved.fresh()
    status = model.get_model_status()
    layers = model.get_layer_status()
    assert len(layers) == len(model.base_model.targeted_module_names) == status.num_adapter_layers
    assert status.peft_types == {"default": "MOEADAPT"}
    assert status.enabled is True
    assert status.requires_grad == {"default": True}
    assert status.merged_adapters == []


def test_counting_parameters_agrees_with_the_sizes(saved: Saved) -> None:
    model = saved.fresh()
    trainable, total = model.get_nb_trainable_parameters()
    tensors = load_file(f"{saved.adapter_dir}/adapter_model.safetensors")
    assert trainable == sum(t.numel() for t in tensors.values())
    assert total == trainable + sum(p.numel() for p in saved.base().parameters())


def test_float64_is_followed_by_the_router(saved: Saved) -> None:
    model = PeftModel.from_pretrained(saved.base(), saved.adapter_dir).double().eval()
    precise = logits(model, saved.inputs)
    assert precise.dtype == torch.float64
    assert_close(precise.float(), saved.logits, atol=2e-4, rtol=1e-3)
