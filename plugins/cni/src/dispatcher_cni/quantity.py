"""Kubernetes quantities ("10M", "1.5Gi", "2e3") as exact numbers. Pure."""

from __future__ import annotations

import math
import re
from fractions import Fraction

_FORM = re.compile(
    r"(?P<number>[0-9]{1,20}(?:\.[0-9]{0,12})?|\.[0-9]{1,12})(?P<suffix>[kMGTPE]i?|Ki|m|u|n|[eE][+-]?[0-9]{1,2})?"
)
_DECIMAL = {"n": -9, "u": -6, "m": -3, "k": 3, "M": 6, "G": 9, "T": 12, "P": 15, "E": 18}
_BINARY = {"Ki": 10, "Mi": 20, "Gi": 30, "Ti": 40, "Pi": 50, "Ei": 60}


def parse_quantity(text: str) -> int:
    """Return the value, rounded up to a whole number as Kubernetes does.

    Raises:
        ValueError: not a quantity, or a negative one.
    """
    match = _FORM.fullmatch(text)
    if match is None or match["suffix"] == "ki":
        raise ValueError(f"{text[:40]!r} is not a quantity such as 10M")
    suffix = match["suffix"] or ""
    if suffix in _BINARY:
        factor = Fraction(2 ** _BINARY[suffix])
    elif suffix in _DECIMAL:
        factor = Fraction(10) ** _DECIMAL[suffix]
    else:
        factor = Fraction(10) ** int(suffix[1:] or 0)
    return math.ceil(Fraction(match["number"]) * factor)
