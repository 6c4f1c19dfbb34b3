"""Calls that outlive their client.

Theory of operation. The work of RunPodSandbox, CreateContainer and PullImage runs in a task of its own, found by a
key that names the object. A client's deadline only detaches that client; a retry with the same key and the same
request joins the task. When the work ends while nobody waits, its result is kept for the retry that will come, and
undone when none came in time. Work that fails while nobody waits is forgotten: the retry begins anew.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Coroutine, Hashable
from dataclasses import dataclass
from typing import Any, TypeVar, cast

from dispatcher.errors import AlreadyExists, RuntimeDown

T = TypeVar("T")

_log = logging.getLogger(__name__)


@dataclass(slots=True, eq=False)
class _Call:
    key: Hashable
    fingerprint: str
    undo: Callable[[Any], Awaitable[None]] | None
    stop_when_abandoned: bool
    task: asyncio.Task[Any]
    waiters: int = 0
    delivered: bool = False
    ending: asyncio.Task[None] | None = None  # the wait for a retry, and the undo behind it
    undoing: bool = False

    @property
    def is_leaving(self) -> bool:
        """True when nobody can join any more: a newcomer waits until it is gone, then starts afresh."""
        return self.undoing or (not self.task.done() and self.task.cancelling() > 0)


class Calls:
    """See the module. One per kind of key space; `keep_s` is how long an abandoned result waits for its retry.

    `sleep` is replaced by tests.
    """

    def __init__(self, *, keep_s: float = 600.0, sleep: Callable[[float], Awaitable[None]] = asyncio.sleep) -> None:
        self._keep_s = keep_s
        self._sleep = sleep
        self._calls: dict[Hashable, _Call] = {}

    async def run(
        self,
        key: Hashable,
        fingerprint: str,
        make: Callable[[], Coroutine[Any, Any, T]],
        undo: Callable[[T], Awaitable[None]] | None = None,
        *,
        stop_when_abandoned: bool = False,
    ) -> T:
        """Return the result of the call `key`, starting `make()` unless it runs or its result is kept.

        `fingerprint` tells a retry from another request for the same object. `undo(result)` runs when nobody was
        waiting at the end and no retry came within `keep_s`; it must look at the record first, because the object may
        be in use by then (see `settle`). With `stop_when_abandoned` the work is cancelled when its last waiter leaves.

        Cancelling the caller detaches it and nothing else.

        Raises:
            AlreadyExists: a call with this key and another fingerprint is in flight or its result is kept.
            RuntimeDown: the daemon stops.
            Exception: whatever the work raised, for everyone who waits for it.
        """
        while True:
            call = self._calls.get(key)
            if call is None:
                task = asyncio.create_task(make(), name=f"call {key}")
                call = self._calls[key] = _Call(key, fingerprint, undo, stop_when_abandoned, task)
                task.add_done_callback(lambda _, call=call: self._on_end(call))  # type: ignore[misc]
                break
            if call.is_leaving:
                await asyncio.wait([call.ending or call.task])
                continue
            if call.fingerprint != fingerprint:
                raise AlreadyExists("Another request for the same object is being worked on.", key=key)
            break
        return cast("T", await self._wait(call))

    def settle(self, key: Hashable) -> None:
        """Let go of a kept result without undoing it: the object was found and is used in another way."""
        call = self._calls.get(key)
        if call is not None and call.ending is not None and not call.undoing:
            call.ending.cancel()
            self._forget(call)

    def is_running(self, key: Hashable) -> bool:
        """Say whether the work of `key` is in flight."""
        call = self._calls.get(key)
        return call is not None and not call.task.done()

    def __len__(self) -> int:
        """Return how many calls are in flight or kept."""
        return len(self._calls)

    async def aclose(self) -> None:
        """Cancel what is in flight and wait for it. Kept results stay as they are: they are on record."""
        calls = tuple(self._calls.values())
        for call in calls:
            call.task.cancel()
            if call.ending is not None and not call.undoing:
                call.ending.cancel()
        tasks = [task for call in calls for task in (call.task, call.ending) if task is not None]
        if tasks:
            await asyncio.wait(tasks)
        self._calls.clear()

    async def _wait(self, call: _Call) -> Any:
        if call.ending is not None:  # kept for us
            call.ending.cancel()
            call.ending = None
        call.waiters += 1
        try:
            # `wait`, not `shield`: an exception reaches every waiter, and cancelling us leaves the task alone.
            await asyncio.wait([call.task])
            if call.task.cancelled():  # by `aclose`: the caller itself was not cancelled
                raise RuntimeDown("The dispatcher is stopping: retry.")
            result = call.task.result()
            call.delivered = True
        finally:
            call.waiters -= 1
            if call.waiters == 0:
                self._on_left(call)
        return result

    def _on_left(self, call: _Call) -> None:
        """The last waiter is gone, with or without a result."""
        if call.task.done():
            self._on_end(call)
        elif call.stop_when_abandoned:
            call.task.cancel()

    def _on_end(self, call: _Call) -> None:
        """The work is done, or the last waiter left after that."""
        if call.waiters or self._calls.get(call.key) is not call or call.ending is not None:
            return
        failed = call.task.cancelled() or call.task.exception() is not None
        if failed or call.delivered or call.undo is None:
            if failed and not call.delivered and not call.task.cancelled():
                _log.info("call failed while nobody waited", exc_info=call.task.exception(), extra={"key": call.key})
            self._forget(call)
            return
        call.ending = asyncio.create_task(self._expire(call), name=f"keep {call.key}")

    async def _expire(self, call: _Call) -> None:
        assert call.undo is not None
        await self._sleep(self._keep_s)
        call.undoing = True
        try:
            _log.info("undoing an abandoned call", extra={"key": call.key})
            await call.undo(call.task.result())
        except Exception:  # noqa: BLE001 - nobody waits: the record shows what is left
            _log.exception("undo of an abandoned call failed", extra={"key": call.key})
        finally:
            self._forget(call)

    def _forget(self, call: _Call) -> None:
        if self._calls.get(call.key) is call:
            del self._calls[call.key]
