"""Every form of one FFN with experts: ours, plain LoRA, and the published loop.

Each has a router of its own, the same for all, and the weights of the same frozen FFN.

Letters: T tokens, D width, F width of the FFN, N experts, r rank of one, K experts per token.

Source: `published`: MixLoRA, Li et al. 2024, https://arxiv.org/abs/2404.15159, eq. 3-6, as its code
computes it: base gate and up once per token, base down once per token and expert.
`published_down_once`: the same with the base down of the weighted sum.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.speed.case import Form, Sizes, leaf, leaves
from moeadapt import MoeLoraConfig

LINEARS = ("gate_proj", "up_proj", "down_proj")


@dataclass
class FfnCase:
    """Random numbers of one FFN with experts; `sizes.out` is F.

    Attributes:
        sizes: the sizes.
        x: tokens [T, D].
        upstream: gradient of the output [T, D].
        router: the gate [N, D].
        base: linear -> the frozen weight.
        a: linear -> first factors [N, r, in].
        b: linear -> second factors [N, out, r].
        scale: what every delta is multiplied by.
    """

    sizes: Sizes
    x: Tensor
    upstream: Tensor
    router: Tensor
    base: dict[str, Tensor]
    a: dict[str, Tensor]
    b: dict[str, Tensor]
    scale: float = 2.0

    @staticmethod
    def random(sizes: Sizes, seed: int = 0) -> "FfnCase":
        """Draw one; the numbers are the same for the same sizes and seed."""
        generator = torch.Generator().manual_seed(seed)

        def normal(*shape: int, size: float = 1.0) -> Tensor:
            drawn = torch.randn(*shape, generator=generator) * size
            return drawn.to(sizes.device, sizes.dtype)

        shapes = dict.fromkeys(LINEARS, (sizes.width, sizes.out))
        shapes["down_proj"] = (sizes.out, sizes.width)
        n, r = sizes.experts, sizes.rank
        return FfnCase(
            sizes=sizes,
            x=normal(sizes.tokens, sizes.width),
            upstream=normal(sizes.tokens, sizes.width),
            router=normal(n, sizes.width, size=0.5 * sizes.width**-0.5),
            base={name: normal(o, i, size=i**-0.5) for name, (i, o) in shapes.items()},
            a={name: normal(n, r, i, size=i**-0.5) for name, (i, _) in shapes.items()},
            b={name: normal(n, o, r, size=0.3 * r**-0.5) for name, (_, o) in shapes.items()},
        )

    def to(self, dtype: torch.dtype) -> "FfnCase":
        """Return the same numbers in another dtype."""
        maps = {
            field: {name: t.to(dtype) for name, t in getattr(self, field).items()}
            for field in ("base", "a", "b")
        }
        tensors = {field: getattr(self, field).to(dtype) for field in ("x", "upstream", "router")}
        return replace(self, sizes=replace(self.sizes, dtype=dtype), **tensors, **maps)


def routed(x: Tensor, router: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Return the experts [T, K] and their weights: top-k of a softmax in float32, renormalised."""
    wide = torch.promote_types(x.dtype, torch.float32)
    probs = F.linear(x.to(wide), router.to(wide)).softmax(-1)
    weights, choice = probs.topk(k, -1)
    return choice, weights / weights.sum(-1, keepdim=True)


class Pairs(nn.Module):
    """The factors of all experts of one linear, one parameter per expert."""

    def __init__(self, a: Tensor, b: Tensor, scale: float) -> None:
        super().__init__()
        self.a = nn.ParameterList(leaves(a))
        self.b = nn.ParameterList(leaves(b))
        self.scale = scale

    def delta(self, x: Tensor, expert: int) -> Tensor:
        """Return what one expert adds."""
        return F.linear(F.linear(x, self.a[expert]), self.b[expert]) * self.scale


class PublishedFfn(nn.Module):
    """The published loop over experts; see `Source` of the file."""

    def __init__(self, base: dict[str, Tensor], pairs: dict[str, Pairs], router: Tensor, k: int):
        super().__init__()
        self.base, self.pairs = base, nn.ModuleDict(pairs)
        self.router, self.k, self.down_once = nn.Parameter(router), k, False

    def forward(self, hidden: Tensor) -> Tensor:
        """Return the mixture of whole FFNs of `hidden` [..., D]."""
        x = hidden.reshape(-1, hidden.shape[-1])
        choice, weights = routed(x, self.router, self.k)
        weights = weights.to(x.dtype)
        gate, up = F.linear(x, self.base["gate_proj"]), F.linear(x, self.base["up_proj"])
        chosen = F.one_hot(choice, len(self.router)).permute(2, 1, 0)
        y, mixed = torch.zeros_like(x), torch.zeros_like(gate) if self.down_once else None
        for expert in range(len(self.router)):
            slot, token = torch.where(chosen[expert])
            own, weight = x[token], weights[token, slot, None]
            g = gate[token] + self.pairs["gate_proj"].delta(own, expert)
            u = up[token] + self.pairs["up_proj"].delta(own, expert)
            activation = F.silu(g) * u
            if mixed is None:
                out = F.linear(activation, self.base["down_proj"])
                out = out + self.pairs["down_proj"].delta(activation, expert)
                y.index_add_(0, token, out * weight)
            else:
                activation = activation * weight
                mixed.index_add_(0, token, activation)
                y.index_add_(0, token, self.pairs["down_proj"].delta(activation, expert))
        if mixed is not None:
            y = y + F.linear(mixed, self.base["down_proj"])
        return y.view_as(hidden)


