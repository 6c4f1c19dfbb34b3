"""Port-forward sessions over SPDY without I/O: pairs of streams by request id, one pair per forwarded connection.

A client opens an error stream (and half-closes it at once), then a data stream, both with the headers `port` and
`requestid`. An old client sends no request id: its error stream n then goes with its data stream n + 2.
Source: the portforward.k8s.io protocol as client-go speaks it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from dispatcher_streaming.spdy.connection import (
    Connection,
    DataReceived,
    GoingAway,
    StreamOpened,
    StreamReset,
)
from dispatcher_streaming.spdy.frames import Status

PROTOCOL = "portforward.k8s.io"
TUNNEL = "SPDY/3.1+portforward.k8s.io"


@dataclass(frozen=True, slots=True)
class Connect:
    """Both streams of a connection stand: connect to this port of the pod. `key` names the connection."""

    key: str
    port: int


@dataclass(frozen=True, slots=True)
class Data:
    """Bytes for a connection."""

    key: str
    data: bytes


@dataclass(frozen=True, slots=True)
class End:
    """The client will send no more on a connection."""

    key: str


@dataclass(frozen=True, slots=True)
class Reset:
    """The client gave up a connection."""

    key: str


@dataclass(frozen=True, slots=True)
class Gone:
    """The client is leaving."""


Event = Connect | Data | End | Reset | Gone


@dataclass(slots=True)
class _Pair:
    port: int
    error_id: int = 0
    data_id: int = 0


@dataclass(slots=True)
class PortForward:
    """One session. Feed `receive`; send all bytes that any method returns, in order."""

    connection: Connection = field(default_factory=Connection)
    _pairs: dict[str, _Pair] = field(default_factory=dict)
    _keys: dict[int, str] = field(default_factory=dict)  # of data streams
    _errors: dict[int, str] = field(default_factory=dict)  # of error streams

    def receive(self, received: bytes) -> tuple[list[Event], bytes]:
        """Return what the peer's bytes mean, and what to send back. Raises ProtocolError."""
        events: list[Event] = []
        output = bytearray()
        for event in self.connection.receive(received):
            if isinstance(event, StreamOpened):
                output += self._open(event, events)
            elif isinstance(event, DataReceived):
                key = self._keys.get(event.stream_id)
                if key is not None:
                    if event.data:
                        events.append(Data(key, event.data))
                    if event.fin:
                        events.append(End(key))
            elif isinstance(event, StreamReset):
                output += self._reset(event.stream_id, events)
            elif isinstance(event, GoingAway):
                events.append(Gone())
        return events, bytes(output) + self.connection.take_output()

    def _open(self, event: StreamOpened, events: list[Event]) -> bytes:
        kind, port = event.headers.get("streamtype", ""), _port(event.headers)
        if kind not in ("error", "data") or port is None:
            return self.connection.reset(event.stream_id, Status.REFUSED_STREAM)
        default = event.stream_id if kind == "error" else event.stream_id - 2
        key = event.headers.get("requestid") or f"stream {default}"
        pair = self._pairs.setdefault(key, _Pair(port))
        taken = pair.error_id if kind == "error" else pair.data_id
        if taken or pair.port != port:
            return self.connection.reset(event.stream_id, Status.REFUSED_STREAM)
        if kind == "error":
            pair.error_id = event.stream_id
            self._errors[event.stream_id] = key
        else:
            pair.data_id = event.stream_id
            self._keys[event.stream_id] = key
        if pair.error_id and pair.data_id:
            events.append(Connect(key, port))
        return self.connection.accept(event.stream_id)

    def _reset(self, stream_id: int, events: list[Event]) -> bytes:
        """The client reset one stream. The other one must not stay: a client waits for the end of its error stream."""
        key = self._keys.get(stream_id) or self._errors.get(stream_id)
        pair = self._pairs.get(key) if key is not None else None
        if key is None or pair is None:
            return b""
        if stream_id == pair.error_id and pair.data_id:
            return b""  # only that nobody listens to an error any more: the connection goes on
        if pair.error_id and pair.data_id:
            events.append(Reset(key))
        return self.end(key)

    def data(self, key: str, data: bytes) -> bytes:
        """Bytes of the pod for the client."""
        pair = self._pairs.get(key)
        return self.connection.send(pair.data_id, data) if pair is not None and pair.data_id else b""

    def end(self, key: str) -> bytes:
        """The pod's side ended: finish the data stream, then the error stream, for whose end the client waits."""
        pair = self._forget(key)
        if pair is None:
            return b""
        return b"".join(
            self.connection.send(stream_id, b"", fin=True) for stream_id in (pair.data_id, pair.error_id) if stream_id
        )

    def fail(self, key: str, message: str) -> bytes:
        """The connection could not be made or broke: a sentence on the error stream, then both are closed."""
        pair = self._forget(key)
        if pair is None:
            return b""
        parts = []
        if pair.error_id:
            parts.append(self.connection.send(pair.error_id, message.encode(), fin=True))
        parts += [self.connection.reset(i, Status.CANCEL) for i in (pair.data_id, pair.error_id) if i]
        return b"".join(parts)

    def _forget(self, key: str) -> _Pair | None:
        pair = self._pairs.pop(key, None)
        if pair is not None:
            self._keys.pop(pair.data_id, None)
            self._errors.pop(pair.error_id, None)
        return pair


def _port(headers: Mapping[str, str]) -> int | None:
    text = headers.get("port", "")
    if not (text.isascii() and text.isdigit() and len(text) <= 5):
        return None
    port = int(text)
    return port if 0 < port < 65536 else None
