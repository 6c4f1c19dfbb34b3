"""GetContainerEvents: every change of a container or sandbox, as it is committed, for evented PLEG.

A subscriber gets what happens after it subscribed. One that does not read is cut off with RESOURCE_EXHAUSTED when its
queue is full: the kubelet then subscribes again and lists everything, which is what it must do after a gap.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

from dispatcher.cri import api_pb2 as pb
from dispatcher.cri import convert
from dispatcher.deps import Deps
from dispatcher.errors import OutOfResources
from dispatcher.model import ContainerRecord, PodRecord
from dispatcher.transitions import ContainerState, PodState

QUEUED = 4096

Record = PodRecord | ContainerRecord


async def handle(request: pb.GetEventsRequest, deps: Deps) -> AsyncIterator[pb.ContainerEventResponse]:
    """Yield events until the client leaves."""
    queue: asyncio.Queue[pb.ContainerEventResponse | None] = asyncio.Queue(QUEUED)

    def on_commit(old: Record | None, new: Record | None) -> None:
        kinds = event_types(old, new)
        record = new or old
        if not kinds or record is None or queue.full():
            return
        for kind in kinds:
            if queue.qsize() >= QUEUED - 1:
                queue.put_nowait(None)  # the last place says that the rest is missing
                return
            queue.put_nowait(_event(record, kind, gone=new is None, deps=deps))

    unsubscribe = deps.store.subscribe(on_commit)
    try:
        while (event := await queue.get()) is not None:
            yield event
        raise OutOfResources("This client does not read its events fast enough: subscribe again and list.")
    finally:
        unsubscribe()


def event_types(old: Record | None, new: Record | None) -> tuple[pb.ContainerEventType, ...]:
    """What a commit means in CRI's words: nothing, for most. A sandbox is created and started at once."""
    if new is None:
        was_shown = old is not None and old.state not in (PodState.CREATING, ContainerState.CREATING)
        return (pb.CONTAINER_DELETED_EVENT,) if was_shown else ()
    if old is None or old.state == new.state:
        return ()
    if isinstance(new, PodRecord):
        if new.state is PodState.READY:
            return (pb.CONTAINER_CREATED_EVENT, pb.CONTAINER_STARTED_EVENT)
        was_ready = old.state is PodState.READY
        return (pb.CONTAINER_STOPPED_EVENT,) if was_ready else ()
    return {
        ContainerState.CREATED: () if old.state is ContainerState.STARTING else (pb.CONTAINER_CREATED_EVENT,),
        ContainerState.RUNNING: (pb.CONTAINER_STARTED_EVENT,),
        ContainerState.EXITED: (pb.CONTAINER_STOPPED_EVENT,),
        ContainerState.UNKNOWN: (pb.CONTAINER_STOPPED_EVENT,),
    }.get(new.state, ())


def _event(record: Record, kind: pb.ContainerEventType, *, gone: bool, deps: Deps) -> pb.ContainerEventResponse:
    event = pb.ContainerEventResponse(container_id=record.id, container_event_type=kind, created_at=deps.now_ns())
    pod = record if isinstance(record, PodRecord) else deps.store.find_pod(record.pod_id)
    if pod is not None and not (gone and isinstance(record, PodRecord)):
        event.pod_sandbox_status.CopyFrom(convert.pod_status(pod))
        event.containers_statuses.extend(
            convert.container_status(c, pod)
            for c in deps.store.list_containers(pod.id)
            if convert.is_shown(c) and not (gone and c.id == record.id)
        )
    return event
