"""Stopping a container as an intent with a deadline.

The first call sends the stop signal, once. Later calls join: an earlier deadline moves the kill forward, a later one
changes nothing. The intent outlives a caller that gives up, since a stop that was asked for is not taken back.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from dispatcher.errors import RuntimeDown
from dispatcher_docker_shim import host
from dispatcher_docker_shim.docker_client import DockerClient
from dispatcher_docker_shim.engine_events import EngineEvents

_LOOK_AGAIN_S = 1.0
_TAKES_NOTE_S = 0.02
_SIGNAL_AGAIN_S = 2.0


@dataclass(slots=True)
class _Intent:
    deadline: float
    moved: asyncio.Event = field(default_factory=asyncio.Event)
    task: asyncio.Task[None] | None = None


class Stopping:
    """All stops in progress, by engine name."""

    def __init__(self, client: DockerClient, events: EngineEvents, *, kill_deadline_s: float) -> None:
        self._client = client
        self._events = events
        self._kill_deadline_s = kill_deadline_s
        self._intents: dict[str, _Intent] = {}

    async def stop(self, name: str, *, signal: str, grace_s: float) -> None:
        """Return when the container's first process is gone, which includes: it never existed.

        Raises:
            RuntimeDown: the engine is away, or the process survived SIGKILL.
        """
        loop = asyncio.get_running_loop()
        deadline = loop.time() + max(0.0, grace_s)
        intent = self._intents.get(name)
        if intent is None:
            intent = self._intents[name] = _Intent(deadline)
            intent.task = asyncio.create_task(self._carry_out(name, signal, intent), name=f"stop-{name[:16]}")
            intent.task.add_done_callback(lambda _: self._intents.pop(name, None))
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

    async def _carry_out(self, name: str, signal: str, intent: _Intent) -> None:
        found = await self._client.find(name)
        if found is None or not _has_process(found):
            return
        loop = asyncio.get_running_loop()
        if found["State"].get("Paused"):  # a frozen process takes no signal but the last one
            intent.deadline = loop.time()
        if intent.deadline > loop.time():
            await self._client.kill(name, signal)
            if await self._gone(name, found, lambda: intent.deadline, intent.moved):
                return
        kill_by = loop.time() + self._kill_deadline_s
        while loop.time() < kill_by:
            await self._client.kill(name, "SIGKILL")
            again = min(loop.time() + _SIGNAL_AGAIN_S, kill_by)
            if await self._gone(name, found, lambda again=again: again, asyncio.Event()):  # type: ignore[misc]
                return
        raise RuntimeDown(f"container {name} survived SIGKILL for {self._kill_deadline_s:g} s; its process hangs")

    async def _gone(
        self, name: str, found: dict[str, Any], deadline: Callable[[], float], moved: asyncio.Event
    ) -> bool:
        """Wait for the end of the process until the deadline, which may move."""
        loop = asyncio.get_running_loop()
        ended = asyncio.Event()
        self._events.on_end(name, ended)
        pause_s = _LOOK_AGAIN_S
        pidfd = host.open_pidfd(int(found["State"].get("Pid") or 0) or -1)
        if pidfd is not None:
            loop.add_reader(pidfd, ended.set)
        try:
            while True:
                seen = await self._client.find(name)
                if seen is None or not _has_process(seen):
                    return True
                left = deadline() - loop.time()
                if left <= 0:
                    return False
                if ended.is_set() and pidfd is not None:
                    loop.remove_reader(pidfd)
                    os.close(pidfd)
                    pidfd = None
                    pause_s = _TAKES_NOTE_S  # the kernel tells of an exit before the engine has taken note of it
                ended.clear()
                await _first_of(ended, moved, timeout_s=min(left, pause_s))
                moved.clear()
        finally:
            self._events.off_end(name, ended)
            if pidfd is not None:
                loop.remove_reader(pidfd)
                os.close(pidfd)


def _has_process(found: dict[str, Any]) -> bool:
    state = found["State"]
    return bool(state.get("Running")) or bool(state.get("Paused")) or bool(state.get("Restarting"))


async def _first_of(*events: asyncio.Event, timeout_s: float) -> None:
    waits = [asyncio.ensure_future(event.wait()) for event in events]
    try:
        await asyncio.wait(waits, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for wait in waits:
            wait.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.gather(*waits, return_exceptions=True)
