"""The engine's log files as records: pure decoders of its "local" and "json-file" formats.

Theory of operation. Both formats are append-only files of whole entries, so the offset behind an entry is a position
that survives restarts of everything. A decoder is given bytes that begin at an entry and returns the entries that are
complete, each with the number of bytes up to its end. An engine that is killed inside a write(2), or a full disk, can
leave a torn entry: a decoder then looks for the next sound one and goes on there.

local      4 bytes big-endian length, a protobuf message of that length, the length again.
           Message: 1 source (string), 2 time in ns (varint), 3 line (bytes), 4 partial (bool), 5 partial metadata
           with 1 last (bool). The line's own newline is left out unless the entry is partial.
json-file  one JSON object a line: log, stream, time. The newline is part of the text.
"""

from __future__ import annotations

import calendar
import json
from collections.abc import Callable
from dataclasses import dataclass

from dispatcher.model import Stream

MAX_ENTRY = 1 << 20  # the engine cuts lines at 16 KiB; attributes and escapes cannot reach this
_SOUND = (b"\n\x06stdout", b"\n\x06stderr")


@dataclass(frozen=True, slots=True)
class Entry:
    """One write of the engine. `end` is the offset behind it, relative to the buffer that was decoded."""

    end: int
    stream: Stream
    time_ns: int
    data: bytes


Decoder = Callable[[bytes], tuple[list[Entry], int]]


def decode_json_file(buffer: bytes) -> tuple[list[Entry], int]:
    """Decode complete lines. Returns the entries and how much of `buffer` needs no second look."""
    entries: list[Entry] = []
    at = 0
    while (newline := buffer.find(b"\n", at)) >= 0:
        line = buffer[at:newline].lstrip(b"\0")  # a freed part of the file reads as zeros
        at = newline + 1
        try:
            record = json.loads(line)
            stream = Stream(record["stream"])
            entry = Entry(at, stream, parse_time(record["time"]), record.get("log", "").encode("utf-8", "replace"))
        except (ValueError, KeyError, TypeError, AttributeError):
            continue  # torn by a crash of the engine: what it held is lost, the next line is sound
        entries.append(entry)
    return entries, at


def decode_local(buffer: bytes) -> tuple[list[Entry], int]:
    """Decode complete messages. Returns the entries and how much of `buffer` needs no second look."""
    entries: list[Entry] = []
    at, size = 0, len(buffer)
    while size - at >= 4:
        length = int.from_bytes(buffer[at : at + 4], "big")
        end = at + length + 8
        if not _begins_sound(buffer, at, length):
            found = _resync(buffer, at + 1)
            if found is None:
                return entries, max(at, size - 12)
            at = found
            continue
        if end > size:
            break
        entry = _message(buffer[at + 4 : end - 4], end) if buffer[end - 4 : end] == buffer[at : at + 4] else None
        if entry is None:
            found = _resync(buffer, at + 1)
            if found is None:
                return entries, max(at + 1, size - 12)
            at = found
            continue
        entries.append(entry)
        at = end
    return entries, at


DECODERS: dict[str, Decoder] = {"local": decode_local, "json-file": decode_json_file}


def _begins_sound(buffer: bytes, at: int, length: int) -> bool:
    head = buffer[at + 4 : at + 12]
    return 8 <= length <= MAX_ENTRY and any(mark.startswith(head) for mark in _SOUND)


def _resync(buffer: bytes, start: int) -> int | None:
    """The first offset from `start` on where a message seems to begin, or None."""
    at = start
    while (mark := buffer.find(b"\n\x06std", at + 4)) >= 0:
        begin = mark - 4
        if _begins_sound(buffer, begin, int.from_bytes(buffer[begin:mark], "big")):
            return begin
        at = begin + 1
    return None


def _message(body: bytes, end: int) -> Entry | None:
    source, time_ns, line, partial, last = "", 0, b"", False, False
    try:
        for field, value in _fields(body):
            if field == 1 and isinstance(value, bytes):
                source = value.decode("ascii")
            elif field == 2 and isinstance(value, int):
                time_ns = value
            elif field == 3 and isinstance(value, bytes):
                line = value
            elif field == 4:
                partial = bool(value)
            elif field == 5 and isinstance(value, bytes):
                last = any(number == 1 and bool(inner) for number, inner in _fields(value))
        if not partial or last:
            line += b"\n"
        return Entry(end, Stream(source), time_ns, line)
    except (ValueError, IndexError):
        return None


def _fields(body: bytes) -> list[tuple[int, int | bytes]]:
    """All fields of a protobuf message: varints and length-delimited ones, others skipped. Raises IndexError."""
    fields: list[tuple[int, int | bytes]] = []
    at = 0
    while at < len(body):
        key, at = _varint(body, at)
        kind = key & 7
        if kind == 0:
            value, at = _varint(body, at)
            fields.append((key >> 3, value))
        elif kind == 2:
            length, at = _varint(body, at)
            if at + length > len(body):
                raise IndexError(length)
            fields.append((key >> 3, body[at : at + length]))
            at += length
        else:
            at += {1: 8, 5: 4}[kind] if kind in (1, 5) else len(body)
    return fields


def _varint(body: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = body[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
        shift += 7
        if shift > 63:
            raise ValueError("varint too long")


def parse_time(text: str) -> int:
    """Read RFC 3339 with up to nine fractional digits as nanoseconds since the epoch; the zero time of Go as 0.

    Raises:
        ValueError: not such a time.
    """
    if text.startswith("0001-01-01"):
        return 0
    numbers = (int(text[0:4]), int(text[5:7]), int(text[8:10]), int(text[11:13]), int(text[14:16]), int(text[17:19]))
    rest = text[19:]
    fraction = 0
    if rest.startswith("."):
        digits = rest[1:].rstrip("Z") if rest.endswith("Z") else rest[1:].split("+")[0].split("-")[0]
        fraction = int(digits[:9].ljust(9, "0"))
        rest = rest[1 + len(digits) :]
    offset = 0
    if rest and rest != "Z":
        sign = {"+": 1, "-": -1}[rest[0]] if rest[0] in "+-" else int("x")
        offset = sign * (int(rest[1:3]) * 3600 + int(rest[4:6]) * 60)
    return (calendar.timegm((*numbers, 0, 0, 0)) - offset) * 1_000_000_000 + fraction
