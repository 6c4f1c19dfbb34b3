"""Log lines: one JSON object per line for machines, one readable line for terminals. Never a secret.

Theory of operation. Code logs with the standard library: a constant sentence, and facts as `extra={"data": {...}}`.
What belongs to the whole call (correlation id, pod id) sits in a context variable that `log_context` sets, so it
reaches every line of the task and of tasks made from it. What leaves passes `redaction`. The newest lines are
kept in memory, as they were written, for `dispatcher diag dump`.

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
from collections import deque
from collections.abc import Iterator, Mapping
from contextvars import ContextVar
from pathlib import PurePath
from types import MappingProxyType
from typing import Any, TextIO

from dispatcher.errors import DispatcherError
from dispatcher.observability.redaction import redact, redact_text

_EMPTY: Mapping[str, str] = MappingProxyType({})
_CONTEXT: ContextVar[Mapping[str, str]] = ContextVar("dispatcher_log_context", default=_EMPTY)

# A record has these attributes anyway; everything else was handed in by `extra`.
_STANDARD = frozenset(logging.makeLogRecord({}).__dict__) | {"message", "asctime", "context", "data"}
_QUIET = (
    "aiohttp.access",
    "docker",
    "urllib3",
    "asyncio",
    "watchfiles",
    "stevedore",
    "pyroute2",
    "websockets",
    "grpc",
    "opentelemetry",
)


_KEPT_LINES = 5000
_KEPT_CHARS = 1 << 20


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


class _Handler(logging.StreamHandler[TextIO]):
    """Writes lines, and remembers the newest of them within a bound."""

    def __init__(self, stream: TextIO) -> None:
        super().__init__(stream)
        self._kept: deque[str] = deque()
        self._kept_chars = 0

    def format(self, record: logging.LogRecord) -> str:
        """Format, and keep the line. Called under the handler's lock."""
        line = super().format(record)
        self._kept.append(line)
        self._kept_chars += len(line)
        while self._kept_chars > _KEPT_CHARS or len(self._kept) > _KEPT_LINES:
            self._kept_chars -= len(self._kept.popleft())
        return line

    def recent(self) -> str:
        """Return the kept lines, the oldest first."""
        self.acquire()
        try:
            return "".join(f"{line}\n" for line in self._kept)
        finally:
            self.release()


def recent_lines() -> str:
    """Return the newest log lines of this process; empty where `configure_logging` was not called."""
    return "".join(handler.recent() for handler in logging.getLogger().handlers if isinstance(handler, _Handler))


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
    handler = _Handler(out)
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
