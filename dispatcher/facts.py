"""Applying what runtimes report to the record. Every fact is complete, so applying one twice changes nothing.

The one place where an engine's view becomes ours: RPC handlers pass here what their calls returned, watchers what they
heard, recovery what it asked. Events never take the operation lock. An exit is shown only once its last output is in
the log, within a deadline.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

from dispatcher.errors import NotFound, WrongState
from dispatcher.logs.pumps import LogPumps
from dispatcher.model import ContainerRecord, Liveness, ObservedContainer, ObservedPod, PodRecord
from dispatcher.store import Store
from dispatcher.transitions import ContainerEvent, ContainerState, PodEvent, PodState

log = logging.getLogger(__name__)

_ALIVE = frozenset({ContainerState.CREATED, ContainerState.STARTING, ContainerState.RUNNING, ContainerState.UNKNOWN})


def exit_reason(observed: ObservedContainer) -> str:
    """The reason as `kubectl describe` shows it (containerd's words, which people know)."""
    if observed.oom_killed:
        return "OOMKilled"
    if observed.reason:
        return observed.reason
    return "Completed" if observed.exit_code == 0 else "Error"


class FactKeeper:
    """Turns observations into commits."""

    def __init__(self, store: Store, logs: LogPumps, now_ns: Callable[[], int]) -> None:
        self._store = store
        self._logs = logs
        self._now_ns = now_ns
        self._tasks: set[asyncio.Task[object]] = set()

    def apply_container_soon(self, observed: ObservedContainer) -> None:
        """As `apply_container`, without waiting for it."""
        task: asyncio.Task[object] = asyncio.create_task(self.apply_container(observed))
        self._tasks.add(task)
        task.add_done_callback(self._on_done)

    def _on_done(self, task: asyncio.Task[object]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("a fact was not applied", exc_info=error)

    async def aclose(self) -> None:
        """Stop applying."""
        for task in self._tasks:
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks)

    async def apply_container(self, observed: ObservedContainer) -> ContainerRecord | None:
        """Commit a fact on a container; returns its record, or None when none of ours has this id."""
        record = self._store.find_container(observed.id)
        if record is None:
            log.debug("fact on a container without a record", extra={"container_id": observed.id})
            return None
        try:
            return await self._apply_container(record, observed)
        except (NotFound, WrongState) as error:
            # The record moved on while this fact was under way (a removal, most often): the newer state stands.
            log.debug("stale fact", extra={"container_id": observed.id, "cause": str(error)})
            return self._store.find_container(observed.id)

    async def _apply_container(self, record: ContainerRecord, observed: ObservedContainer) -> ContainerRecord:
        if observed.liveness is Liveness.RUNNING and record.state in _ALIVE:
            return await self._store.update_container(
                record.id,
                ContainerEvent.STARTED,
                started_at_ns=observed.started_at_ns or record.started_at_ns or self._now_ns(),
                **_applied(observed),
            )
        if observed.liveness is Liveness.EXITED and record.state in _ALIVE:
            if not await self._logs.drained(record.id):
                log.warning("an exit is shown before its last output is written", extra={"container_id": record.id})
            if observed.exit_code is None:
                return await self._contradicted(
                    record,
                    observed.reason or "ExitCodeLost",
                    observed.message or "The runtime does not know its exit code.",
                )
            return await self._store.update_container(
                record.id,
                ContainerEvent.EXITED,
                started_at_ns=observed.started_at_ns or record.started_at_ns,
                finished_at_ns=observed.finished_at_ns or self._now_ns(),
                exit_code=observed.exit_code,
                reason=exit_reason(observed),
                message=observed.message,
                **_applied(observed),
            )
        if observed.liveness is Liveness.ABSENT and record.state in _ALIVE:
            return await self._contradicted(
                record,
                observed.reason or "ContainerGone",
                observed.message or "The runtime no longer has this container.",
            )
        return record

    async def _contradicted(self, record: ContainerRecord, reason: str, message: str) -> ContainerRecord:
        if record.state is ContainerState.UNKNOWN and record.reason == reason:
            return record
        return await self._store.update_container(
            record.id, ContainerEvent.CONTRADICTED, reason=reason, message=message
        )

    async def apply_pod(self, observed: ObservedPod) -> PodRecord | None:
        """Commit a fact on a sandbox: one that died becomes NOTREADY, with the runtime's reason."""
        record = self._store.find_pod(observed.id)
        if record is None:
            return None
        if record.state is PodState.READY and observed.liveness in (Liveness.EXITED, Liveness.ABSENT):
            log.warning("sandbox died", extra={"pod_id": record.id, "reason": observed.reason})
            return await self._store.update_pod(
                record.id,
                PodEvent.DIED,
                reason=observed.reason or "SandboxDied",
                message=observed.message or "The sandbox is no longer running.",
            )
        return record


def _applied(observed: ObservedContainer) -> dict[str, object]:
    changes: dict[str, object] = {}
    if observed.granted is not None:
        changes["granted"] = observed.granted
    if observed.user is not None:
        changes["user"] = observed.user
    return changes
