"""Exec and attach sessions without I/O: which channel means what, and how an exit is told. Two carriers, one meaning.

`SpdyCommand` speaks remotecommand v1 to v4 over SPDY streams, `WebSocketCommand` v1, v4 and v5 over messages whose first
byte is the channel. Both turn what the peer sends into the same session events.
Source: KEP-4006, and the behaviour of the Kubernetes clients (channels 0 to 4 and 255, `metav1.Status` as JSON).
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from dispatcher.api import ExecStream
from dispatcher_streaming import messages
from dispatcher_streaming.spdy.connection import (
    Connection,
    DataReceived,
    GoingAway,
    StreamOpened,
    StreamReset,
)
from dispatcher_streaming.spdy.frames import Status

SPDY_PROTOCOLS = (
    "v4.channel.k8s.io",
    "v3.channel.k8s.io",
    "v2.channel.k8s.io",
    "channel.k8s.io",
)
WEBSOCKET_PROTOCOLS = (
    "v5.channel.k8s.io",
    "v4.channel.k8s.io",
    "v4.base64.channel.k8s.io",
    "channel.k8s.io",
    "base64.channel.k8s.io",
)
CHANNELS = {"stdin": 0, "stdout": 1, "stderr": 2, "error": 3, "resize": 4}
_CLOSE = 255
_MAX_RESIZE = 1024  # one JSON object of a size; a real one has 30 bytes


@dataclass(frozen=True, slots=True)
class Ready:
    """All channels stand: the process may be started."""


@dataclass(frozen=True, slots=True)
class StdinData:
    """Bytes for the process."""

    data: bytes


@dataclass(frozen=True, slots=True)
class StdinEnd:
    """The client half-closed its input."""


@dataclass(frozen=True, slots=True)
class Resize:
    """The client's terminal has this size, in characters."""

    width: int
    height: int


@dataclass(frozen=True, slots=True)
class Gone:
    """The client is leaving."""


Event = Ready | StdinData | StdinEnd | Resize | Gone


def version_of(protocol: str) -> int:
    """Return 1 to 5 for a sub-protocol's name."""
    return int(protocol[1]) if protocol.startswith("v") else 1


def success() -> bytes:
    """The status of an exit with code 0, for v4 and v5."""
    return b'{"metadata":{},"status":"Success"}'


def failure(exit_code: int) -> bytes:
    """The status of another exit code, for v4 and v5: clients read the code as text in `details.causes`."""
    return json.dumps(
        {
            "metadata": {},
            "status": "Failure",
            "message": f"command terminated with non-zero exit code: exit status {exit_code}",
            "reason": "NonZeroExitCode",
            "details": {"causes": [{"reason": "ExitCode", "message": str(exit_code & 0xFF)}]},
        }
    ).encode()


def error(message: str) -> bytes:
    """The status of a failure that is no exit."""
    return json.dumps(
        {
            "metadata": {},
            "status": "Failure",
            "message": f"Internal error occurred: {message}",
            "reason": "InternalError",
            "details": {"causes": [{"message": message}]},
            "code": 500,
        }
    ).encode()


def status_bytes(version: int, exit_code: int | None, message: str) -> bytes:
    """What the error channel carries at the end: JSON from v4 on, before that text, and nothing on success."""
    if version >= 4:
        if message:
            return error(message)
        return failure(exit_code) if exit_code else success()
    if message:
        return message.encode()
    return f"command terminated with exit code {exit_code}".encode() if exit_code else b""


class ResizeReader:
    """Reads concatenated JSON objects {"Width":80,"Height":24} cut anywhere; keys in any case, odd sizes ignored."""

    def __init__(self) -> None:
        self._text = bytearray()
        self._skipping = False  # the object at hand is too long: nothing of it is kept

    def feed(self, data: bytes) -> list[Resize]:
        """Return the sizes that are complete. Of what can never become one nothing is kept."""
        sizes = []
        *pieces, rest = data.split(b"}")
        for piece in pieces:
            self._keep(piece)
            size = None if self._skipping else _parse_size(bytes(self._text) + b"}")
            self._text.clear()
            self._skipping = False
            if size is not None:
                sizes.append(size)
        self._keep(rest)
        return sizes

    def _keep(self, piece: bytes) -> None:
        self._skipping = self._skipping or len(self._text) + len(piece) > _MAX_RESIZE
        if self._skipping:
            self._text.clear()
        else:
            self._text += piece


_USUAL_SIZE = re.compile(rb'\s*\{"Width":([1-9][0-9]{0,4}),"Height":([1-9][0-9]{0,4})\}')


def _parse_size(piece: bytes) -> Resize | None:
    usual = _USUAL_SIZE.fullmatch(piece)  # as clients write it: four times as fast as JSON in general
    if usual is not None and (width := int(usual[1])) < 65536 and (height := int(usual[2])) < 65536:
        return Resize(width, height)
    try:
        found = json.loads(piece)
    except (ValueError, RecursionError):
        return None
    if not isinstance(found, dict):
        return None
    lower: Mapping[str, Any] = {str(key).lower(): value for key, value in found.items()}
    columns, rows = lower.get("width"), lower.get("height")
    if type(columns) is not int or type(rows) is not int or not (0 < columns < 65536 and 0 < rows < 65536):
        return None  # a JSON true is an int in Python, but no width
    return Resize(columns, rows)


