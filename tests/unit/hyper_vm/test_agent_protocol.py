"""The agent's protocol on the host's side: the same events however the bytes are cut, and no mercy for a bad guest."""

from __future__ import annotations

import json
import random
import struct
from pathlib import Path
from typing import Any

import pytest

from dispatcher_hyper_vm.agent.protocol import (
    MAX_PAYLOAD,
    MAX_REQUEST,
    WINDOW,
    Credit,
    Data,
    Ended,
    Event,
    Frame,
    FrameFlag,
    FrameParser,
    FrameType,
    Hello,
    HostConnection,
    Message,
    RemoteProtocolError,
    Reply,
    RequestTooLarge,
    Reset,
    Source,
    VersionMismatch,
    encode,
    printable,
)

GOLDEN = json.loads((Path(__file__).parents[2] / "data" / "agent_frames.json").read_text(encoding="utf-8"))
NONCE = bytes(range(16))


def hello(version: int = 1, nonce: bytes = NONCE) -> bytes:
    body = Message({"version": "1"}).pack()
    return encode(Frame(type=FrameType.HELLO, payload=nonce + struct.pack("<HHH", version, 1, 1) + body))


def open_session(stale: bytes = b"") -> HostConnection:
    connection = HostConnection(NONCE)
    connection.receive(stale + hello())
    event = connection.next_event()
    assert isinstance(event, Hello)
    return connection


def message(kind: FrameType, number: int, seq: int, body: Message, *, cut: int = MAX_PAYLOAD) -> bytes:
    data = body.pack()
    parts = [data[at : at + cut] for at in range(0, len(data), cut)]
    return b"".join(
        encode(
            Frame(
                type=kind,
                id=number,
                seq=seq + at,
                payload=part,
                flags=FrameFlag.MORE if at + 1 < len(parts) else FrameFlag.NONE,
            )
        )
        for at, part in enumerate(parts)
    )


def all_events(connection: HostConnection) -> list[object]:
    found: list[object] = []
    while (event := connection.next_event()) is not None:
        found.append(event)
    return found


# --------------------------------------------------------------------------------------------------------------- frames
@pytest.mark.parametrize("golden", GOLDEN, ids=[item["name"] for item in GOLDEN])
def test_golden_frames_both_ways(golden: dict[str, Any]) -> None:
    """The bytes that the C side is tested against, too."""
    frame = Frame(
        type=FrameType(golden["type"]),
        flags=FrameFlag(golden["flags"]),
        source=Source(golden["source"]),
        id=golden["id"],
        seq=golden["seq"],
        time_ns=golden["time_ns"],
        payload=bytes.fromhex(str(golden["payload"])),
    )
    wire = bytes.fromhex(str(golden["wire"]))
    assert encode(frame) == wire
    parser = FrameParser()
    parser.receive(wire)
    assert parser.next_frame() == frame
    assert parser.next_frame() is None


def transcript() -> bytes:
    """A session as a guest may send it: two streams, a long reply, an event, an end with a code, a reset."""
    frames = [
        hello(),
        message(FrameType.EVENT, 0, 1, Message({"event": "exit"})),
        message(FrameType.REPLY, 1, 2, Message({"text": "x" * 300}, b"blob"), cut=100),
        encode(Frame(type=FrameType.CREDIT, id=1, seq=1000)),
        encode(Frame(type=FrameType.DATA, id=1, seq=5, source=Source.STDOUT, time_ns=7, payload=b"hello")),
        encode(Frame(type=FrameType.DATA, id=1, seq=8, source=Source.STDERR, time_ns=8, payload=b"err")),
        encode(Frame(type=FrameType.END, id=1, seq=8, payload=struct.pack("<I", 137))),
        encode(Frame(type=FrameType.RESET, id=2, payload=b"gone\x1b[0m")),
    ]
    return b"".join(frames)


def replay(greeting: bytes, pieces: list[bytes]) -> list[object]:
    connection = HostConnection(NONCE)
    connection.receive(greeting)
    events = all_events(connection)
    connection.request(Message({"command": "ping"}))
    connection.open_stream()
    connection.open_stream()
    for piece in pieces:
        connection.receive(piece)
        events += all_events(connection)
    return events


