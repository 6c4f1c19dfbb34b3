"""The streaming port: takes a connection, checks its token, upgrades it, and runs its session. Nothing here knows a frame.

One loopback port serves SPDY/3.1 and WebSocket. Without TLS the token is the only authentication, which is usual on
loopback: a kubelet on the same node is the only client. Everything that a client may keep open has a deadline, and who
has shown no token yet cannot keep out who has one.
"""

from __future__ import annotations

import asyncio
import logging
import socket
import ssl
from collections.abc import Awaitable
from dataclasses import dataclass

from websockets.exceptions import WebSocketException

from dispatcher.api import ExecSpec, ExecStream, Process, StreamTarget
from dispatcher.effects import effect
from dispatcher.model import PodId
from dispatcher_streaming import forwarding, portforward, portforward_channels, remotecommand, sessions, upgrade
from dispatcher_streaming.carriers import READ, ByteCarrier, Link, RawCarrier, WebSocketCarrier
from dispatcher_streaming.config import StreamingConfig
from dispatcher_streaming.peers import PeerTable
from dispatcher_streaming.spdy.connection import ProtocolError
from dispatcher_streaming.tokens import Tokens
from dispatcher_streaming.windows import Budget

log = logging.getLogger(__name__)

HEAD_S = 10.0  # for TLS and a request's head
REFUSE_S = 2.0  # for a refused client to read why
MAX_WAITING = 128  # clients that have shown no token yet; a further one takes the place of the oldest


@dataclass(frozen=True, slots=True)
class PortForwardStream:
    """One PortForward request that was granted a URL."""

    pod_id: PodId
    ports: tuple[int, ...]


Granted = ExecStream | PortForwardStream


