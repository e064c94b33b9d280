"""Keeps the routing that was decided for a prompt, while its answer is generated.

The decision belongs to the KV cache it was made with, so it follows the cache wherever it goes: a
copy of the cache carries a copy, and a new prompt has a new cache.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from moeadapt.errors import UnsupportedError
from moeadapt.routing import Routing
from moeadapt.tuner.frame import Frame


def decide_once(frame: Frame, name: str, hidden: Tensor, make: Callable[[], Routing]) -> Routing:
    """Return the prompt's decision for the tokens of `hidden`, making it in the first forward.

    Args:
        frame: the running forward.
        name: the router, unique in the model.
        hidden: the hidden states to route.
        make: routes them afresh.

    Raises:
        UnsupportedError: tokens are generated without a cache, or with one that was filled without
            this router, or with another number of rows.
    """
    rows, length = frame.rows(hidden)
    if frame.cache is None and frame.generates:
        raise UnsupportedError(
            "a router that decides per sequence keeps the decision it made for the prompt beside "
            "the KV cache; generate with use_cache=True"
        )
    if not frame.has_past:
        routing = make()
        last = torch.arange(1, rows + 1, device=hidden.device) * length - 1
        frame.decisions[name] = routing.rows(last, None).detach()
        if frame.cache is not None:
            keep(frame, frame.cache)
        return routing
    kept = getattr(frame.cache, _ATTRIBUTE, {}).get(name)
    if kept is None or rows % len(kept.weights):
        raise UnsupportedError(
            f"the KV cache holds {'no decision' if kept is None else len(kept.weights)} of router "
            f"{name!r} for these {rows} rows: it was filled with the adapter off, with another "
            "adapter, or with other rows. Start the generation again with this adapter on."
        )
    per_row = torch.arange(len(kept.weights), device=hidden.device)
    index = per_row.repeat_interleave(rows // len(kept.weights)).repeat_interleave(length)
    return kept.rows(index, frame.tokens(hidden, frozenset()).mask)


def keep(frame: Frame, cache: Any) -> None:
    """Attach the decisions of `frame` to the cache it filled."""
    if frame.decisions and hasattr(cache, "__dict__"):
        setattr(cache, _ATTRIBUTE, {**getattr(cache, _ATTRIBUTE, {}), **frame.decisions})


_ATTRIBUTE = "_moeadapt_decisions"
