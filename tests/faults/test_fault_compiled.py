"""Case 77: torch.export and torch.compile compute what eager does.

The compiled cases run apart from the rest, since dynamo cannot trace the run-time shape checks:
`pytest tests/faults/test_fault_compiled.py -o addopts="" --import-mode=importlib`.
"""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch.testing import assert_close

from tests.tiny import KINDS, adapted, batch, logits

pytestmark = [
    pytest.mark.compile,
    pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]

kinds = pytest.mark.parametrize("kind", KINDS)


@pytest.fixture(autouse=True)
def _fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def model_of(kind: str) -> Any:
    """Return a mixture without a cache, which has no place in a graph."""
    model = adapted("llama", kind)
    model.config.use_cache = False
    return model


@kinds
def test_fault_077_an_exported_model_computes_what_eager_does(kind: str) -> None:
    model = model_of(kind)
    program = torch.export.export(model, (), batch())
    for seed in (0, 1):
        inputs = batch(seed=seed)
        found = program.module()(**inputs).logits
        assert_close(found, logits(model, inputs), atol=1e-5, rtol=1e-5)


@kinds
def test_fault_077_a_compiled_model_computes_what_eager_does(kind: str) -> None:
    model = model_of(kind)
    compiled: Any = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        found = compiled(**batch()).logits
    assert_close(found, logits(model, batch()), atol=1e-5, rtol=1e-5)
