"""The protocol with the agent of a guest: bytes in, events out, without any I/O. The guest is hostile.

Theory of operation. One byte stream (a virtio-serial port; in tests a UNIX socket) carries frames both ways. The same
text stands in `src/frame.h`, and both sides are tested against the same golden frames.

    header    32 bytes, little endian: magic u32, length u32, type u8, flags u8, source u16, id u32, seq u64, time u64
    payload   `length` bytes, at most 64 KiB
    trailer   4 bytes, none of them zero

Messages. A REQUEST (host), REPLY or EVENT (guest) is a message: JSON with a blob of bytes behind it, cut into frames;
all but the last have the flag MORE. Frames of a message follow each other, with only stream frames between them. Their
`seq` counts frames of messages in that direction, from 1. A REPLY has the id of its REQUEST.

Streams. The host chooses a stream's id and names it in a request. DATA carries bytes; its `seq` is the position behind
them. A stream's positions begin where the request says (0, or inside a container's output). CREDIT tells the sender
the position up to which it may send: absolute, so that telling it twice changes nothing. END closes one direction; the
guest's has the final position in `seq`, and in its payload the exit code, where the stream is that of a process. RESET
tells that a stream is gone, and why. Frames for a stream that the host has let go are dropped.

Reconnection. A connection is a session: requests in flight and streams end with it. What must outlive it is state in
the guest, kept until the host lets it go: containers with their exits until `delete`, output by position until
`trim`. The new host reads the states, opens output at the position up to which it has written, and gets the same
chunks with the same times.

Resynchronisation. Either side may have been cut off in the middle of a frame, and bytes of the old session may still
be on their way. The host begins with zeros, more than a frame can hold. They complete a cut frame, whose trailer is
then wrong, so it is dropped; further zeros are skipped; no payload is ever searched for a beginning. SYNC follows, with
16 random bytes. The guest forgets the old session and answers HELLO with the same bytes, and the host drops all
before that.
"""

from __future__ import annotations

import json
import os
import struct
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import IntEnum, IntFlag
from typing import Any

from dispatcher.errors import DispatcherError, RuntimeDown

VERSION_MIN = 1
VERSION_MAX = 1

MAGIC = 0xC1A90DF7
TRAILER = b"\xa5\xc3\x9e\x7b"
MAX_PAYLOAD = 64 * 1024
MAX_REQUEST = 4 * 1024 * 1024  # 2 MiB of small files, their names, and a specification
MAX_MESSAGE = 1024 * 1024  # what a guest may answer
MAX_STALE = 16 * 1024 * 1024  # bytes of an old session that are read before HELLO
WINDOW = 256 * 1024  # credit of a stream; the most that a guest can make us hold per stream
PREAMBLE = bytes(MAX_PAYLOAD + 64)

_HEADER = struct.Struct("<IIBBHIQQ")
_U32 = struct.Struct("<I")
_SYNC = struct.Struct("<16sHH")
_HELLO = struct.Struct("<16sHHH")


class RemoteProtocolError(DispatcherError):
    """The guest broke the protocol: a modified agent or a bug. The connection is given up; only this pod is hurt."""


class VersionMismatch(RuntimeDown):
    """Host and agent share no version of the protocol: the guest image is too old or too new for this daemon."""


class FrameType(IntEnum):
    """What a frame is."""

    SYNC = 1
    HELLO = 2
    REQUEST = 3
    REPLY = 4
    EVENT = 5
    DATA = 6
    CREDIT = 7
    END = 8
    RESET = 9


class FrameFlag(IntFlag):
    """Bits of a frame's flags."""

    NONE = 0
    MORE = 1  # the message goes on in the next frame of it


class Source(IntEnum):
    """Which output of a process DATA comes from; NONE where a stream has only one."""

    NONE = 0
    STDOUT = 1
    STDERR = 2


_MESSAGES = frozenset({FrameType.REQUEST, FrameType.REPLY, FrameType.EVENT})
_FROM_GUEST = frozenset(FrameType) - {FrameType.SYNC, FrameType.REQUEST}


