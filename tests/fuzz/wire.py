"""What the fuzzers of streaming share: scripts that become the bytes of a peer, cuts of these, and what must hold.

Header blocks are deflated with a window that runs over the whole connection, so that changed bytes are hardly ever read
as headers. An input is therefore a script, a line per frame, and the deflating is done here:

    open ID FLAGS NAME=VALUE,NAME=VALUE     SYN_STREAM
    reply ID FLAGS NAME=VALUE               SYN_REPLY
    block TYPE ID PLAIN                     a frame of any type with any text as its header block
    frame TYPE FLAGS BODY                   a control frame with any body
    data ID FLAGS PAYLOAD                   a data frame
    raw BYTES                               anything

`N*` before a line repeats it. An ID is a number, `+` for the next odd one or `=` for the last one again. In texts `%0A`
stands for a byte, and `{N}` repeats what stands before it. What is no such line is sent as it is.
"""

from __future__ import annotations

import itertools
import random
import re
import struct
import sys
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any
from urllib.parse import unquote_to_bytes

from dispatcher_streaming.spdy.connection import Connection, ProtocolError
from dispatcher_streaming.spdy.frames import ControlFrame, FrameReader, FrameType
from dispatcher_streaming.spdy.headers import DICTIONARY

WIRE_LIMIT = 96 * 1024
_TEXT_LIMIT = 1 << 18  # of one text
_DEFLATED_LIMIT = 1 << 22  # of all header blocks before they are deflated
_FRAMES = 1500  # of a script
TOKENS = [
    *(b"open ", b"reply ", b"block ", b"frame ", b"data ", b"raw ", b"\n", b" ", b"+", b"=", b",", b"*", b"300*"),
    *(b" 0 ", b" 1 ", b" 2 ", b"%00", b"%0A", b"%FF", b"{5000}", b"{70000}"),
    *(b"open + 0 ", b"open + 1 ", b"data = 0 ", b"data = 1 ", b"data 1 0 ", b"frame 3 0 %00%00%00%01%00%00%00%05\n"),
    *(b"frame 6 0 %00%00%00%01\n", b"frame 7 0 %00%00%00%00%00%00%00%00\n", b"frame 4 0 \n", b"frame 9 0 \n"),
    *(b"streamtype", b"stdin", b"stdout", b"stderr", b"error", b"resize", b"data", b"port", b"requestid"),
]


# ------------------------------------------------------------------------------------------------------------- scripts
class Script:
    """Writes one side of a SPDY connection."""

    def __init__(self) -> None:
        self._deflate = zlib.compressobj(6, zlib.DEFLATED, 15, 9, zlib.Z_DEFAULT_STRATEGY, DICTIONARY)
        self._last = -1
        self._left = _DEFLATED_LIMIT

    def compile(self, text: bytes) -> bytes:
        """The bytes of a whole script, up to a limit."""
        wire = bytearray()
        for line in itertools.islice(lines_of(text), _FRAMES):
            wire += self._line(line)
            if len(wire) > WIRE_LIMIT or self._left <= 0:
                break
        return bytes(wire[:WIRE_LIMIT])

    def _line(self, line: bytes) -> bytes:
        words = line.split(b" ", 3)
        words += [b""] * (4 - len(words))
        kind, first, second, rest = words
        if kind in {b"open", b"reply"}:
            head = struct.pack(">I", self._id(first))
            head += bytes(6) if kind == b"open" else b""
            plain = block_of(pair.partition(b"=")[::2] for pair in rest.split(b",") if pair)
            return _control(1 if kind == b"open" else 2, _number(second), head + self._deflated(plain))
        if kind == b"block":
            head = struct.pack(">I", self._id(second)) + (bytes(6) if _number(first) == 1 else b"")
            return _control(_number(first), 0, head + self._deflated(text_of(rest)))
        if kind == b"frame":
            return _control(_number(first), _number(second), text_of(rest))
        if kind == b"data":
            payload = text_of(rest)
            return struct.pack(">II", self._id(first), (_number(second) & 0xFF) << 24 | len(payload)) + payload
        return text_of(line.removeprefix(b"raw "))

    def _id(self, word: bytes) -> int:
        if word == b"+":
            self._last += 2
        elif word != b"=":
            return _number(word) & 0x7FFF_FFFF
        return max(0, self._last)

    def _deflated(self, plain: bytes) -> bytes:
        self._left -= len(plain)
        return self._deflate.compress(plain) + self._deflate.flush(zlib.Z_SYNC_FLUSH)


def lines_of(text: bytes) -> Iterator[bytes]:
    """The lines of a script, the repeated ones as often as they say."""
    for line in text.split(b"\n"):
        repeated = re.match(rb"(\d{1,4})\*", line)
        yield from itertools.repeat(line[repeated.end() :] if repeated else line, int(repeated[1]) if repeated else 1)


