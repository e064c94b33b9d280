"""What the documents show works: docstring examples, and every Python block, by sybil."""

import doctest
import importlib
import math
import re
from pathlib import Path

import pytest
import torch
from sybil.document import Document
from sybil.parsers.markdown import PythonCodeBlockParser

import moeadapt
from moeadapt.routers.base import RouterConfig
from moeadapt.routing import TokenContext
from tests import document_world

ROOT = Path(__file__).parents[1]
PURE = ["aux_loss", "balance", "errors", "registry", "routing", "tuner.config", "tuner.preset"]


@pytest.mark.parametrize("name", PURE)
def test_docstring_examples_run(name):
    module = importlib.import_module(f"moeadapt.{name}")
    names = {**vars(module), "torch": torch, "math": math, "moeadapt": moeadapt}
    result = doctest.testmod(module, extraglobs=names)
    assert result.attempted > 0
    assert result.failed == 0


def pages() -> list[str]:
    """Name every document for users that has Python in it."""
    found = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
    has_python = [path for path in found if "```python" in path.read_text()]
    return [path.relative_to(ROOT).as_posix() for path in has_python]


def run_blocks(page: str, namespace: dict) -> int:
    """Run the Python blocks of `page` from top to bottom in one namespace; return their number."""
    document = Document.parse(str(ROOT / page), PythonCodeBlockParser())
    document.namespace.update(namespace)
    examples = list(document.examples())
    for example in examples:
        example.evaluate()
    namespace.update(document.namespace)
    return len(examples)


@pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true:UserWarning")
# The toy tokenizer knows no word of the documents, so every token looks the same.
@pytest.mark.filterwarnings("ignore::moeadapt.errors.RoutingWarning")
@pytest.mark.parametrize("page", pages())
def test_the_python_of_a_document_runs(page, tmp_path, monkeypatch, capsys):
    document_world.build(tmp_path)
    monkeypatch.chdir(tmp_path)
    # The README's `bf16=True` is for a GPU; here a CPU computes the same bfloat16.
    monkeypatch.setattr("transformers.training_args.is_torch_bf16_gpu_available", lambda: True)
    found = run_blocks(page, document_world.names_of(page))
    assert found == (ROOT / page).read_text().count("```python")


def test_a_block_that_fails_is_told_with_its_line(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("# Title\n\n```python\nx = 1\nassert x == 2\n```\n")
    with pytest.raises(AssertionError) as raised:
        run_blocks(str(page), {})
    assert raised.traceback[-1].lineno == 4


def test_the_router_of_contributing_works():
    namespace = {"__name__": "above_average"}
    assert run_blocks("CONTRIBUTING.md", namespace) == 1
    config = namespace["AboveAverageConfig"]()
    assert isinstance(config, RouterConfig)
    routing = config.build(8, 4)(torch.randn(7, 8), TokenContext())
    torch.testing.assert_close(routing.weights.sum(-1), torch.ones(7))
    below = routing.probs < 1 / 4 - 1e-6
    assert bool((routing.weights[below] == 0).all())
    assert bool((routing.weights != 0).any(-1).all())


def test_the_readme_names_both_commands_and_when_not_to_use_a_mixture():
    text = (ROOT / "README.md").read_text()
    assert "make demo" in text
    assert "make test" in text
    assert "## When not to use a mixture" in text


def test_every_file_the_readme_names_exists():
    text = (ROOT / "README.md").read_text()
    for path in re.findall(r"(?:configs|trainers|examples)/[\w./]+\.(?:yaml|py)", text):
        assert (ROOT / path).exists(), path
