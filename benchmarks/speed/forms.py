"""Every form of one linear with experts: ours, plain LoRA, and the other implementations.

Ours and PEFT's are the real code. The loops are written out from their papers. Each form owns
copies of the same numbers, laid out as its original does, and is given the base output.

Letters: T tokens, D in, O out, N experts, r rank of one, R = N * r, K experts per token.

Source: `loop_sparse`: MixLoRA, Li et al. 2024, https://arxiv.org/abs/2404.15159, section 3, as its
code and that of MoE-PEFT compute it: for each expert, gather its tokens, multiply, weight the
output, `index_add_`; `loop_sparse_fp32`: the same with the casts of that code, which keeps adapters
in float32. `loop_dense`: LoRAMoE, Dou et al. 2023, https://arxiv.org/abs/2312.09979, eq. 4, every
expert on every token, weights on the output. `xlora`: `peft.tuners.xlora.layer.XLoraLinearLayer`
(Buehler and Buehler 2024, https://arxiv.org/abs/2402.07148). `arrow`:
`peft.tuners.lora.arrow.ArrowLoraLinearLayer` (Ostapenko et al. 2024,
https://arxiv.org/abs/2405.11157).
"""

from collections.abc import Callable
from types import SimpleNamespace

import torch
from peft import ArrowConfig, LoraConfig, XLoraConfig
from peft.tuners.lora.layer import Linear as PeftLoraLinear
from peft.tuners.xlora.layer import XLoraLinearLayer
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.speed.case import Form, LinearCase, leaf, leaves
from moeadapt.dispatch import dispatch
from moeadapt.experts import EXPERTS, BankSize
from moeadapt.experts.base import ExpertBank


def make_bank(case: LinearCase, impl: str = "concat") -> ExpertBank:
    """Return our experts with the case's numbers."""
    sizes = case.sizes
    size = BankSize(
        in_features=sizes.width,
        out_features=sizes.out,
        num_experts=sizes.experts,
        rank=sizes.rank,
        scale=case.scale,
    )
    bank = EXPERTS.parse("lora").build(size)
    bank.impl = impl
    for name, numbers in zip(("lora_A", "lora_B"), case.packed(), strict=True):
        bank.factor(name).weight = nn.Parameter(numbers.detach().clone())
    return bank


def ours(impl: str) -> Callable[[LinearCase], Form]:
    """Return what makes our form `impl`; it takes the float32 weights that a router gives."""

    def make(case: LinearCase) -> Form:
        bank = make_bank(case, impl)
        wide = torch.promote_types(case.sizes.dtype, torch.float32)
        x, weights = leaf(case.x), leaf(case.dense_weights(wide))
        a, b = bank.factor("lora_A").weight, bank.factor("lora_B").weight

        def run() -> Tensor:
            return dispatch(x, weights, bank, case.onto, max_active=case.sizes.k)

        return Form(run, {"x": x, "weights": weights, "A": [a], "B": [b]})

    return make


def loop_sparse(case: LinearCase, compute: torch.dtype | None = None) -> Form:
    """Each expert on its own tokens, found by their indices; see `Source`."""
    dtype = compute or case.sizes.dtype
    x, slots = leaf(case.x), leaf(case.slots)
    a_e, b_e = leaves(case.a.to(dtype)), leaves(case.b.to(dtype))

    def run() -> Tensor:
        wide = x.to(dtype)
        chosen = F.one_hot(case.choice, case.sizes.experts).permute(2, 1, 0)
        delta = torch.zeros_like(case.onto, dtype=dtype)
        for expert, (a, b) in enumerate(zip(a_e, b_e, strict=True)):
            slot, token = torch.where(chosen[expert])
            out = F.linear(F.linear(wide[token], a), b) * case.scale
            delta.index_add_(0, token, out * slots[token, slot, None].to(dtype))
        return case.onto + delta.to(case.onto.dtype)

    return Form(run, {"x": x, "slots": slots, "A": a_e, "B": b_e}, exact_dtype=dtype)


def loop_sparse_fp32(case: LinearCase) -> Form:
    """`loop_sparse` with float32 adapters: tokens are cast up, the sum is cast back."""
    return loop_sparse(case, torch.float32)


def loop_dense(case: LinearCase) -> Form:
    """Every expert on every token, weights on the output; see `Source`."""
    x, slots = leaf(case.x), leaf(case.slots)
    a_e, b_e = leaves(case.a), leaves(case.b)

    def run() -> Tensor:
        empty = torch.zeros(x.shape[0], case.sizes.experts, dtype=x.dtype, device=x.device)
        weights = empty.scatter(1, case.choice, slots)
        y = case.onto
        for expert, (a, b) in enumerate(zip(a_e, b_e, strict=True)):
            y = y + F.linear(F.linear(x, a), b) * case.scale * weights[:, expert, None]
        return y

    return Form(run, {"x": x, "slots": slots, "A": a_e, "B": b_e})


