"""Warnings about routers that go wrong while they train, from statistics that are read anyway.

The symptoms are named in Shazeer et al. 2017, https://arxiv.org/abs/1701.06538, section 4 (a few
experts are favoured, and favoured experts are trained more), and Fedus et al. 2022,
https://arxiv.org/abs/2101.03961, section 2.2.
"""

import math
import warnings
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from accelerate.state import PartialState

from moeadapt.errors import RoutingWarning
from moeadapt.routers.dynamic import DynamicRouter
from moeadapt.stats import RouterStats
from moeadapt.tuner.head import RouterHead

WINDOW = 20
"""Optimizer steps, at least, that are looked at together: one bad batch is no symptom.

Not logs: one log of many steps is enough."""

DEAD_LOAD = 0.01
"""An expert is dead below this multiple of the load at balance, 1/E."""

COLLAPSED_USE = 0.9
"""A router has collapsed where this share of tokens, or more, uses the same expert."""

CERTAIN = 0.01
"""A router is certain below this share of the largest entropy, ln E."""

SHOWN = 3
"""Layers that a warning names."""


@dataclass(frozen=True, kw_only=True)
class Window:
    """One router over the last logs of at least `WINDOW` optimizer steps, weighted by tokens.

    Attributes:
        load: share of the used slots per expert.
        active: experts in use per token.
        entropy: of a token's probabilities, in nats.
        width: experts and null experts that share the probability.
        chooses_own_set: whether the router itself switches experts off.
    """

    load: Sequence[float]
    active: float
    entropy: float
    width: int
    chooses_own_set: bool = False

    def has_dead_experts(self) -> bool:
        """Whether an expert has a load below `DEAD_LOAD` / E."""
        if self.chooses_own_set:
            return False
        return min(self.load) < DEAD_LOAD / len(self.load)

    def has_collapsed(self) -> bool:
        """Whether nearly every token uses the same expert.

        Load is a share of used slots. A token fills `active` slots on average and an expert takes
        one of them at most, so an expert's load is the share of tokens that use it, u, divided by
        `active`: 1 / k at most, and u = load * active. At balance u = active / E. Up to half of the
        experts per token, that is 0.5 at most, and u > 0.9 is a preference; with more experts per
        token it may be balance (k = 3 of E = 4: u = 0.75), and is not judged.
        """
        if self.active > len(self.load) / 2:
            return False
        return max(self.load) * self.active > COLLAPSED_USE

    def is_certain(self) -> bool:
        """Whether the mean entropy is below `CERTAIN` of ln W, W experts and null experts."""
        return self.width > 1 and self.entropy < CERTAIN * math.log(self.width)


@dataclass(frozen=True, kw_only=True)
class _Symptom:
    shows: Callable[[Window], bool]
    what: str
    advice: str


SYMPTOMS = (
    _Symptom(
        shows=Window.has_dead_experts,
        what=f"experts that get less than {DEAD_LOAD} of the load at balance",
        advice="They are not trained. Raise the coefficient of the balance loss, add router noise, "
        "warm up with more experts per token (schedule), or use fewer experts.",
    ),
    _Symptom(
        shows=Window.has_collapsed,
        what=f"an expert that over {COLLAPSED_USE:.0%} of the tokens use",
        advice="The router has collapsed onto it. Raise the coefficient of the balance loss, add "
        "router noise, or lower the router's learning rate; if one expert for all tokens is meant, "
        "ask for n_shared=1 and lower k.",
    ),
    _Symptom(
        shows=Window.is_certain,
        what=f"probabilities whose entropy is under {CERTAIN:.0%} of its maximum",
        advice="A router that is certain learns nothing more. Add a z_loss or an entropy loss, "
        "raise the temperature, or lower the router's learning rate.",
    ),
)


class RouterHealth:
    """Watches the routers of one training run; says each symptom once."""

    def __init__(self) -> None:
        """Start without history."""
        self._history: dict[str, deque[tuple[int, RouterStats]]] = {}
        self._said: set[str] = set()

    def observe(
        self, stats: Mapping[str, RouterStats], heads: Mapping[str, RouterHead], steps: int
    ) -> None:
        """Look at one log; warn of what the last `WINDOW` optimizer steps show.

        Routers that do not learn (frozen, or without parameters) are left out.

        Args:
            stats: router -> its statistics, from `pop_router_stats`.
            heads: router -> what routes there.
            steps: optimizer steps since the last log.
        """
        windows = {}
        together = 0
        for name, found in stats.items():
            head = heads[name]
            if not _learns(head):
                self._history.pop(name, None)
                continue
            history = self._history.setdefault(name, deque())
            history.append((steps, found))
            seen = sum(count for count, _ in history)
            while seen - history[0][0] >= WINDOW:
                seen -= history.popleft()[0]
            if seen >= WINDOW:
                windows[name] = join([one for _, one in history], head)
                together = max(together, seen)
        for symptom in SYMPTOMS:
            names = [name for name, window in windows.items() if symptom.shows(window)]
            self._say(symptom, names, together)

    def _say(self, symptom: _Symptom, names: Sequence[str], steps: int) -> None:
        if not names or symptom.what in self._said:
            return
        self._said.add(symptom.what)
        warn(
            f"{place(names)}: {symptom.what}, over the last {steps} optimizer steps. "
            f"{symptom.advice}"
        )


def join(history: Sequence[RouterStats], head: RouterHead) -> Window:
    """Average logs as if they had been one; exact, since loads are shares of used slots."""
    tokens = sum(one.tokens for one in history)
    used = sum(one.tokens * one.active for one in history)
    loads = [[one.tokens * one.active * value for value in one.load.tolist()] for one in history]
    return Window(
        load=[sum(column) / max(used, 1.0) for column in zip(*loads, strict=True)],
        active=used / max(tokens, 1.0),
        entropy=sum(one.tokens * one.entropy for one in history) / max(tokens, 1.0),
        width=head.router.width,
        chooses_own_set=isinstance(head.router, DynamicRouter),
    )


def place(names: Sequence[str]) -> str:
    """Name the first layers and count the others: `a, b, c and 4 more`."""
    more = len(names) - SHOWN
    return ", ".join(names[:SHOWN]) + (f" and {more} more" if more > 0 else "")


def warn(message: str) -> None:
    """Issue a `RoutingWarning`, on the main process alone."""
    if PartialState().is_main_process:
        warnings.warn(message, RoutingWarning, stacklevel=2)


def _learns(head: RouterHead) -> bool:
    router = head.router
    trained = any(parameter.requires_grad for parameter in router.parameters())
    return trained and not router.frozen and not head.values.frozen
