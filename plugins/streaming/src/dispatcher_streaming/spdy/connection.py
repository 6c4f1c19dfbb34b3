"""One SPDY/3.1 connection, either side, without I/O: `receive(bytes)` gives events, every act gives bytes to send.

Theory of operation. A stream is open from SYN_STREAM until both sides have sent FIN, or either has reset it. Each half
is a flag; a frame for a half that is closed is answered as the draft says (DATA after FIN resets the stream) or ignored
(anything for a stream that is gone: the peer may not know yet). PINGs of the peer are echoed here. What the peer may
make us remember is bounded: at most MAX_STREAMS streams, each with two flags and its headers.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from dispatcher_streaming.spdy.frames import (
    FIN,
    ControlFrame,
    DataPiece,
    FrameError,
    FrameReader,
    FrameType,
    Status,
    control,
    data,
)
from dispatcher_streaming.spdy.headers import MAX_BLOCK, HeaderCompressor, HeaderDecompressor, HeaderError

# A forwarded connection needs two streams, so 1024 of them carry 512 connections in one session. Worst case per session:
# 1024 streams x 300 bytes of state, plus the headers kept: 0.3 MiB + 1 MiB. (1024 x 64 KiB inflated would be 64 MiB,
# hence the total; a real stream brings under 100 bytes.)
MAX_STREAMS = 1024
MAX_HEADER_BYTES = 1 << 20
_ID = 0x7FFF_FFFF


@dataclass(frozen=True, slots=True)
class StreamOpened:
    """The peer opened a stream. Answer with `accept` or `reset` before any data."""

    stream_id: int
    headers: Mapping[str, str]
    fin: bool


@dataclass(frozen=True, slots=True)
class StreamAccepted:
    """The peer accepted a stream of ours."""

    stream_id: int
    headers: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class DataReceived:
    """Bytes on a stream; `fin` means that the peer will send no more on it."""

    stream_id: int
    data: bytes
    fin: bool


@dataclass(frozen=True, slots=True)
class StreamReset:
    """The peer reset a stream: nothing more comes or goes on it."""

    stream_id: int
    status: int


@dataclass(frozen=True, slots=True)
class PongReceived:
    """Our ping came back."""

    ping_id: int


@dataclass(frozen=True, slots=True)
class GoingAway:
    """The peer opens no more streams and is about to close."""

    status: int


Event = StreamOpened | StreamAccepted | DataReceived | StreamReset | PongReceived | GoingAway


class ProtocolError(ValueError):
    """The peer broke the protocol: close the connection."""


@dataclass(slots=True)
class _Stream:
    ours: bool
    replied: bool = False
    peer_done: bool = False
    we_done: bool = False
    header_bytes: int = 0


@dataclass(slots=True)
class Connection:
    """One end of a connection. Methods that act return the bytes to send; `receive` queues its own answers in
    `take_output`.

    Args:
        is_client: a client opens streams with odd ids, a server with even ones.
    """

    is_client: bool = False
    max_streams: int = MAX_STREAMS
    max_header_block: int = MAX_BLOCK
    _reader: FrameReader = field(default_factory=FrameReader)
    _compressor: HeaderCompressor = field(default_factory=HeaderCompressor)
    _decompressor: HeaderDecompressor = field(init=False)
    _streams: dict[int, _Stream] = field(default_factory=dict)
    _output: bytearray = field(default_factory=bytearray)
    _last_peer_id: int = 0
    _next_id: int = field(init=False)
    _header_bytes: int = 0
    _went_away: bool = False

    def __post_init__(self) -> None:
        self._decompressor = HeaderDecompressor(self.max_header_block)
        self._next_id = 1 if self.is_client else 2

    @property
    def stream_count(self) -> int:
        """How many streams are open in at least one direction."""
        return len(self._streams)

    def is_open(self, stream_id: int) -> bool:
        """True while we may still send on the stream."""
        stream = self._streams.get(stream_id)
        return stream is not None and not stream.we_done

    # -------------------------------------------------------------------------------------------------------- receive
    def receive(self, received: bytes) -> list[Event]:
        """Take bytes of the peer and return what they mean, in order.

        Raises:
            ProtocolError: the connection is beyond repair.
        """
        self.feed(received)
        return list(self.events())

    def feed(self, received: bytes) -> None:
        """Take bytes of the peer; `events` reads them."""
        self._reader.feed(received)

    def events(self) -> Iterator[Event]:
        """Yield what the bytes fed so far mean, one by one, so that acts upon an event come before the next one is
        read: what a peer is allowed does not depend on how the network cuts its bytes.

        Raises:
            ProtocolError: the connection is beyond repair.
        """
        try:
            while (frame := self._reader.next()) is not None:
                event = self._on_data(frame) if isinstance(frame, DataPiece) else self._on_control(frame)
                if event is not None:
                    yield event
        except (FrameError, HeaderError) as error:
            raise ProtocolError(str(error)) from error

    def take_output(self) -> bytes:
        """Return and forget the answers that `receive` made (pings, resets)."""
        output = bytes(self._output)
        self._output.clear()
        return output

    def _on_data(self, piece: DataPiece) -> Event | None:
        stream = self._streams.get(piece.stream_id)
        if stream is None:
            return None  # it is gone already; the peer may not know
        if stream.peer_done:
            self._output += self.reset(piece.stream_id, Status.PROTOCOL_ERROR)
            return StreamReset(piece.stream_id, Status.PROTOCOL_ERROR)
        if piece.fin:
            self._peer_done(piece.stream_id, stream)
        elif not piece.data:
            return None
        return DataReceived(piece.stream_id, piece.data, piece.fin)

    def _on_control(self, frame: ControlFrame) -> Event | None:
        if frame.type == FrameType.SYN_STREAM:
            return self._on_syn_stream(frame)
        if frame.type == FrameType.SYN_REPLY:
            return self._on_syn_reply(frame)
        if frame.type == FrameType.RST_STREAM:
            stream_id, status = _unpack(">II", frame.body)
            return StreamReset(stream_id & _ID, status) if self._drop(stream_id & _ID) else None
        if frame.type == FrameType.PING:
            (ping_id,) = _unpack(">I", frame.body)
            if ping_id % 2 == (1 if self.is_client else 0):
                return PongReceived(ping_id)
            self._output += control(FrameType.PING, frame.body[:4])
            return None
        if frame.type == FrameType.GOAWAY:
            _, status = _unpack(">II", frame.body)
            return GoingAway(status)
        if frame.type == FrameType.HEADERS:
            self._decompressor.decompress(frame.body[4:])  # for the shared window; nobody sends these with a meaning
        # SETTINGS, WINDOW_UPDATE and types of a later day: the peers that we serve have no flow control.
        return None

    def _on_syn_stream(self, frame: ControlFrame) -> Event | None:
        if len(frame.body) < 10:
            raise ProtocolError("a SYN_STREAM is cut short")
        stream_id = struct.unpack_from(">I", frame.body)[0] & _ID
        headers = self._decompressor.decompress(frame.body[10:])
        if stream_id % 2 == (1 if self.is_client else 0) or stream_id <= self._last_peer_id:
            raise ProtocolError("a SYN_STREAM has an id that is not the peer's next")
        self._last_peer_id = stream_id
        size = sum(len(name) + len(value) for name, value in headers.items())
        if len(self._streams) >= self.max_streams or self._header_bytes + size > MAX_HEADER_BYTES or self._went_away:
            self._output += control(FrameType.RST_STREAM, struct.pack(">II", stream_id, Status.REFUSED_STREAM))
            return None
        fin = bool(frame.flags & FIN)
        self._streams[stream_id] = _Stream(ours=False, peer_done=fin, header_bytes=size)
        self._header_bytes += size
        return StreamOpened(stream_id, headers, fin)

    def _on_syn_reply(self, frame: ControlFrame) -> Event | None:
        if len(frame.body) < 4:
            raise ProtocolError("a SYN_REPLY is cut short")
        stream_id = struct.unpack_from(">I", frame.body)[0] & _ID
        headers = self._decompressor.decompress(frame.body[4:])
        stream = self._streams.get(stream_id)
        if stream is None:
            return None
        if not stream.ours or stream.replied:
            raise ProtocolError("a SYN_REPLY that nothing asked for")
        stream.replied = True
        if frame.flags & FIN:
            self._peer_done(stream_id, stream)
        return StreamAccepted(stream_id, headers)

    # ------------------------------------------------------------------------------------------------------------- act
    def open(self, headers: Mapping[str, str], *, fin: bool = False) -> tuple[int, bytes]:
        """Open a stream; returns its id and the bytes. Send data only after StreamAccepted: peers drop it before."""
        stream_id, self._next_id = self._next_id, self._next_id + 2
        self._streams[stream_id] = _Stream(ours=True, we_done=fin)
        body = struct.pack(">IIBB", stream_id, 0, 0, 0) + self._compressor.compress(headers)
        return stream_id, control(FrameType.SYN_STREAM, body, FIN if fin else 0)

    def accept(self, stream_id: int) -> bytes:
        """Accept a stream of the peer, with no headers. Nothing when the peer reset it in the same breath."""
        stream = self._streams.get(stream_id)
        if stream is None:
            return b""
        stream.replied = True
        return control(FrameType.SYN_REPLY, struct.pack(">I", stream_id) + self._compressor.compress({}))

    def send(self, stream_id: int, payload: bytes, *, fin: bool = False) -> bytes:
        """Send data; nothing on a stream that is closed for us (the peer reset it while we worked)."""
        stream = self._streams.get(stream_id)
        if stream is None or stream.we_done:
            return b""
        if fin:
            stream.we_done = True
            if stream.peer_done:
                self._drop(stream_id)
        return data(stream_id, payload, fin=fin)

    def reset(self, stream_id: int, status: Status = Status.CANCEL) -> bytes:
        """Reset a stream. Nothing when it is gone already."""
        if not self._drop(stream_id):
            return b""
        return control(FrameType.RST_STREAM, struct.pack(">II", stream_id, status))

    def ping(self, ping_id: int) -> bytes:
        """Ask for a sign of life; a client's ids are odd, a server's even."""
        return control(FrameType.PING, struct.pack(">I", ping_id))

    def nothing(self) -> bytes:
        """A frame that means nothing and asks for no answer: SETTINGS without a setting. A PING would ask for one, and
        a peer whose writes are held back would then stop reading too.
        """
        return control(FrameType.SETTINGS, struct.pack(">I", 0))

    def go_away(self, status: int = 0) -> bytes:
        """Say that we take no more streams. Idempotent: the second time it is nothing."""
        if self._went_away:
            return b""
        self._went_away = True
        return control(FrameType.GOAWAY, struct.pack(">II", self._last_peer_id, status))

    def _peer_done(self, stream_id: int, stream: _Stream) -> None:
        stream.peer_done = True
        if stream.we_done:
            self._drop(stream_id)

    def _drop(self, stream_id: int) -> bool:
        stream = self._streams.pop(stream_id, None)
        if stream is None:
            return False
        self._header_bytes -= stream.header_bytes
        return True


def _unpack(form: str, body: bytes) -> tuple[int, ...]:
    if len(body) < struct.calcsize(form):
        raise ProtocolError("a control frame is cut short")
    return struct.unpack_from(form, body)
