"""Connects to a port inside a pod's network namespace, without any tool of the host.

A thread of its own enters the namespace, makes the socket there and ends; a socket stays in the namespace that it was
made in, so the event loop uses it from outside.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator, Coroutine
from pathlib import Path
from typing import Any, TypeVar

from dispatcher.api import run_in_namespace
from dispatcher.errors import InvalidRequest

_DEADLINE_S = 10.0
_PIECE = 64 * 1024

T = TypeVar("T")


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
    return SocketProcess(made)


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
    """A connection in the shape of `Process`: "stdout" is what the peer sends.

    It reads from the socket only when its reader asks, so that hundreds of connections whose client is slow cost one
    piece each: the rest waits in the kernel, and then in the pod.
    """

    def __init__(self, connection: socket.socket) -> None:
        self._socket = connection
        self._loop = asyncio.get_running_loop()
        self._ended = asyncio.Event()
        self._users: set[asyncio.Task[Any]] = set()
        self._closed = False

    async def output(self) -> AsyncIterator[tuple[str, bytes]]:
        try:
            while data := await self._receive():
                yield "stdout", data
        except OSError:
            pass  # reset by the peer: the stream is over
        finally:
            self._ended.set()

    async def write_stdin(self, data: bytes) -> None:
        try:
            await self._send(data)
        except OSError as error:
            raise BrokenPipeError("the pod closed the connection") from error

    async def close_stdin(self) -> None:
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_WR)

    async def resize(self, width: int, height: int) -> None:
        """A connection has no size."""

    async def wait(self) -> int:
        await self._ended.wait()
        return 0

    async def kill(self) -> None:
        """Reset the connection. What is under way on it ends first: a closed descriptor must not be watched."""
        self._ended.set()
        if self._closed:
            return
        self._closed = True
        for task in self._users:
            task.cancel()
        await asyncio.gather(*self._users, return_exceptions=True)
        self._socket.close()

    async def aclose(self) -> None:
        await self.kill()

    async def _receive(self) -> bytes:
        try:
            data = self._socket.recv(_PIECE)
        except BlockingIOError:
            return await self._use(self._loop.sock_recv(self._socket, _PIECE))
        await asyncio.sleep(0)  # a pod that always has more must leave the loop to others
        return data

    async def _send(self, data: bytes) -> None:
        try:
            sent = self._socket.send(data)
        except BlockingIOError:
            sent = 0
        if sent < len(data):
            await self._use(self._loop.sock_sendall(self._socket, memoryview(data)[sent:]))

    async def _use(self, act: Coroutine[Any, Any, T]) -> T:
        """Wait for one act on the socket, as long as that is open. Raises OSError when it is closed meanwhile."""
        task = asyncio.ensure_future(act)
        self._users.add(task)
        try:
            await asyncio.wait({task})
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)  # until the loop has forgotten the descriptor
            self._users.discard(task)
        if task.cancelled():
            raise ConnectionResetError("the connection was closed")
        return task.result()
