"""What each arm costs: parameters, bytes, and the time of a step and of decoding, in turns.

All arms take turns in one process, so that a noisy machine slows them alike; see
`benchmarks.speed.measure`.
"""

import statistics
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.evidence.arms import Sizes, attach
from benchmarks.evidence.runs import Row, answer_losses
from benchmarks.speed.measure import in_turns, peak_bytes
from moeadapt.demo.arms import batch_of

BASELINE = "lora_total"
ROUNDS, DECODED = 5, 8


@dataclass(frozen=True, kw_only=True)
class Cost:
    """What one arm costs.

    Attributes:
        parameters: trainable.
        of_experts: those of them that belong to one expert or another.
        num_experts: 1 for a plain LoRA.
        file_size: of the saved weights, bytes.
        step_seconds: median time of a forward and a backward.
        step_ratio: the same over that of the baseline, median over the turns.
        step_ratio_low: the least of those ratios.
        step_ratio_high: the largest.
        peak_memory: most bytes of tensors alive at once in a step, what existed before left out.
        generated: tokens decoded per second, greedy, one sequence.
        decode_ratio: time of a decoded token over that of the baseline.
    """

    parameters: int
    of_experts: int
    num_experts: int
    file_size: int
    step_seconds: float
    step_ratio: float
    step_ratio_low: float
    step_ratio_high: float
    peak_memory: int
    generated: float
    decode_ratio: float

    def active_parameters(self, experts: float) -> float:
        """Return how many trained parameters a token uses if it uses so many experts."""
        if not self.of_experts:
            return float(self.parameters)
        return self.parameters - self.of_experts * (1 - experts / self.num_experts)


def measure(
    arms: Sequence[str],
    load: Callable[[], Any],
    tokenizer: Any,
    rows: list[Row],
    sizes: Sizes,
    rounds: int = ROUNDS,
) -> dict[str, Cost]:
    """Return the cost of each arm, the baseline among them.

    Args:
        arms: names; an oracle is no method, so its times are those of the arm it is made from.
        load: returns a fresh base.
        tokenizer: of the base.
        rows: the batch of one step; the first prompt is decoded from.
        sizes: of the mixtures.
        rounds: turns.
    """
    models = {arm: attach(arm, load(), sizes, seed=0) for arm in arms}
    device = next(iter(models.values())).device
    inputs = batch_of(tokenizer, rows, device)
    ids = tokenizer(rows[0]["prompt"], return_tensors="pt").input_ids.to(device)
    steps = {arm: partial(_step, model, inputs) for arm, model in models.items()}
    decodes = {arm: partial(_decode, model, ids) for arm, model in models.items()}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the clock is CPU time, which threads that wait spend too
    try:
        seconds = in_turns(steps, rounds, device.type)
        peaks = {arm: peak_bytes(step) for arm, step in steps.items()}
        decoding = in_turns(decodes, rounds, device.type)
    finally:
        torch.set_num_threads(threads)
    ratios = {arm: _ratios(own, seconds[BASELINE]) for arm, own in seconds.items()}
    return {
        arm: Cost(
            parameters=sum(p.numel() for p in model.parameters() if p.requires_grad),
            of_experts=of_experts(model, sizes) if not arm.startswith("lora") else 0,
            num_experts=sizes.experts if not arm.startswith("lora") else 1,
            file_size=_saved_bytes(model),
            step_seconds=statistics.median(seconds[arm]),
            step_ratio=statistics.median(ratios[arm]),
            step_ratio_low=min(ratios[arm]),
            step_ratio_high=max(ratios[arm]),
            peak_memory=peaks[arm],
            generated=DECODED / statistics.median(decoding[arm]),
            decode_ratio=statistics.median(_ratios(decoding[arm], decoding[BASELINE])),
        )
        for arm, model in models.items()
    }


def of_experts(model: Any, sizes: Sizes) -> int:
    """Count the parameters of factors that hold all experts; a shared A has the rank of one."""
    total = 0
    for name, parameter in model.named_parameters():
        side = 0 if "lora_A" in name else 1
        if "lora_" in name and parameter.shape[side] == sizes.experts * sizes.rank:
            total += parameter.numel()
    return total


def _ratios(own: list[float], other: list[float]) -> list[float]:
    return [a / b for a, b in zip(own, other, strict=True)]


def _step(model: Any, inputs: dict[str, Any]) -> None:
    model.train()
    total, count = answer_losses(model, inputs)
    (total.sum() / count.sum()).backward()
    model.zero_grad()


def _decode(model: Any, ids: torch.Tensor) -> None:
    model.eval()
    settings: dict[str, Any] = {
        "max_new_tokens": DECODED,
        "min_new_tokens": DECODED,
        "do_sample": False,
    }
    model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **settings)


def _saved_bytes(model: Any) -> int:
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        return sum(path.stat().st_size for path in Path(folder).rglob("*.safetensors"))
