"""Blocking clients of streaming URLs, as kubectl is behind a kubelet: SPDY/3.1 with remotecommand v4 or port-forward,
and WebSocket with remotecommand v5.

SPDY's framing is the product's own, run as the other side; the transcripts of foreign clients are tested elsewhere.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import threading
from collections.abc import Iterable, Mapping
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

    def feed(self, stream: int, blocks: Iterable[bytes]) -> threading.Thread:
        """Send blocks and the end from a thread of its own, while this one reads. Ends early where the server does."""

        def work() -> None:
            with contextlib.suppress(OSError):
                for block in blocks:
                    self.send(stream, block)
                self.send(stream, b"", fin=True)

        thread = threading.Thread(target=work, daemon=True)
        thread.start()
        return thread

    def raw(self, data: bytes) -> None:
        """Send bytes as they are."""
        self._socket.sendall(data)

    def opening(self, headers: Mapping[str, str]) -> bytes:
        """The bytes that open a stream whose answer is not waited for."""
        stream, data = self._spdy.open(headers, fin=True)
        self._data[stream] = bytearray()
        return data

    def break_off(self) -> None:
        """Go away without a word, as a client that is killed: a thread that sends must not keep the socket open."""
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()

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
        self,
        url: str,
        *,
        stdin: bool = False,
        stdout: bool = True,
        stderr: bool = True,
        tty: bool = False,
        timeout_s: float = 20,
    ) -> None:
        super().__init__(url, "v4.channel.k8s.io", timeout_s=timeout_s)
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


def run_websocket_command(
    url: str, blocks: Iterable[bytes], *, timeout_s: float = 50
) -> tuple[Mapping[str, Any], bytes]:
    """exec or attach over WebSocket v5: send blocks and the end of input while reading, until the server closes.

    Returns:
        The status that the error channel brought, and all of stdout.
    """
    from websockets.asyncio.client import connect
    from websockets.exceptions import ConnectionClosed
    from websockets.typing import Subprotocol

    received: dict[int, bytearray] = {channel: bytearray() for channel in range(5)}

    async def run() -> None:
        address = "ws" + url.removeprefix("http")
        async with (
            asyncio.timeout(timeout_s),
            connect(
                address,
                subprotocols=[Subprotocol("v5.channel.k8s.io")],
                max_size=None,
                compression=None,
                proxy=None,
            ) as session,
        ):

            async def feed() -> None:
                with contextlib.suppress(ConnectionClosed):
                    for block in blocks:
                        await session.send(b"\0" + block)
                    await session.send(b"\xff\0")

            feeding = asyncio.create_task(feed())
            async for message in session:
                assert isinstance(message, bytes)
                received[message[0]] += message[1:]
            await feeding

    asyncio.run(run())
    return json.loads(received[3]), bytes(received[1])


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
