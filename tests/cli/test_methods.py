"""`moeadapt methods` prints every entry of every registry, and where it was published."""

import json

import pytest

from moeadapt import BALANCE, EXPERTS, PRESETS, ROUTERS
from tests.cli.test_cli_start import run_cli

REGISTRIES = {"router": ROUTERS, "balance": BALANCE, "experts": EXPERTS, "preset": PRESETS}


@pytest.fixture(scope="module")
def found():
    return json.loads(run_cli("methods", "--json").stdout)


def test_json_holds_every_entry_with_line_and_source(found):
    assert {(m["kind"], m["name"]) for m in found} == {
        (kind, name) for kind, registry in REGISTRIES.items() for name in registry
    }
    for method in found:
        assert method["line"].endswith("."), method
        assert method["source"]
        assert method["url"] is None or method["url"].startswith("https://")


def test_one_kind_can_be_asked_for(found):
    asked = json.loads(run_cli("methods", "experts", "--json").stdout)
    assert asked == [method for method in found if method["kind"] == "experts"]


def test_the_tables_are_plain_text_with_whole_links(found):
    done = run_cli("methods")
    assert done.returncode == 0
    assert "\x1b" not in done.stdout
    for method in found:
        assert f" {method['name']} " in done.stdout
        assert method["url"] is None or method["url"] in done.stdout


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["routers"], "unknown kind 'routers'; one of .*; did you mean 'router'?"),
        (["--json", "--markdown"], "exclude each other"),
        (["router", "--markdown"], "prints every kind"),
    ],
)
def test_wrong_input_exits_with_2(args, message):
    done = run_cli("methods", *args)
    assert done.returncode == 2
    assert all(part in done.stderr for part in message.split(".*"))
    assert "Traceback" not in done.stderr
