"""A streaming port with processes of ours behind it, and clients in a few lines: real sockets, no container."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field

from dispatcher.api import ExecSpec, ExecStream, Process, StreamTarget
from dispatcher.errors import InvalidRequest
from dispatcher.model import ContainerId, PodId, make_container_id, make_pod_id
from dispatcher_streaming.config import StreamingConfig
from dispatcher_streaming.provider import Streaming
from dispatcher_streaming.spdy.connection import Connection, DataReceived, Event

SPDY = (
    "POST {path} HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: SPDY/3.1\r\nContent-Length: 0\r\n"
    "X-Stream-Protocol-Version: v5.channel.k8s.io\r\nX-Stream-Protocol-Version: v4.channel.k8s.io\r\n"
    "X-Stream-Protocol-Version: portforward.k8s.io\r\n\r\n"
)
DEADLINE_S = 20.0
SEALED = 7  # the port that takes nothing
REFUSING = 9


def websocket_head(protocol: str, query: str = "") -> str:
    """The request of a WebSocket handshake."""
    offer = f"Sec-WebSocket-Protocol: {protocol}\r\n" if protocol else ""
    return (
        f"GET {{path}}{query} HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"
        f"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n{offer}\r\n"
    )


class Told:
    """A process that does as it is told: it writes so much, takes input or not, and stays until it is killed or exits."""

    def __init__(self, size: int = 0, *, stays: bool = False, reads: bool = True, echoes: bool = False) -> None:
        self._size = size
        self._stays = stays
        self._reads = reads
        self._echoes = echoes
        self._output: asyncio.Queue[bytes] = asyncio.Queue()
        self.over = asyncio.Event()
        self.killed = asyncio.Event()
        self.taken = bytearray()
        self.ends = 0
        self.sizes: list[tuple[int, int]] = []

    async def output(self) -> AsyncIterator[tuple[str, bytes]]:
        """Write."""
        for _ in range(self._size // 65536):
            yield "stdout", b"x" * 65536
        while self._echoes and (data := await self._output.get()):
            yield "stdout", data
        if self._stays:
            await self.over.wait()

    async def write_stdin(self, data: bytes) -> None:
        """Take input, or never."""
        if not self._reads:
            await self.over.wait()
            raise BrokenPipeError
        self.taken += data
        if self._echoes:
            await self._output.put(data)

    async def close_stdin(self) -> None:
        """Count, and end an echo."""
        self.ends += 1
        if self._echoes:
            await self._output.put(b"")

    async def resize(self, width: int, height: int) -> None:
        """Remember."""
        self.sizes.append((width, height))

    async def wait(self) -> int:
        """The exit code."""
        if self._stays or not self._reads:
            await self.over.wait()
        return 3

    async def kill(self) -> None:
        """End."""
        self.killed.set()
        self.over.set()

    async def aclose(self) -> None:
        """Nothing is held."""


@dataclass
class World:
    """A served port. Every exec and attach reaches `process`; every forwarded port a process of its own in `ports`."""

    streaming: Streaming
    process: Told
    ports: list[tuple[int, Told]] = field(default_factory=list)

    def exec_url(self, *, stdin: bool = False, tty: bool = False, command: tuple[str, ...] = ("x",)) -> str:
        """A URL for an exec with stdout."""
        return self.streaming.exec_url(
            ExecStream(container_id=make_container_id(), command=command, stdin=stdin, stdout=True, tty=tty)
        )

    def forward_url(self, *ports: int) -> str:
        """A URL for a port-forward."""
        return self.streaming.port_forward_url(make_pod_id(), ports)


@contextlib.asynccontextmanager
async def served(process: Told | None = None, **settings: object) -> AsyncIterator[World]:
    """Serve; at the end nothing of it may be left."""

    async def start(_id: ContainerId, _spec: ExecSpec) -> Process:
        return world.process

    async def attach(_id: ContainerId, _tty: bool, _in: bool, _out: bool, _err: bool) -> Process:
        return world.process

    async def connect(_id: PodId, port: int) -> Process:
        if port == REFUSING:
            raise InvalidRequest("nobody listens")
        made = Told(echoes=port != SEALED, stays=port == SEALED, reads=port != SEALED)
        world.ports.append((port, made))
        return made

    before = asyncio.all_tasks()
    world = World(Streaming(StreamingConfig.model_validate(settings)), process or Told())
    await world.streaming.start(StreamTarget(exec=start, attach=attach, connect=connect))
    try:
        yield world
    finally:
        await world.streaming.aclose()
    assert not {task for task in asyncio.all_tasks() - before if not task.done() and "kit" not in repr(task)}


class Peer:
    """A client's connection after its request: SPDY events, or raw bytes."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, head: bytes) -> None:
        self.reader = reader
        self.writer = writer
        self.head = head
        self.spdy = Connection(is_client=True)
        self.events: list[Event] = []
        self.data: dict[int, bytes] = {}
        self.ended: set[int] = set()

    def open(self, *names: str) -> None:
        """Open streams of an exec."""
        self.writer.write(b"".join(self.spdy.open({"streamtype": name})[1] for name in names))

    def forward(self, request: str, port: int) -> int:
        """Open a forwarded connection; returns its data stream, whose error stream is two before it."""
        pair = {"port": str(port), "requestid": request}
        error = self.spdy.open({"streamtype": "error", **pair}, fin=True)[1]
        stream, data = self.spdy.open({"streamtype": "data", **pair})
        self.writer.write(error + data)
        return stream

    async def until(self, wanted: Callable[[], object]) -> None:
        """Read until something is so, or the server ends."""
        async with asyncio.timeout(DEADLINE_S):
            while not wanted():
                received = await self.reader.read(1 << 16)
                if not received:
                    assert wanted(), f"the server ended: {self.events[-5:]}"
                    return
                for event in self.spdy.receive(received):
                    self.events.append(event)
                    if isinstance(event, DataReceived):
                        self.data[event.stream_id] = self.data.get(event.stream_id, b"") + event.data
                        if event.fin:
                            self.ended.add(event.stream_id)

    async def closed(self) -> bytes:
        """Wait until the server ends; returns all that came."""
        found = b""
        async with asyncio.timeout(DEADLINE_S):
            with contextlib.suppress(ConnectionError):
                while received := await self.reader.read(1 << 16):
                    found += received
        return found


@contextlib.asynccontextmanager
async def dialled(url: str, head: str = SPDY, more: bytes = b"") -> AsyncIterator[Peer]:
    """Connect, send a request's head with some bytes behind it, and read the head of the answer."""
    address, path = url.removeprefix("http://").split("/", 1)
    host, port = address.split(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    try:
        writer.write(head.format(path=f"/{path}").encode() + more)
        async with asyncio.timeout(DEADLINE_S):
            yield_head = await reader.readuntil(b"\r\n\r\n")
        yield Peer(reader, writer, yield_head)
    finally:
        writer.transport.abort()


async def within(condition: Callable[[], object] | Awaitable[object], timeout_s: float = DEADLINE_S) -> None:
    """Wait for an awaitable, or until a condition holds."""
    async with asyncio.timeout(timeout_s):
        if callable(condition):
            while not condition():
                await asyncio.sleep(0.01)
        else:
            await condition
