"""Connects to a port inside a pod's network namespace, without any tool of the host.

A thread of its own enters the namespace, makes the socket there and ends; a socket stays in the namespace that it was
made in, so the event loop uses it from outside.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator
from pathlib import Path

from dispatcher.api import run_in_namespace
from dispatcher.errors import InvalidRequest

_DEADLINE_S = 10.0
_PIECE = 64 * 1024


async def open_in_netns(netns_path: str, port: int) -> SocketProcess:
    """Connect to localhost:`port`, IPv4 then IPv6, in the namespace ("" for the host's).

    Raises:
        InvalidRequest: nothing listens there.
        NotFound: the namespace is gone.
    """
    try:
        if netns_path:
            made = await run_in_namespace(Path(netns_path), lambda: _connect(port))
        else:
            made = await asyncio.to_thread(_connect, port)
    except OSError as error:
        raise InvalidRequest(f"cannot connect to port {port} in the pod: {error.strerror or error}") from error
    made.setblocking(False)
    reader, writer = await asyncio.open_connection(sock=made, limit=_PIECE)
    return SocketProcess(reader, writer)


def _connect(port: int) -> socket.socket:
    first: OSError | None = None
    for family, address in ((socket.AF_INET, "127.0.0.1"), (socket.AF_INET6, "::1")):
        try:
            made = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        except OSError as error:  # a kernel without IPv6
            first = first or error
            continue
        try:
            made.settimeout(_DEADLINE_S)
            made.connect((address, port))
        except OSError as error:
            made.close()
            first = first or error
        else:
            return made
    raise first or OSError()


class SocketProcess:
    """A connection in the shape of `Process`: "stdout" is what the peer sends."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer
        self._ended = asyncio.Event()

    async def output(self) -> AsyncIterator[tuple[str, bytes]]:
        try:
            while data := await self._reader.read(_PIECE):
                yield "stdout", data
        except OSError:
            pass  # reset by the peer: the stream is over
        finally:
            self._ended.set()

    async def write_stdin(self, data: bytes) -> None:
        try:
            for start in range(0, len(data), _PIECE):
                self._writer.write(data[start : start + _PIECE])
                await self._writer.drain()
        except (OSError, RuntimeError) as error:
            raise BrokenPipeError("the pod closed the connection") from error

    async def close_stdin(self) -> None:
        with contextlib.suppress(OSError, RuntimeError):
            self._writer.write_eof()

    async def resize(self, width: int, height: int) -> None:
        """A connection has no size."""

    async def wait(self) -> int:
        await self._ended.wait()
        return 0

    async def kill(self) -> None:
        self._ended.set()
        self._writer.transport.abort()

    async def aclose(self) -> None:
        await self.kill()