@dataclass(frozen=True, slots=True, kw_only=True)
class Frame:
    """One frame, as the header describes it."""

    type: FrameType
    flags: FrameFlag = FrameFlag.NONE
    source: Source = Source.NONE
    id: int = 0
    seq: int = 0
    time_ns: int = 0
    payload: bytes = b""


def encode(frame: Frame) -> bytes:
    """Return the bytes of a frame."""
    header = _HEADER.pack(
        MAGIC, len(frame.payload), frame.type, frame.flags, frame.source, frame.id, frame.seq, frame.time_ns
    )
    return header + frame.payload + TRAILER


class FrameParser:
    """Cuts a byte stream into frames. Holds at most one frame and what one `receive` brought."""

    def __init__(self, *, types: frozenset[FrameType] = frozenset(FrameType)) -> None:
        self._buffer = bytearray()
        self._types = types

    def receive(self, data: bytes) -> None:
        """Take bytes in, cut anywhere."""
        self._buffer += data

    def next_frame(self) -> Frame | None:
        """Return the next whole frame, or None when more bytes are needed.

        Raises:
            RemoteProtocolError: what is there cannot be the beginning of a frame, or is too large.
        """
        if len(self._buffer) < _HEADER.size:
            return None
        magic, length, kind, flags, source, number, seq, time_ns = _HEADER.unpack_from(self._buffer)
        if magic != MAGIC:
            raise RemoteProtocolError("The guest sent something that is no frame.")
        if length > MAX_PAYLOAD:
            raise RemoteProtocolError(f"The guest sent a frame of {length} bytes.")
        end = _HEADER.size + length
        if len(self._buffer) < end + len(TRAILER):
            return None
        if self._buffer[end : end + len(TRAILER)] != TRAILER:
            raise RemoteProtocolError("The guest sent a frame without its end.")
        try:
            frame = Frame(
                type=FrameType(kind),
                flags=_known_flags(flags),
                source=Source(source),
                id=number,
                seq=seq,
                time_ns=time_ns,
                payload=bytes(self._buffer[_HEADER.size : end]),
            )
        except ValueError as error:
            raise RemoteProtocolError("The guest sent a frame of an unknown kind.") from error
        if frame.type not in self._types:
            raise RemoteProtocolError(f"The guest may not send {frame.type.name}.")
        del self._buffer[: end + len(TRAILER)]
        return frame

    def find_hello(self, nonce: bytes) -> bool:
        """Drop everything before the HELLO that repeats `nonce`. True when it is there."""
        at = self._buffer.find(nonce)
        if at < 0:
            del self._buffer[: max(0, len(self._buffer) - _HEADER.size - len(nonce))]
            return False
        start = at - _HEADER.size
        if start < 0 or self._buffer[start : start + _U32.size] != _U32.pack(MAGIC):
            raise RemoteProtocolError("The guest repeated our random bytes outside of a greeting.")
        del self._buffer[:start]
        return True


def _known_flags(flags: int) -> FrameFlag:
    if flags & ~FrameFlag.MORE:
        raise ValueError(f"unknown flags {flags:#x}")
    return FrameFlag(flags)


@dataclass(frozen=True, slots=True)
class Message:
    """A message: a JSON object, and bytes that it refers to."""

    body: Mapping[str, Any]
    blob: bytes = b""

    def pack(self) -> bytes:
        """Return it as it is cut into frames. Bytes that are not UTF-8 travel as lone surrogates (PEP 383)."""
        text = json.dumps(self.body, separators=(",", ":"), allow_nan=False).encode("ascii")
        return _U32.pack(len(text)) + text + self.blob

    @classmethod
    def unpack(cls, data: bytes) -> Message:
        """Read what a guest sent.

        Raises:
            RemoteProtocolError: it is no message.
        """
        if len(data) < _U32.size:
            raise RemoteProtocolError("The guest sent a message without a length.")
        (length,) = _U32.unpack_from(data)
        text = data[_U32.size : _U32.size + length]
        if len(text) != length:
            raise RemoteProtocolError("The guest sent a message that is shorter than it says.")
        try:
            body = json.loads(text.decode("utf-8", "surrogateescape"), parse_constant=_refuse)
        except (ValueError, RecursionError) as error:
            raise RemoteProtocolError("The guest sent a message that is not JSON.") from error
        if not isinstance(body, dict):
            raise RemoteProtocolError("The guest sent a message that is not an object.")
        return cls(body, data[_U32.size + length :])


