"""A model whose parts are computed by the kernels: to be run where Triton runs."""

import torch
from torch import Tensor
from torch.testing import assert_close

import moeadapt
from moeadapt import kernels
from moeadapt.dispatch import activation
from moeadapt.routers import top_k
from tests.tiny import adapted, batch, labels_of

# The kernels and PyTorch add up in other orders; float32.
CLOSE = {"rtol": 1e-3, "atol": 1e-5}


def _step(device: str, fields: dict) -> dict[str, Tensor]:
    balance = {"switch": 0.5, "z_loss": 0.25}
    model = adapted("llama", "ffn", balance=balance, **fields).train().to(device)
    moeadapt.set_aux_loss_scale(model, 1.0)
    inputs = {name: value.to(device) for name, value in batch(rows=2).items()}
    outputs = model(**inputs, labels=labels_of(inputs))
    outputs.loss.backward()
    grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    return {"logits": outputs.logits.detach(), **grads}


def check_a_training_step(device: str, fields: dict) -> None:
    """Compare logits and every gradient with and without kernels, and count their calls."""
    called: dict[str, int] = {"mix": 0, "gate": 0}
    own = (activation.mix_activation_kernel, top_k.top_k_gate)

    def counting(name: str, kernel):
        def call(*args, **kwargs):
            called[name] += 1
            return kernel(*args, **kwargs)

        return call

    activation.mix_activation_kernel = counting("mix", own[0])
    top_k.top_k_gate = counting("gate", own[1])
    try:
        expected = _step(device, fields)
        assert called == {"mix": 0, "gate": 0}, "an unproven kernel ran unasked"
        with kernels.enabled(device):
            found = _step(device, fields)
    finally:
        activation.mix_activation_kernel, top_k.top_k_gate = own
    assert called["mix"] > 0, "the kernel of the FFN mixture never ran"
    assert called["gate"] > 0, "the kernel of the gate never ran"
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert_close(found[name], value, **CLOSE, msg=lambda text, name=name: f"{name}: {text}")


def refusal_in_float64(device: str) -> str:
    """Return what a model in float64 is told."""
    model = adapted("llama", "ffn").double().to(device)
    inputs = {name: value.to(device) for name, value in batch(rows=1).items()}
    try:
        with kernels.enabled(device), torch.no_grad():
            model(**inputs)
    except moeadapt.errors.UnsupportedError as error:
        return str(error)
    return ""
