"""What the preset tests share: one layer of a tiny model, alone, with its tensors and its input.

A test writes the paper's formula with loops over tokens and experts and compares it with the layer.
Letters: T tokens, D in, O out.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from moeadapt import MoeLoraConfig, collect_routing
from moeadapt.balance import Mixture
from moeadapt.routing import Routing
from moeadapt.tuner.inspect import require_context
from tests.tiny import adapt, batch, tiny

LINEAR = "model.layers.1.mlp.up_proj"


@dataclass
class Layer:
    """One layer of a model with the preset's adapter.

    Attributes:
        module: the layer or block, to be called alone.
        x: its input in the model, a leaf.
        output: its output in the model.
        routing: what its router decided there.
        config: the adapter's settings.
        mixture: what a balance loss may look at.
    """

    module: nn.Module
    x: Tensor
    output: Tensor
    routing: Routing
    config: MoeLoraConfig
    mixture: Mixture

    def __getitem__(self, name: str) -> Tensor:
        """Return an adapter tensor, by the name it has in the file, without adapter and prefix."""
        return self.tensors()[name]

    def tensors(self) -> dict[str, Tensor]:
        """Return every adapter tensor of the layer and of the layers inside it, by its path."""
        named = [*self.module.named_parameters(), *self.module.named_buffers()]
        return {_short(name): tensor for name, tensor in named if "moeadapt_" in name}

    def base(self, path: str = "") -> Tensor:
        """Return the frozen weight."""
        return self.module.get_submodule(path).get_base_layer().weight

    @property
    def scale(self) -> float:
        """Alpha / rank of one expert."""
        return self.config.lora_alpha / self.config.r

    def balance(self, name: str) -> Tensor:
        """Return the value of a balance loss on the routing, before its coefficient."""
        return self.config.balance_configs[name].loss(self.routing, self.mixture)


def preset_layer(name: str, path: str = LINEAR, layers: int = 2, **overrides: Any) -> Layer:
    """Build a tiny Llama with preset `name` in double precision, nothing zero, in eval mode."""
    config = MoeLoraConfig.preset(
        name, **{"task_type": "CAUSAL_LM", "init_lora_weights": False, **overrides}
    )
    model = adapt(tiny("llama", num_hidden_layers=layers), config).double()
    scatter(model)
    module = model.get_submodule(f"base_model.model.{path}")
    seen: list[Tensor] = []
    hook = module.register_forward_hook(lambda _, args, out: seen.extend([args[0], out]))
    with torch.no_grad(), collect_routing(model) as routings:
        model(input_ids=batch(rows=1)["input_ids"])
    hook.remove()
    x, output = seen
    context = require_context(model)
    head = context.heads["default"][path]
    x = x.reshape(-1, x.shape[-1]).requires_grad_()
    return Layer(
        module=module,
        x=x,
        output=output.reshape(len(x), -1),
        routing=routings[path][0],
        config=model.peft_config["default"],
        mixture=Mixture(router=head.router, banks=head.banks, hidden=x.detach()),
    )


def scatter(model: nn.Module) -> None:
    """Give every router tensor random values, so that no two experts are alike."""
    generator = torch.Generator().manual_seed(1)
    named = [(name, tensor, 0.5) for name, tensor in model.named_parameters()]
    named += [(n, b, 0.1) for n, b in model.named_buffers() if n.endswith("selection_bias")]
    with torch.no_grad():
        for name, tensor, std in named:
            if "moeadapt_router" in name:
                noise = torch.randn(tensor.shape, generator=generator, dtype=tensor.dtype)
                tensor.copy_(std * noise)


def assert_equals(layer: Layer, reference: Callable[[Tensor], Tensor], *factors: str) -> None:
    """Compare values, and the gradients of the input and of the named tensors."""
    expected = torch.stack([reference(token) for token in layer.x])
    torch.testing.assert_close(layer.output, expected.detach())
    ours = layer.module(layer.x.unsqueeze(0)).squeeze(0)
    towards = torch.randn(ours.shape, generator=torch.Generator().manual_seed(2)).double()
    leaves = [layer.x, *(layer[name] for name in factors)]
    got = torch.autograd.grad((ours * towards).sum(), leaves)
    wanted = torch.autograd.grad((expected * towards).sum(), leaves)
    for name, a, b in zip(("x", *factors), got, wanted, strict=True):
        assert b.abs().max() > 0, f"the reference has no gradient for {name}"
        torch.testing.assert_close(a, b, msg=lambda text, name=name: f"gradient of {name}: {text}")


def expert(x: Tensor, a: Tensor, b: Tensor, e: int, rank: int) -> Tensor:
    """Return B_e A_e x, where expert e owns `rank` rows of A and columns of B."""
    own = slice(e * rank, (e + 1) * rank)
    return b[:, own] @ (a[own] @ x)


def num(value: Tensor) -> float:
    """Return a scalar without its graph."""
    return float(value.detach())


def softmax(scores: Tensor) -> list[Tensor]:
    """Return exp(s_e) / sum exp(s_j), one by one."""
    total = sum(score.exp() for score in scores)
    return [score.exp() / total for score in scores]


def largest(scores: list[Tensor], k: int) -> list[int]:
    """Return the indices of the k largest."""
    return sorted(range(len(scores)), key=lambda e: -num(scores[e]))[:k]


def switch_loss(chosen: list[list[int]], probs: list[list[Tensor]]) -> float:
    """E * sum_e f_e P_e: f the share of slots, P the mean probability (Fedus 2021, eq. 4)."""
    experts, slots = len(probs[0]), sum(len(own) for own in chosen)
    total = 0.0
    for e in range(experts):
        share = sum(own.count(e) for own in chosen) / slots
        total += share * sum(num(p[e]) for p in probs) / len(probs)
    return experts * total


def _short(name: str) -> str:
    name = name.removesuffix(".weight") if "moeadapt_router" not in name else name
    return name.replace("moeadapt_", "").replace(".default", "")