class StreamServer:
    """Listens on one address.

    Args:
        config: the address, and all limits.
        tokens: the requests that were granted a URL.
        target: what a session reaches.
        tls: a server context, or None for plain HTTP.
    """

    def __init__(
        self,
        config: StreamingConfig,
        *,
        tokens: Tokens[Granted],
        target: StreamTarget,
        tls: ssl.SSLContext | None = None,
    ) -> None:
        self._config = config
        self._tokens = tokens
        self._target = target
        self._tls = tls
        self._server: asyncio.Server | None = None
        self._waiting: dict[asyncio.Task[None], None] = {}  # the oldest first
        self._sessions: set[asyncio.Task[None]] = set()
        self._peers = PeerTable()
        self._budget = Budget(config.buffer_bytes)
        self._limits = sessions.Limits(self._budget, config.drain_s)
        self._forward_limits = forwarding.ForwardLimits(self._budget, Budget(config.max_forwards))

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
            self._connected, self._config.host, self._config.port, limit=READ, backlog=128
        )

    async def aclose(self) -> None:
        """Stop listening and end every session."""
        if self._server is not None:
            self._server.close()
        tasks = {*self._waiting, *self._sessions}
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)

    def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Serve a client in a task of its own."""
        if len(self._waiting) >= MAX_WAITING:
            oldest = next(iter(self._waiting))
            del self._waiting[oldest]
            oldest.cancel()
        task = asyncio.ensure_future(self._accept(reader, writer))
        self._waiting[task] = None
        task.add_done_callback(self._disconnected)

    def _disconnected(self, task: asyncio.Task[None]) -> None:
        self._waiting.pop(task, None)
        self._sessions.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("a streaming session failed", exc_info=error)

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        link = None
        try:
            _keep_alive(writer)
            async with asyncio.timeout(HEAD_S):
                if self._tls is not None:
                    await writer.start_tls(self._tls, ssl_handshake_timeout=HEAD_S)
                head = await upgrade.read_head(reader)
            kind, request = self._admit(head)
            self._waiting.pop(task, None)
            self._sessions.add(task)
            link = Link(reader, writer, self._peers, self._config.idle_s)
            await self._serve(head, kind, request, link, writer)
            await link.linger()
        except* upgrade.Refused as refusals:
            refusal = refusals.exceptions[0]
            assert isinstance(refusal, upgrade.Refused)
            await self._refuse(refusal, reader, writer)
        except* (OSError, TimeoutError, ProtocolError, WebSocketException, EOFError) as errors:
            log.debug("a streaming connection ended", extra={"cause": repr(errors.exceptions)})
        finally:
            if link is not None:
                link.close()
            writer.transport.abort()

    async def _refuse(
        self, refusal: upgrade.Refused, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        """Answer with an HTTP error, and give the client a moment to read it."""
        try:
            async with asyncio.timeout(REFUSE_S):
                await upgrade.answer(writer, refusal.status, refusal.text, refusal.headers)
                if writer.can_write_eof():
                    writer.write_eof()
                while await reader.read(READ):
                    pass
        except (OSError, TimeoutError):
            return

    def _admit(self, head: upgrade.Head) -> tuple[str, Granted]:
        """The request that the URL's token stands for. It works once, whatever comes of it."""
        parts = head.target.partition("?")[0].split("/")
        if head.method not in ("GET", "POST") or len(parts) != 3 or parts[1] not in ("exec", "attach", "portforward"):
            raise upgrade.Refused(404, "no such path")
        request = self._tokens.take(parts[1], parts[2])
        if request is None:
            raise upgrade.Refused(404, "unknown, used or expired token")
        if len(self._sessions) >= self._config.max_connections:
            raise upgrade.Refused(503, "too many streaming sessions at once")
        return parts[1], request

    async def _serve(
        self, head: upgrade.Head, kind: str, request: Granted, link: Link, writer: asyncio.StreamWriter
    ) -> None:
        if isinstance(request, PortForwardStream):
            await self._port_forward(head, request, link, writer)
        else:
            await self._command(head, kind, request, link, writer)

    # ------------------------------------------------------------------------------------------------ exec and attach
    async def _command(
        self, head: upgrade.Head, kind: str, request: ExecStream, link: Link, writer: asyncio.StreamWriter
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

        if head.upgrades_to(upgrade.SPDY):
            chosen = upgrade.choose(head.words(upgrade.VERSIONS), remotecommand.SPDY_PROTOCOLS)
            await upgrade.switch(writer, chosen)
            session = remotecommand.SpdyCommand(request, remotecommand.version_of(chosen))
            carrier = RawCarrier(link, head.leftover, session.connection.nothing())
            await sessions.run_spdy_command(carrier, session, start, self._limits)
        elif head.upgrades_to("websocket"):
            protocol = await upgrade.handshake(head, writer, remotecommand.WEBSOCKET_PROTOCOLS)
            chosen = str(protocol.subprotocol or "channel.k8s.io")
            websocket = WebSocketCarrier(protocol, link, self._budget, head.leftover, text="base64" in chosen)
            command = remotecommand.WebSocketCommand(request, chosen)
            await sessions.run_websocket_command(websocket, command, start, self._limits, websocket.close)
        else:
            raise upgrade.Refused(400, "an upgrade to SPDY/3.1 or websocket is needed")

    # --------------------------------------------------------------------------------------------------- port-forward
    async def _port_forward(
        self, head: upgrade.Head, request: PortForwardStream, link: Link, writer: asyncio.StreamWriter
    ) -> None:
        def connect(port: int) -> Awaitable[Process]:
            return self._target.connect(request.pod_id, port)

        carrier: ByteCarrier
        session = portforward.PortForward()
        if head.upgrades_to(upgrade.SPDY):
            await upgrade.switch(writer, upgrade.choose(head.words(upgrade.VERSIONS), (portforward.PROTOCOL,)))
            carrier = RawCarrier(link, head.leftover, session.connection.nothing())
            await forwarding.run_port_forward(carrier, session, connect, self._forward_limits)
        elif not head.upgrades_to("websocket"):
            raise upgrade.Refused(400, "an upgrade to SPDY/3.1 or websocket is needed")
        elif set(head.words("sec-websocket-protocol")) & set(portforward.TUNNELS):
            protocol = await upgrade.handshake(head, writer, portforward.TUNNELS)
            carrier = WebSocketCarrier(protocol, link, self._budget, head.leftover)
            await forwarding.run_port_forward(carrier, session, connect, self._forward_limits)
        else:
            await self._forward_channels(head, request, connect, link, writer)

    async def _forward_channels(
        self,
        head: upgrade.Head,
        request: PortForwardStream,
        connect: forwarding.Connect,
        link: Link,
        writer: asyncio.StreamWriter,
    ) -> None:
        """Serve the oldest WebSocket clients: two channels for each port."""
        ports = request.ports or portforward_channels.ports_of(head.target.partition("?")[2])
        if not ports:
            raise upgrade.Refused(400, "the ports to forward are named neither by the request nor by the query")
        protocol = await upgrade.handshake(
            head,
            writer,
            [p for p in portforward_channels.PROTOCOLS if len(ports) <= portforward_channels.most_ports(p)],
        )
        chosen = str(protocol.subprotocol or "channel.k8s.io")
        session = portforward_channels.ChannelForward(ports, chosen)
        carrier = WebSocketCarrier(protocol, link, self._budget, head.leftover, text="base64" in chosen)
        for message in session.greeting():
            await carrier.write(message)
        await forwarding.run_port_forward(carrier, session, connect, self._forward_limits, session.opening())
        await carrier.close()


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
