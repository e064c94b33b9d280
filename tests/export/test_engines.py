"""The compatibility table says no exactly where an engine is known to be wrong."""

import pytest

from moeadapt.errors import ConfigError, UnsupportedError
from moeadapt.export.engines import ENGINES, EXACT, RULES, WRONG, check_engines, table, verdicts
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


def test_transformers_is_exact_for_every_target():
    for cls in EXPORTERS.values():
        names = {rule for rule in RULES if "transformers" in rule.engines}
        assert not names, cls
    assert verdicts(target("mixtral", "llama"))[0].status == EXACT


def test_an_unknown_engine_is_named_with_its_neighbour():
    with pytest.raises(ConfigError, match=r"did you mean 'llama\.cpp'"):
        check_engines(target("mixtral", "llama"), ["llamacpp"])


def test_the_table_for_the_documentation_names_only_what_exists():
    for row in table():
        assert set(row["engines"]) <= set(ENGINES)
        assert set(row["targets"]) <= set(EXPORTERS)
        assert row["reason"]
