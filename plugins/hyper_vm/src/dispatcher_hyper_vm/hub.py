"""Who hears of facts: the core's watcher, from one queue per subscription that begins with a snapshot."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable

from dispatcher.model import Change, ObservedContainer, ObservedPod, Snapshot


class Hub:
    """Passes facts on. A subscriber that falls far behind gets a new snapshot instead of what it missed."""

    def __init__(self, snapshot: Callable[[], Awaitable[Snapshot]], *, most: int = 10_000) -> None:
        self._snapshot = snapshot
        self._most = most
        self._queues: set[asyncio.Queue[ObservedPod | ObservedContainer]] = set()

    def tell(self, fact: ObservedPod | ObservedContainer) -> None:
        """Pass one complete fact on to everybody."""
        for queue in self._queues:
            if not queue.full():
                queue.put_nowait(fact)

    async def watch(self) -> AsyncIterator[Snapshot | Change]:
        """Yield a snapshot, then changes, for ever."""
        queue: asyncio.Queue[ObservedPod | ObservedContainer] = asyncio.Queue(self._most)
        self._queues.add(queue)
        sequence = 0
        try:
            yield await self._snapshot()
            while True:
                if queue.full():
                    while not queue.empty():
                        queue.get_nowait()
                    yield await self._snapshot()
                    continue
                fact = await queue.get()
                sequence += 1
                if isinstance(fact, ObservedPod):
                    yield Change(sequence=sequence, pod=fact)
                else:
                    yield Change(sequence=sequence, container=fact)
        finally:
            self._queues.discard(queue)
