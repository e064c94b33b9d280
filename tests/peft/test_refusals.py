"""What a routed mixture, or PEFT from outside, cannot do is refused and changes nothing."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import PeftMixedModel, PeftModel, get_peft_model
from peft.tuners.lora.conversion import convert_to_lora
from peft.utils.hotswap import hotswap_adapter
from torch import Tensor, nn
from transformers import (
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from moeadapt import MoeLoraConfig
from moeadapt.errors import ConfigError, MoeAdaptError, UnsupportedError
from moeadapt.tuner import MoeLoraLinear
from moeadapt.tuner.context import find_context
from tests.tiny import HIDDEN, KINDS, VOCAB, adapted, batch, logits, moe_config, tiny

MENU = "from_pretrained.*disable_adapter.*unload.*plain LoRA"


def _state(model: nn.Module) -> dict[str, Any]:
    """Return everything a refusal must leave alone."""
    return {
        "types": [(n, type(m)) for n, m in model.named_modules()],
        "hooks": [(len(m._forward_pre_hooks), len(m._forward_hooks)) for m in model.modules()],
        "trained": [(n, p.requires_grad) for n, p in model.named_parameters()],
        "config": sorted(getattr(model, "peft_config", {})),
        "attributes": sorted(vars(model)),
    }


def _same(before: dict[str, Tensor], after: dict[str, Tensor]) -> bool:
    return before.keys() == after.keys() and all(torch.equal(before[n], after[n]) for n in before)


REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "embedding": (
        "llama",
        {"target_modules": ["embed_tokens", "q_proj"]},
        r"'model.embed_tokens' is a Embedding.*nn.Linear, transformers Conv1D, and the quantised",
    ),
    "norm": ("llama", {"target_modules": ["norm"]}, "LlamaRMSNorm"),
    "whole block": ("llama", {"target_modules": ["mlp"]}, "LlamaMLP"),
    "gpt2 norm": ("gpt2", {"target_modules": ["c_fc", "ln_1"]}, "LayerNorm"),
    "partial ffn": (
        "llama",
        {"placement": "ffn", "target_modules": ["gate_proj", "up_proj"]},
        r"every linear of the FFN 'model.layers.0.mlp'.*not targeted: .*down_proj",
    ),
    "partial ffn, opt": (
        "opt",
        {"placement": "ffn", "target_modules": ["fc1"]},
        "not targeted: .*fc2",
    ),
    "no ffn": (
        "llama",
        {"placement": "ffn", "target_modules": ["q_proj"]},
        "found no FFN among the targets",
    ),
}


@pytest.mark.parametrize(("name", "fields", "message"), list(REFUSED.values()), ids=list(REFUSED))
def test_a_refused_target_leaves_the_base_untouched(
    name: str, fields: dict[str, Any], message: str
) -> None:
    base = tiny(name)
    state, weights = _state(base), {n: p.clone() for n, p in base.state_dict().items()}
    with pytest.raises(ConfigError, match=message):
        get_peft_model(base, moe_config("layer", **fields))
    assert _state(base) == state
    assert _same(weights, base.state_dict())
    assert find_context(base) is None


def test_a_lone_linear_is_no_ffn() -> None:
    config = Qwen2MoeConfig(
        hidden_size=32,
        intermediate_size=64,
        moe_intermediate_size=16,
        shared_expert_intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_experts=4,
        vocab_size=128,
    )
    with pytest.raises(ConfigError, match="mlp.shared_expert_gate' stands alone.*exclude_modules"):
        get_peft_model(Qwen2MoeForCausalLM(config), moe_config("ffn"))
    excluded = moe_config("ffn", exclude_modules=["shared_expert_gate"])
    model = get_peft_model(Qwen2MoeForCausalLM(config), excluded)
    assert logits(model, batch()).isfinite().all()


@pytest.mark.parametrize("targets", [["nonsense"], r".*nonsense"])
def test_targets_that_match_nothing_leave_the_base_untouched(targets: Any) -> None:
    base = tiny("llama")
    state = _state(base)
    with pytest.raises(ValueError, match="matches no module"):
        get_peft_model(base, moe_config("layer", target_modules=targets))
    assert _state(base) == state


@pytest.mark.parametrize("kind", KINDS)
def test_a_refused_second_adapter_leaves_the_first_working(kind: str) -> None:
    model = adapted("llama", kind)
    state, before = _state(model), logits(model, batch())
    for targets in (["embed_tokens"], ["nonsense"]):
        with pytest.raises(ValueError, match="embed_tokens|nonsense"):
            model.add_adapter("other", moe_config(kind, target_modules=targets))
        assert _state(model) == state
        assert torch.equal(logits(model, batch()), before)
    model.add_adapter("other", moe_config(kind))


@pytest.mark.filterwarnings("ignore:Already found a `peft_config` attribute:UserWarning")
def test_a_natively_refused_second_adapter_leaves_the_first_working() -> None:
    model = tiny("llama")
    model.add_adapter(moe_config("block"), "first")
    state, before = _state(model), logits(model, batch())
    with pytest.raises(ConfigError, match="embed_tokens"):
        model.add_adapter(moe_config("block", target_modules=["embed_tokens"]), "second")
    assert _state(model) == state
    assert torch.equal(logits(model, batch()), before)


def test_fused_parameters_are_refused_by_the_config() -> None:
    with pytest.raises(ConfigError, match="target_parameters=.*target_modules"):
        moe_config("layer", target_parameters=["mlp.experts.gate_up_proj"])


@pytest.mark.parametrize("bias", ["all", "lora_only"])
def test_trained_biases_are_refused_by_the_config(bias: str) -> None:
    with pytest.raises(ConfigError, match="bias="):
        moe_config("layer", bias=bias)


MERGES: dict[str, Callable[[PeftModel], Any]] = {
    "merge_and_unload": lambda m: m.merge_and_unload(),
    "merge_and_unload safely": lambda m: m.merge_and_unload(safe_merge=True),
    "merge_adapter": lambda m: m.merge_adapter(),
    "merge_adapter by name": lambda m: m.merge_adapter(["default"]),
    "layer.merge": lambda m: next(x for x in m.modules() if isinstance(x, MoeLoraLinear)).merge(),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("merge", list(MERGES.values()), ids=list(MERGES))
def test_merging_refuses_with_the_menu(merge: Callable[[PeftModel], Any], kind: str) -> None:
    model = adapted("llama", kind)
    state, before = _state(model), logits(model, batch())
    with pytest.raises(UnsupportedError, match=MENU) as caught:
        merge(model)
    assert isinstance(caught.value, (MoeAdaptError, NotImplementedError))
    assert _state(model) == state
    assert torch.equal(logits(model, batch()), before)


@pytest.mark.parametrize("kind", KINDS)
def test_unmerging_what_was_never_merged_does_nothing(kind: str) -> None:
    model = adapted("llama", kind)
    before = logits(model, batch())
    model.unmerge_adapter()
    assert torch.equal(logits(model, batch()), before)


@pytest.mark.parametrize("call", ["forward", "generate"])
def test_an_adapter_per_row_is_refused(call: str) -> None:
    model = adapted("llama", "block")
    with pytest.raises(UnsupportedError, match="set_adapter between the calls"):
        getattr(model, call)(**batch(), adapter_names=["default", "__base__", "default"])
    assert torch.equal(logits(model, batch()), logits(adapted("llama", "block"), batch()))


def test_peft_mixed_models_are_refused() -> None:
    base = tiny("llama")
    state = _state(base)
    with pytest.raises(ValueError, match="not compatible|MOEADAPT|not supported"):
        get_peft_model(base, moe_config("layer"), mixed=True)
    with pytest.raises(ValueError, match="not compatible|MOEADAPT|not supported"):
        PeftMixedModel(base, moe_config("layer"), adapter_name="default")
    assert _state(base) == state


@pytest.mark.parametrize("kind", KINDS)
def test_hotswapping_is_refused(kind: str, save_case) -> None:
    saved = save_case("llama", kind)
    model = PeftModel.from_pretrained(saved.base(), saved.adapter_dir).eval()
    with pytest.raises(ValueError, match="LORA"):
        hotswap_adapter(model, saved.adapter_dir, adapter_name="default")
    assert torch.equal(logits(model, saved.inputs), saved.logits)
    native = saved.base()
    native.load_adapter(saved.adapter_dir)
    with pytest.raises(ValueError, match="LoRA"):
        native.load_adapter(saved.adapter_dir, "default", hotswap=True)
    assert torch.equal(logits(native, saved.inputs), saved.logits)


def test_peft_does_not_convert_a_mixture_to_lora() -> None:
    model = adapted("llama", "layer")
    assert not model.supports_lora_conversion()
    with pytest.raises((TypeError, ValueError), match="lora|LoRA"):
        convert_to_lora(model, rank=4)


@pytest.mark.parametrize("kind", ["block", "ffn"])
def test_a_linear_called_outside_its_block_is_refused(kind: str) -> None:
    model = adapted("llama", kind)
    layer = model.get_base_model().model.layers[0].mlp.up_proj
    with pytest.raises(UnsupportedError, match="router_scope='layer'"):
        layer(torch.zeros(1, 2, 32))
    assert torch.equal(logits(model, batch()), logits(adapted("llama", kind), batch()))


def test_an_encoder_decoder_model_is_refused_before_it_is_touched() -> None:
    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 1, "num_heads": 4}
    model = T5ForConditionalGeneration(T5Config(vocab_size=VOCAB, **sizes))
    before = [type(module) for module in model.modules()]
    with pytest.raises(ConfigError, match="encoder-decoder models are not supported"):
        get_peft_model(model, MoeLoraConfig(target_modules=["q", "v"]))
    assert [type(module) for module in model.modules()] == before


@pytest.mark.parametrize("kind", ["layer", "block"])
def test_no_token_at_all_gives_no_output_row(kind: str) -> None:
    block = adapted("llama", kind).get_base_model().model.layers[0].mlp
    assert block(torch.zeros(0, 3, HIDDEN)).shape == (0, 3, HIDDEN)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"target_modules": ["qq_proj"]}, "matches no module; did you mean 'q_proj'.*'down_proj'"),
        ({"target_modules": "q_proj"}, "did you mean 'q_proj'.*give a list to name modules"),
        (
            {"target_modules": ["q_proj"], "layers_to_transform": [7]},
            "layers_to_transform names layers",
        ),
        ({"target_modules": "*("}, "not a valid regular expression: nothing to repeat"),
    ],
)
def test_targets_that_match_nothing_name_what_there_is(
    fields: dict[str, Any], message: str
) -> None:
    model = tiny("llama")
    before = _state(model)
    with pytest.raises(ConfigError, match=message):
        get_peft_model(model, moe_config("layer", **fields))
    assert _state(model) == before