def test_events_are_the_same_however_the_bytes_are_cut() -> None:
    """Whole, byte by byte, and at random places."""
    greeting, rest = hello(), transcript()[len(hello()) :]
    whole = replay(greeting, [rest])
    assert whole[1:] == [
        Event(Message({"event": "exit"})),
        Reply(1, Message({"text": "x" * 300}, b"blob")),
        Credit(1),
        Data(stream=1, source=Source.STDOUT, time_ns=7, position=5, data=b"hello"),
        Data(stream=1, source=Source.STDERR, time_ns=8, position=8, data=b"err"),
        Ended(1, 137),
        Reset(2, "gone [0m"),
    ]
    assert replay(greeting, [bytes([byte]) for byte in rest]) == whole
    chance = random.Random(5)
    for _ in range(200):
        cuts = sorted(chance.sample(range(1, len(rest)), chance.randint(1, 12)))
        pieces = [rest[a:b] for a, b in zip([0, *cuts], [*cuts, len(rest)], strict=True)]
        assert replay(greeting, pieces) == whole


def test_all_before_the_greeting_is_dropped() -> None:
    """Old frames, halves of frames, and even an old greeting of another session."""
    old = encode(Frame(type=FrameType.DATA, id=9, seq=3, payload=b"old"))
    for stale in (b"", b"\x00" * 100, old, old[5:], old[:-1], hello(nonce=bytes(16)), old * 1000 + old[:40]):
        assert open_session(stale) is not None


def test_a_greeting_cut_anywhere_is_found() -> None:
    """The search keeps what may be its beginning."""
    stale = encode(Frame(type=FrameType.DATA, id=9, seq=3, payload=b"old"))[7:]
    data = stale + hello()
    for cut in range(len(data)):
        connection = HostConnection(NONCE)
        connection.receive(data[:cut])
        connection.receive(data[cut:])
        assert isinstance(connection.next_event(), Hello)


def test_a_guest_that_sends_but_never_greets_is_given_up() -> None:
    """Within a bound, and without keeping what it sent."""
    connection = HostConnection(NONCE)
    with pytest.raises(RemoteProtocolError):  # noqa: PT012 - some time within the bound
        for _ in range(1000):
            connection.receive(b"x" * 65536)
    assert len(connection._parser._buffer) < 65536 * 2


def test_a_version_out_of_range_is_named() -> None:
    """What to do is said: build the image anew."""
    with pytest.raises(VersionMismatch, match="build the guest image anew"):
        HostConnection(NONCE).receive(hello(version=0))


# -------------------------------------------------------------------------------------------------------------- hostile
def data(stream: int, seq: int, payload: bytes) -> bytes:
    return encode(Frame(type=FrameType.DATA, id=stream, seq=seq, payload=payload))


def header(magic: int, length: int, kind: int, flags: int = 0, source: int = 0, number: int = 0) -> bytes:
    return struct.pack("<IIBBHIQQ", magic, length, kind, flags, source, number, 0, 0)


