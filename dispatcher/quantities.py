"""Kubernetes quantities ("500m", "64Mi") as plain integers."""

from __future__ import annotations

import math
import re
from decimal import Decimal

_QUANTITY = re.compile(
    r"(?P<number>[0-9]{1,18}(\.[0-9]{0,9})?|\.[0-9]{1,9})(?P<unit>[numkMGTPE]|[KMGTPE]i|[eE][-+]?[0-9]{1,2})?"
)
_UNITS = {
    "n": Decimal(1).scaleb(-9),
    "u": Decimal(1).scaleb(-6),
    "m": Decimal(1).scaleb(-3),
    "": Decimal(1),
    **{unit: Decimal(1000) ** power for power, unit in enumerate("kMGTPE", 1)},
    **{f"{unit}i": Decimal(1024) ** power for power, unit in enumerate("KMGTPE", 1)},
}
_MAX = 2**63 - 1


def parse_quantity(text: str | float) -> Decimal:
    """Return the value of a quantity, which YAML may also give as a plain number.

    Raises:
        ValueError: it is none, negative, or beyond 64 bits.
    """
    match = _QUANTITY.fullmatch(str(text))
    if match is None:
        raise ValueError(f'{str(text)[:40]!r} is not a quantity such as "500m", "2" or "64Mi"')
    unit = match["unit"] or ""
    number = Decimal(match["number"])
    value = (
        number.scaleb(int(unit[1:]))
        if unit[:1] in ("e", "E") and len(unit) > 1 and unit != "Ei"
        else number * _UNITS[unit]
    )
    if value > _MAX:
        raise ValueError(f"{str(text)[:40]!r} is more than fits into 64 bits")
    return value


def milli_cpus(text: str | float) -> int:
    """Return a number of CPUs in thousandths, rounded up as Kubernetes does."""
    return math.ceil(parse_quantity(text) * 1000)


def whole_bytes(text: str | float) -> int:
    """Return a number of bytes, rounded up."""
    return math.ceil(parse_quantity(text))
