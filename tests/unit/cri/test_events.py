"""The feed of events: made once, in order, bounded for each client."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from dispatcher.cri import api_pb2 as pb
from dispatcher.cri.handlers import events
from dispatcher.cri.handlers.events import CLIENTS, EventFeed
from dispatcher.errors import OutOfResources
from dispatcher.model import Isolation, PluginStamp, PodMetadata, PodRecord, PodSpec, Route, make_pod_id
from dispatcher.transitions import PodState


class Feed:
    """A feed over a store that only tells of commits. The clock stands still."""

    def __init__(self) -> None:
        self.commit: Callable[[Any, Any], None] = lambda _old, _new: None
        self.made = 0
        store = SimpleNamespace(
            subscribe=self._subscribe, list_containers=self._count_and_list, find_pod=lambda _pod_id: None
        )
        self.feed = EventFeed(SimpleNamespace(store=store, now_ns=lambda: 1000))  # type: ignore[arg-type]

    def _subscribe(self, subscriber: Any) -> None:
        self.commit = subscriber

    def _count_and_list(self, _pod_id: str) -> list[Any]:
        self.made += 1
        return []

    def client(self) -> AsyncIterator[bytes]:
        return self.feed.handle(pb.GetEventsRequest(), None)  # type: ignore[arg-type]

    async def waiting(self, *clients: AsyncIterator[bytes]) -> list[asyncio.Task[bytes]]:
        """Begin to read, so that the clients are subscribed."""
        tasks = [asyncio.ensure_future(anext(client)) for client in clients]
        await asyncio.sleep(0)
        return tasks


def pod(annotation: str = "") -> PodRecord:
    return PodRecord(
        id=make_pod_id(),
        spec=PodSpec(metadata=PodMetadata(name="p", namespace="n", uid="u"), annotations={"a": annotation}),
        route=Route(runtime="r", rule="", reason="", isolation=Isolation.VM),
        stamp=PluginStamp(name="p", version="1", facts_schema=1),
        created_at_ns=1,
        fingerprint="",
        state=PodState.READY,
    )


def parsed(data: bytes) -> pb.ContainerEventResponse:
    return pb.ContainerEventResponse.FromString(data)


async def read_all(client: AsyncIterator[bytes], found: list[bytes]) -> None:
    async for event in client:
        found.append(event)


async def test_nothing_is_made_without_a_client() -> None:
    feed = Feed()
    record = pod()
    feed.commit(record, replace(record, state=PodState.NOTREADY))
    assert feed.made == 0


async def test_an_event_is_made_once_for_all_clients_with_rising_times() -> None:
    feed = Feed()
    clients = [feed.client() for _ in range(5)]
    tasks = await feed.waiting(*clients)
    record = pod()
    feed.commit(replace(record, state=PodState.CREATING), record)
    feed.commit(record, None)
    first = [await task for task in tasks]
    rest = [[await anext(client), await anext(client)] for client in clients]
    assert len(set(first)) == 1
    assert feed.made == 3
    told = [parsed(first[0]), *map(parsed, rest[0])]
    assert [event.container_event_type for event in told] == [
        pb.CONTAINER_CREATED_EVENT,
        pb.CONTAINER_STARTED_EVENT,
        pb.CONTAINER_DELETED_EVENT,
    ]
    assert [event.created_at for event in told] == [1000, 1001, 1002], "also where the clock stands still"
    assert {event.pod_sandbox_status.id for event in told} == {record.id}
    for client in clients:
        await client.aclose()  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("annotation", "limit"), [("", events.QUEUED), ("x" * 100_000, events.QUEUED_BYTES // 100_000)]
)
async def test_a_client_that_does_not_read_is_cut_off(annotation: str, limit: int) -> None:
    """By count or by bytes, after what it had room for; another one that reads is not disturbed."""
    feed = Feed()
    slow, quick = feed.client(), feed.client()
    tasks = await feed.waiting(slow, quick)
    record = pod(annotation)
    gone = replace(record, state=PodState.NOTREADY)
    feed.commit(record, gone)
    await asyncio.gather(*tasks)
    for _ in range(limit + 10):
        feed.commit(record, gone)
        await anext(quick)
    read: list[bytes] = []
    with pytest.raises(OutOfResources, match="subscribe again"):
        await read_all(slow, read)
    assert limit * 0.9 <= len(read) <= limit
    feed.commit(record, gone)
    assert await anext(quick)
    await quick.aclose()  # type: ignore[attr-defined]


async def test_clients_are_counted() -> None:
    feed = Feed()
    clients = [feed.client() for _ in range(CLIENTS)]
    tasks = await feed.waiting(*clients)
    with pytest.raises(OutOfResources, match="no more"):
        await anext(feed.client())
    tasks[0].cancel()
    await asyncio.wait({tasks[0]})
    [another] = await feed.waiting(feed.client())
    assert not another.done(), "the place of one that left is free"
    for task in (*tasks, another):
        task.cancel()
    await asyncio.wait({*tasks, another})
