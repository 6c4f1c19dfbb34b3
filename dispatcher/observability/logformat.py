"""Log lines: one JSON object per line for machines, one readable line for terminals. Never a secret.

Theory of operation. Code logs with the standard library: a constant sentence, and facts as `extra={"data": {...}}`.
What belongs to the whole call (correlation id, pod id) sits in a context variable that `log_context` sets, so it
reaches every line of the task and of tasks made from it. A line passes three guards on its way out:

* a value whose key sounds like a secret is replaced, at any depth;
* a value that is not plain (text, number, list, mapping, path, enum, exception) is shown as its type only: a protobuf
  message or a record with credentials in it cannot slip in by `%s` or as a fact;
* credentials that hide in text (`Bearer x`, `user:pass@host`, `password=x`) are cut out by pattern.

Text lines escape control characters, because pods choose their own names and a terminal obeys escape sequences.
"""

from __future__ import annotations

import contextlib
import enum
import json
import logging
import os
import re
import secrets
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextvars import ContextVar
from pathlib import PurePath
from types import MappingProxyType
from typing import Any, TextIO

from dispatcher.errors import DispatcherError

REDACTED = "***"
_MAX_TEXT = 4096
_MAX_ITEMS = 64
_MAX_DEPTH = 6

_EMPTY: Mapping[str, str] = MappingProxyType({})
_CONTEXT: ContextVar[Mapping[str, str]] = ContextVar("dispatcher_log_context", default=_EMPTY)

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
# A record has these attributes anyway; everything else was handed in by `extra`.
_STANDARD = frozenset(logging.makeLogRecord({}).__dict__) | {"message", "asctime", "context", "data"}
_QUIET = ("aiohttp.access", "docker", "urllib3", "asyncio", "watchfiles", "stevedore", "pyroute2", "websockets", "grpc")


def make_correlation_id() -> str:
    """Return a fresh id that ties all lines of one call together (48 random bits)."""
    return secrets.token_hex(6)


@contextlib.contextmanager
def log_context(**fields: str) -> Iterator[None]:
    """Add fields to every line that this task, and tasks made from it meanwhile, will log.

    Args:
        fields: such as `correlation_id` or `pod_id`. An empty value removes the field. Nested uses add up.
    """
    merged = {**_CONTEXT.get(), **fields}
    token = _CONTEXT.set(MappingProxyType({key: value for key, value in merged.items() if value}))
    try:
        yield
    finally:
        _CONTEXT.reset(token)


def current_context() -> Mapping[str, str]:
    """Return the fields that `log_context` set for this task."""
    return _CONTEXT.get()


def redact_text(text: str) -> str:
    """Cut credentials out of free text, and cap its length."""
    for pattern, replacement in _SECRET_TEXT:
        text = pattern.sub(replacement, text)
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


class _Attach(logging.Filter):
    """Attaches the task's context to the record and takes the danger out of its arguments."""

    def filter(self, record: logging.LogRecord) -> bool:
        record.context = dict(_CONTEXT.get())
        if isinstance(record.args, tuple):
            record.args = tuple(_plain(arg) for arg in record.args)
        elif isinstance(record.args, Mapping):
            record.args = {key: _plain(arg) for key, arg in record.args.items()}
        return True


def _plain(arg: object) -> object:
    if arg is None or isinstance(arg, str | int | float | PurePath | enum.Enum):
        return arg
    if isinstance(arg, BaseException):
        return str(arg)
    return json.dumps(redact(arg), ensure_ascii=False) if isinstance(arg, Mapping | list | tuple | set) else redact(arg)


def _facts(record: logging.LogRecord) -> dict[str, Any]:
    facts: dict[str, Any] = dict(getattr(record, "context", {}))
    data = getattr(record, "data", None)
    if isinstance(data, Mapping):
        facts.update(redact(data))
    for name, value in record.__dict__.items():
        if name not in _STANDARD and not name.startswith("_"):
            facts[name] = redact(value, name)
    if record.exc_info and isinstance(record.exc_info[1], DispatcherError):
        for name, value in record.exc_info[1].data.items():
            facts.setdefault(name, redact(value, name))
    return facts


