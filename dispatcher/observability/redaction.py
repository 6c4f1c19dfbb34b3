"""Taking secrets out of values and texts, before they are logged, kept in a trace or put into a support archive.

* A value whose key sounds like a secret is replaced, at any depth.
* A value that is not plain (text, number, list, mapping, path, enum, exception) is shown as its type only: a protobuf
  message or a record with credentials in it cannot slip in.
* Credentials that hide in text (`Bearer x`, `user:pass@host`, `password=x`) are cut out by pattern.
"""

from __future__ import annotations

import enum
import re
from collections.abc import Mapping, Sequence
from pathlib import PurePath
from typing import Any

REDACTED = "***"
_MAX_TEXT = 4096
_MAX_ITEMS = 64
_MAX_DEPTH = 6

_SECRET_KEY = re.compile(
    r"passw|secret|token|credential|authorization|^auth$|_auth$|^envs?$|cookie|private_?key", re.IGNORECASE
)
_SECRET_TEXT: tuple[tuple[re.Pattern[str], str], ...] = (
    (re.compile(r"\b(Bearer|Basic)\s+[A-Za-z0-9._~+/=-]{6,}", re.IGNORECASE), rf"\1 {REDACTED}"),
    (re.compile(r"(://)[^/\s:@]+:[^/\s@]+@"), rf"\1{REDACTED}@"),
    (
        re.compile(
            r"""((?:\b(?:password|passwd|(?:identity|registry|access|refresh)_?token)["']?\s*[=:]|\b(?:secret|token|auth)(?:=|["']\s*:))\s*)"""
            r"""(?:"(?:[^"\\]|\\.)*"|'[^']*'|[^\s,;&}"']+)""",
            re.IGNORECASE,
        ),
        rf"\1{REDACTED}",
    ),
)


def cut_credentials(text: str) -> str:
    """Cut credentials out of free text."""
    for pattern, replacement in _SECRET_TEXT:
        text = pattern.sub(replacement, text)
    return text


def redact_text(text: str) -> str:
    """Cut credentials out of free text, and cap its length."""
    text = cut_credentials(text)
    return text if len(text) <= _MAX_TEXT else f"{text[:_MAX_TEXT]}... ({len(text)} characters)"


def redact(value: object, key: str = "", depth: int = 0) -> Any:
    """Return a JSON-ready copy of `value` without secrets. See the rules at the top of this module."""
    if key and _SECRET_KEY.search(key) and value not in (None, "", (), [], {}):
        return REDACTED
    if value is None or isinstance(value, bool | int | float):
        return value
    if isinstance(value, enum.Enum):
        return redact(value.value, depth=depth)
    if isinstance(value, str | PurePath):
        return redact_text(str(value))
    if isinstance(value, BaseException):
        return f"{type(value).__name__}: {redact_text(str(value))}"
    if depth >= _MAX_DEPTH:
        return f"<{type(value).__name__}>"
    if isinstance(value, Mapping):
        items = list(value.items())[:_MAX_ITEMS]
        return {str(name): redact(item, str(name), depth + 1) for name, item in items}
    if isinstance(value, Sequence | set | frozenset) and not isinstance(value, bytes | bytearray | memoryview):
        return [redact(item, depth=depth + 1) for item in list(value)[:_MAX_ITEMS]]
    return f"<{type(value).__name__}>"
