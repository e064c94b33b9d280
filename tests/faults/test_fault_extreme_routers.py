"""Cases 51, 59, 60, 61 and 66: routers at their limits, in a model and in a training run."""

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch.testing import assert_close

import moeadapt
from moeadapt.errors import RoutingWarning
from moeadapt.routers import Router
from moeadapt.training import health
from tests.faults import runs
from tests.tiny import KINDS, adapted, batch, labels_of, logits

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")

kinds = pytest.mark.parametrize("kind", KINDS)


def routers(model: PeftModel) -> list[Any]:
    """Return the routers of a model."""
    return [module for module in model.modules() if isinstance(module, Router)]


def routings(model: PeftModel) -> list[Any]:
    """Return what each router decides on a batch."""
    with torch.no_grad(), moeadapt.collect_routing(model) as found:
        model(**batch())
    return [routing for (routing,) in found.values()]


@kinds
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_fault_051_logits_of_ten_thousand_stay_finite_under_autocast(
    kind: str, dtype: torch.dtype
) -> None:
    model = adapted("llama", kind, balance={"switch": 0.1, "z_loss": 1e-9}).train()
    size = max(float(found.logits.abs().max()) for found in routings(model))
    with torch.no_grad():
        for router in routers(model):
            for parameter in router.parameters():
                parameter.mul_(1e4 / size)
    moeadapt.set_aux_loss_scale(model, 1.0)
    with torch.autocast("cpu", dtype), moeadapt.collect_routing(model) as found:
        loss = model(**batch(), labels=labels_of(batch())).loss
    seen = [routing for (routing,) in found.values()]
    largest = max(float(routing.logits.abs().max()) for routing in seen)
    assert largest > 5e3
    for routing in seen:
        assert routing.logits.dtype == routing.weights.dtype == torch.float32
        assert routing.weights.isfinite().all()
        assert_close(routing.probs.sum(-1), torch.ones(len(routing.probs)))
    assert loss.isfinite()
    loss.backward()
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    assert grads
    assert all(grad.isfinite().all() for grad in grads)


@kinds
def test_fault_061_equal_logits_go_to_the_lowest_experts_always(kind: str) -> None:
    model = adapted("llama", kind)
    with torch.no_grad():
        for router in routers(model):
            for parameter in router.parameters():
                parameter.zero_()
    first, second = logits(model, batch()), logits(model, batch())
    assert torch.equal(first, second)
    for routing in routings(model):
        assert not routing.logits.any()
        chosen = routing.weights != 0
        assert chosen[:, :2].all()
        assert not chosen[:, 2:].any()


NOISY = {"name": "top_k", "k": 2, "noise": "softplus", "jitter": 0.1, "init_std": 0.5}


@kinds
def test_fault_066_evaluation_is_deterministic_and_training_draws_noise(kind: str) -> None:
    model = adapted("llama", kind, router=NOISY, lora_dropout=0.3)
    assert torch.equal(logits(model, batch()), logits(model, batch()))
    model.train()
    torch.manual_seed(0)
    one, other = logits(model, batch()), logits(model, batch())
    assert not torch.equal(one, other)
    torch.manual_seed(0)
    assert torch.equal(logits(model, batch()), one)


BIASED = {"name": "top_k", "bias": True, "init_std": 0.5}
NEVER = 3
"""The expert that nobody chooses."""


def with_bias(k: int, expert: int, value: float) -> PeftModel:
    """Return a model whose routers like or dislike one expert beyond measure."""
    model = runs.build(router={**BIASED, "k": k}, balance=None)
    for name, parameter in model.named_parameters():
        if "router" in name and name.endswith("bias"):
            with torch.no_grad():
                parameter[expert] = value
    return model


def train(model: PeftModel, folder: Path, monkeypatch: Any) -> tuple[Any, list[str]]:
    """Train eight steps; return the trainer, and what it said about its routers."""
    monkeypatch.setattr(health, "WINDOW", 4)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", RoutingWarning)
        trainer = runs.train(folder, 2, 1, model=model, max_steps=8)
    said = [str(one.message) for one in caught if issubclass(one.category, RoutingWarning)]
    return trainer, said


def test_fault_059_all_tokens_to_one_expert_stay_finite_and_collapse_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = with_bias(1, 0, 1e4)
    trainer, said = train(model, tmp_path, monkeypatch)
    assert {int(r.weights.count_nonzero(0)[0]) for r in routings(model)} == {27}
    assert runs.found(trainer)["loss"].isfinite().all()
    assert all(p.isfinite().all() for p in model.parameters())
    assert any("an expert that over 90% of the tokens use" in one for one in said)
    assert any("The router has collapsed onto it. Raise the coefficient" in one for one in said)


def of_expert(model: PeftModel, expert: int) -> list[torch.Tensor]:
    """Return copies of one expert's own weights: rank 4 of each of 4 experts."""
    own = slice(4 * expert, 4 * expert + 4)
    named = [(n, p.detach().clone()) for n, p in model.named_parameters() if "moeadapt_lora" in n]
    assert all(16 in p.shape for _, p in named)
    return [p[own] if "lora_A" in name else p[:, own] for name, p in named]


def test_fault_060_an_expert_never_chosen_keeps_its_weights_and_is_called_dead(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = with_bias(2, NEVER, -1e4)
    idle, busy = of_expert(model, NEVER), of_expert(model, 0)
    trainer, said = train(model, tmp_path, monkeypatch)
    assert all(torch.equal(a, b) for a, b in zip(idle, of_expert(model, NEVER), strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(busy, of_expert(model, 0), strict=True))
    assert all(p.isfinite().all() for p in model.parameters())
    assert {log["moe/dead_experts"] for log in runs.found(trainer)["metrics"]} == {1.0}
    assert any("experts that get less than 0.01 of the load at balance" in one for one in said)