def _refuse(name: str) -> object:
    raise ValueError(f"{name} is not JSON")


# --------------------------------------------------------------------------------------------------------------- events
@dataclass(frozen=True, slots=True)
class Hello:
    """The guest has answered: the session begins."""

    version: int
    body: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Reply:
    """The answer to the request with this id."""

    id: int
    message: Message


@dataclass(frozen=True, slots=True)
class Event:
    """Something happened in the guest. It is a hint: the state that it tells of can also be asked for."""

    message: Message


@dataclass(frozen=True, slots=True, kw_only=True)
class Data:
    """Bytes of a stream; `position` is behind them."""

    stream: int
    source: Source
    time_ns: int
    position: int
    data: bytes


@dataclass(frozen=True, slots=True)
class Credit:
    """More may be sent on a stream."""

    stream: int


@dataclass(frozen=True, slots=True)
class Ended:
    """The guest will send no more on a stream. `code` is the exit code, where it is the stream of a process."""

    stream: int
    code: int | None


@dataclass(frozen=True, slots=True)
class Reset:
    """A stream is gone, with the guest's reason."""

    stream: int
    reason: str


AgentEvent = Hello | Reply | Event | Data | Credit | Ended | Reset


@dataclass(slots=True)
class _Stream:
    received: int  # position behind the last byte that came
    granted: int  # position up to which the guest may send
    sent: int = 0
    allowed: int = 0  # position up to which we may send
    ended: bool = False  # the guest's direction
    closed: bool = False  # ours


@dataclass(slots=True)
class _Assembly:
    type: FrameType
    id: int
    data: bytearray = field(default_factory=bytearray)


