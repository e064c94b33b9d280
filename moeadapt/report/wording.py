"""Numbers and texts of the data as the page shows them."""

import math
import re
from collections.abc import Sequence
from typing import Any

UNSHOWABLE = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\ud800-\udfff\ufffe\uffff]")
"""What neither HTML nor XML can hold: control characters and halves of surrogate pairs."""

NOTHING = "\N{EN DASH}"


def showable(text: str) -> str:
    """Replace what a page cannot hold by the replacement character."""
    return UNSHOWABLE.sub("\N{REPLACEMENT CHARACTER}", text)


def number(value: float | None, digits: int = 2, sign: bool = False) -> str:
    """Write a number with `digits` decimals and a true minus; a dash if it is none.

    Example:
        >>> number(0.1234), number(float("nan"))
        ('0.12', '–')
    """
    if value is None or not math.isfinite(value):
        return NOTHING
    text = f"{value:+,.{digits}f}" if sign else f"{value:,.{digits}f}"
    if float(text.replace(",", "")) == 0:
        text = text.lstrip("+-")
    return text.replace("-", "\N{MINUS SIGN}")


def short_number(value: float) -> str:
    """Write a number with three significant digits."""
    if not math.isfinite(value):
        return NOTHING
    if value == int(value) and abs(value) < 1e6:  # noqa: PLR2004 (above it, digits say little)
        return number(value, 0)
    digits = 2 - math.floor(math.log10(abs(value)))
    return number(value, min(max(digits, 0), 6))


def interval(low: float, high: float, digits: int = 3, sign: bool = False) -> str:
    """Write an interval."""
    return f"{number(low, digits, sign)} to {number(high, digits, sign)}"


def without_nan(value: Any) -> Any:
    """Return lists and dicts with None for what JSON cannot hold: NaN and the infinities."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: without_nan(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [without_nan(item) for item in value]
    return value


def finite(values: Sequence[float | None]) -> list[float]:
    """Return the numbers among `values`."""
    return [value for value in values if value is not None and math.isfinite(value)]
