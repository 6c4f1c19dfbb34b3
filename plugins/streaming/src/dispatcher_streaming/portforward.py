"""Port-forward sessions over SPDY without I/O: pairs of streams by request id, one pair per forwarded connection.

A client opens an error stream (and half-closes it at once), then a data stream, both with the headers `port` and
`requestid`. An old client sends no request id: its error stream n then goes with its data stream n + 2.
What may wait is bounded: a pair whose other half does not come has a deadline, and of data that comes before its error
stream a little is kept. Worst case per session: 1024 streams (`spdy.connection`) with 16 KiB each, 16 MiB.
Source: the portforward.k8s.io protocol as client-go speaks it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
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
TUNNELS = ("SPDY/3.1+portforward.k8s.io", "v2.portforward.k8s.io")  # the same SPDY inside a WebSocket
PAIR_S = 30.0  # for the second stream of a connection to come
HALF_CLOSE_S = 1.0  # without a byte from a client to a pod that has ended its own side
_MAX_EARLY = 16 * 1024


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
    since_s: float
    error_id: int = 0
    data_id: int = 0
    early: bytearray = field(default_factory=bytearray)  # data that came before the error stream
    early_end: bool = False


@dataclass(slots=True)
class PortForward:
    """One session. Feed `receive`; send all bytes that any method returns, in order.

    Args:
        clock_s: a monotonic clock, in seconds.
    """

    connection: Connection = field(default_factory=Connection)
    clock_s: Callable[[], float] = time.monotonic
    half_close_s: float = HALF_CLOSE_S
    is_over: bool = False  # a client may open connections until it leaves
    _pairs: dict[str, _Pair] = field(default_factory=dict)
    _halves: dict[str, None] = field(default_factory=dict)  # of pairs, the oldest first
    _keys: dict[int, str] = field(default_factory=dict)  # of data streams
    _errors: dict[int, str] = field(default_factory=dict)  # of error streams

    def receive(self, received: bytes) -> tuple[list[Event], bytes]:
        """Return what the peer's bytes mean, and what to send back. Raises ProtocolError."""
        events: list[Event] = []
        output = bytearray()
        self.connection.feed(received)
        for event in self.connection.events():
            if isinstance(event, StreamOpened):
                output += self._open(event, events)
            elif isinstance(event, DataReceived):
                output += self._data(event, events)
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
        pair = self._pairs.get(key)
        if pair is None:
            pair = self._pairs[key] = _Pair(port, self.clock_s())
            self._halves[key] = None
        taken = pair.error_id if kind == "error" else pair.data_id
        if taken or pair.port != port:
            return self.connection.reset(event.stream_id, Status.REFUSED_STREAM)
        if kind == "error":
            pair.error_id = event.stream_id
            self._errors[event.stream_id] = key
        else:
            pair.data_id = event.stream_id
            pair.early_end = event.fin
            self._keys[event.stream_id] = key
        reply = self.connection.accept(event.stream_id)
        if pair.error_id and pair.data_id:
            del self._halves[key]
            events.append(Connect(key, port))
            if pair.early:
                events.append(Data(key, bytes(pair.early)))
                pair.early.clear()
            if pair.early_end:
                events.append(End(key))
        return reply

    def _data(self, event: DataReceived, events: list[Event]) -> bytes:
        key = self._keys.get(event.stream_id)
        if key is None:
            return b""
        if key in self._halves:
            pair = self._pairs[key]
            pair.early += event.data
            pair.early_end = pair.early_end or event.fin
            if len(pair.early) > _MAX_EARLY:
                return self.fail(key, "data came before the error stream of its connection")
            return b""
        if event.data:
            events.append(Data(key, event.data))
        if event.fin:
            events.append(End(key))
        return b""

    def expire(self) -> bytes:
        """Give up the pairs whose second stream did not come in time. Call it about once a second."""
        output = bytearray()
        while self._halves:
            key = next(iter(self._halves))
            if self._pairs[key].since_s + PAIR_S > self.clock_s():
                break
            output += self.fail(key, f"the other stream of this connection did not come within {PAIR_S:g} s")
        return bytes(output)

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

    def end_output(self, key: str) -> bytes:
        """The pod will send no more; the client still may."""
        pair = self._pairs.get(key)
        return self.connection.send(pair.data_id, b"", fin=True) if pair is not None and pair.data_id else b""

    def end(self, key: str) -> bytes:
        """The connection is over: finish the data stream, then the error stream, for whose end the client waits."""
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

    def give_up(self, key: str) -> bytes:
        """Break a connection off that does not take what the client sends. Without a sentence on its error stream:
        for that clients close their whole session.
        """
        pair = self._forget(key)
        if pair is None:
            return b""
        reset = self.connection.reset(pair.data_id, Status.CANCEL)
        return reset + self.connection.send(pair.error_id, b"", fin=True)

    def _forget(self, key: str) -> _Pair | None:
        pair = self._pairs.pop(key, None)
        if pair is not None:
            self._keys.pop(pair.data_id, None)
            self._errors.pop(pair.error_id, None)
            self._halves.pop(key, None)
        return pair


def _port(headers: Mapping[str, str]) -> int | None:
    text = headers.get("port", "")
    if not (text.isascii() and text.isdigit() and len(text) <= 5):
        return None
    port = int(text)
    return port if 0 < port < 65536 else None
