"""SPDY/3.1 frames: the bytes of each, and a reader that never holds more than one control frame.

Control frame: 0x8003, type (16 bits), flags (8), length (24), body. Data frame: stream id (31 bits), flags (8),
length (24), payload. Everything big endian. A data frame of any size passes in pieces, as its bytes arrive.
Source: the SPDY/3.1 draft, section 2.2, and what moby/spdystream really sends (no SETTINGS, no flow control).
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from enum import IntEnum

VERSION = 3
FIN = 0x01
HEADER = 8
MAX_CONTROL = 64 * 1024  # compressed header blocks included
MAX_DATA = (1 << 24) - 1
_CONTROL = 0x8000_0000


class FrameType(IntEnum):
    """Types of control frames."""

    SYN_STREAM = 1
    SYN_REPLY = 2
    RST_STREAM = 3
    SETTINGS = 4
    PING = 6
    GOAWAY = 7
    HEADERS = 8
    WINDOW_UPDATE = 9


class Status(IntEnum):
    """Status codes of RST_STREAM."""

    PROTOCOL_ERROR = 1
    INVALID_STREAM = 2
    REFUSED_STREAM = 3
    UNSUPPORTED_VERSION = 4
    CANCEL = 5
    INTERNAL_ERROR = 6


class FrameError(ValueError):
    """Bytes that are no frame of ours: the connection cannot go on."""


@dataclass(frozen=True, slots=True)
class ControlFrame:
    """A whole control frame."""

    type: int
    flags: int
    body: bytes


@dataclass(frozen=True, slots=True)
class DataPiece:
    """A piece of a data frame; `fin` stands on the last one of a frame that ends its stream."""

    stream_id: int
    data: bytes
    fin: bool


class FrameReader:
    """Turns bytes, cut anywhere, into frames. `feed` then `next` until it returns None."""

    def __init__(self, max_control: int = MAX_CONTROL) -> None:
        self._max_control = max_control
        self._buffer = bytearray()
        self._stream_id = 0
        self._left = 0  # of the payload of the current data frame
        self._fin = False

    def feed(self, data: bytes) -> None:
        """Take bytes from the peer. The caller bounds them: one read of a socket at a time."""
        self._buffer += data

    def next(self) -> ControlFrame | DataPiece | None:
        """Return what the bytes so far hold, or None: more is needed.

        Raises:
            FrameError: another version, or a control frame that is too large.
        """
        if self._left:
            return self._take_piece()
        if len(self._buffer) < HEADER:
            return None
        first, second = struct.unpack_from(">II", self._buffer)
        flags, length = second >> 24, second & 0xFF_FFFF
        if first & _CONTROL:
            return self._take_control(first, flags, length)
        del self._buffer[:HEADER]
        self._stream_id, self._left, self._fin = first, length, bool(flags & FIN)
        if length == 0:
            return DataPiece(self._stream_id, b"", self._fin)
        return self._take_piece()

    def _take_control(self, first: int, flags: int, length: int) -> ControlFrame | None:
        if (first >> 16) & 0x7FFF != VERSION:
            raise FrameError("a frame of another SPDY version")
        if length > self._max_control:
            raise FrameError("a control frame is too large")
        if len(self._buffer) < HEADER + length:
            return None
        body = bytes(self._buffer[HEADER : HEADER + length])
        del self._buffer[: HEADER + length]
        return ControlFrame(first & 0xFFFF, flags, body)

    def _take_piece(self) -> DataPiece | None:
        if not self._buffer:
            return None
        data = bytes(self._buffer[: self._left])
        del self._buffer[: len(data)]
        self._left -= len(data)
        return DataPiece(self._stream_id, data, self._fin and self._left == 0)


def control(frame_type: FrameType, body: bytes, flags: int = 0) -> bytes:
    """Return the bytes of a control frame."""
    return struct.pack(">II", _CONTROL | VERSION << 16 | frame_type, flags << 24 | len(body)) + body


def data(stream_id: int, payload: bytes, *, fin: bool = False) -> bytes:
    """Return the bytes of a data frame."""
    if len(payload) > MAX_DATA:
        raise ValueError("a data frame holds less than 16 MiB")
    return struct.pack(">II", stream_id, (FIN if fin else 0) << 24 | len(payload)) + payload
