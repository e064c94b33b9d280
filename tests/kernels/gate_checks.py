"""What must hold for the kernels of the top-k gate, on any device: called by the tests."""

import torch
from torch import Tensor
from torch.testing import assert_close

from moeadapt.errors import UnsupportedError
from moeadapt.kernels.reference import top_k_gate_reference
from moeadapt.kernels.top_k_gate import top_k_gate
from moeadapt.routing import select_top_k

NAMES = ("weights", "probs", "uses", "sums")


def logits_of(device: str, tokens: int, experts: int, kind: str) -> Tensor:
    """Return logits; `tied` ones have many equals, `hidden` ones some -inf."""
    torch.manual_seed(0)
    logits = 2 * torch.randn(tokens, experts)
    if kind == "tied":
        logits = logits.round().clamp(-1, 1)
    if kind == "hidden":
        logits = logits.masked_fill(torch.rand(tokens, experts) < 0.3, -torch.inf)
        logits[:, 0] = 0.0
    return logits.to(device)


def solve(function, logits: Tensor, *args, **options) -> dict[str, Tensor]:
    """Return the outputs and the gradient of a fixed readout of all that have one."""
    logits = logits.detach().requires_grad_()
    outputs = dict(zip(NAMES, function(logits, *args, **options), strict=True))
    assert not outputs["uses"].requires_grad
    torch.manual_seed(1)
    readouts = {n: torch.randn(o.shape).to(o) for n, o in outputs.items() if n != "uses"}
    loss = sum((outputs[name] * readout).sum() for name, readout in readouts.items())
    (outputs["d_logits"],) = torch.autograd.grad(loss, logits)
    return {name: value.detach() for name, value in outputs.items()}


def check_values(
    device: str, tokens: int, experts: int, k: int, kind: str, renorm: bool, masked: bool
) -> None:
    """Outputs and gradients are those of the reference in double precision."""
    logits = logits_of(device, tokens, experts, kind)
    mask = (torch.rand(tokens) < 0.7).to(device) if masked else None
    found = solve(top_k_gate, logits, k, mask, renorm=renorm)
    expected = solve(top_k_gate_reference, logits.double(), k, mask, renorm=renorm)
    chosen = select_top_k(logits, k) & (logits > -torch.inf)
    assert torch.equal(found["weights"] != 0, chosen)
    assert torch.equal(found["uses"].double(), expected["uses"])
    for name, value in found.items():
        assert value.dtype == torch.float32
        assert_close(value.double(), expected[name], rtol=1e-5, atol=1e-5, msg=name)


def check_one_output_alone(device: str, name: str) -> None:
    """The gradient through one output is the reference's: the others then send none."""
    logits = logits_of(device, 37, 9, "plain").requires_grad_()
    i = NAMES.index(name)
    grads = []
    for function, x in ((top_k_gate, logits), (top_k_gate_reference, logits.double())):
        output = function(x, 3)[i]
        torch.manual_seed(1)
        (grad,) = torch.autograd.grad((output * torch.randn(output.shape).to(output)).sum(), logits)
        grads.append(grad)
    assert_close(grads[0], grads[1], rtol=1e-5, atol=1e-6)
    assert grads[0].abs().sum() > 0


def check_two_runs(device: str) -> None:
    """Two runs agree bit by bit, the counts over many programs included."""
    logits = logits_of(device, 1031, 64, "plain")
    first, second = (solve(top_k_gate, logits, 2) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


def refusal(device: str, dtype: str, experts: int) -> str:
    """Return what is said about logits that the kernel does not take."""
    try:
        top_k_gate(torch.zeros(3, experts, dtype=getattr(torch, dtype), device=device), 2)
    except UnsupportedError as error:
        return str(error)
    return ""
