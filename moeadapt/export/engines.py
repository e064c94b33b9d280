"""Which engine runs which target rightly, as data, and the refusal of one that would not.

Statuses: `exact` was measured against the dense reference; `untested` reads the class by its own
documentation and was not run by us; `wrong` gives other logits, or does not load.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from moeadapt.errors import ConfigError, UnsupportedError, did_you_mean
from moeadapt.export.targets import EXPORTERS, Target

ENGINES = ("transformers", "vllm", "sglang", "llama.cpp")

EXACT, UNTESTED, WRONG = "exact", "untested", "wrong"


@dataclass(frozen=True)
class Verdict:
    """What an engine does with one checkpoint.

    Attributes:
        engine: one of `ENGINES`.
        status: exact, untested or wrong.
        reason: why.
    """

    engine: str
    status: str
    reason: str


@dataclass(frozen=True)
class Rule:
    """A reason why an engine is wrong for some targets, where `applies` says so.

    Attributes:
        engines: which engines.
        targets: which keys of `EXPORTERS`.
        reason: what they do, and what to change.
        applies: whether it concerns one checkpoint.
    """

    engines: frozenset[str]
    targets: frozenset[str]
    reason: str
    applies: Callable[[Target], bool] = lambda target: True


def _set(*names: str) -> frozenset[str]:
    return frozenset(names)


ALL = frozenset(EXPORTERS)
SERVERS = _set("vllm", "sglang")
OTHERS = _set("vllm", "sglang", "llama.cpp")


def _rope_type(target: Target) -> str:
    return (target.dense.rope_parameters or {}).get("rope_type", "default")


def _odd_heads(target: Target) -> bool:
    return target.head_dim * target.dense.num_attention_heads != target.dense.hidden_size


def _all_experts(target: Target) -> bool:
    return target.shape.top_k == target.shape.num_experts


def _renormalised(target: Target) -> bool:
    return target.shape.norm_topk and not _all_experts(target)


def _plain(target: Target) -> bool:
    return not target.shape.norm_topk


def _not_silu(target: Target) -> bool:
    return getattr(target.dense, "hidden_act", "silu") not in ("silu", "swish")


RULES: tuple[Rule, ...] = (
    Rule(
        _set("llama.cpp"),
        _set("qwen2_moe"),
        "it never renormalises the weights of this class and ignores norm_topk_prob (measured: "
        "logits off by 2.17); use top_k = num_experts or norm_topk=False",
        _renormalised,
    ),
    Rule(
        _set("llama.cpp"),
        _set("qwen3_moe"),
        "it always renormalises the weights of this class (measured: logits off by 1.94); use "
        "norm_topk=True",
        _plain,
    ),
    Rule(
        _set("llama.cpp"),
        _set("qwen2_moe"),
        "it does not load this class with a shared output head; set untie=True",
        lambda target: target.is_tied,
    ),
    Rule(
        _set("llama.cpp"),
        ALL,
        "it has no layers without a mixture; route every layer",
        lambda target: bool(target.shape.dense_layers),
    ),
    Rule(
        _set("llama.cpp"),
        _set("granite_moe", "granite_moe_shared"),
        "its converter drops the llama3 rope of this class; use mixtral or glm4_moe",
        lambda target: _rope_type(target) == "llama3",
    ),
    Rule(_set("llama.cpp"), _set("flex_olmo", "cohere2_moe"), "its converter lacks this class"),
    Rule(_set("sglang"), _set("flex_olmo", "cohere2_moe"), "it lacks this class"),
    Rule(
        OTHERS,
        _set("qwen2_moe", "granite_moe", "granite_moe_shared"),
        "it takes hidden_size / heads as the width of a head of this class, and this base has "
        "another",
        _odd_heads,
    ),
    Rule(
        OTHERS,
        _set("granite_moe", "granite_moe_shared"),
        "it has no attention biases in this class",
        lambda target: bool(getattr(target.dense, "attention_bias", False)),
    ),
    Rule(OTHERS, ALL, "its fused experts know silu only", _not_silu),
    Rule(
        _set("llama.cpp"),
        _set("mixtral"),
        "it runs this class as its llama architecture, which has no sliding window (its issue "
        "3377), and this base has one",
        lambda target: getattr(target.dense, "sliding_window", None) is not None,
    ),
    Rule(
        OTHERS,
        _set("qwen2_moe"),
        "it has no list of sliding-window layers in this class",
        lambda target: bool(target.dense.use_sliding_window),
    ),
)

MEASURED: Mapping[str, frozenset[str]] = {
    "transformers": ALL,
    "llama.cpp": _set("mixtral", "qwen2_moe", "qwen3_moe", "granite_moe", "glm4_moe"),
}
"""Engine -> targets whose logits were compared with the dense reference in float32.

transformers: every pair, by the tests here. llama.cpp: a CPU build on F32 files of tiny models with
full attention, the default rope and, but for Qwen3, heads of hidden_size / heads; other shapes are
untested.
"""


def _measured(target: Target, engine: str) -> bool:
    if target.name not in MEASURED.get(engine, ()):
        return False
    heads = target.name == "qwen3_moe" or not _odd_heads(target)
    return engine == "transformers" or (heads and _rope_type(target) == "default")


def verdicts(target: Target) -> list[Verdict]:
    """Return what each engine does with the checkpoint that `target` describes."""
    return [_verdict(target, engine) for engine in ENGINES]


def _verdict(target: Target, engine: str) -> Verdict:
    reasons = [
        rule.reason
        for rule in RULES
        if engine in rule.engines and target.name in rule.targets and rule.applies(target)
    ]
    if reasons:
        return Verdict(engine, WRONG, "; ".join(reasons))
    if _measured(target, engine):
        return Verdict(engine, EXACT, "measured in float32 on tiny models of this shape")
    return Verdict(engine, UNTESTED, "nothing known against it; not run")


def check_engines(target: Target, engines: Iterable[str]) -> list[Verdict]:
    """Return `verdicts(target)`, after checking the engines that the checkpoint is meant for.

    Raises:
        ConfigError: an engine is unknown.
        UnsupportedError: an engine would be wrong; says why and what to change.
    """
    asked = list(engines)
    for engine in asked:
        if engine not in ENGINES:
            raise ConfigError(
                f"unknown engine {engine!r}; one of {list(ENGINES)}{did_you_mean(engine, ENGINES)}"
            )
    found = verdicts(target)
    wrong = [verdict for verdict in found if verdict.engine in asked and verdict.status == WRONG]
    if wrong:
        why = "; ".join(f"{verdict.engine}: {verdict.reason}" for verdict in wrong)
        fitting = [verdict.engine for verdict in found if verdict.status != WRONG]
        raise UnsupportedError(
            f"{target.name} of {target.dense.model_type}: {why}; runs: {fitting}"
        )
    return found
