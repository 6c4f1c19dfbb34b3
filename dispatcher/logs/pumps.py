"""All log pumps of the daemon: which run, and waiting for one to be done."""

from __future__ import annotations

import asyncio
import logging

from dispatcher.api import ContainerRef, Runtime
from dispatcher.errors import NotFound, WrongState
from dispatcher.logs.pump import LogPump
from dispatcher.model import ContainerId, LogCheckpoint
from dispatcher.store import Store

log = logging.getLogger(__name__)

DRAIN_S = 10.0  # an exit waits this long for the last lines before it is shown


class LogPumps:
    """Starts, finds and ends the pumps, one per container that runs or ran."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._pumps: dict[ContainerId, LogPump] = {}
        self._tasks: dict[ContainerId, asyncio.Task[None]] = {}
        self._followed: dict[ContainerId, asyncio.Event] = {}

    async def open(self, runtime: Runtime, container: ContainerRef, checkpoint: LogCheckpoint) -> None:
        """Open the log file, before the container is started. Idempotent."""
        self._followed.setdefault(container.id, asyncio.Event())
        await self._pump(runtime, container, checkpoint).open()

    def follow(self, runtime: Runtime, container: ContainerRef, checkpoint: LogCheckpoint) -> None:
        """Carry output until the container is done. Idempotent: a container has one pump."""
        if container.id in self._tasks:
            return
        pump = self._pump(runtime, container, checkpoint)
        task = asyncio.create_task(self._run(container.id, pump), name=f"log {container.id[:12]}")
        self._tasks[container.id] = task
        self._followed.setdefault(container.id, asyncio.Event()).set()

    def is_open(self, container_id: ContainerId) -> bool:
        """True where a pump stands already, following or about to."""
        return container_id in self._pumps

    async def drained(self, container_id: ContainerId, timeout_s: float = DRAIN_S) -> bool:
        """Wait until all output of an exited container is written. False when that took too long: it goes on.

        An exit can be heard of before the call that started the container has returned and its pump follows.
        """
        followed = self._followed.get(container_id)
        if followed is None:
            return True
        try:
            async with asyncio.timeout(timeout_s):
                await followed.wait()
                await asyncio.wait({self._tasks[container_id]})
        except (TimeoutError, KeyError):
            return False
        return True

    async def reopen(self, container_id: ContainerId) -> None:
        """Continue in a fresh file. Raises WrongState when the container has no open log; makes no file then."""
        pump = self._pumps.get(container_id)
        task = self._tasks.get(container_id)
        if pump is None or task is None or task.done():
            raise WrongState("The container is not running, so its log is not open.")
        await pump.reopen()

    async def forget(self, container_id: ContainerId) -> None:
        """End the pump of a container that is being removed. The file stays: it is the kubelet's."""
        task = self._tasks.pop(container_id, None)
        if task is not None:
            task.cancel()
            await asyncio.wait({task})
        pump = self._pumps.pop(container_id, None)
        self._followed.pop(container_id, None)
        if pump is not None:
            pump.close()

    async def aclose(self) -> None:
        """End all pumps; a restart continues where they stand."""
        for container_id in list(self._pumps):
            await self.forget(container_id)

    def _pump(self, runtime: Runtime, container: ContainerRef, checkpoint: LogCheckpoint) -> LogPump:
        pump = self._pumps.get(container.id)
        if pump is None:
            pump = self._pumps[container.id] = LogPump(runtime, container, checkpoint, self._commit)
        return pump

    async def _commit(self, container_id: ContainerId, checkpoint: LogCheckpoint) -> None:
        try:
            await self._store.update_container(container_id, log=checkpoint)
        except NotFound:
            log.debug("no record for a log checkpoint", extra={"container_id": container_id})

    async def _run(self, container_id: ContainerId, pump: LogPump) -> None:
        try:
            await pump.run()
        except asyncio.CancelledError:
            raise
        except Exception:
            log.exception("log pump failed", extra={"container_id": container_id})
        finally:
            pump.close()
