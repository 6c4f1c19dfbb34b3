"""JSON as other languages and our database take it: one object, UTF-8, finite numbers, whole characters. Pure."""

from __future__ import annotations

import json
import math
from typing import Any, NoReturn

LIMIT_BYTES = 1 << 20


class NotStrictJson(ValueError):
    """Not usable as a JSON object; the text is a sentence that says why."""


def load_object(data: bytes) -> dict[str, Any]:
    """Read one JSON object.

    Raises:
        NotStrictJson: whatever else the bytes hold.
    """
    if len(data) > LIMIT_BYTES:
        raise NotStrictJson(f"This is larger than {LIMIT_BYTES} bytes.")
    try:
        top = json.loads(data.decode("utf-8"), parse_constant=_no_constant, parse_float=_finite)
        json.dumps(top, ensure_ascii=False).encode("utf-8")  # half a surrogate pair cannot be handed on
    except UnicodeError:
        raise NotStrictJson("This is not UTF-8 text.") from None
    except json.JSONDecodeError as error:
        raise NotStrictJson(f"Line {error.lineno}, column {error.colno} is not JSON: {error.msg}.") from None
    except (ValueError, RecursionError) as error:
        raise NotStrictJson(f"This is not usable JSON: {str(error)[:200]}.") from None
    if not isinstance(top, dict):
        raise NotStrictJson("This must be one JSON object.")
    return top


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"the number {text[:40]} is too large")
    return value
