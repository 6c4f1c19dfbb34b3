"""Frames of WebSocket clients from anywhere: whole messages, however they are cut, or the end of the connection."""

from __future__ import annotations

import asyncio
import random
import struct
from collections.abc import Sequence
from typing import Any

import pytest
from websockets.frames import Opcode
from websockets.protocol import State
from websockets.server import ServerProtocol

from dispatcher_streaming.carriers import WebSocketCarrier
from dispatcher_streaming.windows import OWN, Budget
from tests.fuzz.harness import Fuzzer, finds
from tests.fuzz.wire import WIRE_LIMIT, cuts_of, lines_of, text_of

pytestmark = [pytest.mark.fuzz, pytest.mark.timeout(0)]

# A line per frame: FIRST-BYTE PAYLOAD, or `raw BYTES`. 130 is a whole binary message, 2 its beginning, 128 its end.
TOKENS = [
    *(
        b"130 ",
        b"129 ",
        b"2 ",
        b"1 ",
        b"0 ",
        b"128 ",
        b"136 ",
        b"136 %03%E8",
        b"137 ",
        b"138 ",
        b"194 ",
        b"raw ",
        b"\n",
    ),
    *(
        b"raw %82%FF%00%00%00%00%7F%FF%FF%FF",
        b"raw %82%FE%FF%FF",
        b"raw %82%05",
        b"{126}",
        b"{5000}",
        b"{70000}",
        b"300*",
    ),
]
MESSAGE_LIMIT = 40_000
FRAMES_LIMIT = 600
BUDGET = 100_000


class _Pipe:
    """A connection that brings some pieces, then ends; it keeps what is sent."""

    def __init__(self, pieces: Sequence[bytes]) -> None:
        self._pieces = iter([piece for piece in pieces if piece])
        self.sent = bytearray()

    async def read(self) -> bytes:
        return next(self._pieces, b"")

    def put(self, data: bytes) -> None:
        self.sent += data

    async def drain(self) -> None: ...


def wire_of(script: bytes) -> bytes:
    """The bytes of a client's frames."""
    wire = bytearray()
    for count, line in enumerate(lines_of(script)):
        head, _, payload = line.partition(b" ")
        wire += text_of(payload) if head == b"raw" else _frame(head, text_of(payload))
        if len(wire) > WIRE_LIMIT or count > FRAMES_LIMIT:
            break
    return bytes(wire[:WIRE_LIMIT])


def _frame(head: bytes, payload: bytes) -> bytes:
    first = int(head) & 0xFF if head.isdigit() and len(head) < 4 else 0x82
    if len(payload) < 126:
        size = struct.pack(">B", 0x80 | len(payload))
    elif len(payload) < 1 << 16:
        size = struct.pack(">BH", 0x80 | 126, len(payload))
    else:
        size = struct.pack(">BQ", 0x80 | 127, len(payload))
    return bytes([first]) + size + bytes(4) + payload  # a mask of zeros changes nothing


def check_messages(data: bytes) -> str:
    """The property: the same messages whatever the cuts, none too large, little kept, answers no larger than questions."""
    wire = wire_of(data)
    answers = asyncio.run(_read_all(wire))
    messages, end = answers[0]
    last, content = _finals_of(wire)
    assert len(messages) <= last, "more messages than frames that end one"
    assert content.startswith(b"".join(messages)), "other content than was sent"
    for other, other_end in answers[1:]:
        assert end == other_end, f"it ends as {end} or as {other_end}"
        assert messages == other, "other messages"
    return f"{[len(message).bit_length() for message in messages[:4]]} {end}"


def _finals_of(wire: bytes) -> tuple[int, bytes]:
    """How many frames end a message, and what all frames of messages hold, read without a look at any rule."""
    count, content, at = 0, bytearray(), 0
    while at + 2 <= len(wire):
        first, size = wire[at], wire[at + 1] & 0x7F
        wide = {126: 2, 127: 8}.get(size, 0)
        mask_at = at + 2 + wide
        size = int.from_bytes(wire[at + 2 : mask_at], "big") if wide else size
        mask = wire[mask_at : mask_at + 4] if wire[at + 1] & 0x80 else b""
        payload = wire[mask_at + len(mask) : mask_at + len(mask) + size]
        at = mask_at + len(mask) + size
        if first & 0x0F < 3:
            count += first >> 7
            content += bytes(byte ^ mask[i % 4] for i, byte in enumerate(payload)) if any(mask) else payload
    return count, bytes(content)


