"""Each target names exactly the tensors that transformers writes for its class."""

import pytest
import torch
import transformers
from safetensors import safe_open

from moeadapt.errors import ConfigError, UnsupportedError
from moeadapt.export.shards import plan
from moeadapt.export.source import ModelSource
from moeadapt.export.targets import EXPORTERS, MoeShape, find_target, targets_of
from tests.export.bases import ADDITIVE, BASES, FFN, base, base_config

ADDITIVE_CASES = [(name, target) for name, targets in ADDITIVE.items() for target in targets]


def shape_of(width: int = FFN, **fields) -> MoeShape:
    return MoeShape(**{"num_experts": 4, "top_k": 2, "expert_width": width, **fields})


def written_by_transformers(config, folder) -> dict[str, tuple[int, ...]]:
    """Save a random model of `config` and list what is on disk."""
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    found = {}
    for file in folder.glob("*.safetensors"):
        with safe_open(file, "pt") as opened:
            for name in opened.keys():  # noqa: SIM118
                found[name] = tuple(opened.get_slice(name).get_shape())
    return found


def planned(target, model) -> dict[str, tuple[int, ...]]:
    return {tensor.name: tensor.shape for tensor in plan(target, ModelSource(model).tensors())}


@pytest.mark.parametrize("name", BASES)
def test_a_mixture_of_ffns_has_the_tensors_that_transformers_saves(name, tmp_path):
    model = base(name)
    cls = find_target("auto", model.config)
    assert cls.name == BASES[name][2]
    target = cls(model.config, shape_of())
    target = cls(model.config, shape_of(target.full_width))
    assert planned(target, model) == written_by_transformers(target.config(), tmp_path)


@pytest.mark.parametrize(("name", "target_name"), ADDITIVE_CASES)
def test_small_experts_beside_the_ffn_have_the_tensors_that_transformers_saves(
    name, target_name, tmp_path
):
    model = base(name)
    shape = shape_of(16, shared_width=FFN)
    target = EXPORTERS[target_name](model.config, shape)
    assert planned(target, model) == written_by_transformers(target.config(), tmp_path)


@pytest.mark.parametrize("name", ["qwen2", "qwen3"])
def test_layers_that_keep_their_ffn_have_the_tensors_that_transformers_saves(name, tmp_path):
    model = base(name)
    target = find_target("auto", model.config)(model.config, shape_of(dense_layers=(1,)))
    assert planned(target, model) == written_by_transformers(target.config(), tmp_path)


def test_an_untied_head_is_a_tensor_of_its_own(tmp_path):
    model = base("qwen2, tied, yarn")
    target = EXPORTERS["qwen2_moe"](model.config, shape_of(untie=True))
    found = planned(target, model)
    assert found == written_by_transformers(target.config(), tmp_path)
    assert found["lm_head.weight"] == found["model.embed_tokens.weight"]


def test_every_target_is_planned_for_some_base():
    shown = {BASES[name][2] for name in BASES} | {t for ts in ADDITIVE.values() for t in ts}
    assert shown == set(EXPORTERS)


REFUSED = {
    "a gemma": (lambda: transformers.Gemma2Config(), "no stock mixture class holds 'gemma2'"),
    "phi3 that rotates half": (
        lambda: base_config(
            "phi3",
            rope_parameters={"rope_type": "default", "rope_theta": 1e4}
            | {"partial_rotary_factor": 0.5},
        ),
        "rotates a share of 0.5",
    ),
    "qwen3 with windows": (
        lambda: base_config(
            "qwen3", use_sliding_window=True, sliding_window=5, max_window_layers=1
        ),
        "sliding window",
    ),
    "llama with biases in its FFN": (lambda: base_config("llama", mlp_bias=True), "have biases"),
    "ernie with biases": (lambda: base_config("ernie4_5", use_bias=True), "have biases"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_base_that_no_class_holds_is_refused_with_the_reason(case):
    make, reason = REFUSED[case]
    with pytest.raises(UnsupportedError, match=reason):
        find_target("auto", make())
    assert targets_of(make()) == []


def test_a_class_that_transformers_lacks_is_refused(monkeypatch):
    monkeypatch.setattr(EXPORTERS["mixtral"], "architecture", "MixtralNeverWritten")
    with pytest.raises(UnsupportedError, match="has no MixtralNeverWritten"):
        find_target("mixtral", base_config("llama"))


def test_a_named_target_that_does_not_fit_names_those_that_do():
    with pytest.raises(UnsupportedError, match=r"what can: \['mixtral', 'granite_moe'\]"):
        find_target("qwen3_moe", base_config("llama"))


def test_an_unknown_target_is_named_with_its_neighbour():
    with pytest.raises(ConfigError, match="did you mean 'mixtral'"):
        find_target("mixtrl", base_config("llama"))


def test_a_router_that_the_class_cannot_compute_is_refused():
    additive = {"additive": True}
    assert find_target("auto", base_config("llama"), scoring="sigmoid", **additive).name == (
        "glm4_moe"
    )
    with pytest.raises(UnsupportedError, match="its router computes a softmax, not a sigmoid"):
        find_target("granite_moe_shared", base_config("llama"), scoring="sigmoid", **additive)


@pytest.mark.parametrize(
    ("target", "name", "fields", "reason"),
    [
        ("mixtral", "llama", {"norm_topk": False}, "always normalises"),
        ("mixtral", "llama", {"dense_layers": (0,)}, "a mixture in every layer"),
        ("qwen3_moe", "qwen3", {"dense_layers": (2,)}, "the base has 2 layers"),
        ("glm4_moe", "qwen3", {"shared_width": 64, "expert_width": 24}, r"\[16, 32\]"),
    ],
)
def test_a_shape_that_a_class_cannot_have_is_refused(target, name, fields, reason):
    with pytest.raises(UnsupportedError, match=reason):
        EXPORTERS[target](base_config(name), shape_of(**fields))


@pytest.mark.parametrize(
    "fields", [{"num_experts": 1}, {"top_k": 0}, {"top_k": 5}, {"expert_width": 0}]
)
def test_sizes_out_of_range_are_refused(fields):
    with pytest.raises(ConfigError):
        shape_of(**fields)


def test_the_plan_refuses_a_dtype_that_is_not_for_weights():
    model = base("llama")
    target = EXPORTERS["mixtral"](model.config, shape_of())
    with pytest.raises(ConfigError, match=r"torch\.int8"):
        plan(target, ModelSource(model).tensors(), torch.int8)
