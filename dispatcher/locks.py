"""One operation at a time per key.

The key that is a pod's id is that pod's operation lock: held by create and remove only; events, stops and reads never
take it. Other keys have a prefix that says what they guard.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field


@dataclass(slots=True)
class _Counted:
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)
    users: int = 0


class Locks:
    """Locks by key, first come first served. A lock exists only while somebody holds or awaits it."""

    def __init__(self) -> None:
        self._locks: dict[str, _Counted] = {}

    @asynccontextmanager
    async def hold(self, key: str) -> AsyncIterator[None]:
        """Hold the lock of `key` for the block. Not reentrant. A cancelled wait leaves nothing behind."""
        counted = self._locks.setdefault(key, _Counted())
        counted.users += 1
        try:
            async with counted.lock:
                yield
        finally:
            counted.users -= 1
            if not counted.users:
                del self._locks[key]

    def is_held(self, key: str) -> bool:
        """Say whether somebody holds the lock of `key` right now."""
        counted = self._locks.get(key)
        return counted is not None and counted.lock.locked()

    def __len__(self) -> int:
        """Return how many keys are held or awaited."""
        return len(self._locks)
