"""The engine's log files: whole entries at stable positions, whatever a crash left between them."""

from __future__ import annotations

import json
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dispatcher.model import Stream
from dispatcher_docker_shim.log_formats import DECODERS, Entry, parse_time

Row = tuple[Stream, int, bytes]


def varint(value: int) -> bytes:
    out = b""
    while value > 0x7F:
        out += bytes([value & 0x7F | 0x80])
        value >>= 7
    return out + bytes([value])


def local(row: Row) -> bytes:
    """An entry as the engine writes it: a final newline is left out, its absence is marked."""
    stream, time_ns, data = row
    ends = data.endswith(b"\n")
    line = data[:-1] if ends else data
    body = b"\n\x06" + stream.value.encode() + b"\x10" + varint(time_ns) + b"\x1a" + varint(len(line)) + line
    if not ends:
        body += b"\x20\x01\x2a\x04\x12\x02id"
    size = len(body).to_bytes(4, "big")
    return size + body + size


def json_file(row: Row) -> bytes:
    stream, time_ns, data = row
    stamp = f"2026-11-23T08:46:18.{time_ns % 1_000_000_000:09}Z"
    return json.dumps({"log": data.decode(), "stream": stream.value, "time": stamp}).encode() + b"\n"


WRITERS = {"local": local, "json-file": json_file}
TIME = 1_795_423_578_000_000_000
TEXT = st.text(st.characters(codec="utf-8", exclude_characters="\n"), max_size=40)
ROWS = st.lists(
    st.builds(
        lambda stream, text, end: (stream, TIME + len(text), (text + end).encode()),
        st.sampled_from(Stream),
        TEXT,
        st.sampled_from(["\n", ""]),
    ),
    max_size=8,
)


def decode_in_pieces(name: str, data: bytes, cuts: list[int]) -> list[Entry]:
    """Decode as a reader does: what was not used is offered again with the next piece; ends are absolute."""
    found: list[Entry] = []
    position, pending = 0, b""
    borders = [0, *sorted(cut % (len(data) + 1) for cut in cuts), len(data)]
    for start, end in pairwise(borders):
        entries, used = DECODERS[name](pending + data[start:end])
        found += [Entry(position + item.end, item.stream, item.time_ns, item.data) for item in entries]
        pending = (pending + data[start:end])[used:]
        position += used
    return found


@pytest.mark.parametrize("name", WRITERS)
@given(rows=ROWS, cuts=st.lists(st.integers(min_value=0), max_size=6))
def test_any_cut_gives_the_same_entries(name: str, rows: list[Row], cuts: list[int]) -> None:
    """Entries and positions do not depend on how the file is read."""
    blobs = [WRITERS[name](row) for row in rows]
    found = decode_in_pieces(name, b"".join(blobs), cuts)
    assert [(item.stream, item.time_ns, item.data) for item in found] == rows
    ends = [sum(len(blob) for blob in blobs[: index + 1]) for index in range(len(blobs))]
    assert [item.end for item in found] == ends


@pytest.mark.parametrize("name", WRITERS)
@given(data=st.data())
def test_a_torn_entry_costs_only_itself(name: str, data: st.DataObject) -> None:
    """After a crash in the middle of a write, the next entry is found again, at its true position."""
    row = (Stream.STDOUT, TIME, b"before the crash, a line of some length\n")
    torn = WRITERS[name](row)
    cut = data.draw(st.integers(min_value=1, max_value=len(torn) - 1))
    good = WRITERS[name]((Stream.STDERR, TIME, b"after\n"))
    separator = b"\n" if name == "json-file" else b""  # the engine's next write begins a line only by luck
    found = decode_in_pieces(name, torn + torn[:cut] + separator + good + good, [])
    assert [item.data for item in found][-2:] == [b"after\n", b"after\n"]
    assert found[-1].end == len(torn) + cut + len(separator) + 2 * len(good)
    assert len(found) in (3, 4)


@pytest.mark.parametrize("name", WRITERS)
@given(junk=st.binary(max_size=200))
def test_junk_is_never_an_error(name: str, junk: bytes) -> None:
    """No content of the file makes the decoder fail or go backwards."""
    _, used = DECODERS[name](junk)
    assert 0 <= used <= len(junk)


@pytest.mark.parametrize("name", WRITERS)
def test_a_freed_part_is_passed_over(name: str) -> None:
    """Zeros of a freed part in front of an entry are no entry."""
    good = WRITERS[name]((Stream.STDOUT, TIME, b"line\n"))
    found = decode_in_pieces(name, bytes(4096) + good + good, [1000, 4097])
    assert [item.data for item in found] == [b"line\n", b"line\n"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("2026-11-23T08:46:18.184367279Z", 1_795_423_578_184_367_279),
        ("2026-11-23T08:46:18.5Z", 1_795_423_578_500_000_000),
        ("2026-11-23T08:46:18Z", 1_795_423_578_000_000_000),
        ("2026-11-23T10:46:18.000000001+02:00", 1_795_423_578_000_000_001),
        ("0001-01-01T00:00:00Z", 0),
    ],
)
def test_times(text: str, expected: int) -> None:
    """Nanoseconds are kept, Go's zero time is none."""
    assert parse_time(text) == expected
