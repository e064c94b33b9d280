"""Any JSON is a configuration that survives JSON, or is refused by a `ConfigError`."""

import contextlib
import json
import math
import sys
from dataclasses import fields
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from moeadapt import BALANCE, EXPERTS, ROUTERS, MoeLoraConfig
from moeadapt.errors import ConfigError
from moeadapt.presets import PRESETS
from moeadapt.tuner.preset import preset_fields

SPECIAL = [math.nan, math.inf, -math.inf, 1e308, -0.0, 1e-300, 2**63, -(2**31), 10**9, 0, 1, -1, 2]

WORDS = ["", "all-linear", "q_proj", "*(", ".*", "os", "../../x", "\0", "top_k", "lora", "default"]

scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 9),
    st.floats(),
    st.sampled_from(SPECIAL),
    st.sampled_from(WORDS),
    st.text(max_size=6),
)
anything = st.recursive(
    scalars,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=4), inner, max_size=3)
    ),
    max_leaves=6,
)

FIELDS = sorted({f.name for f in fields(MoeLoraConfig) if f.init} - {"peft_type"})


@st.composite
def component(draw: Any, registry: Any) -> Any:
    """A named component with some of its fields, right or wrong."""
    name = draw(st.sampled_from(sorted(registry)))
    known = st.sampled_from(sorted(registry[name].model_fields) or ["none"])
    options = draw(st.dictionaries(known, scalars, max_size=2))
    return {"name": name, **options}


balances = st.dictionaries(
    st.sampled_from([*sorted(BALANCE), "swich"]),
    st.one_of(st.floats(-0.1, 1.0), st.fixed_dictionaries({"coef": scalars})),
    max_size=3,
)


@st.composite
def configs(draw: Any) -> dict[str, Any]:
    """Settings that are mostly right, with a few fields of anything."""
    chosen: dict[str, Any] = {
        "r": draw(st.integers(1, 8)),
        "num_experts": draw(st.integers(1, 8)),
        "target_modules": draw(st.sampled_from(["all-linear", ["q_proj"], "q.*"])),
    }
    if draw(st.booleans()):
        chosen["router"] = draw(component(ROUTERS))
    if draw(st.booleans()):
        chosen["experts"] = draw(component(EXPERTS))
    if draw(st.booleans()):
        chosen["balance"] = draw(balances)
    if draw(st.booleans()):
        chosen["placement"] = draw(st.sampled_from(["linear", "ffn", "glu"]))
    chosen.update(draw(st.dictionaries(st.sampled_from(FIELDS), anything, max_size=2)))
    return chosen


def check(spec: dict[str, Any]) -> bool:
    """Build, save and read a configuration; return whether it was accepted."""
    modules = set(sys.modules)
    text = json.dumps(spec)
    try:
        config = MoeLoraConfig(**json.loads(text))
    except ConfigError:
        return False
    finally:
        assert not set(sys.modules) - modules, "a configuration imports nothing"
    plain = config.to_dict()
    again = MoeLoraConfig(**{k: v for k, v in plain.items() if k != "peft_type"})
    assert again.to_dict() == plain
    with TemporaryDirectory() as folder:
        config.save_pretrained(folder)
        assert "NaN" not in (Path(folder) / "adapter_config.json").read_text()
        assert MoeLoraConfig.from_pretrained(folder).to_dict() == plain
    return True


QUICK = settings(
    max_examples=300,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=list(HealthCheck),
)

LONG = settings(QUICK, max_examples=20_000, derandomize=False)


@QUICK
@given(configs())
def test_any_config_survives_json_or_is_refused(spec: dict[str, Any]) -> None:
    check(spec)


@pytest.mark.slow
@LONG
@given(configs())
def test_twenty_thousand_configs_survive_json_or_are_refused(spec: dict[str, Any]) -> None:
    check(spec)


changes = st.dictionaries(st.sampled_from(FIELDS), anything, max_size=2)


@settings(QUICK, max_examples=100)
@given(st.sampled_from(sorted(PRESETS)), changes)
def test_any_change_of_a_preset_survives_json_or_is_refused(
    name: str, changes: dict[str, Any]
) -> None:
    with contextlib.suppress(ConfigError):
        check(preset_fields(name, json.loads(json.dumps(changes))))


def test_the_fuzzer_sees_both_sides() -> None:
    """Else the tests above would show nothing."""
    seen: list[bool] = []

    @settings(QUICK, max_examples=100)
    @given(configs())
    def count(spec: dict[str, Any]) -> None:
        seen.append(check(spec))

    count()
    assert 10 < sum(seen) < len(seen) - 10
