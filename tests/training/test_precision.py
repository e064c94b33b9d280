"""Half precision: routers stay float32, and metrics and gradients stay right."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, TrainerCallback

from moeadapt import MoeAdaptCallback
from moeadapt.routers import Router
from tests.tiny import adapted, saved_base
from tests.toy import toy_text
from tests.training.kit import GradientProbe, make_trainer, moe, routers_of

requires_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


class RouterTypes(TrainerCallback):
    """Notes the routers' types at the first step, after every other preparation."""

    def __init__(self) -> None:
        self.seen: set[torch.dtype] = set()

    def on_step_begin(
        self, args: Any, state: Any, control: Any, model: nn.Module | None = None, **kwargs: Any
    ) -> None:
        assert model is not None
        self.seen |= {p.dtype for p in routers_of(model).values()}


def cast_trainable(model: nn.Module) -> None:
    """Do what TRL does to the trainable parameters of a quantised model."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(torch.bfloat16)


@pytest.fixture
def unmoved(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let nobody move the model: `Router._apply` would already undo the cast."""
    monkeypatch.setattr(Router, "_apply", nn.Module._apply)


@pytest.mark.usefixtures("unmoved")
@pytest.mark.parametrize("stock", [False, True])
@pytest.mark.parametrize("late", [False, True])
def test_routers_cast_through_data_train_in_float32(
    stock: bool, late: bool, tmp_path: Path
) -> None:
    model = adapted("llama", "block", balance={"switch": 0.1}).train()
    if not late:
        cast_trainable(model)
    types = RouterTypes()
    callbacks = [MoeAdaptCallback(), types] if stock else [types]
    trainer = make_trainer(
        "SFT", tmp_path, stock=stock, model=model, callbacks=callbacks, bf16=True, max_steps=2
    )
    if late:
        cast_trainable(model)
    elif stock:
        assert {p.dtype for p in routers_of(model).values()} == {torch.float32}
    before = {n: p.detach().clone() for n, p in routers_of(model).items()}
    trainer.train()
    assert types.seen == {torch.float32}
    assert all(not torch.equal(p.detach(), before[n]) for n, p in routers_of(model).items())


@pytest.mark.usefixtures("unmoved")
@pytest.mark.parametrize("stock", [False, True])
def test_routers_of_a_4_bit_model_train_in_float32(stock: bool, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    four_bit = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16
    )
    model = AutoModelForCausalLM.from_pretrained(
        saved_base("llama", tmp_path), quantization_config=four_bit, device_map={"": "cpu"}
    )
    types = RouterTypes()
    callbacks = [MoeAdaptCallback(), types] if stock else [types]
    trainer = make_trainer(
        "SFT",
        tmp_path,
        stock=stock,
        model=model,
        config=moe(),
        callbacks=callbacks,
        bf16=True,
        learning_rate=1e-5,
        max_steps=2,
    )
    before = {n: p.detach().clone().float() for n, p in routers_of(trainer.model).items()}
    trainer.train()
    assert types.seen == {torch.float32}
    for name, router in routers_of(trainer.model).items():
        assert (router.detach() != before[name]).float().mean() > 0.9


@pytest.mark.parametrize("stock", [False, True])
def test_bf16_autocast_trains_with_finite_metrics(stock: bool, tmp_path: Path) -> None:
    callbacks = [MoeAdaptCallback()] if stock else []
    trainer = make_trainer("SFT", tmp_path, stock=stock, callbacks=callbacks, bf16=True)
    trainer.train()
    logs = [log for log in trainer.state.log_history if "loss" in log]
    assert len(logs) == 4
    assert all(math.isfinite(value) for log in logs for value in log.values())
    assert {p.dtype for p in routers_of(trainer.model).values()} == {torch.float32}


@pytest.mark.gpu
@requires_cuda
@pytest.mark.parametrize("stock", [False, True])
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_on_cuda_gives_nearly_the_router_gradients_of_float32(
    precision: str, stock: bool, tmp_path: Path
) -> None:
    runs = []
    for half in (False, True):
        probe = GradientProbe()
        callbacks = [MoeAdaptCallback(), probe] if stock else [probe]
        # Clipping to a huge norm unscales the gradients before the probe reads them.
        args = {"use_cpu": False, "max_grad_norm": 1e9, "gradient_accumulation_steps": 2}
        args |= {"max_steps": 1, "rows": toy_text(8), precision: half}
        trainer = make_trainer("SFT", tmp_path, stock=stock, callbacks=callbacks, **args)
        if trainer.accelerator.scaler is not None:
            trainer.accelerator.scaler = torch.amp.GradScaler("cuda", init_scale=2.0**8)
        trainer.train()
        runs.append({n: g for n, g in probe.steps[0].items() if "moeadapt_router" in n})
    for name, gradient in runs[0].items():
        error = (runs[1][name] - gradient).norm() / gradient.norm()
        assert error < 0.1, name