def expected_streams(request: ExecStream, version: int) -> frozenset[str]:
    """The streams that the client opens, by their `streamtype`."""
    names = {"error"}
    names |= {name for name in ("stdin", "stdout") if getattr(request, name)}
    if request.stderr and not request.tty:
        names.add("stderr")
    if request.tty and version >= 3:
        names.add("resize")
    return frozenset(names)


@dataclass(slots=True)
class SpdyCommand:
    """One exec or attach over SPDY. Feed `receive`; send all bytes that any method returns, in order."""

    request: ExecStream
    version: int
    connection: Connection = field(default_factory=Connection)
    _ids: dict[str, int] = field(default_factory=dict)
    _names: dict[int, str] = field(default_factory=dict)
    _ready: bool = False
    _resize: ResizeReader = field(default_factory=ResizeReader)

    def receive(self, received: bytes) -> tuple[list[Event], bytes]:
        """Return what the peer's bytes mean, and what to send back. Raises ProtocolError."""
        events: list[Event] = []
        output = bytearray()
        self.connection.feed(received)
        for event in self.connection.events():
            if isinstance(event, StreamOpened):
                output += self._open(event, events)
            elif isinstance(event, DataReceived):
                self._data(event, events)
            elif isinstance(event, StreamReset):
                if self._names.get(event.stream_id) == "stdin":
                    events.append(StdinEnd())
            elif isinstance(event, GoingAway):
                events.append(Gone())
        return events, bytes(output) + self.connection.take_output()

    def _open(self, event: StreamOpened, events: list[Event]) -> bytes:
        name = event.headers.get("streamtype", "")
        wanted = expected_streams(self.request, self.version)
        if name not in wanted or name in self._ids:
            return self.connection.reset(event.stream_id, Status.REFUSED_STREAM)
        self._ids[name], self._names[event.stream_id] = event.stream_id, name
        reply = self.connection.accept(event.stream_id)
        if not self._ready and set(self._ids) == wanted:
            self._ready = True
            events.append(Ready())
        if event.fin and name == "stdin":
            events.append(StdinEnd())
        return reply

    def _data(self, event: DataReceived, events: list[Event]) -> None:
        name = self._names.get(event.stream_id)
        if name == "stdin":
            if event.data:
                events.append(StdinData(event.data))
            if event.fin:
                events.append(StdinEnd())
        elif name == "resize":
            events += self._resize.feed(event.data)

    def output(self, stream: str, data: bytes) -> bytes:
        """Bytes of the process for the client. Nothing where the client did not ask for this stream."""
        stream_id = self._ids.get(stream)
        return self.connection.send(stream_id, data) if stream_id is not None and data else b""

    def finish(self, exit_code: int | None, message: str = "") -> bytes:
        """End the session: FIN both outputs, then the status, then reset what is open, then GOAWAY.

        A client waits for the end of its outputs before it reads the status; any of the three forgotten hangs it.
        """
        parts = [
            self.connection.send(self._ids[name], b"", fin=True) for name in ("stdout", "stderr") if name in self._ids
        ]
        if "error" in self._ids:
            parts.append(
                self.connection.send(self._ids["error"], status_bytes(self.version, exit_code, message), fin=True)
            )
        parts += [self.connection.reset(stream_id, Status.CANCEL) for stream_id in self._ids.values()]
        parts.append(self.connection.go_away())
        return b"".join(parts)


@dataclass(slots=True)
class WebSocketCommand:
    """One exec or attach over WebSocket messages. The caller frames what `output` and `finish` return, one each."""

    request: ExecStream
    protocol: str
    _resize: ResizeReader = field(default_factory=ResizeReader)

    @property
    def version(self) -> int:
        """The version that the sub-protocol stands for."""
        return version_of(self.protocol)

    def greeting(self) -> list[bytes]:
        """An empty message on the lowest channel that we write, at once: some clients wait for it."""
        lowest = next((name for name in ("stdout", "stderr") if getattr(self.request, name)), "error")
        return [self._message(lowest, b"")]

    def receive(self, message: bytes) -> list[Event]:
        """Return what one message means. Raises ProtocolError."""
        if not message:
            return []
        channel, data = messages.split(message, self.protocol)
        if channel == CHANNELS["stdin"] and self.request.stdin:
            return [StdinData(data)] if data else []
        if channel == CHANNELS["resize"]:
            return list(self._resize.feed(data))
        if channel == _CLOSE and self.version >= 5 and self.request.stdin and data[:1] == b"\x00":
            return [StdinEnd()]
        return []

    def output(self, stream: str, data: bytes) -> list[bytes]:
        """Messages that carry bytes of the process. None where the client did not ask for this stream."""
        return [self._message(stream, data)] if data and getattr(self.request, stream, False) else []

    def finish(self, exit_code: int | None, message: str = "") -> list[bytes]:
        """The messages that end the session."""
        status = status_bytes(self.version, exit_code, message)
        return [self._message("error", status)] if status else []

    def _message(self, stream: str, data: bytes) -> bytes:
        return messages.join(CHANNELS[stream], data, self.protocol)
