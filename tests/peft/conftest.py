"""Fixtures of the PEFT matrix."""

import copy
from collections.abc import Callable, Iterator
from functools import cache

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.peft.saved import Saved
from tests.tiny import adapt, batch, logits, moe_config, saved_base


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> Iterator[None]:
    """Tiny matrices are slower on two threads than on one."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def save_case(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], Saved]:
    """Return a function that saves one (model, kind) and remembers what it computes."""
    folder = tmp_path_factory.mktemp("saved")

    @cache
    def save(name: str, kind: str) -> Saved:
        base = AutoModelForCausalLM.from_pretrained(saved_base(name, folder)).eval()
        inputs = batch()
        base_logits = logits(base, inputs)
        model = adapt(copy.deepcopy(base), moe_config(kind), seed=1)
        adapter_dir = str(folder / f"{name}-{kind}-adapter")
        model.save_pretrained(adapter_dir)
        return Saved(name, kind, base, adapter_dir, inputs, base_logits, logits(model, inputs))

    return save


@pytest.fixture
def saved(name: str, kind: str, save_case: Callable[[str, str], Saved]) -> Saved:
    """One (model, kind) of the matrix."""
    return save_case(name, kind)
