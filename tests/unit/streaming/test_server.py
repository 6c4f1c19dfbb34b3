"""The streaming port with a process of ours behind it: real sockets, no container."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest

from dispatcher.api import ExecSpec, ExecStream, Process, StreamTarget
from dispatcher.model import ContainerId, PodId, make_container_id
from dispatcher_streaming import sessions
from dispatcher_streaming.config import StreamingConfig
from dispatcher_streaming.provider import Streaming
from dispatcher_streaming.spdy.connection import Connection, DataReceived

UPGRADE = (
    "POST {path} HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: SPDY/3.1\r\nContent-Length: 0\r\n"
    "X-Stream-Protocol-Version: v5.channel.k8s.io\r\nX-Stream-Protocol-Version: v4.channel.k8s.io\r\n\r\n"
)
WEBSOCKET = (
    "GET {path} HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\n"
    "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Protocol: v5.channel.k8s.io\r\n\r\n"
)


class Told:
    """A process that writes so much, then exits; `killed` tells of its end."""

    def __init__(self, size: int, *, stays: bool = False) -> None:
        self._size = size
        self._stays = stays
        self.killed = asyncio.Event()
        self.read = 0

    async def output(self) -> AsyncIterator[tuple[str, bytes]]:
        for _ in range(self._size // 65536):
            yield "stdout", b"x" * 65536
        if self._stays:
            await self.killed.wait()

    async def write_stdin(self, data: bytes) -> None:
        self.read += len(data)
        if self._stays:
            await self.killed.wait()

    async def close_stdin(self) -> None: ...

    async def resize(self, width: int, height: int) -> None: ...

    async def wait(self) -> int:
        if self._stays:
            await self.killed.wait()
        return 3

    async def kill(self) -> None:
        self.killed.set()

    async def aclose(self) -> None: ...


async def serve(process: Told, **settings: object) -> Streaming:
    async def start(_id: ContainerId, _spec: ExecSpec) -> Process:
        return process

    async def attach(_id: ContainerId, _tty: bool, _in: bool, _out: bool, _err: bool) -> Process:
        return process

    async def connect(_id: PodId, _port: int) -> Process:
        return process

    streaming = Streaming(StreamingConfig.model_validate(settings))
    await streaming.start(StreamTarget(exec=start, attach=attach, connect=connect))
    return streaming


async def dial(url: str, head: str = UPGRADE) -> tuple[asyncio.StreamReader, asyncio.StreamWriter, bytes]:
    address, path = url.removeprefix("http://").split("/", 1)
    host, port = address.split(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    writer.write(head.format(path=f"/{path}").encode())
    return reader, writer, await reader.readuntil(b"\r\n\r\n")


def exec_url(streaming: Streaming, *, stdin: bool = False) -> str:
    return streaming.exec_url(
        ExecStream(container_id=make_container_id(), command=("x",), stdin=stdin, stdout=True, stderr=False)
    )


def streams(client: Connection, *names: str) -> bytes:
    return b"".join(client.open({"streamtype": name})[1] for name in names)


async def test_a_slow_client_gets_every_byte_behind_the_exit(monkeypatch: pytest.MonkeyPatch) -> None:
    """The process is long gone, and the client reads slower than the wait for silence: nothing is cut."""
    monkeypatch.setattr(sessions, "DRAIN_S", 0.05)
    streaming = await serve(Told(8 << 20))
    reader, writer, head = await dial(exec_url(streaming))
    assert b" 101 " in head
    assert b"v4.channel.k8s.io" in head
    client = Connection(is_client=True)
    writer.write(streams(client, "error", "stdout"))
    await asyncio.sleep(0.3)  # six times as long as the wait
    got, status = 0, b""
    while received := await reader.read(1 << 20):
        for event in client.receive(received):
            if isinstance(event, DataReceived) and event.stream_id == 3:
                got += len(event.data)
            elif isinstance(event, DataReceived):
                status += event.data
    assert got == 8 << 20
    assert b'"3"' in status
    writer.close()
    await streaming.aclose()


async def test_a_client_that_leaves_ends_its_process() -> None:
    process = Told(65536, stays=True)
    streaming = await serve(process)
    _, writer, _ = await dial(exec_url(streaming))
    writer.write(streams(Connection(is_client=True), "error", "stdout"))
    await writer.drain()
    writer.transport.abort()
    async with asyncio.timeout(10):
        await process.killed.wait()
    await streaming.aclose()


async def test_an_idle_session_ends() -> None:
    """Also over WebSocket."""
    for head in (UPGRADE, WEBSOCKET):
        process = Told(0, stays=True)
        streaming = await serve(process, idle_s=0.2)
        _, writer, answer = await dial(exec_url(streaming), head)
        assert b" 101 " in answer
        if head is UPGRADE:
            writer.write(streams(Connection(is_client=True), "error", "stdout"))
        async with asyncio.timeout(10):
            await process.killed.wait()
        writer.close()
        await streaming.aclose()


@pytest.mark.parametrize(
    ("path", "head", "code"),
    [
        ("/exec/unknown", UPGRADE, b"404"),
        ("/other/x", UPGRADE, b"404"),
        (None, UPGRADE.replace("v5.channel", "v9.channel").replace("v4.channel", "v8.channel"), b"403"),
        (None, "GET {path} HTTP/1.1\r\nHost: x\r\n\r\n", b"400"),
        (None, "no http at all\r\n\r\n", b"400"),
    ],
)
async def test_what_is_refused_is_told_in_http(path: str | None, head: str, code: bytes) -> None:
    streaming = await serve(Told(0))
    url = exec_url(streaming)
    if path is not None:
        url = url.split("/exec/")[0] + path
    reader, writer, answer = await dial(url, head)
    assert answer.split()[1] == code
    await reader.read()
    writer.close()
    await streaming.aclose()
