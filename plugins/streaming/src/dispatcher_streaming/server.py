"""The streaming port: takes a connection, checks its token, upgrades it, and runs its session. Nothing here knows a frame.

One loopback port serves SPDY/3.1 and WebSocket. Without TLS the token is the only authentication, which is usual on
loopback: a kubelet on the same node is the only client. Everything that a client may keep open has a deadline.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
import ssl
from collections.abc import AsyncIterator, Awaitable, Sequence
from dataclasses import dataclass
from http import HTTPStatus

import h11
from websockets.exceptions import WebSocketException
from websockets.http11 import Request
from websockets.server import ServerProtocol
from websockets.typing import Subprotocol

from dispatcher.api import ExecSpec, ExecStream, Process, StreamTarget
from dispatcher.effects import effect
from dispatcher.model import PodId
from dispatcher_streaming import portforward, remotecommand, sessions
from dispatcher_streaming.carriers import READ, ByteCarrier, RawCarrier, WebSocketCarrier
from dispatcher_streaming.spdy.connection import ProtocolError
from dispatcher_streaming.tokens import Tokens

log = logging.getLogger(__name__)

HEAD_S = 10.0
MAX_HEAD = 32 * 1024
MAX_MESSAGE = 1 << 20  # of a WebSocket
_SPDY = "spdy/3.1"
_VERSIONS = "X-Stream-Protocol-Version"


@dataclass(frozen=True, slots=True)
class PortForwardStream:
    """One PortForward request that was granted a URL."""

    pod_id: PodId
    ports: tuple[int, ...]


Granted = ExecStream | PortForwardStream


class _Refused(Exception):
    """Answer with a plain HTTP error and close."""

    def __init__(self, status: int, text: str, headers: tuple[tuple[str, str], ...] = ()) -> None:
        super().__init__(text)
        self.status = status
        self.text = text
        self.headers = headers


@dataclass(slots=True)
class _Head:
    """A request's head, with the raw bytes that a WebSocket handshake is replayed from."""

    method: str
    target: str
    headers: dict[str, list[str]]
    raw: bytes
    leftover: bytes

    def words(self, name: str) -> list[str]:
        """All values of a header, split at commas."""
        return [word.strip() for value in self.headers.get(name.lower(), []) for word in value.split(",")]

    def upgrades_to(self, name: str) -> bool:
        """Whether the request asks for an upgrade to this protocol."""
        connection = {word.lower() for word in self.words("connection")}
        return "upgrade" in connection and name in {word.lower() for word in self.words("upgrade")}


