"""WebSocket messages of Kubernetes' channel protocols: the first byte names a channel; in base64 variants all is text."""

from __future__ import annotations

import base64

from dispatcher_streaming.spdy.connection import ProtocolError


def is_base64(protocol: str) -> bool:
    """True where messages are text: a digit for the channel, then base64."""
    return "base64" in protocol


def split(message: bytes, protocol: str) -> tuple[int, bytes]:
    """Return the channel and the content of a message that is not empty. Raises ProtocolError."""
    if not is_base64(protocol):
        return message[0], message[1:]
    if not 0x30 <= message[0] <= 0x39:
        raise ProtocolError("a message that does not begin with its channel")
    try:
        return message[0] - 0x30, base64.b64decode(message[1:], validate=True)
    except ValueError as cause:
        raise ProtocolError("a message that is not base64") from cause


def join(channel: int, data: bytes, protocol: str) -> bytes:
    """Return the message that carries this content."""
    if is_base64(protocol):
        return b"%d" % channel + base64.b64encode(data)
    return bytes([channel]) + data
