"""What the documents show works: docstring examples, and the router of CONTRIBUTING.md."""

import doctest
import importlib
import math
import re
from pathlib import Path

import pytest
import torch

import moeadapt
from moeadapt.routers.base import RouterConfig
from moeadapt.routing import TokenContext

ROOT = Path(__file__).parents[1]
PURE = ["aux_loss", "balance", "errors", "registry", "routing", "tuner.config", "tuner.preset"]


@pytest.mark.parametrize("name", PURE)
def test_docstring_examples_run(name):
    module = importlib.import_module(f"moeadapt.{name}")
    names = {**vars(module), "torch": torch, "math": math, "moeadapt": moeadapt}
    result = doctest.testmod(module, extraglobs=names)
    assert result.attempted > 0
    assert result.failed == 0


def test_the_router_of_contributing_works(monkeypatch):
    text = (ROOT / "CONTRIBUTING.md").read_text()
    (block,) = re.findall(r"^   ```python\n(.*?)^   ```", text, re.DOTALL | re.MULTILINE)
    code = "\n".join(line.removeprefix("   ") for line in block.splitlines())
    namespace = {"__name__": "above_average"}
    exec(compile(code, "CONTRIBUTING.md", "exec"), namespace)
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