class StreamServer:
    """Listens on one address.

    Args:
        host: a loopback address.
        port: 0 picks a free one.
        tokens: the requests that were granted a URL.
        target: what a session reaches.
        idle_s: a session on which nothing moves for so long is ended.
        max_connections: further clients are refused at once.
        tls: a server context, or None for plain HTTP.
    """

    def __init__(
        self,
        *,
        host: str,
        port: int,
        tokens: Tokens[Granted],
        target: StreamTarget,
        idle_s: float,
        max_connections: int,
        tls: ssl.SSLContext | None = None,
    ) -> None:
        self._host = host
        self._port = port
        self._tokens = tokens
        self._target = target
        self._idle_s = idle_s
        self._max_connections = max_connections
        self._tls = tls
        self._server: asyncio.Server | None = None
        self._tasks: set[asyncio.Task[None]] = set()

    @property
    def base_url(self) -> str:
        """The absolute URL of the port, such as http://127.0.0.1:40123."""
        assert self._server is not None
        host, port = self._server.sockets[0].getsockname()[:2]
        shown = f"[{host}]" if ":" in host else host
        return f"{'https' if self._tls else 'http'}://{shown}:{port}"

    @effect("streaming.listen")
    async def start(self) -> None:
        """Listen. Raises OSError where the port is taken."""
        self._server = await asyncio.start_server(
            self._accept, self._host, self._port, limit=READ, ssl=self._tls, backlog=128
        )

    async def aclose(self) -> None:
        """Stop listening and end every session."""
        if self._server is not None:
            self._server.close()
        for task in self._tasks:
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks)

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        if len(self._tasks) >= self._max_connections:
            writer.close()
            return
        self._tasks.add(task)
        _keep_alive(writer)
        try:
            await self._serve(reader, writer)
            await _linger(reader, writer)
        except* (ConnectionError, TimeoutError, ProtocolError, WebSocketException, EOFError) as errors:
            log.debug("a streaming connection ended", extra={"cause": repr(errors.exceptions)})
        finally:
            self._tasks.discard(task)
            writer.transport.abort()  # a client that does not read must not hold the socket for ever

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            async with asyncio.timeout(HEAD_S):
                head = await _read_head(reader)
            kind, request = self._admit(head)
            if isinstance(request, PortForwardStream):
                await self._port_forward(head, request, reader, writer)
            else:
                await self._command(head, kind, request, reader, writer)
        except _Refused as refusal:
            await _answer(writer, refusal.status, refusal.text, refusal.headers)

    def _admit(self, head: _Head) -> tuple[str, Granted]:
        """The request that the URL's token stands for. It works once, whatever comes of it."""
        parts = head.target.partition("?")[0].split("/")
        if head.method not in ("GET", "POST") or len(parts) != 3 or parts[1] not in ("exec", "attach", "portforward"):
            raise _Refused(404, "no such path")
        request = self._tokens.take(parts[1], parts[2])
        if request is None:
            raise _Refused(404, "unknown, used or expired token")
        return parts[1], request

    # ------------------------------------------------------------------------------------------------ exec and attach
    async def _command(
        self, head: _Head, kind: str, request: ExecStream, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        def start() -> Awaitable[Process]:
            if kind == "exec":
                spec = ExecSpec(
                    command=request.command,
                    tty=request.tty,
                    stdin=request.stdin,
                    stdout=request.stdout,
                    stderr=request.stderr,
                )
                return self._target.exec(request.container_id, spec)
            return self._target.attach(request.container_id, request.tty, request.stdin, request.stdout, request.stderr)

        if head.upgrades_to(_SPDY):
            chosen = _choose(head.words(_VERSIONS), remotecommand.SPDY_PROTOCOLS)
            await _switch(writer, chosen)
            session = remotecommand.SpdyCommand(request, remotecommand.version_of(chosen))
            carrier = self._watched(RawCarrier(reader, writer, head.leftover))
            await sessions.run_spdy_command(carrier, session, start)
        elif head.upgrades_to("websocket"):
            protocol = await _handshake(head, writer, remotecommand.WEBSOCKET_PROTOCOLS)
            chosen = str(protocol.subprotocol or "channel.k8s.io")
            websocket = WebSocketCarrier(protocol, reader, writer, text="base64" in chosen)
            command = remotecommand.WebSocketCommand(request, chosen)
            await sessions.run_websocket_command(self._watched(websocket), command, start, websocket.close)
        else:
            raise _Refused(400, "an upgrade to SPDY/3.1 or websocket is needed")

    # --------------------------------------------------------------------------------------------------- port-forward
    async def _port_forward(
        self, head: _Head, request: PortForwardStream, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        def connect(port: int) -> Awaitable[Process]:
            return self._target.connect(request.pod_id, port)

        carrier: ByteCarrier
        if head.upgrades_to(_SPDY):
            await _switch(writer, _choose(head.words(_VERSIONS), (portforward.PROTOCOL,)))
            carrier = RawCarrier(reader, writer, head.leftover)
        elif head.upgrades_to("websocket"):
            protocol = await _handshake(head, writer, (portforward.TUNNEL,))
            if protocol.subprotocol is None:
                return
            carrier = WebSocketCarrier(protocol, reader, writer)
        else:
            raise _Refused(400, "an upgrade to SPDY/3.1 or websocket is needed")
        await sessions.run_port_forward(self._watched(carrier), connect)

    def _watched(self, carrier: ByteCarrier) -> ByteCarrier:
        return IdleLimit(carrier, self._idle_s)


class IdleLimit:
    """A carrier whose reader gives up when nothing came in, and nothing went out, for too long."""

    def __init__(self, carrier: ByteCarrier, idle_s: float) -> None:
        self._carrier = carrier
        self._idle_s = idle_s
        self._moved = 0

    async def read(self) -> AsyncIterator[bytes]:
        """Yield what comes. Raises TimeoutError when the session is idle."""
        async with contextlib.aclosing(self._carrier.read()) as parts:  # type: ignore[type-var]
            iterator = aiter(parts)
            while True:
                reading = asyncio.ensure_future(anext(iterator, None))
                try:
                    data = await self._next(reading)
                finally:
                    if not reading.done():
                        reading.cancel()
                        await asyncio.wait({reading})
                if data is None:
                    return
                yield data

    async def _next(self, reading: asyncio.Future[bytes | None]) -> bytes | None:
        while True:
            moved = self._moved
            done, _ = await asyncio.wait({reading}, timeout=self._idle_s)
            if done:
                return reading.result()
            if moved == self._moved:
                raise TimeoutError("the session is idle")

    async def write(self, data: bytes) -> None:
        """Send."""
        if data:
            self._moved += 1
            await self._carrier.write(data)


async def _read_head(reader: asyncio.StreamReader) -> _Head:
    connection = h11.Connection(h11.SERVER, max_incomplete_event_size=MAX_HEAD)
    raw = bytearray()
    while True:
        try:
            event = connection.next_event()
        except h11.RemoteProtocolError as error:
            raise _Refused(error.error_status_hint, "not HTTP") from error
        if isinstance(event, h11.Request):
            headers: dict[str, list[str]] = {}
            for name, value in event.headers:
                headers.setdefault(name.decode("ascii").lower(), []).append(value.decode("latin-1"))
            leftover = bytes(connection.trailing_data[0])
            end = len(raw) - len(leftover)
            return _Head(
                event.method.decode("ascii"), event.target.decode("ascii"), headers, bytes(raw[:end]), leftover
            )
        data = await reader.read(READ)
        if not data:
            raise EOFError("the client left before its request was complete")
        raw += data
        connection.receive_data(data)


def _choose(offered: Sequence[str], known: Sequence[str]) -> str:
    """The first of the client's protocols that we speak too."""
    if not any(offered):
        raise _Refused(400, f"the header {_VERSIONS} is missing")
    for protocol in offered:
        if protocol in known:
            return protocol
    accepted = tuple(("X-Accepted-Stream-Protocol-Versions", protocol) for protocol in known)
    raise _Refused(403, "none of the client's protocols is spoken here", accepted)


async def _switch(writer: asyncio.StreamWriter, protocol: str) -> None:
    writer.write(
        (
            "HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: SPDY/3.1\r\n"
            f"{_VERSIONS}: {protocol}\r\n\r\n"
        ).encode()
    )
    await writer.drain()


async def _handshake(head: _Head, writer: asyncio.StreamWriter, protocols: Sequence[str]) -> ServerProtocol:
    """Answer a WebSocket handshake. Raises _Refused where no sub-protocol fits; none offered is the oldest one."""
    offered = head.words("sec-websocket-protocol")
    if any(offered) and not set(offered) & set(protocols):
        raise _Refused(403, "none of the client's protocols is spoken here")
    chosen = next((p for p in offered if p in protocols), None)
    # Origins are not checked: a browser cannot know the token, and kubelets send their API server's.
    protocol = ServerProtocol(
        subprotocols=[Subprotocol(p) for p in protocols],
        select_subprotocol=lambda _protocol, _offered: Subprotocol(chosen) if chosen else None,
        max_size=MAX_MESSAGE,
    )
    protocol.receive_data(head.raw + head.leftover)
    for event in protocol.events_received():
        if isinstance(event, Request):
            protocol.send_response(protocol.accept(event))
            break
    for data in protocol.data_to_send():
        writer.write(data)
    await writer.drain()
    if protocol.handshake_exc is not None:
        raise EOFError("the WebSocket handshake failed") from protocol.handshake_exc
    return protocol


def _keep_alive(writer: asyncio.StreamWriter) -> None:
    """Have the kernel notice a peer that vanished without a word."""
    peer = writer.get_extra_info("socket")
    for level, option, value in (
        (socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1),
        (socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 30),
        (socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 10),
        (socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 3),
    ):
        peer.setsockopt(level, option, value)


async def _linger(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Let the client read what was sent. Closing while bytes of its wait unread would reset the connection under it."""
    if not writer.can_write_eof():  # TLS has no half-close
        writer.close()
        async with asyncio.timeout(sessions.LINGER_S):
            await writer.wait_closed()
        return
    writer.write_eof()
    async with asyncio.timeout(sessions.LINGER_S):
        while await reader.read(READ):
            pass


async def _answer(
    writer: asyncio.StreamWriter, status: int, text: str, headers: tuple[tuple[str, str], ...] = ()
) -> None:
    body = (text + "\n").encode()
    extra = "".join(f"{name}: {value}\r\n" for name, value in headers)
    phrase = HTTPStatus(status).phrase
    writer.write(
        (
            f"HTTP/1.1 {status} {phrase}\r\nContent-Type: text/plain\r\nContent-Length: {len(body)}\r\n"
            f"Connection: close\r\n{extra}\r\n"
        ).encode()
        + body
    )
    await writer.drain()
