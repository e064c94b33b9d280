"""What an evaluation found: plain frozen data with a JSON form."""

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Interval:
    """A 95 % interval, in the unit of the number it belongs to."""

    low: float
    high: float


@dataclass(frozen=True, kw_only=True)
class RowScore:
    """One row.

    Attributes:
        key: SHA-256 of the row's content, so that arms are compared on the same rows alone.
        domain: its domain; None: no row has one.
        nll: negative log likelihood of the answer, summed over its tokens, in nats.
        tokens: tokens of the answer, >= 1.
        exact: whether greedy generation gave the answer, white space aside; None: nothing was
            generated, or the row has no prompt.
    """

    key: str
    domain: str | None
    nll: float
    tokens: int
    exact: bool | None = None


@dataclass(frozen=True, kw_only=True)
class Score:
    """Some rows together.

    Attributes:
        rows: how many.
        tokens: tokens of their answers.
        nll: mean over tokens, in nats per token: the sum over rows by the sum of their tokens.
        nll_interval: bootstrap over rows; None for a single row, which has no spread.
        answered: rows that were generated for; 0: the two fields below are None.
        exact: share of them whose answer was given exactly, 0 to 1.
        exact_interval: Wilson's.
    """

    rows: int
    tokens: int
    nll: float
    nll_interval: Interval | None
    answered: int = 0
    exact: float | None = None
    exact_interval: Interval | None = None


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """One arm on one set of rows.

    Attributes:
        overall: all rows; a domain counts by its tokens.
        by_domain: each labelled domain; empty if no row has a domain.
        rows: each row, in the order given.
        truncated: rows whose answer was cut at `max_length`; they are scored on what is left.
        max_length: tokens of a row.
        seed: of the bootstrap.
    """

    overall: Score
    by_domain: dict[str, Score]
    rows: tuple[RowScore, ...]
    truncated: int
    max_length: int
    seed: int

    def to_json(self) -> dict[str, Any]:
        """Return plain lists and dicts, every number included."""
        return _plain(self)


@dataclass(frozen=True, kw_only=True)
class Difference:
    """Second arm minus first arm on the same rows; below 0 means a lower loss, above a higher.

    Attributes:
        value: the difference of the two means.
        interval: 95 %, paired bootstrap over rows; None for fewer than 8 rows.
        p: two-sided, by flipping the signs of the rows' differences; at least 2^(1 - rows), so 1
            for a single row, and 1 for arms that are equal.
    """

    value: float
    interval: Interval | None
    p: float


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Two arms, row by row.

    Attributes:
        nll: difference in nats per token, all rows.
        nll_by_domain: the same within each domain. The p-values are not corrected for their number.
        exact: difference of the shares of exact answers; None: not generated.
        exact_by_domain: the same within each domain.
        rows: how many.
        seed: of the bootstrap.
    """

    nll: Difference
    nll_by_domain: dict[str, Difference]
    exact: Difference | None
    exact_by_domain: dict[str, Difference]
    rows: int
    seed: int

    def to_json(self) -> dict[str, Any]:
        """Return plain lists and dicts."""
        return _plain(self)


@dataclass(frozen=True, kw_only=True)
class Forgetting:
    """What an adapter does to the base model's own text.

    Attributes:
        off: without the adapter.
        on: with it.
        change: on minus off; `change.nll` above 0 is what was forgotten, in nats per token.
    """

    off: Evaluation
    on: Evaluation
    change: Comparison

    def to_json(self) -> dict[str, Any]:
        """Return plain lists and dicts, every number included."""
        return _plain(self)


def _plain(result: Any) -> dict[str, Any]:
    return asdict(result, dict_factory=lambda pairs: {k: _listed(v) for k, v in pairs})


def _listed(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value