def block_of(pairs: Iterator[tuple[bytes, ...]]) -> bytes:
    """The plain text of a header block."""
    texts = [text_of(text) for pair in pairs for text in pair]
    return struct.pack(">I", len(texts) // 2) + b"".join(struct.pack(">I", len(text)) + text for text in texts)


def text_of(word: bytes) -> bytes:
    """Bytes from their form in a script."""
    parts = re.split(rb"\{(\d{1,7})\}", word)
    text = b""
    for index, part in enumerate(parts):
        if index % 2:
            text = text * min(int(part), max(1, _TEXT_LIMIT // max(1, len(text))))
        else:
            text += unquote_to_bytes(part)
    return text[:_TEXT_LIMIT]


def _number(word: bytes) -> int:
    return int(word) if word.isdigit() and len(word) < 12 else 0


def _control(kind: int, flags: int, body: bytes) -> bytes:
    return struct.pack(">HHI", 0x8003, kind & 0xFFFF, (flags & 0xFF) << 24 | len(body) & 0xFF_FFFF) + body


# ---------------------------------------------------------------------------------------------------------------- cuts
def cuts_of(wire: bytes) -> Iterator[list[bytes]]:
    """The same bytes as they may arrive: whole, byte by byte where they are few, and cut at random."""
    yield [wire]
    if len(wire) <= 1000:
        yield [wire[i : i + 1] for i in range(len(wire))]
    chance = random.Random(zlib.crc32(wire))
    for largest in (40, 3000) if len(wire) <= 20_000 else (9000,):
        pieces, position = [], 0
        while position < len(wire):
            size = chance.randint(1, largest)
            pieces.append(wire[position : position + size])
            position += size
        yield pieces


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a parser made of one way to cut the bytes."""

    events: Sequence[Any]
    output: bytes
    error: str


Receive = Callable[[bytes], tuple[Sequence[Any], bytes]]


def outcome_of(receive: Receive, pieces: Sequence[bytes], *, same: tuple[str, ...]) -> Outcome:
    """Feed a parser until it refuses; the data of neighbouring events that agree in `same` is joined."""
    events: list[Any] = []
    output = bytearray()
    for piece in pieces:
        try:
            found, answer = receive(piece)
        except ProtocolError as error:
            return Outcome(_joined(events, same), bytes(output), str(error) or "refused without a sentence")
        events += found
        output += answer
    return Outcome(_joined(events, same), bytes(output), "")


def hold_equal(outcomes: Sequence[Outcome]) -> None:
    """Events, answers and refusals do not depend on the cuts. What one read brought before its refusal may be lost."""
    first = outcomes[0]
    for other in outcomes[1:]:
        assert first.error == other.error, f"refused as {first.error!r} or as {other.error!r}"
        if not first.error:
            assert list(first.events) == list(other.events), "other events"
            assert _by_stream(first.output) == _by_stream(other.output), "other answers"


def _by_stream(output: bytes) -> dict[int, list[object]]:
    """The frames of each stream in order; data is joined. How the streams mix is free."""
    reader = FrameReader()
    reader.feed(output)
    found: dict[int, list[object]] = {}
    while (frame := reader.next()) is not None:
        if isinstance(frame, ControlFrame):
            has_stream = frame.type in {FrameType.SYN_REPLY, FrameType.RST_STREAM}
            stream_id = struct.unpack_from(">I", frame.body)[0] if has_stream else -1
            found.setdefault(stream_id, []).append(
                (frame.type, frame.body if frame.type != FrameType.SYN_REPLY else b"")
            )
        else:
            found.setdefault(frame.stream_id, []).append(frame)
    return {stream_id: _joined(frames, ("stream_id",)) for stream_id, frames in found.items()}


def _joined(events: Sequence[Any], same: tuple[str, ...]) -> list[Any]:
    joined: list[Any] = []
    for event in events:
        if joined and _goes_on(joined[-1], event, same):
            more = {"fin": event.fin} if hasattr(event, "fin") else {}
            joined[-1] = replace(joined[-1], data=joined[-1].data + event.data, **more)
        else:
            joined.append(event)
    return joined


def _goes_on(last: Any, event: Any, same: tuple[str, ...]) -> bool:
    if type(event) is not type(last) or not hasattr(event, "data") or getattr(last, "fin", False):
        return False
    return all(getattr(event, name) == getattr(last, name) for name in same)


# -------------------------------------------------------------------------------------------------------------- limits
def footprint(thing: Any) -> int:
    """The bytes that an object keeps alive, as far as Python can tell."""
    seen: set[int] = set()
    total, waiting = 0, [thing]
    while waiting:
        item = waiting.pop()
        if id(item) in seen or isinstance(item, type):
            continue
        seen.add(id(item))
        total += sys.getsizeof(item)
        if isinstance(item, Mapping):
            waiting += [*item.keys(), *item.values()]
        elif isinstance(item, (list, tuple, set, frozenset)):
            waiting += item
        elif is_dataclass(item):
            waiting += [getattr(item, each.name) for each in fields(item)]
        elif hasattr(item, "__dict__"):
            waiting += vars(item).values()
        else:
            waiting += [getattr(item, name) for name in ("unconsumed_tail", "unused_data") if hasattr(item, name)]
    return total


def hold_frames(output: bytes) -> None:
    """What we sent is whole frames; nothing comes on a stream before its reply or behind its end."""
    reader = FrameReader()
    reader.feed(output)
    replied: set[int] = set()
    ended: set[int] = set()
    gone = False
    while (frame := reader.next()) is not None:
        assert not gone, "a frame behind GOAWAY"
        if not isinstance(frame, ControlFrame):
            assert frame.stream_id in replied, "data before the reply"
            assert frame.stream_id not in ended, "data behind the end"
            if frame.fin:
                ended.add(frame.stream_id)
        elif frame.type == FrameType.GOAWAY:
            gone = True
        elif frame.type in {FrameType.SYN_REPLY, FrameType.RST_STREAM}:
            stream_id = struct.unpack_from(">I", frame.body)[0]
            if frame.type == FrameType.SYN_REPLY:
                assert stream_id not in replied, "two replies"
                replied.add(stream_id)
            else:
                ended.add(stream_id)
    Connection(is_client=True).receive(output)
