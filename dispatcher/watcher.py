"""Listening to runtimes: one task per runtime brings its facts into the record, for as long as the daemon lives."""

from __future__ import annotations

import asyncio
import logging

from dispatcher.api import Runtime
from dispatcher.deps import Deps
from dispatcher.errors import DispatcherError
from dispatcher.model import Change, ContainerRecord, Liveness, PodRecord, Snapshot
from dispatcher.transitions import ContainerEvent, ContainerState, PodState

log = logging.getLogger(__name__)

_RETRY_S = 1.0
# States in which the engine can tell something that the record does not know yet.
_OPEN_PODS = frozenset({PodState.READY})
_OPEN_CONTAINERS = frozenset(
    {ContainerState.CREATED, ContainerState.STARTING, ContainerState.RUNNING, ContainerState.UNKNOWN}
)


async def sync_runtime(runtime: Runtime, deps: Deps) -> None:
    """Ask a runtime about all that is on record as its own and alive, apply the answers, and follow the logs.

    Asked anew rather than taken from an event's snapshot: what was created after that snapshot would look absent.

    Raises:
        RuntimeDown: it cannot be asked.
    """
    pods = [p for p in deps.store.list_pods() if p.route.runtime == runtime.name and p.state is not PodState.CREATING]
    by_id: dict[str, PodRecord] = {p.id: p for p in pods}
    open_pods = [p for p in pods if p.state in _OPEN_PODS]
    containers = [c for c in deps.store.list_containers() if c.pod_id in by_id and c.state in _OPEN_CONTAINERS]
    if not open_pods and not containers:
        return
    snapshot = await runtime.inspect(
        tuple(deps.pod_ref(p) for p in open_pods),
        tuple(deps.container_ref(c, by_id[c.pod_id]) for c in containers),
    )
    for pod in snapshot.pods:
        await deps.facts.apply_pod(pod)
    liveness = {o.id: o.liveness for o in snapshot.containers}
    for container in containers:
        if liveness.get(container.id) in (Liveness.RUNNING, Liveness.EXITED):
            await _follow(runtime, container, by_id[container.pod_id], deps)
    for container in containers:
        started = liveness.get(container.id) is not Liveness.CREATED
        if container.state is ContainerState.STARTING and not started and not deps.logs.is_open(container.id):
            # The daemon died between the record and the act, so nobody is starting it now.
            await deps.store.update_container(container.id, ContainerEvent.NOT_STARTED)
    await asyncio.gather(*(deps.facts.apply_container(o) for o in snapshot.containers))


async def _follow(runtime: Runtime, container: ContainerRecord, pod: PodRecord, deps: Deps) -> None:
    """Carry on the log of a container that was started; a StartContainer call in flight does so itself."""
    if container.state is ContainerState.CREATED or deps.logs.is_open(container.id):
        return
    reference = deps.container_ref(container, pod)
    try:
        await deps.logs.open(runtime, reference, container.log)
    except (DispatcherError, OSError) as error:
        log.error("log cannot be opened", extra={"container_id": container.id, "cause": str(error)})
        return
    deps.logs.follow(runtime, reference, container.log)


async def watch_runtime(runtime: Runtime, deps: Deps) -> None:
    """Apply a runtime's facts for ever. A snapshot means that events may have been missed: everything is asked anew."""
    while True:
        try:
            async for item in runtime.watch():
                await _apply(item, runtime, deps)
        except DispatcherError as error:
            log.warning("watch broke off", extra={"runtime": runtime.name, "cause": error.message})
        except Exception:
            log.exception("watch failed", extra={"runtime": runtime.name})
        await asyncio.sleep(_RETRY_S)


async def _apply(item: Snapshot | Change, runtime: Runtime, deps: Deps) -> None:
    if isinstance(item, Snapshot):
        await sync_runtime(runtime, deps)
        return
    if item.pod is not None:
        await deps.facts.apply_pod(item.pod)
    if item.container is not None:
        # An exit waits for its last output; other facts must not wait behind it.
        deps.facts.apply_container_soon(item.container)
