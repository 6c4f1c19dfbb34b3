"""Reading CRI logs: whole, from the end, as they grow, over rotation and truncation."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dispatcher.commands.log_reader import LogReader, LogRecord, parse_record
from dispatcher.commands.logs import LogWriter
from dispatcher.logs.records import render
from dispatcher.model import OutputChunk, Stream

T = b"2026-01-01T00:00:00.000000000Z"


def record(content: bytes, *, stream: bytes = b"stdout", tag: bytes = b"F") -> bytes:
    return b"%b %b %b %b\n" % (T, stream, tag, content)


def read(path: Path, tail: int | None = None) -> bytes:
    reader = LogReader(str(path), tail)
    try:
        return b"".join(item.output for item in reader.read())
    finally:
        reader.close()


@pytest.mark.parametrize(
    "line",
    [b"", b"x", b"2026 stdout F", b"2026 stdin F x", b"no record at all but words"],
)
def test_what_is_no_record_is_skipped(line: bytes) -> None:
    assert parse_record(line) is None


def test_content_is_verbatim() -> None:
    assert parse_record(T + b" stderr P:x a  b ") == LogRecord(T, b"stderr", True, b"a  b ")
    assert parse_record(T + b" stdout F ") == LogRecord(T, b"stdout", False, b"")


@given(st.lists(st.binary(min_size=1, max_size=50), max_size=8))
def test_what_the_daemon_writes_is_read_back(chunks: list[bytes]) -> None:
    text = b"".join(
        render(OutputChunk(stream=Stream.STDOUT, time_ns=1, seq=index, data=data)) for index, data in enumerate(chunks)
    )
    records = [parse_record(line) for line in text.split(b"\n")[:-1]]
    assert b"".join(item.output for item in records if item) == b"".join(chunks)


@pytest.mark.parametrize(
    ("tail", "expected"),
    [(None, b"one\ntwo\nlong line\n"), (1, b"long line\n"), (2, b"two\nlong line\n"), (99, None), (0, b"")],
)
def test_tail_counts_lines_and_not_records(tmp_path: Path, tail: int | None, expected: bytes | None) -> None:
    log = tmp_path / "0.log"
    log.write_bytes(record(b"one") + record(b"two") + record(b"long ", tag=b"P") + record(b"line"))
    assert read(log, tail) == (b"one\ntwo\nlong line\n" if expected is None else expected)


def test_tail_looks_back_over_many_blocks(tmp_path: Path) -> None:
    log = tmp_path / "0.log"
    log.write_bytes(b"".join(record(b"line %d " % index + b"x" * 500) for index in range(1000)))
    lines = read(log, 300).splitlines()
    assert len(lines) == 300
    assert lines[0].startswith(b"line 700 ")


def test_follows_a_growing_file_without_cutting_records(tmp_path: Path) -> None:
    log = tmp_path / "0.log"
    reader = LogReader(str(log))
    assert list(reader.read()) == []
    whole = record(b"hello")
    with log.open("ab", buffering=0) as file:
        file.write(whole[:10])
        assert list(reader.read()) == []
        file.write(whole[10:])
        assert [item.content for item in reader.read()] == [b"hello"]
        assert list(reader.read()) == []
    reader.close()


def test_rotation_loses_and_doubles_nothing(tmp_path: Path) -> None:
    log = tmp_path / "0.log"
    log.write_bytes(record(b"1"))
    reader = LogReader(str(log))
    seen = [item.content for item in reader.read()]
    with log.open("ab") as old:
        log.rename(tmp_path / "0.log.20260101")
        seen += [item.content for item in reader.read()]
        old.write(record(b"2"))  # written to the renamed file before the daemon reopens
    log.write_bytes(record(b"3"))
    seen += [item.content for item in reader.read()]
    log.rename(tmp_path / "0.log.20260102")
    log.write_bytes(record(b"4"))
    seen += [item.content for item in reader.read()]
    reader.close()
    assert seen == [b"1", b"2", b"3", b"4"]


def test_truncation_in_place_starts_over(tmp_path: Path) -> None:
    log = tmp_path / "0.log"
    log.write_bytes(record(b"a long first line") * 3)
    reader = LogReader(str(log))
    list(reader.read())
    log.write_bytes(record(b"new"))
    assert [item.content for item in [*reader.read(), *reader.read()]] == [b"new"]
    reader.close()


def test_streams_go_where_they_belong(tmp_path: Path) -> None:
    log = tmp_path / "0.log"
    log.write_bytes(record(b"par", tag=b"P") + record(b"oops", stream=b"stderr") + record(b"tial"))
    out, err = io.BytesIO(), io.BytesIO()
    reader = LogReader(str(log))
    LogWriter(prefix=b"[p] ", out=out, err=err).write_all(reader)
    reader.close()
    assert out.getvalue() == b"[p] partial\n"
    assert err.getvalue() == b"[p] oops\n"
