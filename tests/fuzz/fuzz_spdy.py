"""SPDY frames, header blocks and connections from anywhere: understood, or refused as a breach of the protocol."""

from __future__ import annotations

import random
import zlib
from collections.abc import Sequence
from typing import Any

import pytest

from dispatcher_streaming.spdy import connection, frames, headers
from dispatcher_streaming.spdy.connection import Connection, Event, StreamOpened
from tests.fuzz.harness import Fuzzer, finds
from tests.fuzz.wire import TOKENS, Outcome, Script, cuts_of, footprint, hold_equal, hold_frames, outcome_of

pytestmark = [pytest.mark.fuzz, pytest.mark.timeout(0)]

# A read of a socket with a control frame that is not complete yet, and the headers of all streams in Python's form.
HEADERS_AT_MOST = connection.MAX_HEADER_BYTES
KEPT_AT_MOST = 2 * frames.MAX_CONTROL + connection.MAX_HEADER_BYTES + connection.MAX_STREAMS * 1024


def check_connection(data: bytes) -> str:
    """The property: only ProtocolError, the same events however the bytes are cut, and little is kept."""
    wire = Script().compile(data)
    answers = []
    for is_client in (False, True):
        outcomes = [_outcome(pieces, is_client=is_client) for pieces in cuts_of(wire)]
        hold_equal(outcomes)
        kinds = dict.fromkeys(type(event).__name__ for event in outcomes[0].events)
        answers.append(f"{outcomes[0].error} {' '.join(kinds)} {min(len(outcomes[0].output), 40)}")
    _serve(wire)
    return " | ".join(answers)


def _outcome(pieces: list[bytes], *, is_client: bool) -> Outcome:
    peer = Connection(is_client=is_client)
    if is_client:
        for fin in (False, True, False):
            peer.open({"a": "b"}, fin=fin)

    def receive(piece: bytes) -> tuple[list[Event], bytes]:
        events = peer.receive(piece)
        answer = peer.take_output()
        assert len(answer) <= 64 + 2 * len(piece), "answers larger than what they answer"
        _hold(events)
        return events, answer

    outcome = outcome_of(receive, pieces, same=("stream_id",))
    assert _held(outcome.events) <= HEADERS_AT_MOST, "the headers of open streams have no limit in all"
    assert peer.stream_count <= connection.MAX_STREAMS + 3
    kept = footprint(peer)
    assert kept <= KEPT_AT_MOST, f"{kept} bytes are kept"
    return outcome


def _hold(events: list[Event]) -> None:
    for event in events:
        if isinstance(event, StreamOpened):
            assert event.stream_id > 0
            assert _size(event) <= headers.MAX_BLOCK
            assert all(name and name == name.lower() for name in event.headers)


def _size(event: StreamOpened) -> int:
    return sum(len(name) + len(value) for name, value in event.headers.items())


def _held(events: Sequence[Event]) -> int:
    """What the headers of all streams take that were not reset."""
    held: dict[int, int] = {}
    for event in events:
        if isinstance(event, StreamOpened):
            held[event.stream_id] = _size(event)
        elif isinstance(event, connection.StreamReset):
            held.pop(event.stream_id, None)
    return sum(held.values())


def _serve(wire: bytes) -> None:
    """Act on the events as a server does; what goes out must be right whatever came in."""
    server = Connection()
    output = bytearray()
    try:
        for start in range(0, len(wire), 1000):
            for event in server.receive(wire[start : start + 1000]):
                output += _act(server, event)
            output += server.take_output()
    except connection.ProtocolError:
        pass
    output += server.go_away() + server.go_away()
    hold_frames(bytes(output))


def _act(server: Connection, event: Event) -> bytes:
    stream_id = getattr(event, "stream_id", 0)
    if isinstance(event, StreamOpened):
        return (
            server.reset(stream_id) if stream_id % 7 == 0 else server.accept(stream_id) + server.send(stream_id, b"!")
        )
    if isinstance(event, connection.DataReceived):
        if len(event.data) == 3:
            return server.reset(stream_id) + server.reset(stream_id) + server.send(stream_id, b"late")
        return server.send(stream_id, event.data[:9], fin=event.fin) + server.send(stream_id, b"?")
    return b""


