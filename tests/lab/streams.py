"""A blocking client of streaming URLs, as kubectl is behind a kubelet: SPDY/3.1 with remotecommand v4 or port-forward.

The framing is the product's own, run as the other side; the transcripts of foreign clients are tested elsewhere.
"""

from __future__ import annotations

import json
import socket
from collections.abc import Mapping
from types import TracebackType
from typing import Any, Self
from urllib.parse import urlsplit

from dispatcher_streaming.spdy.connection import Connection, DataReceived, Event, StreamAccepted, StreamReset

_HEAD_LIMIT = 65536


class SpdySession:
    """One upgraded connection. Every wait has the socket's timeout, so that a silent server fails a test."""

    def __init__(self, url: str, protocol: str, *, timeout_s: float = 20) -> None:
        """Connect and upgrade.

        Args:
            url: What Exec, Attach or PortForward answered.
            protocol: The protocol to offer, such as `v4.channel.k8s.io`.
            timeout_s: Limit of each wait.

        Raises:
            ConnectionError: The server did not switch protocols; the message is its answer.
        """
        where = urlsplit(url)
        self._socket = socket.create_connection((where.hostname, where.port or 80), timeout=timeout_s)
        self._spdy = Connection(is_client=True)
        self._data: dict[int, bytearray] = {}
        self._ended: set[int] = set()
        self._accepted: set[int] = set()
        head = (
            f"POST {where.path} HTTP/1.1\r\nHost: {where.netloc}\r\nContent-Length: 0\r\nConnection: Upgrade\r\n"
            f"Upgrade: SPDY/3.1\r\nX-Stream-Protocol-Version: {protocol}\r\n\r\n"
        )
        self._socket.sendall(head.encode())
        answer = b""
        while b"\r\n\r\n" not in answer and len(answer) < _HEAD_LIMIT:
            if not (more := self._socket.recv(4096)):
                break
            answer += more
        status, _blank, rest = answer.partition(b"\r\n\r\n")
        if not status.startswith(b"HTTP/1.1 101"):
            self._socket.close()
            raise ConnectionError(answer.decode(errors="replace"))
        self._take(self._spdy.receive(rest))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._socket.close()

    def open(self, headers: Mapping[str, str], *, fin: bool = False) -> int:
        """Open a stream and wait until the server accepts it."""
        stream, data = self._spdy.open(headers, fin=fin)
        self._data[stream] = bytearray()
        self._socket.sendall(data)
        while stream not in self._accepted and stream not in self._ended:
            self._receive()
        return stream

    def send(self, stream: int, data: bytes, *, fin: bool = False) -> None:
        """Send bytes, and the end with `fin`."""
        self._socket.sendall(self._spdy.send(stream, data, fin=fin))

    def read_until(self, stream: int, wanted: bytes) -> bytes:
        """Wait until a stream has brought some bytes; returns all that it brought so far."""
        while wanted not in self._data[stream]:
            assert stream not in self._ended, f"the stream ended with {bytes(self._data[stream])!r}"
            self._receive()
        return bytes(self._data[stream])

    def read_all(self, stream: int) -> bytes:
        """Wait until a stream ends; returns all that it brought."""
        while stream not in self._ended:
            self._receive()
        return bytes(self._data[stream])

    def _receive(self) -> None:
        received = self._socket.recv(65536)
        if not received:
            self._ended.update(self._data)
            return
        self._take(self._spdy.receive(received))
        if answers := self._spdy.take_output():
            self._socket.sendall(answers)

    def _take(self, events: list[Event]) -> None:
        for event in events:
            if isinstance(event, StreamAccepted):
                self._accepted.add(event.stream_id)
            elif isinstance(event, DataReceived):
                self._data[event.stream_id] += event.data
                if event.fin:
                    self._ended.add(event.stream_id)
            elif isinstance(event, StreamReset):
                self._ended.add(event.stream_id)


class RemoteCommand(SpdySession):
    """exec or attach: `stdin`, `stdout`, `stderr` are stream ids, absent ones are -1."""

    def __init__(
        self, url: str, *, stdin: bool = False, stdout: bool = True, stderr: bool = True, tty: bool = False
    ) -> None:
        super().__init__(url, "v4.channel.k8s.io")
        self.error = self.open({"streamtype": "error"})
        self.stdin = self.open({"streamtype": "stdin"}) if stdin else -1
        self.stdout = self.open({"streamtype": "stdout"}) if stdout else -1
        self.stderr = self.open({"streamtype": "stderr"}) if stderr and not tty else -1
        self.resize = self.open({"streamtype": "resize"}) if tty else -1

    def set_size(self, width: int, height: int) -> None:
        """Tell the size of the terminal."""
        self.send(self.resize, json.dumps({"Width": width, "Height": height}).encode() + b"\n")

    def result(self) -> Mapping[str, Any]:
        """Wait for the end; returns the status that the error stream brought."""
        found: Mapping[str, Any] = json.loads(self.read_all(self.error))
        return found


class Forwarding(SpdySession):
    """Port-forward: any number of connections over one session."""

    def __init__(self, url: str) -> None:
        super().__init__(url, "portforward.k8s.io")
        self._requests = 0

    def connect(self, port: int) -> tuple[int, int]:
        """Open a connection to a port of the pod; returns its data and its error stream."""
        pair = {"port": str(port), "requestid": str(self._requests)}
        self._requests += 1
        error = self.open({"streamtype": "error", **pair}, fin=True)
        return self.open({"streamtype": "data", **pair}), error
