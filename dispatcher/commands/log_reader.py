"""Reads container logs in the CRI format, whole, from the end, or as they grow, over rotations.

A record is "TIME STREAM TAGS CONTENT"; P among the tags means that the line goes on in the stream's next record. What
does not look like a record is skipped: a log is written by the daemon, but its file may be truncated under us.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

_BLOCK = 64 * 1024


@dataclass(frozen=True, slots=True)
class LogRecord:
    """One record. `is_partial` says that no line feed follows its content."""

    time: bytes
    stream: bytes
    is_partial: bool
    content: bytes

    @property
    def output(self) -> bytes:
        """What the container wrote."""
        return self.content if self.is_partial else self.content + b"\n"


def parse_record(line: bytes) -> LogRecord | None:
    """Parse a line without its line feed; None for what is no record."""
    parts = line.split(b" ", 3)
    if len(parts) != 4 or parts[1] not in (b"stdout", b"stderr"):
        return None
    return LogRecord(parts[0], parts[1], parts[2].split(b":")[0] == b"P", parts[3])


class LogReader:
    """Reads one log path. Every call to `read` yields what is new since the last one.

    Args:
        path: the file, which need not exist yet and may be renamed and made anew meanwhile.
        tail: begin this many lines before the end, None for the beginning.
    """

    def __init__(self, path: str, tail: int | None = None) -> None:
        self._path = Path(path)
        self._tail = tail
        self._file: BinaryIO | None = None
        self._rest = b""

    def read(self) -> Iterator[LogRecord]:
        """Yield the records that are complete by now, from the old file first when the path was rotated."""
        if self._file is None and not self._open():
            return
        yield from self._drain()
        while self._was_replaced():
            yield from self._drain()
            self.close()
            if not self._open():
                return
            yield from self._drain()

    def close(self) -> None:
        """Close the file. Idempotent; a later `read` opens the path again."""
        if self._file is not None:
            self._file.close()
            self._file = None
            self._rest = b""

    def _open(self) -> bool:
        with contextlib.suppress(FileNotFoundError):
            self._file = self._path.open("rb", buffering=0)
            if self._tail is not None:
                self._file.seek(_offset_of_tail(self._file, self._tail))
                self._tail = None
            return True
        return False

    def _was_replaced(self) -> bool:
        if self._file is None:
            return False
        ours = os.fstat(self._file.fileno())
        try:
            there = self._path.stat()
        except FileNotFoundError:
            return False  # between rename and reopen: the old file may still grow
        if (there.st_dev, there.st_ino) != (ours.st_dev, ours.st_ino):
            return True
        if ours.st_size < self._file.tell():
            self._file.seek(0)  # truncated in place
            self._rest = b""
        return False

    def _drain(self) -> Iterator[LogRecord]:
        while self._file is not None and (block := self._file.read(_BLOCK)):
            *lines, self._rest = (self._rest + block).split(b"\n")
            for line in lines:
                record = parse_record(line)
                if record is not None:
                    yield record


def _offset_of_tail(file: BinaryIO, lines: int) -> int:
    """Return where the last `lines` lines begin. A line is what ends with a record that is not partial."""
    size = os.fstat(file.fileno()).st_size
    if lines <= 0:
        return size
    position, text = size, b""
    while position > 0:
        step = min(_BLOCK, position)
        position -= step
        text = os.pread(file.fileno(), step, position) + text
        starts = _line_starts(text)
        # The first start of a block may lie within a line, except at the beginning of the file.
        if position > 0:
            starts = starts[1:]
        if len(starts) >= lines:
            return position + starts[-lines]
    return 0


def _line_starts(text: bytes) -> list[int]:
    """Return the offsets at which whole lines begin, where partial records are glued to what follows."""
    starts, offset, begins = [], 0, True
    for line in text.split(b"\n")[:-1]:
        if begins:
            starts.append(offset)
        record = parse_record(line)
        begins = record is None or not record.is_partial
        offset += len(line) + 1
    return starts