async def _read_all(wire: bytes) -> list[tuple[list[bytes], str]]:
    return [await _read(pieces) for pieces in cuts_of(wire)]


async def _read(pieces: Sequence[bytes]) -> tuple[list[bytes], str]:
    protocol = ServerProtocol(state=State.OPEN, max_size=MESSAGE_LIMIT)
    budget = Budget(BUDGET)
    pipe: Any = _Pipe(pieces)
    carrier = WebSocketCarrier(protocol, pipe, budget)
    messages: list[bytes] = []
    end = "open"
    try:
        async for message in carrier.read():
            assert len(message) <= MESSAGE_LIMIT
            messages.append(message)
    except ConnectionError as error:
        end = str(error)
    else:
        await carrier.close()
    assert budget.take(BUDGET), "a part of the budget is lost"
    assert len(carrier._parts) <= MESSAGE_LIMIT
    assert len(pipe.sent) <= 256 + sum(map(len, pieces)), "answers larger than what they answer"
    with pytest.raises(ConnectionError):
        await carrier.write(b"late")
    return messages, f"{end} {protocol.close_code}"


def generate(chance: random.Random) -> bytes:
    """Frames that are nearly right."""
    lines = []
    for _ in range(chance.randrange(1, 9)):
        size = chance.choice(["", "", "", "{125}", "{126}", "{3000}", "{39999}", "{40001}", "{70000}"])
        first = chance.choice([130, 130, 130, 2, 0, 0, 128, 128, 137, 138, 129, 136, 194, 131])
        count = chance.choice(["", "", "", "", "", "", "3*", "500*"]) if not size else ""
        lines.append(f"{count}{first} {chance.choice(['a', 'a', '%C3', '%03%E8'])}{size}")
    return "\n".join(lines).encode()


def make_fuzzer(**changes: Any) -> Fuzzer:
    """The fuzzer of WebSocket frames."""
    return Fuzzer(check=check_messages, corpus="websocket", tokens=TOKENS, generate=generate, **changes)


def test_frames_become_messages_or_an_end() -> None:
    """Nothing but the end of a connection is ever raised, and cuts change nothing."""
    print(make_fuzzer().run())


def _never_clear(self: WebSocketCarrier) -> list[bytes]:
    messages = []
    for frame in self._protocol.events_received():
        if getattr(frame, "opcode", None) in (Opcode.TEXT, Opcode.BINARY, Opcode.CONT):
            self._parts += frame.data  # type: ignore[union-attr]
            if frame.fin:  # type: ignore[union-attr]
                messages.append(bytes(self._parts))
    return messages


def _each_frame(self: WebSocketCarrier) -> list[bytes]:
    frames: list[Any] = self._protocol.events_received()
    return [bytes(frame.data) for frame in frames if frame.opcode != Opcode.CLOSE]


async def _read_once(self: WebSocketCarrier) -> Any:
    while self._protocol.state is State.OPEN and (data := await self._link.read()):
        self._protocol.receive_data(data)
        for message in self._messages():
            self._share.fit(len(self._parts) + OWN + 1)
            yield message


PLANTED = [
    ("a message that holds the one before", "_messages", _never_clear),
    ("a part of a message for a whole one", "_messages", _each_frame),
    ("a budget that is not given back", "read", _read_once),
]


@pytest.mark.parametrize(("name", "part", "replacement"), PLANTED, ids=[planted[0] for planted in PLANTED])
def test_planted_faults_are_found(monkeypatch: pytest.MonkeyPatch, name: str, part: str, replacement: Any) -> None:
    """Each is caught within seconds."""
    monkeypatch.setattr(WebSocketCarrier, part, replacement)
    finds(make_fuzzer(seconds=120, seed=1), name)
