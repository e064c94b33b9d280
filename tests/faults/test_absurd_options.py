"""Every option of every component, set to an absurd number in a file: refused, or harmless."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from moeadapt import BALANCE, EXPERTS, ROUTERS
from tests.faults.fuzz_files import valid
from tests.faults.fuzz_loading import Loader

ABSURD: tuple[Any, ...] = (2**63, 10**9, 1e308)

FIELDS = [
    {field: value}
    for field in ("lora_alpha", "lora_dropout", "n_shared", "granularity", "r", "num_experts")
    for value in ABSURD
] + [
    {field: {"q_proj": value}}
    for field in ("alpha_pattern", "rank_pattern", "experts_pattern", "trainable_token_indices")
    for value in ABSURD
]


def options(kind: str, registry: Any) -> list[dict[str, Any]]:
    """Return the settings with one option of one component set."""
    found = []
    for name in sorted(registry):
        for field in registry[name].model_fields:
            if field != "name":
                of_balance = kind == "balance"
                for value in ABSURD:
                    whole = {name: {field: value}} if of_balance else {"name": name, field: value}
                    found.append({kind: whole})
    return found


CASES = {
    "fields": FIELDS,
    "router": options("router", ROUTERS),
    "experts": options("experts", EXPERTS),
    "balance": options("balance", BALANCE),
}


@pytest.mark.parametrize("kind", CASES)
def test_an_absurd_option_is_refused_or_gives_numbers(kind: str, tmp_path: Path) -> None:
    loader, settings = Loader(tmp_path), json.loads(valid().settings)
    loader.check(valid())
    for case in CASES[kind]:
        text = json.dumps({**settings, **case}).encode()
        loader.check(replace(valid(), settings=text, sealed=True))
    assert loader.outcomes["AdapterFileError"] > 5
