"""`compare`: two arms on the same rows, by a paired bootstrap and flipped signs."""

from collections.abc import Sequence

from moeadapt.errors import ConfigError
from moeadapt.evaluation.bootstrap import paired_difference
from moeadapt.evaluation.results import Comparison, Difference, Evaluation, RowScore

Pair = tuple[RowScore, RowScore]


def compare(first: Evaluation, second: Evaluation, *, seed: int = 0) -> Comparison:
    """Compare two arms row by row: second minus first, so below 0 the second has the lower loss.

    Rows that are hard for both arms cancel, so this sees differences that two intervals beside each
    other do not.

    Args:
        first: an arm, for example the baseline.
        second: another arm, on the same rows in the same order.
        seed: of the bootstrap, and of the signs that are flipped.

    Raises:
        ConfigError: the rows are others, or were split into other tokens.
    """
    pairs = _pair(first, second)
    domains = sorted({a.domain for a, _ in pairs if a.domain is not None})
    grouped = {name: [pair for pair in pairs if pair[0].domain == name] for name in domains}
    exact = {name: _exact(group, seed) for name, group in grouped.items()}
    return Comparison(
        nll=_nll(pairs, seed),
        nll_by_domain={name: _nll(group, seed) for name, group in grouped.items()},
        exact=_exact(pairs, seed),
        exact_by_domain={name: found for name, found in exact.items() if found is not None},
        rows=len(pairs),
        seed=seed,
    )


def _pair(first: Evaluation, second: Evaluation) -> list[Pair]:
    one, other = [row.key for row in first.rows], [row.key for row in second.rows]
    if one != other:
        same = len(set(one) & set(other))
        order = ", in another order" if sorted(one) == sorted(other) else ""
        raise ConfigError(
            f"the arms were evaluated on different rows: {len(one)} and {len(other)}, {same} of "
            f"them in both{order}; evaluate both on the same file"
        )
    pairs = list(zip(first.rows, second.rows, strict=True))
    for number, (a, b) in enumerate(pairs, 1):
        if a.tokens != b.tokens:
            raise ConfigError(
                f"row {number} has {a.tokens} tokens to score in one arm and {b.tokens} in the "
                "other, so their losses per token cannot be compared; use one tokenizer and one "
                "max_length"
            )
    return pairs


def _nll(pairs: Sequence[Pair], seed: int) -> Difference:
    tokens = [float(a.tokens) for a, _ in pairs]
    return paired_difference(
        [a.nll for a, _ in pairs], [b.nll for _, b in pairs], tokens, seed=seed
    )


def _exact(pairs: Sequence[Pair], seed: int) -> Difference | None:
    both = [(a.exact, b.exact) for a, b in pairs if a.exact is not None and b.exact is not None]
    if not both:
        return None
    ones = [1.0] * len(both)
    return paired_difference(
        [float(a) for a, _ in both], [float(b) for _, b in both], ones, seed=seed
    )