def generate(chance: random.Random) -> bytes:
    """A conversation that is nearly right."""
    if chance.random() < 0.02:
        return b"%d*open + 0 a=%d{%d},b=c\n" % (
            chance.choice([3, 40, 1100]),
            chance.randrange(9),
            chance.choice([60_000, 16_000, 4000]),
        )
    lines = []
    for _ in range(chance.randrange(1, 9)):
        count = chance.choice([*[""] * 25, *["3*"] * 4, "1100*"])
        size = chance.choice(["", "", "", "", "{40}", "{3000}", "{70000}"])
        pairs = ",".join(f"{chance.choice('abAB')}{chance.randrange(3)}=v{size}" for _ in range(chance.randrange(4)))
        flags, stream = chance.choice([0, 0, 0, 1, 2]), chance.choice(["+", "=", "1", "2", "3", "5"])
        kind = chance.choice(["open", "open", "open", "data", "data", "reply", "frame", "block"])
        if kind in {"open", "reply"}:
            lines.append(f"{count}{kind} {'+' if chance.random() < 0.8 else stream} {flags} {pairs}")
        elif kind == "data":
            lines.append(f"{count}data {stream} {flags} abc{size}")
        elif kind == "block":
            number = chance.choice([0, 1, 2, 101, 2**31, 2**32 - 1])
            plain = "".join(f"%{byte:02X}" for byte in number.to_bytes(4, "big"))
            lines.append(f"block {chance.choice([1, 1, 2, 8])} + {plain}%00%00%00%01a%00%00%00%01b{size}")
        else:
            body = "".join(f"%{byte:02X}" for byte in chance.randbytes(1) for _ in range(4))
            lines.append(f"{count}frame {chance.choice([3, 4, 6, 7, 8, 9, 77])} {flags} %00%00%00{body}")
    return "\n".join(lines).encode()


def make_fuzzer(**changes: Any) -> Fuzzer:
    """The fuzzer of SPDY connections."""
    return Fuzzer(check=check_connection, corpus="spdy", tokens=TOKENS, generate=generate, **changes)


def test_peers_are_understood_or_refused() -> None:
    """Nothing but ProtocolError is ever raised, memory is bounded, and cuts change nothing."""
    print(make_fuzzer().run())


def _piece_that_ends_early(reader: Any) -> frames.DataPiece | None:
    if not reader._buffer:
        return None
    data = bytes(reader._buffer[: reader._left])
    del reader._buffer[: len(data)]
    reader._left -= len(data)
    return frames.DataPiece(reader._stream_id, data, reader._fin)


def _inflate_all(self: Any, block: bytes) -> dict[str, str]:
    try:
        texts = list(headers._texts(self._inflate.decompress(block)))
    except zlib.error as error:
        raise headers.HeaderError("a header block cannot be inflated") from error
    names = [name.decode("utf-8", "replace").lower() for name in texts[::2]]
    return dict(zip(names, (value.decode("utf-8", "replace") for value in texts[1::2]), strict=True))


def _send_behind_the_end(self: Connection, stream_id: int, payload: bytes, *, fin: bool = False) -> bytes:
    return frames.data(stream_id, payload, fin=fin) if stream_id in self._streams else b""


PLANTED: list[tuple[str, Any, str, Any]] = [
    ("a piece that ends its frame early", frames.FrameReader, "_take_piece", _piece_that_ends_early),
    ("data behind its end", Connection, "send", _send_behind_the_end),
    ("headers without a limit in all", connection, "MAX_HEADER_BYTES", 1 << 40),
    ("a block without a limit", headers.HeaderDecompressor, "decompress", _inflate_all),
]


@pytest.mark.parametrize(("name", "where", "part", "replacement"), PLANTED, ids=[planted[0] for planted in PLANTED])
def test_planted_faults_are_found(
    monkeypatch: pytest.MonkeyPatch, name: str, where: Any, part: str, replacement: Any
) -> None:
    """Each is caught within seconds."""
    monkeypatch.setattr(where, part, replacement)
    finds(make_fuzzer(seconds=120, seed=1), name)
