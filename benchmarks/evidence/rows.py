"""The CSV rows of the evidence on a real model, in the columns of PEFT's method comparison.

What has a value for each seed is written seed by seed too, so that the page can compare any two
arms in pairs.
"""

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.evidence import runs, sequential
from benchmarks.evidence.cost import Cost


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What all arms of one run share, and what is written beside each.

    Attributes:
        model_id: of the base.
        base_nll: test loss of the base without an adapter, mean over the domains.
        base_text_nll: its loss of plain text.
        steps: of training.
        batch: rows of a step.
        train_rows: of each domain.
        validation_rows: of each domain.
        test_rows: of each domain.
        texts: of plain text.
    """

    model_id: str
    base_nll: float
    base_text_nll: float
    steps: int
    batch: int
    train_rows: int
    validation_rows: int
    test_rows: int
    texts: int


def mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    """Return the mean and its standard error, NaN if a run diverged."""
    if not all(map(math.isfinite, values)):
        return math.nan, math.nan
    return statistics.mean(values), statistics.stdev(values) / len(values) ** 0.5


def of_seeds(name: str, values: Sequence[float]) -> dict[str, Any]:
    """Return the columns of a number: mean, standard error, that of each seed."""
    middle, error = mean_and_error(values)
    return {
        name: round(middle, 4),
        f"{name}_se": round(error, 4),
        f"{name}_by_seed": " ".join(f"{value:.4f}" for value in values),
    }


def of_forgetting(values: Sequence[float | None]) -> dict[str, Any]:
    """Return the columns of the forgetting, empty for an arm that has none."""
    known = [value for value in values if value is not None]
    empty = dict.fromkeys(of_seeds("forgetting", [0.0, 0.0]), "")
    return of_seeds("forgetting", known) if known else empty


def of_rates(tried: Mapping[float, Sequence[float]]) -> str:
    """Return `rate:mean validation loss@seeds` of every learning rate tried."""
    each = (f"{rate}:{statistics.fmean(tried[rate]):.4f}@{len(tried[rate])}" for rate in tried)
    return " ".join(sorted(each, key=lambda text: float(text.partition(":")[0])))


def of_arm(
    found: Sequence[runs.Run],
    tried: Mapping[float, Sequence[float]],
    costs: Cost,
    setting: Setting,
    seconds: float,
) -> dict[str, Any]:
    """Return the row of one arm.

    Args:
        found: its run of each seed.
        tried: validation losses of each learning rate.
        costs: of the arm.
        setting: what all arms share.
        seconds: that the arm took, the search included.
    """
    one, experts = found[0], statistics.mean(run.experts for run in found)
    row: dict[str, Any] = {
        "experiment_name": one.arm,
        "peft_type": "LORA" if one.arm.startswith("lora") else "MOEADAPT",
        "total_time": round(seconds),
        "train_time": round(statistics.mean(run.seconds for run in found)),
        **of_seeds("test_nll", [run.test for run in found]),
        "train_loss": round(statistics.mean(run.train_loss for run in found), 4),
        "accelerator_memory_max": costs.peak_memory,
        "file_size": costs.file_size,
        "task_name": "moeadapt-domains",
        "num_trainable_params": costs.parameters,
        "num_active_params": round(costs.active_parameters(experts)),
        "experts_per_token": round(experts, 2),
        "train_time_per_step": round(costs.step_seconds, 3),
        "train_time_ratio": round(costs.step_ratio, 3),
        "train_time_ratio_low": round(costs.step_ratio_low, 3),
        "train_time_ratio_high": round(costs.step_ratio_high, 3),
        **of_forgetting([run.forgetting for run in found]),
        "decode_tokens_per_second": round(costs.generated, 1),
        "decode_time_ratio": round(costs.decode_ratio, 3),
        "learning_rate": one.rate,
        "rates_tried": of_rates(tried),
        "seeds": len(found),
        **vars(setting),
    }
    for name in one.losses:
        middle, spread = mean_and_error([run.losses[name] for run in found])
        row[f"nll_{name}"], row[f"nll_{name}_se"] = round(middle, 4), round(spread, 4)
    return row


def of_sequence(found: Sequence[sequential.Sequence2], setting: Setting) -> dict[str, Any]:
    """Return the row of one arm that was trained on one domain after the other."""
    row: dict[str, Any] = {"experiment_name": found[0].arm, "seeds": len(found), **vars(setting)}
    numbers: dict[str, Callable[[sequential.Sequence2], float]] = {
        "first_before": lambda one: one.first_before,
        "first_after": lambda one: one.first_after,
        "interference": lambda one: one.interference,
        "second_after": lambda one: one.second_after,
        "forgetting": lambda one: one.base_text - setting.base_text_nll,
    }
    for name, number in numbers.items():
        row |= of_seeds(name, [number(one) for one in found])
    return row
