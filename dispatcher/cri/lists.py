"""ListPodSandbox and ListContainers: answered from memory, as bytes that were serialised once per record.

The kubelet asks for both every second. A reply with one repeated field is, on the wire, nothing but the concatenation
of its entries, each with tag and length in front; so an entry is rendered when its record changes, and a list is a
join. Filters look at records, never at bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Generic, TypeVar

from google.protobuf.message import Message

from dispatcher.cri import api_pb2 as pb
from dispatcher.cri import convert
from dispatcher.deps import Deps
from dispatcher.model import ContainerRecord, PodRecord
from dispatcher.store import Store
from dispatcher.transitions import PodState

Record = TypeVar("Record", PodRecord, ContainerRecord)


class RenderedEntries(Generic[Record]):
    """Entries of a list reply by record id, each kept until its record has another version."""

    def __init__(self, wrap: Callable[[Record], Message]) -> None:
        self._wrap: Callable[[Record], Message] = wrap
        self._kept: dict[str, tuple[int, bytes]] = {}

    def each(self, records: Iterable[Record]) -> Iterator[bytes]:
        """Yield the serialised entry of each of these records, in their order."""
        for record in records:
            kept = self._kept.get(record.id)
            if kept is None or kept[0] != record.version:
                kept = (record.version, self._wrap(record).SerializeToString())
                self._kept[record.id] = kept
            yield kept[1]

    def join(self, records: Iterable[Record]) -> bytes:
        """Return the serialised reply that lists these records, in their order."""
        return b"".join(self.each(records))

    def drop(self, record_id: str) -> None:
        """Forget a removed record."""
        self._kept.pop(record_id, None)


def is_selected(labels: Mapping[str, str], selector: Mapping[str, str]) -> bool:
    """True where all labels of a CRI selector match; an empty one matches all."""
    return all(labels.get(key) == value for key, value in selector.items())


def named_containers(
    wanted: pb.ContainerFilter | pb.ContainerStatsFilter, records: Iterable[ContainerRecord], store: Store
) -> list[ContainerRecord]:
    """Those of the records that a filter names by id, by pod and by labels (all that are given have to hold)."""
    if wanted.id:
        container_id = store.resolve_container_id(wanted.id)
        records = [r for r in records if r.id == container_id]
    if wanted.pod_sandbox_id:
        pod_id = store.resolve_pod_id(wanted.pod_sandbox_id)
        records = [r for r in records if r.pod_id == pod_id]
    if wanted.label_selector:
        records = [r for r in records if is_selected(r.spec.labels, wanted.label_selector)]
    return list(records)


class Lists:
    """The two hot lists. Subscribes to the store to forget what was removed."""

    def __init__(self, deps: Deps) -> None:
        self._deps = deps
        self._pods: RenderedEntries[PodRecord] = RenderedEntries(
            lambda record: pb.ListPodSandboxResponse(items=[convert.pod_item(record)])
        )
        self._containers: RenderedEntries[ContainerRecord] = RenderedEntries(
            lambda record: pb.ListContainersResponse(containers=[convert.container_item(record)])
        )
        deps.store.subscribe(self._on_commit)

    def _on_commit(self, old: PodRecord | ContainerRecord | None, new: PodRecord | ContainerRecord | None) -> None:
        if old is not None and new is None:
            self._pods.drop(old.id)
            self._containers.drop(old.id)

    async def pods(self, request: pb.ListPodSandboxRequest, deps: Deps) -> bytes:
        """The sandboxes that the filter selects (all conditions hold); those being created are not shown yet."""
        return self._pods.join(self.select_pods(request.filter))

    async def containers(self, request: pb.ListContainersRequest, deps: Deps) -> bytes:
        """The containers that the filter selects."""
        return self._containers.join(self.select_containers(request.filter))

    def each_pod(self, wanted: pb.PodSandboxFilter) -> Iterator[bytes]:
        """Yield the serialised entries of the sandboxes that a filter selects."""
        return self._pods.each(self.select_pods(wanted))

    def each_container(self, wanted: pb.ContainerFilter) -> Iterator[bytes]:
        """Yield the serialised entries of the containers that a filter selects."""
        return self._containers.each(self.select_containers(wanted))

    def select_pods(self, wanted: pb.PodSandboxFilter) -> list[PodRecord]:
        """The records that a filter selects, in order of creation."""
        records: Iterable[PodRecord] = self._deps.store.list_pods()
        if wanted.id:
            pod_id = self._deps.store.resolve_pod_id(wanted.id)
            records = [r for r in records if r.id == pod_id]
        if wanted.HasField("state"):
            records = [r for r in records if convert.pod_state(r) == wanted.state.state]
        if wanted.label_selector:
            records = [r for r in records if is_selected(r.spec.labels, wanted.label_selector)]
        return [r for r in records if r.state is not PodState.CREATING]

    def select_containers(self, wanted: pb.ContainerFilter) -> list[ContainerRecord]:
        """The records that a filter selects, in order of creation."""
        store = self._deps.store
        records = [r for r in named_containers(wanted, store.list_containers(), store) if convert.is_shown(r)]
        if wanted.HasField("state"):
            records = [r for r in records if convert.container_state(r) == wanted.state.state]
        return records
