"""What the library sets out to reach, and whether a run did."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

from benchmarks.speed.measure import Measured


@dataclass(frozen=True)
class Goal:
    """A bound on a ratio of two forms' times, or on the memory of one.

    Attributes:
        benchmark: of the measurement.
        work: of the measurement.
        form: what is bounded.
        to: what its time is divided by; empty: its saved units are bounded.
        bound: the number.
        sense: whether the value should be at least or at most the bound.
        sizes: of the measurement; those left out may be anything.
    """

    benchmark: str
    work: str
    form: str
    to: str
    sense: Literal[">=", "<="]
    bound: float
    sizes: dict[str, Any] = field(default_factory=dict)

    @property
    def text(self) -> str:
        """Say it in one line."""
        what = f"{self.form} / {self.to}" if self.to else f"{self.form} saves"
        return f"{what} {self.sense} {self.bound}"

    def fits(self, measured: Measured) -> bool:
        """Whether this measurement says something about the goal."""
        same = (measured.benchmark, measured.work) == (self.benchmark, self.work)
        forms = {self.form, self.to} - {""} <= set(measured.seconds)
        return same and forms and self.sizes.items() <= measured.sizes.items()

    def value(self, measured: Measured) -> float:
        """Return the measured number."""
        if not self.to:
            return measured.saved[self.form]
        return measured.ratio(self.form, self.to)[0]

    def met(self, value: float) -> bool:
        """Whether the value is on the right side of the bound."""
        return value >= self.bound if self.sense == ">=" else value <= self.bound


BOTH = "forward+backward"
HEADLINE = {"tokens": 1024, "width": 1024, "out": 1024, "experts": 8, "rank": 8, "k": 2}


def _linear(form: str, to: str, sense: Any, bound: float, **sizes: Any) -> Goal:
    return Goal("linear", BOTH, form, to, sense, bound, {**HEADLINE, **sizes})


def _llama(work: str, form: str, to: str, sense: Any, bound: float, width: int) -> Goal:
    return Goal("llama", work, form, to, sense, bound, {"width": width})


GOALS = (
    _linear("loop_sparse", "ours_auto", ">=", 2.5, dtype="bf16"),
    _linear("loop_dense", "ours_auto", ">=", 4.0, dtype="bf16"),
    _linear("xlora", "ours_auto", ">=", 4.0, dtype="bf16"),
    _linear("arrow", "ours_auto", ">=", 4.0, dtype="bf16"),
    _linear("ours_auto", "lora_Nr", "<=", 1.05, dtype="bf16"),
    _linear("loop_sparse", "ours_auto", ">=", 1.6, dtype="fp32"),
    _linear("loop_dense", "ours_auto", ">=", 4.0, dtype="fp32"),
    _linear("ours_auto", "lora_Nr", "<=", 1.05, dtype="fp32"),
    _linear("ours_auto", "lora_Nr", "<=", 1.0, experts=64, dtype="bf16"),
    _linear("ours_auto", "lora_Nr", "<=", 1.0, experts=64, dtype="fp32"),
    *(
        goal
        for width in (512, 128)
        for goal in (
            _llama("step", "ours_block", "lora_Nr", "<=", 1.05, width),
            _llama("step", "ours_layer", "lora_Nr", "<=", 1.15, width),
            _llama("decode", "ours_block", "lora_Nr", "<=", 1.0, width),
            _llama("decode", "ours_layer", "lora_Nr", "<=", 1.0, width),
            _llama("step", "loop_layer", "ours_block", ">=", {512: 1.2, 128: 2.5}[width], width),
        )
    ),
    Goal("ffn", BOTH, "published", "ours", ">=", 1.25, {"experts": 8, "k": 2}),
    Goal("ffn", BOTH, "published", "ours", ">=", 1.5, {"experts": 8, "k": 4}),
    Goal("ffn", BOTH, "ours", "", "<=", 2.1, {"experts": 8}),
)


def judged(results: list[Measured]) -> Iterator[tuple[Goal, Measured | None, float, bool]]:
    """Yield every goal with each measurement that it fits; None: nothing was measured for it."""
    for goal in GOALS:
        fitting = [measured for measured in results if goal.fits(measured)]
        for measured in fitting:
            value = goal.value(measured)
            yield goal, measured, value, goal.met(value)
        if not fitting:
            yield goal, None, float("nan"), False