def _timestamp(created: float) -> str:
    seconds = int(created)
    stamp = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(seconds))
    return f"{stamp}.{int((created - seconds) * 1_000_000):06d}Z"


class JsonFormatter(logging.Formatter):
    """One JSON object per line: time, level, logger, message, then the facts by their own names."""

    def format(self, record: logging.LogRecord) -> str:
        """Format one record; facts never replace the four fixed keys."""
        line: dict[str, Any] = {
            "time": _timestamp(record.created),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": redact_text(record.getMessage()),
        }
        for name, value in _facts(record).items():
            line.setdefault(name, value)
        if record.exc_info:
            line["traceback"] = redact_text(self.formatException(record.exc_info))
        return json.dumps(line, ensure_ascii=True, default=lambda value: f"<{type(value).__name__}>")


class TextFormatter(logging.Formatter):
    """One line for people: clock time, level, message, facts as name=value. Colours on request."""

    _COLOURS = MappingProxyType(
        {"WARNING": "\x1b[33m", "ERROR": "\x1b[31m", "CRITICAL": "\x1b[31m", "DEBUG": "\x1b[2m"}
    )

    def __init__(self, *, colour: bool = False) -> None:
        super().__init__()
        self._colour = colour

    def format(self, record: logging.LogRecord) -> str:
        """Format one record; ids are shortened to twelve digits, as the other commands show them."""
        clock = _timestamp(record.created)[11:23]
        facts = " ".join(f"{name}={_show(value)}" for name, value in _facts(record).items())
        message = _escape(redact_text(record.getMessage()))
        line = f"{clock} {record.levelname:<7} {message}" + (f"  {facts}" if facts else "")
        if record.exc_info:
            trace = redact_text(self.formatException(record.exc_info))
            line += "\n" + "\n".join(_escape(part) for part in trace.splitlines())
        colour = self._COLOURS.get(record.levelname, "") if self._colour else ""
        return f"{colour}{line}\x1b[0m" if colour else line


def _show(value: object) -> str:
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
    if isinstance(value, str) and re.fullmatch(r"[0-9a-f]{64}", value):
        text = value[:12]
    text = _escape(text)
    return json.dumps(text, ensure_ascii=False) if isinstance(value, str) and (not text or " " in text) else text


def _escape(text: str) -> str:
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode("ascii") for char in text)


def configure_logging(
    *,
    level: str = "info",
    style: str = "auto",
    levels: Mapping[str, str] = _EMPTY,
    stream: TextIO | None = None,
) -> None:
    """Send all log lines of this process to one stream. Replaces what an earlier call set.

    Args:
        level: the lowest level shown: debug, info, warning, error.
        style: "json", "text", or "auto": text when the stream is a terminal, else JSON.
        levels: levels per logger name, such as {"dispatcher_cni": "debug"}.
        stream: standard error when None.

    Raises:
        ValueError: an unknown level or style.
    """
    out = stream if stream is not None else sys.stderr
    if style not in {"auto", "json", "text"}:
        raise ValueError(f"log style {style!r} is not one of auto, json, text")
    terminal = hasattr(out, "isatty") and out.isatty()
    handler = logging.StreamHandler(out)
    if style == "text" or (style == "auto" and terminal):
        handler.setFormatter(TextFormatter(colour=terminal and "NO_COLOR" not in os.environ))
    else:
        handler.setFormatter(JsonFormatter())
    handler.addFilter(_Attach())

    root = logging.getLogger()
    for old in root.handlers[:]:
        root.removeHandler(old)
    root.addHandler(handler)
    root.setLevel(_level(level))
    for name in _QUIET:
        logging.getLogger(name).setLevel(max(_level(level), logging.WARNING))
    for name, wanted in levels.items():
        logging.getLogger(name).setLevel(_level(wanted))
    # A handler that cannot write (a closed pipe) must not print tracebacks of its own for each line.
    logging.raiseExceptions = False


def _level(name: str) -> int:
    found = logging.getLevelNamesMapping().get(name.upper())
    if found is None:
        raise ValueError(f"log level {name!r} is not one of debug, info, warning, error")
    return found
