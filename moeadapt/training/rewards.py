"""Reward functions that a recipe can name; a closed list, nothing is imported from a string."""

from collections.abc import Callable
from typing import Any

from moeadapt.errors import ConfigError, did_you_mean


def _text(completion: Any) -> str:
    return completion if isinstance(completion, str) else completion[-1]["content"]


def exact_match(completions: list[Any], answer: list[str], **_: Any) -> list[float]:
    """1 where the completion is the row's `answer`, but for white space; else 0."""
    return [
        float(_text(said).split() == wanted.split())
        for said, wanted in zip(completions, answer, strict=True)
    ]


def prefix_overlap(completions: list[Any], answer: list[str], **_: Any) -> list[float]:
    """Share of the answer's words, from the first on, that the completion gets right, 0 to 1."""
    scores = []
    for said, wanted in zip(completions, answer, strict=True):
        ours, theirs = _text(said).split(), wanted.split()
        right = 0
        for mine, other in zip(ours, theirs, strict=False):
            if mine != other:
                break
            right += 1
        scores.append(right / max(len(theirs), 1))
    return scores


REWARDS: dict[str, Callable[..., list[float]]] = {
    "exact_match": exact_match,
    "prefix_overlap": prefix_overlap,
}
"""Rewards by name."""


def get_reward(name: str) -> Callable[..., list[float]]:
    """Return a reward function.

    Raises:
        ConfigError: `name` is not registered.
    """
    if name not in REWARDS:
        raise ConfigError(
            f"unknown reward {name!r}; one of {sorted(REWARDS)}{did_you_mean(name, REWARDS)}"
        )
    return REWARDS[name]
