"""How much may wait for one process or connection that is slow to take it, and for all of them together.

Theory of operation. The clients of today have no flow control per stream: what they send on one stream arrives whatever
its reader does. A window takes it without waiting; a window that is full is a reason to read no more from the client,
who then waits in turn. A small part of each window is its own, the rest comes out of one budget for all sessions:

    worst case = sessions x 64 KiB + forwarded connections x 64 KiB + budget, and one read (64 KiB) on top of each window

No I/O here.
"""

from __future__ import annotations

import asyncio
from collections import deque

OWN = 64 * 1024  # of a window, whatever the budget says


class Budget:
    """So many of something, shared by all sessions: bytes in windows, or connections.

    Args:
        limit: how many may be taken.
    """

    def __init__(self, limit: int) -> None:
        self._left = limit

    def take(self, count: int) -> bool:
        """Take so many, or none and False where that many are not left."""
        if count > self._left:
            return False
        self._left -= count
        return True

    def give(self, count: int) -> None:
        """Give back what was taken."""
        self._left += count


class Share:
    """What one owner has taken of a budget, for an amount that goes up and down."""

    def __init__(self, budget: Budget) -> None:
        self._budget = budget
        self._taken = 0

    def fit(self, held: int) -> bool:
        """Take or give back until `held`, but for the owner's own part, is covered. False where it cannot be."""
        change = max(0, held - OWN) - self._taken
        if change > 0 and not self._budget.take(change):
            return False
        if change < 0:
            self._budget.give(-change)
        self._taken += change
        return True


class Window:
    """Bytes on their way to one reader, in order, with an end. One task may `get`; anyone may `put`.

    Args:
        size: how many bytes may wait before the window is full.
        budget: where what exceeds its own part comes from.
    """

    def __init__(self, size: int, budget: Budget) -> None:
        self._size = size
        self._share = Share(budget)
        self._pieces: deque[bytes] = deque()
        self._held = 0
        self._covered = True
        self._ended = False
        self._closed = False
        self._filled = asyncio.Event()
        self._room = asyncio.Event()
        self._room.set()
        self.moved = 0

    @property
    def is_full(self) -> bool:
        """Whether nothing more should be read for it now."""
        return not self._room.is_set()

    def put(self, data: bytes) -> None:
        """Add bytes, also to a full window. Nothing after the end, and nothing where nobody reads any more."""
        if data and not self._ended and not self._closed:
            self._pieces.append(data)
            self._held += len(data)
            self._measure()
            self._filled.set()

    def end(self) -> None:
        """No more comes. Idempotent."""
        self._ended = True
        self._filled.set()

    def close(self) -> None:
        """Nobody reads any more: forget all, and take nothing. Idempotent."""
        self._closed = True
        self._pieces.clear()
        self._held = 0
        self._measure()

    async def get(self) -> bytes:
        """Return the next bytes, b"" at the end."""
        while not self._pieces and not self._ended:
            self._filled.clear()
            await self._filled.wait()
        if not self._pieces:
            return b""
        data = self._pieces.popleft()
        self._held -= len(data)
        self.moved += 1  # `moved` tells a reader that is slow from one that is stuck
        self._measure()
        return data

    async def wait_room(self) -> None:
        """Wait until the window is not full."""
        await self._room.wait()

    def _measure(self) -> None:
        self._covered = self._share.fit(self._held)
        if self._held < self._size and self._covered:
            self._room.set()
        else:
            self._room.clear()