class HostConnection:
    """Our side of one session. Feed it bytes, take events; ask it for bytes to send. It never blocks and does no I/O.

    Args:
        nonce: 16 random bytes, new for each session.
        max_streams: how many streams may be open at once.
    """

    def __init__(self, nonce: bytes | None = None, *, max_streams: int = 4096) -> None:
        self._nonce = os.urandom(16) if nonce is None else nonce
        self._parser = FrameParser(types=_FROM_GUEST)
        self._synced = False
        self._stale = 0
        self._requests: set[int] = set()
        self._last_request = 0
        self._last_stream = 0
        self._streams: dict[int, _Stream] = {}
        self._max_streams = max_streams
        self._sent = 0  # frames of messages
        self._received = 0
        self._assembly: _Assembly | None = None
        self._events: deque[AgentEvent] = deque()

    # ------------------------------------------------------------------------------------------------------ sending
    def begin(self) -> bytes:
        """Return the first bytes of the session."""
        sync = Frame(type=FrameType.SYNC, payload=_SYNC.pack(self._nonce, VERSION_MIN, VERSION_MAX))
        return PREAMBLE + encode(sync)

    def request(self, message: Message) -> tuple[int, list[bytes]]:
        """Return the id of a new request and its frames, which are sent one behind the other.

        Raises:
            DispatcherError: it is too large.
        """
        packed = message.pack()
        if len(packed) > MAX_REQUEST:
            raise RequestTooLarge(f"The request to the agent has {len(packed)} bytes, at most {MAX_REQUEST} are sent.")
        self._last_request += 1
        self._requests.add(self._last_request)
        frames = []
        for at in range(0, len(packed), MAX_PAYLOAD):
            self._sent += 1
            more = FrameFlag.MORE if at + MAX_PAYLOAD < len(packed) else FrameFlag.NONE
            frames.append(
                encode(
                    Frame(
                        type=FrameType.REQUEST,
                        flags=more,
                        id=self._last_request,
                        seq=self._sent,
                        payload=packed[at : at + MAX_PAYLOAD],
                    )
                )
            )
        return self._last_request, frames

    def open_stream(self, position: int = 0, window: int = WINDOW) -> int:
        """Choose the id of a new stream whose data begins at `position`. The request that opens it tells `window`."""
        if len(self._streams) >= self._max_streams:
            raise RequestTooLarge(f"{self._max_streams} streams to this guest are open already.")
        self._last_stream += 1
        self._streams[self._last_stream] = _Stream(received=position, granted=position + window)
        return self._last_stream

    def grant_if_low(self, stream: int, consumed: int, window: int = WINDOW) -> bytes:
        """Let the guest send a whole window beyond what was consumed, once half of its credit is used up, else b""."""
        state = self._streams.get(stream)
        if state is None or state.ended or state.granted - consumed > window // 2:
            return b""
        state.granted = consumed + window
        return encode(Frame(type=FrameType.CREDIT, id=stream, seq=state.granted))

    def sendable(self, stream: int) -> int:
        """How many bytes the guest takes now. Raises BrokenPipeError when it takes no more at all."""
        state = self._streams.get(stream)
        if state is None or state.closed:
            raise BrokenPipeError("the stream is closed")
        return state.allowed - state.sent

    def send_data(self, stream: int, data: bytes) -> bytes:
        """Return the frame of `data`, at most MAX_PAYLOAD and what `sendable` says."""
        state = self._streams[stream]
        assert len(data) <= min(MAX_PAYLOAD, state.allowed - state.sent)
        state.sent += len(data)
        return encode(Frame(type=FrameType.DATA, id=stream, seq=state.sent, payload=data))

    def end_stream(self, stream: int) -> bytes:
        """Close our direction. Idempotent."""
        state = self._streams.get(stream)
        if state is None or state.closed:
            return b""
        state.closed = True
        return encode(Frame(type=FrameType.END, id=stream, seq=state.sent))

    def reset_stream(self, stream: int) -> bytes:
        """Let go of a stream: what the guest still sends on it is dropped. Idempotent."""
        state = self._streams.pop(stream, None)
        if state is None:
            return b""
        return encode(Frame(type=FrameType.RESET, id=stream))

    # ---------------------------------------------------------------------------------------------------- receiving
    def receive(self, data: bytes) -> None:
        """Take bytes in, cut anywhere.

        Raises:
            RemoteProtocolError: the guest broke the protocol. The session is over.
            VersionMismatch: no version is shared.
        """
        self._parser.receive(data)
        if not self._synced and not self._find_hello(len(data)):
            return
        while (frame := self._parser.next_frame()) is not None:
            self._take(frame)

    def next_event(self) -> AgentEvent | None:
        """Return the next event, or None."""
        return self._events.popleft() if self._events else None

    def _find_hello(self, size: int) -> bool:
        self._stale += size
        if self._stale > MAX_STALE:
            raise RemoteProtocolError("The guest sends, but does not answer.")
        # Only our own nonce counts: whatever old frames hold, they cannot know it.
        if not self._parser.find_hello(self._nonce):
            return False
        self._synced = True
        return True

    def _take(self, frame: Frame) -> None:
        if frame.type is FrameType.HELLO:
            self._take_hello(frame)
        elif frame.type in _MESSAGES:
            self._take_message(frame)
        else:
            self._take_stream(frame)

    def _take_hello(self, frame: Frame) -> None:
        if len(frame.payload) < _HELLO.size or frame.payload[:16] != self._nonce:
            raise RemoteProtocolError("The guest said hello to somebody else.")
        if self._received or self._last_request or self._last_stream:
            raise RemoteProtocolError("The guest said hello twice.")
        _, version, low, high = _HELLO.unpack_from(frame.payload)
        if not VERSION_MIN <= version <= VERSION_MAX:
            raise VersionMismatch(
                f"The agent of the guest speaks the protocol versions {low} to {high}, this daemon {VERSION_MIN} to "
                f"{VERSION_MAX}: build the guest image anew, and start the pod again."
            )
        try:
            body = Message.unpack(frame.payload[_HELLO.size :]).body
        except RemoteProtocolError as error:
            raise RemoteProtocolError("The guest said hello without saying who it is.") from error
        self._events.append(Hello(version, body))

    def _take_message(self, frame: Frame) -> None:
        self._received += 1
        if frame.seq != self._received:
            raise RemoteProtocolError(f"The guest numbered a message {frame.seq} instead of {self._received}.")
        if frame.type is FrameType.REPLY and frame.id not in self._requests:
            raise RemoteProtocolError(f"The guest answered request {frame.id}, which does not wait.")
        if frame.type is FrameType.EVENT and frame.id:
            raise RemoteProtocolError("The guest gave an event the number of a request.")
        assembly = self._assembly or _Assembly(frame.type, frame.id)
        if (assembly.type, assembly.id) != (frame.type, frame.id):
            raise RemoteProtocolError("The guest mixed two messages.")
        assembly.data += frame.payload
        if len(assembly.data) > MAX_MESSAGE:
            raise RemoteProtocolError("The guest sent a message that is too large.")
        if frame.flags & FrameFlag.MORE:
            self._assembly = assembly
            return
        self._assembly = None
        message = Message.unpack(bytes(assembly.data))
        if frame.type is FrameType.REPLY:
            self._requests.discard(frame.id)
            self._events.append(Reply(frame.id, message))
        else:
            self._events.append(Event(message))

    def _take_stream(self, frame: Frame) -> None:
        if not 0 < frame.id <= self._last_stream:
            raise RemoteProtocolError(f"The guest used stream {frame.id}, which was never opened.")
        state = self._streams.get(frame.id)
        if state is None:
            return  # let go, and the guest had not heard of it yet
        if frame.type is FrameType.DATA:
            self._take_data(frame, state)
        elif frame.type is FrameType.CREDIT:
            if frame.seq > state.allowed:
                state.allowed = frame.seq
                self._events.append(Credit(frame.id))
        elif frame.type is FrameType.END:
            if state.ended or frame.seq != state.received:
                raise RemoteProtocolError("The guest ended a stream at a wrong position.")
            state.ended = True
            code = _U32.unpack(frame.payload)[0] if len(frame.payload) == _U32.size else None
            if code is not None and code > 255:
                raise RemoteProtocolError(f"The guest reported the exit code {code}.")
            self._events.append(Ended(frame.id, code))
        else:
            del self._streams[frame.id]
            self._events.append(Reset(frame.id, printable(frame.payload)))

    def _take_data(self, frame: Frame, state: _Stream) -> None:
        if state.ended or not frame.payload:
            raise RemoteProtocolError("The guest sent empty data, or data behind the end of a stream.")
        if frame.seq != state.received + len(frame.payload):
            raise RemoteProtocolError(f"The guest sent data at {frame.seq}, expected behind {state.received}.")
        if frame.seq > state.granted:
            raise RemoteProtocolError("The guest sent more than it may.")
        state.received = frame.seq
        self._events.append(
            Data(
                stream=frame.id,
                source=frame.source,
                time_ns=frame.time_ns,
                position=frame.seq,
                data=frame.payload,
            )
        )


class RequestTooLarge(DispatcherError):
    """More was asked of a guest than one request, or one session, can hold."""


def printable(data: bytes | str, limit: int = 500) -> str:
    """Return a guest's words, fit to be shown: one line, no control characters, not too long."""
    text = data.decode("utf-8", "replace") if isinstance(data, bytes) else data
    text = "".join(char if char.isprintable() else " " for char in text[: limit + 1])
    return text[:limit] + "..." if len(text) > limit else text
