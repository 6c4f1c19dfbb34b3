"""GetContainerEvents: every change of a container or sandbox, as it is committed, for evented PLEG.

Theory of operation. An event is made once, when its commit is seen, whatever the number of clients, and waits as bytes
in the queue of each. A client gets what happens after it subscribed, in the order of the commits, with times that
never fall: a kubelet drops what looks older than what it knows. A queue is bounded by count and by bytes; a client
that does not read is cut off with RESOURCE_EXHAUSTED when its own is full. The kubelet then subscribes again and lists
everything, which is what it must do after a gap.

The event of a removed sandbox still carries its last status: a kubelet passes over events without one, and forgets the
pod by the sandbox id in it.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator

from dispatcher.cri import api_pb2 as pb
from dispatcher.cri import convert
from dispatcher.deps import Deps
from dispatcher.errors import OutOfResources
from dispatcher.model import ContainerRecord, PodRecord
from dispatcher.transitions import ContainerState, PodState

QUEUED = 4096
QUEUED_BYTES = 8 << 20
CLIENTS = 32

Record = PodRecord | ContainerRecord


class _Queue:
    """The events that one client did not read yet. Closed for good when it overflows."""

    def __init__(self) -> None:
        self._events: deque[bytes] = deque()
        self._bytes = 0
        self._news = asyncio.Event()
        self.overflowed = False

    def put(self, event: bytes) -> None:
        if self.overflowed:
            return
        if len(self._events) >= QUEUED or self._bytes + len(event) > QUEUED_BYTES:
            self.overflowed = True
        else:
            self._events.append(event)
            self._bytes += len(event)
        self._news.set()

    async def get(self) -> bytes | None:
        """The next event; None when the rest is missing."""
        while not self._events:
            if self.overflowed:
                return None
            self._news.clear()
            await self._news.wait()
        event = self._events.popleft()
        self._bytes -= len(event)
        return event


class EventFeed:
    """The clients of GetContainerEvents. Costs nothing while there is none."""

    def __init__(self, deps: Deps) -> None:
        self._deps = deps
        self._queues: set[_Queue] = set()
        self._last_ns = 0
        deps.store.subscribe(self._on_commit)

    async def handle(self, request: pb.GetEventsRequest, deps: Deps) -> AsyncIterator[bytes]:
        """Yield events until the client leaves."""
        if len(self._queues) >= CLIENTS:
            raise OutOfResources(f"{CLIENTS} clients follow the events already: no more are served.")
        queue = _Queue()
        self._queues.add(queue)
        try:
            while (event := await queue.get()) is not None:
                yield event
            raise OutOfResources("This client does not read its events fast enough: subscribe again and list.")
        finally:
            self._queues.discard(queue)

    def _on_commit(self, old: Record | None, new: Record | None) -> None:
        if not self._queues:
            return
        record = new or old
        for kind in event_types(old, new):
            assert record is not None
            event = self._make(record, kind, gone=new is None).SerializeToString()
            for queue in self._queues:
                queue.put(event)

    def _make(self, record: Record, kind: pb.ContainerEventType, *, gone: bool) -> pb.ContainerEventResponse:
        self._last_ns = max(self._deps.now_ns(), self._last_ns + 1)
        event = pb.ContainerEventResponse(container_id=record.id, container_event_type=kind, created_at=self._last_ns)
        pod = record if isinstance(record, PodRecord) else self._deps.store.find_pod(record.pod_id)
        if pod is not None:
            event.pod_sandbox_status.CopyFrom(convert.pod_status(pod))
            event.containers_statuses.extend(
                convert.container_status(c, pod)
                for c in convert.newest_first(self._deps.store.list_containers(pod.id))
                if not (gone and c.id == record.id)
            )
        return event


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