def published(case: FfnCase, down_once: bool = False) -> Form:
    """Return the published loop."""
    pairs = {name: Pairs(case.a[name], case.b[name], case.scale) for name in LINEARS}
    ffn = PublishedFfn(case.base, pairs, case.router.detach().clone(), case.sizes.k)
    ffn.down_once = down_once
    x = leaf(case.x)
    factors = {f"A {name}": list(pairs[name].a) for name in LINEARS}
    factors |= {f"B {name}": list(pairs[name].b) for name in LINEARS}
    known = list(case.base.values())
    return Form(lambda: ffn(x), {"x": x, "router": ffn.router, **factors}, known=known)


def published_down_once(case: FfnCase) -> Form:
    """Return the published loop with one base down for all experts of a token."""
    return published(case, down_once=True)


def tiny_llama(case: FfnCase) -> Any:
    """Return a Llama of one layer around the FFN."""
    config = LlamaConfig(
        vocab_size=8,
        hidden_size=case.sizes.width,
        intermediate_size=case.sizes.out,
        num_hidden_layers=1,
        num_attention_heads=1,
        num_key_value_heads=1,
        pad_token_id=0,
    )
    with torch.device(case.sizes.device):
        return LlamaForCausalLM(config).to(case.sizes.dtype)


def adapted_ffn(case: FfnCase, config: Any) -> Any:
    """Return the real FFN module with an adapter of `config`."""
    model = get_peft_model(tiny_llama(case), config, autocast_adapter_dtype=False).train()
    ffn = model.base_model.model.model.layers[0].mlp
    for name in LINEARS:
        getattr(ffn, name).base_layer.weight.data.copy_(case.base[name])
    return ffn


def ours(case: FfnCase, as_written: bool = False) -> Form:
    """Return `placement="ffn"` as PEFT makes it, without balance losses.

    Args:
        case: the numbers.
        as_written: whether the FFN keeps its class's forward, so that each of its linears and its
            activation runs by itself over all slots.
    """
    sizes = case.sizes
    config = MoeLoraConfig(
        r=sizes.rank,
        lora_alpha=case.scale * sizes.rank,
        num_experts=sizes.experts,
        router={"name": "top_k", "k": sizes.k},
        balance=None,
        placement="ffn",
        target_modules=list(LINEARS),
        task_type="CAUSAL_LM",
    )
    ffn = adapted_ffn(case, config)
    if as_written:
        vars(ffn).pop("forward", None)
    layers = {name: getattr(ffn, name) for name in LINEARS}
    (head,) = [h for layer in layers.values() for h in layer.moe_heads.values()]
    head.router.weight.data.copy_(case.router)
    x, inputs = leaf(case.x), {}
    for name, layer in layers.items():
        bank = layer.moe_banks["default"]
        for letter, numbers in (
            ("A", case.a[name].flatten(0, 1)),
            ("B", case.b[name].movedim(0, 1).flatten(1)),
        ):
            weight = bank.factor(f"lora_{letter}").weight
            weight.data = numbers.to(weight.dtype).clone()
            inputs[f"{letter} {name}"] = [weight]
    inputs = {"x": x, "router": head.router.weight, **inputs}
    return Form(lambda: ffn(x.unsqueeze(0))[0], inputs, known=list(ffn.parameters()))


def ours_slots(case: FfnCase) -> Form:
    """Return `ours` with the forward of the FFN's own class, slot by slot under autograd."""
    return ours(case, as_written=True)


def plain_lora(case: FfnCase) -> Form:
    """Return PEFT's LoRA of rank N*r on the three linears."""
    rank = case.sizes.experts * case.sizes.rank
    config = LoraConfig(
        r=rank,
        lora_alpha=case.scale * rank,
        target_modules=list(LINEARS),
        task_type="CAUSAL_LM",
    )
    ffn = adapted_ffn(case, config)
    x, inputs = leaf(case.x), {}
    for name in LINEARS:
        layer = getattr(ffn, name)
        a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        a.data.copy_(case.a[name].flatten(0, 1))
        b.data.copy_(case.b[name].movedim(0, 1).flatten(1))
        inputs |= {f"A {name}": [a], f"B {name}": [b]}
    known = list(ffn.parameters())
    return Form(lambda: ffn(x.unsqueeze(0))[0], {"x": x, **inputs}, routing="none", known=known)


FORMS: dict[str, Callable[[FfnCase], Form]] = {
    "lora_Nr": plain_lora,
    "ours": ours,
    "ours_slots": ours_slots,
    "published": published,
    "published_down_once": published_down_once,
}
