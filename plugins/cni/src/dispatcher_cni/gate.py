"""Who may run plugins when: one call at a time per attachment, and none at all while garbage is collected.

The specification asks for both: plugins need not cope with two calls for one container, nor with GC beside an ADD
whose attachment is not in the list yet.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator


class Gate:
    """Locks by attachment, and one over all. First come, first served; a waiting `exclusive` holds newcomers back."""

    def __init__(self) -> None:
        self._locks: dict[str, tuple[asyncio.Lock, int]] = {}
        self._open = asyncio.Lock()
        self._running = 0
        self._idle = asyncio.Event()
        self._idle.set()

    @contextlib.asynccontextmanager
    async def shared(self, key: str) -> AsyncIterator[None]:
        """Be the only one at work on `key`, beside others on other keys."""
        lock, users = self._locks.get(key, (asyncio.Lock(), 0))
        self._locks[key] = lock, users + 1
        try:
            async with lock:
                async with self._open:
                    self._running += 1
                    self._idle.clear()
                try:
                    yield
                finally:
                    self._running -= 1
                    if not self._running:
                        self._idle.set()
        finally:
            lock, users = self._locks.pop(key)
            if users > 1:
                self._locks[key] = lock, users - 1

    @contextlib.asynccontextmanager
    async def exclusive(self) -> AsyncIterator[None]:
        """Be the only one at work."""
        async with self._open:
            await self._idle.wait()
            yield
