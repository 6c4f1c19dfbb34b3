"""Reads the engine's stream of a process ahead of its reader, so that the engine cannot take back what was written.

Theory of operation. Two seconds after an exit the engine closes the streams of the process, whether or not all was
fetched: the rest is lost (seen on 20.10 and 28). What a process can have left behind at its exit is bounded: its pipe
(64 KiB), the engine's own buffer (1 MB) and the sockets in between (under 0.5 MB). So while the process runs little is
kept, and its reader's pace is its own; from the exit on as much is kept as can be there. What a child writes on beyond
that has the engine's two seconds.
"""

from __future__ import annotations

import asyncio
from collections import deque

from dispatcher_docker_shim.engine_stream import HijackedStream

RUNNING = 64 * 1024
AFTER_EXIT = 2 << 20


class ReadAhead:
    """The same bytes as the stream's, in order, with an end. One task may `read`."""

    def __init__(self, stream: HijackedStream) -> None:
        self._stream = stream
        self._limit = RUNNING
        self._pieces: deque[bytes] = deque()
        self._held = 0
        self._ended = False
        self._filled = asyncio.Event()
        self._room = asyncio.Event()
        self._room.set()
        self.count = 0  # of reads that brought something
        self._task = asyncio.ensure_future(self._pump())

    @property
    def is_silent(self) -> bool:
        """Whether the engine is being waited for, rather than our reader, or the end."""
        return self._room.is_set() and not self._ended

    async def read(self) -> bytes:
        """Some bytes, or b"" at the end."""
        while not self._pieces and not self._ended:
            self._filled.clear()
            await self._filled.wait()
        if not self._pieces:
            return b""
        data = self._pieces.popleft()
        self._held -= len(data)
        self._measure()
        return data

    async def wait_first(self, timeout_s: float) -> None:
        """Wait for the first bytes or the end, but not longer than this."""
        if not self._pieces and not self._ended:
            self._filled.clear()
            try:
                async with asyncio.timeout(timeout_s):
                    await self._filled.wait()
            except TimeoutError:
                return

    def keep_all(self) -> None:
        """The process has ended: fetch what it left behind, whether or not anybody reads."""
        self._limit = AFTER_EXIT
        self._measure()

    def close(self) -> None:
        """Stop reading and forget. Idempotent."""
        self._task.cancel()
        self._ended = True
        self._pieces.clear()
        self._filled.set()

    async def _pump(self) -> None:
        try:
            while data := await self._stream.read():
                self._pieces.append(data)
                self._held += len(data)
                self.count += 1
                self._filled.set()
                self._measure()
                await self._room.wait()
        finally:
            self._ended = True
            self._filled.set()

    def _measure(self) -> None:
        if self._held < self._limit:
            self._room.set()
        else:
            self._room.clear()
