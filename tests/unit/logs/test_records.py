"""A chunk of output becomes the same lines of the CRI log format, however often it is rendered."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from dispatcher.logs.records import MAX_CONTENT, render, timestamp
from dispatcher.model import OutputChunk, Stream


def chunk(data: bytes, *, stream: Stream = Stream.STDOUT, time_ns: int = 1_475_712_577_669_794_202) -> OutputChunk:
    return OutputChunk(stream=stream, time_ns=time_ns, seq=1, data=data)


def parse(rendered: bytes) -> list[tuple[bytes, bytes, bytes]]:
    """Read records as the kubelet does: time, stream, tag, content."""
    assert rendered == b"" or rendered.endswith(b"\n")
    return [tuple(line.split(b" ", 3)[1:]) for line in rendered.split(b"\n")[:-1]]  # type: ignore[misc]


def test_time_has_nine_digits_in_utc() -> None:
    assert timestamp(1_475_712_577_000_000_002) == b"2016-10-06T00:09:37.000000002Z"


def test_full_line_is_f_and_open_piece_is_p() -> None:
    assert parse(render(chunk(b"one\ntwo"))) == [(b"stdout", b"F", b"one"), (b"stdout", b"P", b"two")]


def test_empty_line_keeps_its_record() -> None:
    assert render(chunk(b"\n")).endswith(b"Z stdout F \n")


def test_long_line_is_cut_into_p_pieces_and_an_f() -> None:
    records = parse(render(chunk(b"x" * (2 * MAX_CONTENT + 5) + b"\n")))
    assert [(tag, len(content)) for _, tag, content in records] == [(b"P", MAX_CONTENT), (b"P", MAX_CONTENT), (b"F", 5)]


def test_stderr_is_named() -> None:
    assert parse(render(chunk(b"e\n", stream=Stream.STDERR))) == [(b"stderr", b"F", b"e")]


@given(st.lists(st.binary(max_size=200), max_size=8))
def test_every_byte_survives_in_order(pieces: list[bytes]) -> None:
    """Gluing P records to the next one gives back what was written, whatever the chunk borders."""
    text = b""
    for piece in pieces:
        for _, tag, content in parse(render(chunk(piece))):
            text += content + (b"\n" if tag == b"F" else b"")
    assert text == b"".join(pieces)
