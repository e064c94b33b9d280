"""The scripts in trainers/ stay short, equal in what they pass on, and are never imported."""

import ast
import importlib.util
import inspect
from pathlib import Path

import pytest

from moeadapt.training import run
from moeadapt.training.objectives import OBJECTIVES

FOLDER = Path(__file__).parents[1] / "trainers"
NEEDS_REWARD = {name for name, goal in OBJECTIVES.items() if goal.data == "prompt"}

scripts = pytest.mark.parametrize("name", sorted(OBJECTIVES))


def keywords_of_the_trainer(source: str) -> set[str]:
    """Return the keywords of the one call that gets a `processing_class`; `**x` counts as `x`."""
    calls = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)]
    named = [{word.arg or ast.unparse(word.value) for word in call.keywords} for call in calls]
    (found,) = [names for names in named if "processing_class" in names]
    return found - {"extra"}


def test_there_is_one_script_per_objective():
    assert {path.stem for path in FOLDER.glob("*.py")} - {"__init__"} == set(OBJECTIVES)


@scripts
def test_a_script_passes_on_what_the_command_line_does(name):
    script = keywords_of_the_trainer((FOLDER / f"{name}.py").read_text())
    command = keywords_of_the_trainer(inspect.getsource(run.build_trainer))
    assert script == command | ({"reward_funcs"} if name in NEEDS_REWARD else set())


@scripts
def test_a_script_is_under_120_lines_and_uses_its_own_trainer(name):
    source = (FOLDER / f"{name}.py").read_text()
    assert len(source.splitlines()) < 120
    assert f"MoE{OBJECTIVES[name].trl_name}Trainer(" in source
    assert f'parse_script("{name}"' in source


def test_the_folder_cannot_be_imported():
    spec = importlib.util.spec_from_file_location("trainers", FOLDER / "__init__.py")
    with pytest.raises(ImportError, match="run them, or import moeadapt.training"):
        spec.loader.exec_module(importlib.util.module_from_spec(spec))
