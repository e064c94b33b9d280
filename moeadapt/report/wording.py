"""Numbers and texts of the data as the page shows them."""

import math
import re
from collections.abc import Sequence
from typing import Any

UNSHOWABLE = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\u2028\u2029\ud800-\udfff\ufffe\uffff]")
"""What a page cannot hold: control characters and halves of surrogate pairs, which neither HTML nor
XML have, and the two line separators, which end a line in the script that draws the charts."""

NOTHING = "\N{EN DASH}"

Number = float | int


def showable(text: str) -> str:
    """Replace what a page cannot hold by the replacement character."""
    return UNSHOWABLE.sub("\N{REPLACEMENT CHARACTER}", text)


def all_showable(value: Any) -> Any:
    """Return lists and dicts with every text made `showable`.

    JSON would write a control character as an escape, which comes back where it is read.

    Example:
        >>> all_showable({"domain": ["a" + chr(27)]}) == {"domain": ["a" + chr(0xFFFD)]}
        True
    """
    if isinstance(value, str):
        return showable(value)
    if isinstance(value, dict):
        return {key: all_showable(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [all_showable(item) for item in value]
    return value


def number(value: Number | None, digits: int = 2, sign: bool = False) -> str:
    """Write a number with `digits` decimals and a true minus; a dash if it is none.

    Example:
        >>> number(0.1234), number(float("nan")) == NOTHING
        ('0.12', True)
    """
    if value is None or not math.isfinite(value):
        return NOTHING
    text = f"{value:+,.{digits}f}" if sign else f"{value:,.{digits}f}"
    if float(text.replace(",", "")) == 0:
        text = text.lstrip("+-")
    return text.replace("-", "\N{MINUS SIGN}")


def short_number(value: Number) -> str:
    """Write a number with three significant digits, without zeros at its end.

    Example:
        >>> short_number(6.4), short_number(0.0091234), short_number(12345.6)
        ('6.4', '0.00912', '12,346')
    """
    if not math.isfinite(value) or value == 0:
        return number(value, 0)
    digits = min(max(2 - math.floor(math.log10(abs(value))), 0), 6)
    text = number(value, digits)
    return text.rstrip("0").rstrip(".") if digits else text


def interval(low: Number, high: Number, digits: int = 3, sign: bool = False) -> str:
    """Write an interval."""
    return f"{number(low, digits, sign)} to {number(high, digits, sign)}"


def rounded(value: Any) -> Any:
    """Return lists and dicts with six digits of each number, and None where JSON has no number.

    Example:
        >>> rounded({"nll": 2.123456789, "p": [float("nan"), 3]})
        {'nll': 2.12346, 'p': [None, 3]}
    """
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: rounded(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [rounded(item) for item in value]
    return value


def finite(values: Sequence[Number | None]) -> list[Number]:
    """Return the numbers among `values`."""
    return [value for value in values if value is not None and math.isfinite(value)]
