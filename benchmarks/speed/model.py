"""Whole models: one training step, and decoding with a cache, all seven linears adapted.

Letters: T tokens, D width of the model, N experts, r rank of one, K experts per token.
"""

from collections.abc import Callable
from functools import partial
from itertools import product
from typing import Any

import torch
from peft import get_peft_model
from torch import Tensor

from benchmarks.speed.arms import Shape, make_arms, mixture_config, random_llama
from benchmarks.speed.case import Sizes
from benchmarks.speed.gate import differences
from benchmarks.speed.loops import ADAPTER, LoopLinear, mirrored
from benchmarks.speed.measure import Measured, in_turns, peak_bytes, saved_bytes
from moeadapt.tuner.layer import MoeLoraLinear

UNIT = "T*D over base"
PROMPT, DECODED = 8, 24
CHECKED = ("ours_layer_no_losses", "ours_block_no_losses", "ours_ffn")


def step_of(model: Any, ids: Tensor) -> Callable[[], None]:
    """Return what runs one forward and backward, down to the embeddings."""

    def step() -> None:
        embedded = embeddings(model, ids)
        model(inputs_embeds=embedded, labels=ids).loss.backward()
        model.zero_grad()

    return step


def embeddings(model: Any, ids: Tensor) -> Tensor:
    """Return the embeddings as a leaf, so that the frozen base runs its backward too."""
    return model.get_input_embeddings()(ids).detach().requires_grad_()


def decode_of(model: Any, ids: Tensor, tokens: int = DECODED) -> Callable[[], None]:
    """Return what decodes `tokens` tokens greedily after a prompt that is in the cache."""
    with torch.no_grad():
        model.eval()
        cache = model(input_ids=ids, use_cache=True).past_key_values

    def decode() -> None:
        model.eval()
        if longer := cache.get_seq_length() - ids.shape[1]:
            cache.crop(-longer)
        token = ids[:, -1:]
        with torch.no_grad():
            for _ in range(tokens):
                logits = model(input_ids=token, past_key_values=cache, use_cache=True).logits
                token = logits[:, -1:].argmax(-1)

    return decode


def check(shapes: set[tuple[int, int, int]], device: str = "cpu") -> list[str]:
    """Compare our adapters in a small Llama with the loops in it, gradients and decoding included.

    In float64 and float32. The loops themselves are compared with the definition in `linear` and
    `ffn`.
    """
    wrong = []
    for experts, rank, k in sorted(shapes):
        for name, dtype in product(CHECKED, (torch.float64, torch.float32)):
            sizes = Sizes(1, 1, 1, experts, rank, k, dtype, device)
            load = partial(random_llama, Shape(32, 48, 2, heads=2, kv_heads=2), sizes)
            config = mixture_config(
                name, sizes, balance=None, init_lora_weights=False, lora_alpha=rank / 2
            )
            adapted = get_peft_model(load(), config, autocast_adapter_dtype=False).train()
            where = f"llama {name} N={experts} r={rank} k={k} {str(dtype)[6:]}"
            wrong += _compare(where, load(), adapted, dtype)
    return wrong


def _compare(where: str, base: Any, adapted: Any, dtype: torch.dtype) -> list[str]:
    loop = mirrored(base, adapted).train()
    ids = torch.randint(1, 64, (2, 11), device=base.device)
    outputs = []
    for model in (adapted, loop):
        result = model(input_ids=ids, labels=ids)
        result.loss.backward()
        outputs.append({"logits": result.logits, "loss": result.loss})
    ours, theirs = dict(adapted.base_model.model.named_modules()), dict(loop.named_modules())
    for name, layer in ours.items():
        if isinstance(layer, MoeLoraLinear):
            bank = layer.moe_banks[ADAPTER]
            pairs = _pairs(theirs, name)
            grads = [torch.cat([p.grad for p in pairs.a]), torch.cat([p.grad for p in pairs.b], 1)]
            for factor, grad in zip(("lora_A", "lora_B"), grads, strict=True):
                key = f"gradient of {factor} of {name}"
                outputs[0][key], outputs[1][key] = bank.factor(factor).weight.grad, grad
    for model, found in zip((adapted, loop), outputs, strict=True):
        found["decoded logits"] = _decoded(model.eval(), ids)
    return differences(where, outputs[0], outputs[1], dtype)


def _decoded(model: Any, ids: Tensor, prompt: int = 6) -> Tensor:
    with torch.no_grad():
        first = model(input_ids=ids[:, :prompt], use_cache=True)
        parts = [first.logits]
        for at in range(prompt, ids.shape[1]):
            one = ids[:, at : at + 1]
            step = model(input_ids=one, past_key_values=first.past_key_values, use_cache=True)
            parts.append(step.logits)
    return torch.cat(parts, 1)


def _pairs(modules: dict[str, Any], name: str) -> Any:
    if isinstance(modules.get(name), LoopLinear):
        return modules[name].pairs
    parent, _, own = name.rpartition(".")
    return modules[parent].pairs[own]


def measure(
    benchmark: str,
    load: Callable[[], Any],
    ids: Tensor,
    sizes: Sizes,
    rounds: tuple[int, int],
    only: list[str] | None = None,
) -> list[Measured]:
    """Time the training step and the decoding of every arm.

    Args:
        benchmark: name in the table.
        load: returns a fresh base, the same one each time.
        ids: token ids of the step, [rows, length].
        sizes: for the table, and experts, rank and k.
        rounds: turns of the step, turns of the decoding.
        only: the arms; None: all.
    """
    models = {name: model.train() for name, model in make_arms(load, sizes, only).items()}
    llama = next(iter(models.values())).config
    of_model = {"ffn": llama.intermediate_size, "layers": llama.num_hidden_layers}
    common: dict[str, Any] = {"benchmark": benchmark, "sizes": {**sizes.named(), **of_model}}
    common |= {"baseline": "lora_Nr", "ours": "ours_block"}
    steps = {name: step_of(model, ids) for name, model in models.items()}
    seconds = in_turns(steps, rounds[0], sizes.device)
    unit = ids.numel() * llama.hidden_size * torch.finfo(sizes.dtype).bits // 8
    saved, peak = {}, {}
    for name, model in models.items():
        embedded = embeddings(model, ids)
        known = [*model.parameters(), *model.buffers(), ids, embedded]
        run = partial(model, inputs_embeds=embedded, labels=ids)
        saved[name] = saved_bytes(run, known) / unit
        peak[name] = peak_bytes(steps[name]) / unit
    extra = (
        {name: units - saved["base"] for name, units in saved.items()} if "base" in saved else {}
    )
    work = {name: decode_of(model, ids[:1, :PROMPT]) for name, model in models.items()}
    decoded = in_turns(work, rounds[1], sizes.device)
    return [
        Measured(work="step", seconds=seconds, unit=UNIT, saved=extra, peak=peak, **common),
        Measured(work="decode", seconds=decoded, per=DECODED, **common),
    ]


def measure_random(
    shape: Shape, sizes: Sizes, rounds: tuple[int, int], only: list[str] | None = None
) -> list[Measured]:
    """Time a Llama of random weights; `sizes.tokens` are one row of text."""
    ids = torch.randint(1, 512, (1, sizes.tokens), device=sizes.device)
    load = partial(random_llama, shape, sizes)
    return measure("llama", load, ids, sizes, rounds, only)