class Given(nn.Linear):
    """A base layer that returns a given output, so that PEFT's layers are timed without it."""

    def __init__(self, onto: Tensor, width: int, fresh: bool) -> None:
        super().__init__(width, onto.shape[-1], bias=False, device=onto.device, dtype=onto.dtype)
        self.weight.requires_grad_(False)
        self.onto, self.fresh = onto, fresh

    def forward(self, x: Tensor) -> Tensor:
        """Return the given output, as a copy for a layer that adds into it."""
        onto = self.onto.view(*x.shape[:-1], -1)
        return onto.clone() if self.fresh else onto


def peft_linear(
    case: LinearCase, a_e: list[Tensor], b_e: list[Tensor], names: list[str], fresh: bool = False
) -> PeftLoraLinear:
    """Return a real PEFT LoRA linear whose adapters `names` hold these numbers."""
    rank = a_e[0].shape[0]
    config = LoraConfig(r=rank, lora_alpha=case.scale * rank, init_lora_weights=False)
    base = Given(case.onto, case.sizes.width, fresh)
    layer = PeftLoraLinear(base, names[0], config, r=rank, lora_alpha=case.scale * rank)
    for name, a, b in zip(names, a_e, b_e, strict=True):
        if name not in layer.lora_A:
            layer.update_layer(name, rank, case.scale * rank, config)
        layer.lora_A[name].weight = nn.Parameter(a.detach().clone().contiguous())
        layer.lora_B[name].weight = nn.Parameter(b.detach().clone().contiguous())
    layer.set_adapter(names)
    return layer


def _factors(layer: PeftLoraLinear, names: list[str]) -> dict[str, list[Tensor]]:
    return {
        "A": [layer.lora_A[name].weight for name in names],
        "B": [layer.lora_B[name].weight for name in names],
    }


def peft_lora(case: LinearCase) -> Form:
    """PEFT's LoRA of rank R, without routing: a mixture of one expert."""
    a, b = case.packed()
    layer, x = peft_linear(case, [a], [b], ["default"]), leaf(case.x)
    return Form(
        lambda: layer(x),
        {"x": x, **_factors(layer, ["default"])},
        routing="none",
        known=list(layer.parameters()),
    )


def xlora(case: LinearCase) -> Form:
    """PEFT's X-LoRA layer, given the weights that its classifier would make.

    It adds into the base output, so it gets a copy each time.
    """
    names = [str(expert) for expert in range(case.sizes.experts)]
    layer = peft_linear(case, list(case.a), list(case.b), names, fresh=True)
    config = XLoraConfig(hidden_size=case.sizes.width, adapters=dict.fromkeys(names, ""))
    model = SimpleNamespace(disabled=False)
    real = XLoraLinearLayer(model, layer, layer.forward, 0, config)  # type: ignore[arg-type]
    x, weights = leaf(case.x), leaf(case.dense_weights())

    def run() -> Tensor:
        return real.forward(x.unsqueeze(0), scalings=weights[None, :, None, :]).squeeze(0)

    inputs = {"x": x, "weights": weights, **_factors(layer, names)}
    return Form(run, inputs, known=list(layer.parameters()))


def arrow(case: LinearCase) -> Form:
    """PEFT's Arrow layer; it routes by itself, to prototypes that it finds once."""
    names = [f"task_{expert}" for expert in range(case.sizes.experts)]
    layer = peft_linear(case, list(case.a), list(case.b), names)
    config = ArrowConfig(top_k=case.sizes.k, rng_seed=0)
    config.task_adapter_names, config.gks_adapter_names = names, []
    rank = case.sizes.rank
    routed = LoraConfig(r=rank, lora_alpha=case.scale * rank, arrow_config=config)
    layer.update_layer("arrow_router", rank, case.scale * rank, routed)
    layer.set_adapter("arrow_router")
    factors = _factors(layer, names)
    for tensor in [*factors["A"], *factors["B"]]:
        tensor.requires_grad_()
    x = leaf(case.x)
    with torch.no_grad():
        layer(x)  # finds the prototypes
    prototypes = layer.lora_arrow["arrow_router"].prototypes

    def weights(x: Tensor) -> Tensor:
        alike = (x @ prototypes.to(x.dtype).T).abs()
        values, chosen = alike.topk(case.sizes.k, -1)
        return torch.full_like(alike, -torch.inf).scatter(1, chosen, values).softmax(-1)

    known = [*layer.parameters(), prototypes]
    inputs = {"x": x, **factors}
    return Form(lambda: layer(x), inputs, routing="own", weights=weights, known=known)


OURS: dict[str, Callable[[LinearCase], Form]] = {
    f"ours_{impl}": ours(impl) for impl in ("auto", "concat", "grouped", "gather")
}
PEERS: dict[str, Callable[[LinearCase], Form]] = {
    "loop_sparse": loop_sparse,
    "loop_sparse_fp32": loop_sparse_fp32,
    "loop_dense": loop_dense,
    "xlora": xlora,
    "arrow": arrow,
}
PLAIN: dict[str, Callable[[LinearCase], Form]] = {"lora": peft_lora}


def available(name: str, case: LinearCase) -> bool:
    """Whether a form can compute this case in its dtype, and within a usual memory."""
    sizes = case.sizes
    if name == "ours_grouped":
        return sizes.dtype == torch.float64 or (sizes.rank * case.x.element_size()) % 16 == 0
    if name == "ours_gather":
        return sizes.tokens <= 128  # it copies the experts for each token
    return True
