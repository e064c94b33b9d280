"""The compatibility table says no exactly where an engine is known to be wrong."""

import pytest

from moeadapt.errors import ConfigError, UnsupportedError
from moeadapt.export.engines import (
    ENGINES,
    EXACT,
    RULES,
    UNTESTED,
    WRONG,
    check_engines,
    verdicts,
)
from moeadapt.export.targets import EXPORTERS, MoeShape
from tests.export.bases import LLAMA3, base_config


def target(name, base, settings=None, **config):
    fields = {"num_experts": 4, "top_k": 2, "expert_width": 16, **(settings or {})}
    return EXPORTERS[name](base_config(base, **config), MoeShape(**fields))


WRONGS = {
    "qwen2 renormalised": (target, ("qwen2_moe", "qwen2"), {}, {"llama.cpp"}),
    "qwen2 with all experts": (
        target, ("qwen2_moe", "qwen2", {"top_k": 4}), {}, set(),
    ),
    "qwen2 plain": (target, ("qwen2_moe", "qwen2", {"norm_topk": False}), {}, set()),
    "qwen2 tied": (
        target, ("qwen2_moe", "qwen2", {"norm_topk": False}), {"tie_word_embeddings": True},
        {"llama.cpp"},
    ),
    "qwen2 untied": (
        target, ("qwen2_moe", "qwen2", {"norm_topk": False, "untie": True}),
        {"tie_word_embeddings": True}, set(),
    ),
    "qwen3 renormalised": (target, ("qwen3_moe", "qwen3"), {}, set()),
    "qwen3 plain": (target, ("qwen3_moe", "qwen3", {"norm_topk": False}), {}, {"llama.cpp"}),
    "qwen3 in one layer": (
        target, ("qwen3_moe", "qwen3", {"dense_layers": (0,)}), {}, {"llama.cpp"},
    ),
    "flex_olmo": (target, ("flex_olmo", "olmo2"), {}, {"llama.cpp", "sglang"}),
    "granite": (target, ("granite_moe", "granite"), {}, set()),
    "granite llama3 rope": (
        target, ("granite_moe", "granite"), {"rope_parameters": LLAMA3}, {"llama.cpp"},
    ),
    "granite with biases": (
        target, ("granite_moe", "granite"), {"attention_bias": True},
        {"vllm", "sglang", "llama.cpp"},
    ),
    "granite with wide heads": (
        target, ("granite_moe", "granite"), {"head_dim": 12}, {"vllm", "sglang", "llama.cpp"},
    ),
    "qwen2 with windows": (
        target, ("qwen2_moe", "qwen2, window in one layer", {"norm_topk": False}), {},
        {"vllm", "sglang", "llama.cpp"},
    ),
    "cohere2": (target, ("cohere2_moe", "cohere2"), {}, {"llama.cpp", "sglang"}),
    "mixtral": (target, ("mixtral", "llama"), {}, set()),
    "mixtral with gelu": (
        target, ("mixtral", "llama"), {"hidden_act": "gelu"}, {"vllm", "sglang", "llama.cpp"},
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONGS)
def test_an_engine_is_wrong_where_the_facts_say_so(case):
    make, args, config, expected = WRONGS[case]
    found = make(*args, **config)
    assert {v.engine for v in verdicts(found) if v.status == WRONG} == expected
    for engine in ENGINES:
        if engine in expected:
            with pytest.raises(UnsupportedError, match=engine.replace(".", r"\.")):
                check_engines(found, [engine])
        else:
            check_engines(found, [engine])


DENSE = {
    "mixtral": "llama", "qwen2_moe": "qwen2", "qwen3_moe": "qwen3", "qwen3_5_moe": "qwen3_5",
    "flex_olmo": "olmo2", "granite_moe": "granite", "granite_moe_shared": "granite",
    "ernie4_5_moe": "ernie4_5", "cohere2_moe": "cohere2", "hunyuan_moe_v1": "hunyuan",
    "lfm2_moe": "lfm2", "glm4_moe": "llama",
}  # fmt: skip


@pytest.mark.parametrize("name", EXPORTERS)
def test_transformers_is_exact_for_every_target(name):
    beside = {"shared_width": 64} if name in ("granite_moe_shared", "glm4_moe") else {}
    found = {v.engine: v.status for v in verdicts(target(name, DENSE[name], beside))}
    assert found["transformers"] == EXACT


@pytest.mark.parametrize(
    ("args", "config", "status"),
    [
        (("mixtral", "llama"), {}, EXACT),
        (("mixtral", "llama"), {"rope_parameters": LLAMA3}, UNTESTED),
        (("mixtral", "llama"), {"head_dim": 12}, UNTESTED),
        (("mixtral", "mistral, window"), {}, WRONG),
        (("ernie4_5_moe", "ernie4_5"), {}, UNTESTED),
    ],
)
def test_llama_cpp_is_exact_only_where_it_was_measured(args, config, status):
    found = {v.engine: v.status for v in verdicts(target(*args, **config))}
    assert found["llama.cpp"] == status


def test_an_unknown_engine_is_named_with_its_neighbour():
    with pytest.raises(ConfigError, match=r"did you mean 'llama\.cpp'"):
        check_engines(target("mixtral", "llama"), ["llamacpp"])


def test_rules_name_only_what_exists():
    for rule in RULES:
        assert rule.engines <= set(ENGINES)
        assert rule.targets <= set(EXPORTERS)
        assert rule.reason
