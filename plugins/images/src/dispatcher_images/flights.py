"""Doing a thing once for everybody who asks at the same time.

The work runs in a task of its own: a caller that is cancelled only leaves, and the last one to leave cancels the work
and waits until it has cleaned up.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

T = TypeVar("T")


@dataclass(slots=True)
class _Flight(Generic[T]):
    task: asyncio.Task[T]
    waiters: int = 0


class Flights(Generic[T]):
    """Work in progress, by key."""

    def __init__(self) -> None:
        self._flights: dict[str, _Flight[T]] = {}

    def __contains__(self, key: str) -> bool:
        return key in self._flights

    async def join(self, key: str, work: Callable[[], Awaitable[T]]) -> T:
        """Join the work under `key`, starting it if nobody has; `work` is called at most once."""
        flight = self._flights.get(key)
        if flight is None:
            flight = _Flight(asyncio.ensure_future(self._run(key, work)))
            self._flights[key] = flight
        flight.waiters += 1
        try:
            return await asyncio.shield(flight.task)
        finally:
            flight.waiters -= 1
            if not flight.waiters and not flight.task.done():
                await self._abandon(key, flight)

    async def aclose(self) -> None:
        """Cancel everything and wait for it to clean up."""
        for key, flight in list(self._flights.items()):
            await self._abandon(key, flight)

    async def _run(self, key: str, work: Callable[[], Awaitable[T]]) -> T:
        try:
            return await work()
        finally:
            # A later caller must start anew, not join what is ending.
            if (flight := self._flights.get(key)) is not None and flight.task is asyncio.current_task():
                del self._flights[key]

    async def _abandon(self, key: str, flight: _Flight[T]) -> None:
        if self._flights.get(key) is flight:
            del self._flights[key]
        flight.task.cancel()
        with contextlib.suppress(asyncio.CancelledError):  # the first cancellation is on its way up already
            await asyncio.wait([flight.task])
        if flight.task.done() and not flight.task.cancelled():
            flight.task.exception()  # looked at, so that asyncio does not complain
