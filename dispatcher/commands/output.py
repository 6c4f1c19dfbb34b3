"""Where commands write: data to standard output, everything said beside it to standard error.

What pods choose themselves (names, labels, messages) is escaped before it reaches a terminal. JSON is printed as is.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterable, Sequence
from typing import Any, TextIO

_MAX_CELL = 120


class Failure(Exception):
    """Ends a command with a message for the user, what to do about it, and an exit code."""

    def __init__(self, message: str, *, hint: str = "", code: int = 1) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint
        self.code = code


class Exit:
    """Exit codes. `run`, `play` and `exec` answer with the container's code, and 125 where they could not get one."""

    OK = 0
    FAILED = 1
    USAGE = 2
    UNREACHABLE = 3
    NOT_FOUND = 4
    REFUSED = 5
    TIMED_OUT = 124
    NO_RESULT = 125
    INTERRUPTED = 130


def printable(value: object) -> str:
    """Return text that a terminal shows and does not obey."""
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode("ascii") for char in str(value))


class Console:
    """Standard output and error of one command. `as_json` is the user's `-o json`."""

    def __init__(self, out: TextIO | None = None, err: TextIO | None = None, *, as_json: bool = False) -> None:
        self.out = out if out is not None else sys.stdout
        self.err = err if err is not None else sys.stderr
        self.as_json = as_json
        self.quiet = False

    def data(self, value: Any) -> None:
        """Print a value as JSON."""
        json.dump(value, self.out, indent=2, ensure_ascii=False)
        self.out.write("\n")

    def line(self, text: str = "") -> None:
        """Print one line of data."""
        self.out.write(f"{text}\n")

    def table(self, header: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
        """Print columns; the last one is not padded."""
        cells = [[_cell(value) for value in row] for row in rows]
        widths = [max(len(row[index]) for row in [list(header), *cells]) for index in range(len(header))]
        for row in [list(header), *cells]:
            shown = [cell.ljust(width) for cell, width in zip(row, widths, strict=True)]
            self.line("  ".join(shown).rstrip())

    def fields(self, pairs: Iterable[tuple[str, object]]) -> None:
        """Print "name: value" lines, values below each other, without the empty ones."""
        shown = [(name, printable(value)) for name, value in pairs if value not in (None, "", [], {}, ())]
        width = max((len(name) for name, _ in shown), default=0) + 1
        for name, value in shown:
            self.line(f"{name + ':':<{width}} {value}")

    def say(self, text: str) -> None:
        """Tell the user something that is no data (progress, a warning)."""
        if not self.quiet:
            self.err.write(f"{printable(text)}\n")
            self.err.flush()

    def complain(self, failure: Failure) -> None:
        """Print why a command ended, and what to do. Never silenced."""
        for index, part in enumerate(failure.message.splitlines() or [""]):
            self.err.write(f"{'dispatcher: ' if index == 0 else '  '}{printable(part)}\n")
        for part in failure.hint.splitlines():
            self.err.write(f"  -> {printable(part)}\n")
        self.err.flush()


def _cell(value: object) -> str:
    text = "-" if value in (None, "") else printable(value)
    return text if len(text) <= _MAX_CELL else text[: _MAX_CELL - 1] + "…"


def short_id(identifier: str) -> str:
    """Return the first digits of an id, as all listings show it."""
    return identifier.removeprefix("sha256:")[:12]


def age(created_at_ns: int, now_ns: int | None = None) -> str:
    """Return the time since a moment in one unit, such as "5m"; "-" for no moment."""
    if created_at_ns <= 0:
        return "-"
    seconds = max(0, ((time.time_ns() if now_ns is None else now_ns) - created_at_ns) // 1_000_000_000)
    for unit, size in (("d", 86400), ("h", 3600), ("m", 60)):
        if seconds >= 2 * size:
            return f"{seconds // size}{unit}"
    return f"{seconds}s"