BAD = {
    "no frame": b"\xff" * 64,
    "too large": header(0xC1A90DF7, MAX_PAYLOAD + 1, 6),
    "wrong end": data(1, 3, b"abc")[:-1] + b"\x00",
    "unknown type": header(0xC1A90DF7, 0, 99) + b"\xa5\xc3\x9e\x7b",
    "unknown flag": header(0xC1A90DF7, 0, 6, flags=8) + b"\xa5\xc3\x9e\x7b",
    "unknown source": header(0xC1A90DF7, 0, 6, source=9) + b"\xa5\xc3\x9e\x7b",
    "a request": message(FrameType.REQUEST, 1, 1, Message({})),
    "a second greeting": hello(),
    "a reply to nothing": message(FrameType.REPLY, 7, 1, Message({})),
    "a message out of order": message(FrameType.EVENT, 0, 2, Message({})),
    "an event with an id": message(FrameType.EVENT, 3, 1, Message({})),
    "mixed messages": message(FrameType.EVENT, 0, 1, Message({"a": "b" * 50}), cut=20)[:56]
    + message(FrameType.REPLY, 1, 2, Message({})),
    "no JSON": encode(Frame(type=FrameType.EVENT, seq=1, payload=struct.pack("<I", 3) + b"{,}")),
    "deep JSON": encode(Frame(type=FrameType.EVENT, seq=1, payload=struct.pack("<I", 60000) + b"[" * 60000)),
    "a huge number": encode(Frame(type=FrameType.EVENT, seq=1, payload=struct.pack("<I", 9000) + b"1" * 9000)),
    "not an object": encode(Frame(type=FrameType.EVENT, seq=1, payload=struct.pack("<I", 2) + b"[]")),
    "NaN": encode(Frame(type=FrameType.EVENT, seq=1, payload=struct.pack("<I", 7) + b'{"a":NaN}'[:7])),
    "short": encode(Frame(type=FrameType.EVENT, seq=1, payload=struct.pack("<I", 50) + b"{}")),
    "no length": encode(Frame(type=FrameType.EVENT, seq=1, payload=b"{}")),
    "data on no stream": data(5, 1, b"x"),
    "data behind a gap": data(1, 9, b"abc"),
    "data twice": data(1, 3, b"abc") * 2,
    "empty data": data(1, 0, b""),
    "data beyond the credit": b"".join(data(1, (at + 1) * 65536, bytes(65536)) for at in range(WINDOW // 65536 + 1)),
    "data behind the end": encode(Frame(type=FrameType.END, id=1)) + data(1, 1, b"x"),
    "an end at a wrong place": encode(Frame(type=FrameType.END, id=1, seq=4)),
    "an impossible exit code": encode(Frame(type=FrameType.END, id=1, payload=struct.pack("<I", 999))),
    "an endless message": b"".join(
        encode(Frame(type=FrameType.EVENT, seq=at, flags=FrameFlag.MORE, payload=b"x" * 65536)) for at in range(1, 18)
    ),
}


@pytest.mark.parametrize("wire", BAD.values(), ids=list(BAD))
def test_a_guest_that_breaks_the_protocol_is_refused_by_name(wire: bytes) -> None:
    """One class of error for all of it, and nothing else escapes."""
    connection = open_session()
    connection.request(Message({"command": "ping"}))
    connection.open_stream()
    with pytest.raises(RemoteProtocolError):
        connection.receive(wire)


def test_frames_of_a_stream_that_was_let_go_are_dropped() -> None:
    """The guest had not heard of it yet."""
    connection = open_session()
    stream = connection.open_stream()
    assert connection.reset_stream(stream)
    assert connection.reset_stream(stream) == b""
    connection.receive(data(stream, 3, b"abc") + encode(Frame(type=FrameType.END, id=stream, seq=3)))
    assert all_events(connection) == []


def test_credit_is_given_when_half_of_it_is_used() -> None:
    """Not for every byte, and never backwards."""
    connection = open_session()
    stream = connection.open_stream()
    assert connection.grant_if_low(stream, 10) == b""
    parser = FrameParser()
    parser.receive(connection.grant_if_low(stream, WINDOW // 2))
    frame = parser.next_frame()
    assert frame is not None
    assert (frame.type, frame.id, frame.seq) == (FrameType.CREDIT, stream, WINDOW // 2 + WINDOW)


def test_what_is_sent_stays_within_the_guests_credit() -> None:
    """And after our end nothing more is sent."""
    connection = open_session()
    stream = connection.open_stream()
    assert connection.sendable(stream) == 0
    connection.receive(encode(Frame(type=FrameType.CREDIT, id=stream, seq=10)))
    assert connection.sendable(stream) == 10
    connection.send_data(stream, b"1234")
    assert connection.sendable(stream) == 6
    assert connection.end_stream(stream)
    assert connection.end_stream(stream) == b""
    with pytest.raises(BrokenPipeError):
        connection.sendable(stream)


def test_a_request_is_cut_into_frames() -> None:
    """Each but the last says that more comes."""
    connection = open_session()
    body = Message({"a": "ü\udcff"}, bytes(200_000))
    number, frames = connection.request(body)
    parser = FrameParser()
    parser.receive(b"".join(frames))
    found = []
    while (frame := parser.next_frame()) is not None:
        found.append(frame)
    assert [frame.flags for frame in found] == [FrameFlag.MORE] * 3 + [FrameFlag.NONE]
    assert [frame.seq for frame in found] == [1, 2, 3, 4]
    assert {frame.id for frame in found} == {number}
    packed = b"".join(frame.payload for frame in found)
    assert packed == body.pack()
    assert b"\\udcff" in packed


def test_what_is_too_large_is_not_sent() -> None:
    """It would be refused in the guest."""
    with pytest.raises(RequestTooLarge):
        open_session().request(Message({}, bytes(MAX_REQUEST)))
    connection = HostConnection(NONCE, max_streams=2)
    connection.open_stream()
    connection.open_stream()
    with pytest.raises(RequestTooLarge):
        connection.open_stream()


def test_a_guests_words_are_made_fit_to_be_shown() -> None:
    """One line, no control characters, not too long."""
    assert printable(b"a\nb\x1b\xff") == "a b \ufffd"
    assert printable("x" * 1000, 10) == "x" * 10 + "..."
