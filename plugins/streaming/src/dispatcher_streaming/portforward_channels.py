"""Port-forward over WebSocket channels without I/O: two per port, data and error, one connection each.

The ports are known at once: those of the request, else those that the URL's query names. Message by message: the first
byte (or, in the base64 variants, the first digit) is the channel: 2i for the data of the i-th port, 2i+1 for its error.
Before anything else the server sends the port on both, as two bytes, the lower one first. There is no half-close.
Source: the kubelet's own protocol for clients without SPDY.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from urllib.parse import parse_qs

from dispatcher_streaming import messages
from dispatcher_streaming.portforward import Connect, Data, Event

PROTOCOLS = (
    "v4.channel.k8s.io",
    "v4.base64.channel.k8s.io",
    "channel.k8s.io",
    "base64.channel.k8s.io",
)
_MAX_QUERY_FIELDS = 128


def most_ports(protocol: str) -> int:
    """How many ports have channels of their own: 255 is no channel, and a digit names ten."""
    return 5 if messages.is_base64(protocol) else 127


def ports_of(query: str) -> tuple[int, ...] | None:
    """The ports that a query names, as `port=80&port=81` or `port=80,81`; None where that is no list of ports."""
    try:
        values = parse_qs(query, keep_blank_values=True, max_num_fields=_MAX_QUERY_FIELDS).get("port", [])
    except ValueError:
        return None
    words = [word for value in values for word in value.split(",")]
    if not all(word.isascii() and word.isdigit() and len(word) <= 5 for word in words):
        return None
    ports = tuple(int(word) for word in words)
    return ports if all(0 < port < 65536 for port in ports) else None


@dataclass(slots=True)
class ChannelForward:
    """One session. Send what `greeting` returns, act on `opening`, then feed `receive`; each item is one message."""

    ports: tuple[int, ...]
    protocol: str
    half_close_s: float = 0.0
    _open: set[str] = field(init=False)

    def __post_init__(self) -> None:
        self._open = {str(index) for index in range(len(self.ports))}

    @property
    def is_over(self) -> bool:
        """Whether no connection is left: then the server closes."""
        return not self._open

    def greeting(self) -> list[bytes]:
        """The port on each channel."""
        return [
            self._message(2 * index + half, port.to_bytes(2, "little"))
            for index, port in enumerate(self.ports)
            for half in (0, 1)
        ]

    def opening(self) -> list[Event]:
        """The connections to make."""
        return [Connect(str(index), port) for index, port in enumerate(self.ports)]

    def receive(self, message: bytes) -> tuple[list[Event], list[bytes]]:
        """Return what one message means, and what to send back. Raises ProtocolError."""
        if not message:
            return [], []
        channel, data = messages.split(message, self.protocol)
        index, is_error = divmod(channel, 2)
        if is_error or not data or str(index) not in self._open:
            return [], []
        return [Data(str(index), data)], []

    def expire(self) -> list[bytes]:
        """Nothing waits here for its other half."""
        return []

    def data(self, key: str, data: bytes) -> list[bytes]:
        """Bytes of the pod for the client."""
        return [self._message(2 * int(key), data)] if data and key in self._open else []

    def end_output(self, key: str) -> list[bytes]:  # noqa: ARG002 - there is no half-close
        """Nothing: see `end`."""
        return []

    def end(self, key: str) -> list[bytes]:
        """The connection is over. The client learns it when the last one is, from the close."""
        self._open.discard(key)
        return []

    def fail(self, key: str, message: str) -> list[bytes]:
        """The connection could not be made or broke: a sentence on its error channel."""
        if key not in self._open:
            return []
        self._open.discard(key)
        return [self._message(2 * int(key) + 1, message.encode())]

    def give_up(self, key: str) -> list[bytes]:
        """Break a connection off that does not take what the client sends."""
        return self.fail(key, "the pod does not take what is sent to this port")

    def _message(self, channel: int, data: bytes) -> bytes:
        return messages.join(channel, data, self.protocol)
