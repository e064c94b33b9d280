"""Cases 68, 73 and 83: casts, moves and copies of a model, and adapters that are taken off."""

import copy
import io
import pickle
import threading
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import nn
from torch.testing import assert_close
from transformers import AutoModelForCausalLM

from moeadapt.routers import Router
from moeadapt.tuner.quiet import without_warnings
from tests.tiny import KINDS, adapted, batch, logits, saved_base, tiny

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")

kinds = pytest.mark.parametrize("kind", KINDS)


def router_dtypes(model: nn.Module) -> set[torch.dtype]:
    """Return the dtypes of the routers' parameters."""
    routers = [module for module in model.modules() if isinstance(module, Router)]
    assert routers
    return {parameter.dtype for router in routers for parameter in router.parameters()}


CASTS: dict[str, tuple[torch.dtype, Callable[[Any], Any]]] = {
    "bf16": (torch.bfloat16, lambda m: m.to(torch.bfloat16)),
    "half": (torch.float16, lambda m: m.half()),
}


@kinds
@pytest.mark.parametrize(("dtype", "cast"), list(CASTS.values()), ids=list(CASTS))
def test_fault_068_a_cast_model_keeps_float32_routers_bit_for_bit(
    kind: str, dtype: torch.dtype, cast: Callable[[Any], Any]
) -> None:
    model = adapted("llama", kind)
    before = {n: p.clone() for n, p in model.named_parameters() if "router" in n}
    exact = logits(model, batch())
    found = logits(cast(model), batch())
    assert found.dtype == dtype
    assert router_dtypes(model) == {torch.float32}
    assert all(torch.equal(before[n], p) for n, p in model.named_parameters() if "router" in n)
    # 8 bits of bfloat16 can turn a close choice of experts: most tokens stay where they were.
    near = (found.float() - exact).abs().amax(-1) < 0.05 * exact.abs().max()
    assert near.float().mean() > 0.8


def through_meta(model: PeftModel) -> PeftModel:
    """Send a model to the meta device and back, and give it its tensors again."""
    state = {name: value.clone() for name, value in model.state_dict().items()}
    buffers = {name: value.clone() for name, value in model.named_buffers()}
    model.to("meta").to_empty(device="cpu")
    model.load_state_dict(state)
    for name, buffer in model.named_buffers():
        buffer.copy_(buffers[name])
    return model


def through_torch(model: nn.Module) -> nn.Module:
    """Save and load the module as a whole; the file is the test's own."""
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


COPIES: dict[str, Callable[[Any], Any]] = {
    "meta": through_meta,
    "deepcopy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "torch.save": through_torch,
}


@kinds
@pytest.mark.parametrize("way", list(COPIES.values()), ids=list(COPIES))
def test_fault_068_a_copy_computes_the_same_bits(kind: str, way: Callable[[Any], Any]) -> None:
    model = adapted("llama", kind)
    expected = logits(model, batch())
    twin = way(model)
    assert torch.equal(logits(twin, batch()), expected)
    assert router_dtypes(twin) == {torch.float32}


@kinds
@pytest.mark.parametrize(
    "how", [{"device_map": {"": "cpu"}}, {"device_map": "auto"}, {"low": True}], ids=str
)
def test_fault_068_a_device_map_loads_the_same_bits(
    kind: str, how: dict[str, Any], tmp_path: Path
) -> None:
    model = adapted("llama", kind)
    model.save_pretrained(tmp_path / "adapter")
    low = how.pop("low", False)
    base = AutoModelForCausalLM.from_pretrained(saved_base("llama", tmp_path), **how)
    loaded = PeftModel.from_pretrained(base, tmp_path / "adapter", low_cpu_mem_usage=low).eval()
    assert torch.equal(logits(loaded, batch()), logits(model, batch()))
    assert router_dtypes(loaded) == {torch.float32}


@kinds
def test_fault_073_disabled_and_unloaded_are_bitwise_the_base(kind: str) -> None:
    base = tiny("llama")
    expected, weights = logits(base, batch()), base.state_dict()
    model = adapted("llama", kind)
    changed = logits(model, batch())
    assert not torch.equal(changed, expected)
    with model.disable_adapter():
        assert torch.equal(logits(model, batch()), expected)
    assert torch.equal(logits(model, batch()), changed)
    plain = model.unload()
    assert torch.equal(logits(plain, batch()), expected)
    assert plain.state_dict().keys() == weights.keys()
    assert all(torch.equal(value, weights[name]) for name, value in plain.state_dict().items())
    assert [type(m) for m in plain.modules()] == [type(m) for m in base.modules()]


def test_fault_083_eight_threads_load_adapters_at_once(tmp_path: Path) -> None:
    expected = []
    for number in range(8):
        model = adapted("llama", KINDS[number % 4], seed=number)
        model.save_pretrained(tmp_path / str(number))
        expected.append(logits(model, batch()))
    bases = [tiny("llama") for _ in range(8)]
    filters = list(warnings.filters)
    found: dict[int, Any] = {}
    ready = threading.Barrier(8)

    def load(number: int) -> None:
        try:
            ready.wait()
            for _ in range(2):
                model = PeftModel.from_pretrained(bases[number], tmp_path / str(number)).eval()
                found[number] = logits(model, batch())
                bases[number] = model.unload()
        except BaseException as error:
            found[number] = error

    threads = [threading.Thread(target=load, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=120)
    for number in range(8):
        assert isinstance(found[number], torch.Tensor), found[number]
        assert_close(found[number], expected[number], rtol=0, atol=0)
    assert warnings.filters == filters, "a warning filter of one thread is left to all"


def test_fault_083_overlapping_checks_leave_the_warning_filters_alone() -> None:
    """The order in which two threads, each restoring what it found, would leave them silenced."""
    filters = list(warnings.filters)
    inside, done = threading.Event(), threading.Event()

    def second() -> None:
        with without_warnings():
            inside.set()
            done.wait(10)

    thread = threading.Thread(target=second)
    with without_warnings():
        thread.start()
        inside.wait(0.3)
    done.set()
    thread.join()
    assert warnings.filters == filters
