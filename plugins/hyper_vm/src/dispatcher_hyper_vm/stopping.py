"""Stopping a container as an intent with a deadline.

The first call sends the stop signal, once. Later calls join: an earlier deadline moves the kill forward, a later one
changes nothing. The intent outlives a caller that gives up, since a stop that was asked for is not taken back.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

from dispatcher.errors import RuntimeDown
from dispatcher.model import ContainerId

_KILL = 9
_KILL_AGAIN_S = 2.0

Signal = Callable[[int], Awaitable[None]]


@dataclass(slots=True)
class _Intent:
    deadline: float
    moved: asyncio.Event = field(default_factory=asyncio.Event)
    task: asyncio.Task[None] | None = None


class Stopping:
    """All stops in progress."""

    def __init__(self, kill_s: float) -> None:
        self._kill_s = kill_s
        self._intents: dict[ContainerId, _Intent] = {}

    async def stop(
        self, container: ContainerId, signal: int, grace_s: float, *, send: Signal, ended: Callable[[], Awaitable[None]]
    ) -> None:
        """Return when the container has ended. `send` sends a signal, `ended` waits for the end.

        Raises:
            RuntimeDown: it survived SIGKILL, or the guest is silent.
        """
        loop = asyncio.get_running_loop()
        deadline = loop.time() + max(0.0, grace_s)
        intent = self._intents.get(container)
        if intent is None:
            intent = self._intents[container] = _Intent(deadline)
            intent.task = asyncio.create_task(
                self._carry_out(signal, intent, send, ended), name=f"stop-{container[:12]}"
            )
            intent.task.add_done_callback(lambda _: self._intents.pop(container, None))
        elif deadline < intent.deadline:
            intent.deadline = deadline
            intent.moved.set()
        assert intent.task is not None
        await asyncio.shield(intent.task)

    async def aclose(self) -> None:
        """Give up waiting; what was signalled stays signalled."""
        tasks = [intent.task for intent in self._intents.values() if intent.task]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _carry_out(
        self, signal: int, intent: _Intent, send: Signal, ended: Callable[[], Awaitable[None]]
    ) -> None:
        loop = asyncio.get_running_loop()
        end = asyncio.ensure_future(ended())
        try:
            if intent.deadline > loop.time():
                await send(signal)
                while not end.done() and (left := intent.deadline - loop.time()) > 0:
                    moved = asyncio.ensure_future(intent.moved.wait())
                    await asyncio.wait({end, moved}, timeout=left, return_when=asyncio.FIRST_COMPLETED)
                    moved.cancel()
                    intent.moved.clear()
            kill_by = loop.time() + self._kill_s
            while not end.done() and loop.time() < kill_by:
                await send(_KILL)
                await asyncio.wait({end}, timeout=min(_KILL_AGAIN_S, self._kill_s))
            if not end.done():
                raise RuntimeDown(f"the container survived SIGKILL for {self._kill_s:g} s")
            await end
        finally:
            end.cancel()
