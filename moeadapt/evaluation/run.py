"""`evaluate`: rows -> a score per row, per domain and overall."""

import warnings
from collections.abc import Sequence
from typing import Any

from torch import nn

from moeadapt.evaluation.bootstrap import ratio_interval, wilson_interval
from moeadapt.evaluation.generate import exact_matches
from moeadapt.evaluation.results import Evaluation, RowScore, Score
from moeadapt.evaluation.rows import prepare
from moeadapt.evaluation.score import score_rows
from moeadapt.rows import Row
from moeadapt.tuner.context import find_context
from moeadapt.tuner.inspect import heads_of


def evaluate(
    model: nn.Module,
    tokenizer: Any,
    rows: Sequence[Row],
    *,
    batch_size: int = 8,
    max_length: int = 1024,
    generate: bool = False,
    max_new_tokens: int | None = None,
    seed: int = 0,
) -> Evaluation:
    """Measure a causal language model, with or without an adapter, on held-out rows.

    Args:
        model: the model, in any wrapper; its mode and its settings are left as they are.
        tokenizer: its tokenizer.
        rows: each has `prompt` and `completion`, or `messages` that end with the assistant's, or
            `text`; and maybe `domain`. Scored are the tokens of the completion with its end token,
            of the last message, or of the whole text.
        batch_size: rows computed together.
        max_length: tokens of a row, the rest is cut; at most the positions the model has.
        generate: also answer each prompt greedily and compare with the completion, white space
            aside; slow.
        max_new_tokens: tokens generated at most; None: for each row those of its answer and a few
            more.
        seed: of the bootstrap.

    Raises:
        ConfigError: there are no rows, a row cannot be scored or answered, or the model is no
            language model.

    Example:
        >>> found = evaluate(model, tokenizer, [{"prompt": "1 + 1 =", "completion": " 2"}])
        >>> found.overall.nll
        0.42
    """
    positions = getattr(getattr(model, "config", None), "max_position_embeddings", None)
    max_length = min(max_length, positions or max_length)
    _warn_of_looking_ahead(model)
    ready = prepare(rows, tokenizer, max_length=max_length)
    losses = score_rows(model, tokenizer, ready, batch_size=batch_size)
    exact: list[bool | None] = [None] * len(ready)
    if generate:
        exact = exact_matches(
            model, tokenizer, ready, batch_size=batch_size, max_new_tokens=max_new_tokens
        )
    scored = tuple(
        RowScore(key=row.key, domain=row.domain, nll=loss, tokens=row.tokens, exact=match)
        for row, loss, match in zip(ready, losses, exact, strict=True)
    )
    domains = sorted({row.domain for row in scored if row.domain is not None})
    return Evaluation(
        overall=summarise(scored, seed=seed),
        by_domain={
            name: summarise([row for row in scored if row.domain == name], seed=seed)
            for name in domains
        },
        rows=scored,
        truncated=sum(row.truncated for row in ready),
        max_length=max_length,
        seed=seed,
    )


def _warn_of_looking_ahead(model: nn.Module) -> None:
    heads = heads_of(model) if find_context(model) else {}
    ahead = sorted(name for name, head in heads.items() if head.router.looks_ahead)
    if ahead:
        warnings.warn(
            f"router {ahead[0]!r} looks at later tokens (expert_choice, or per='sequence'), so the "
            "loss of an answer is measured with the answer in view; compare generated answers "
            "instead (generate=True)",
            stacklevel=3,
        )


def summarise(rows: Sequence[RowScore], *, seed: int = 0) -> Score:
    """Put rows together; see `Score`."""
    losses, tokens = [row.nll for row in rows], [float(row.tokens) for row in rows]
    matches = [row.exact for row in rows if row.exact is not None]
    return Score(
        rows=len(rows),
        tokens=int(sum(tokens)),
        nll=sum(losses) / sum(tokens),
        nll_interval=ratio_interval(losses, tokens, seed=seed),
        answered=len(matches),
        exact=sum(matches) / len(matches) if matches else None,
        exact_interval=wilson_interval(sum(matches), len(matches)) if matches else None,
    )
