"""Facts on pods and containers, asked from the engine in whole whenever something hints that they changed."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Iterable, Mapping
from typing import Any, NamedTuple, TypeVar

from dispatcher.api import ContainerRef, PodRef
from dispatcher.errors import RuntimeDown
from dispatcher.model import Change, ContainerId, Liveness, ObservedContainer, ObservedPod, PodId, Snapshot
from dispatcher_docker_shim import naming
from dispatcher_docker_shim.engine import EngineLink
from dispatcher_docker_shim.observe import container_facts, pod_facts
from dispatcher_docker_shim.oom import OomWitness

T = TypeVar("T")
Json = dict[str, Any]

_log = logging.getLogger(__name__)

_FEW = 8  # up to so many objects are asked for one by one, more by one list first
_LOOK_AGAIN_S = 0.05
_AFTER_GAP_S = 0.1


class FirstProcess(NamedTuple):
    """The first process of a running container, and the engine's id, which its cgroup's name has in it."""

    pid: int
    engine_id: str


class EngineFacts:
    """Answers what the engine knows of our objects.

    `processes` holds the first processes of running containers, `layers` the folders of all writable layers ("" where the
    engine tells none), by the engine's names.
    """

    def __init__(self, link: EngineLink, oom: OomWitness, *, node_uuid: str, threads: int) -> None:
        self._link = link
        self._oom = oom
        self._node_uuid = node_uuid
        self._threads = threads
        self.processes: dict[str, FirstProcess] = {}
        self.layers: dict[str, str] = {}

    async def of_exactly(self, pods: tuple[PodRef, ...], containers: tuple[ContainerRef, ...]) -> Snapshot:
        """Facts on exactly these; ABSENT for what the engine does not have."""
        ids: list[PodId | ContainerId] = [*(pod.id for pod in pods), *(item.id for item in containers)]
        wanted = {naming.engine_name(item) for item in ids}
        if len(wanted) > _FEW:
            rows = await self._link.client.list_by_labels({naming.NODE_LABEL: self._node_uuid})
            wanted &= {name_of(row) for row in rows}
        found = await self._inspect_all(sorted(wanted))
        return Snapshot(
            pods=tuple(self._pod(pod.id, found.get(naming.engine_name(pod.id))) for pod in pods),
            containers=tuple(self._container(item.id, found.get(naming.engine_name(item.id))) for item in containers),
        )

    async def watch(self) -> AsyncIterator[Snapshot | Change]:
        """A snapshot after each (re)subscription, then full facts of whatever an event touched."""
        events = self._link.events
        epoch, sequence = 0, 0
        while True:
            events.changed.clear()
            if not events.connected or (events.epoch == epoch and not events.dirty):
                await events.changed.wait()
                continue
            item: Snapshot | Change | None
            try:
                if events.epoch != epoch:
                    seen = events.epoch
                    events.dirty.clear()
                    item = await self._of_all()
                    epoch = seen
                else:
                    name = next(iter(events.dirty))
                    del events.dirty[name]
                    item = await self._change(name, sequence + 1)
                    sequence += item is not None
            except RuntimeDown as error:
                _log.debug("facts wait for the engine: %s", error.message)
                epoch = 0  # whatever was missed comes with the next snapshot
                await asyncio.sleep(_AFTER_GAP_S)
                continue
            if item is not None:
                yield item

    async def settled(self, name: str) -> Json:
        """Inspect, waiting a moment where the engine may not have heard of an OOM kill yet. Raises EngineLacks."""
        while True:
            found = await self._link.client.inspect(name)
            self._oom.complete(found)
            self._note(name, found)
            if not self._oom.may_be_late(name, found["State"]):
                return found
            await asyncio.sleep(_LOOK_AGAIN_S)

    async def container(self, name: str) -> ObservedContainer:
        """`settled`, as facts."""
        return container_facts(await self.settled(name), self._link.age)

    async def has_ended(self, name: str) -> bool:
        """True when a container will write no more; False as well while the engine is away."""
        try:
            found = await self._link.client.find(name)
            return found is None or container_facts(found, self._link.age).liveness is Liveness.EXITED
        except RuntimeDown:
            return False  # a short absence is waited out: the next subscription asks again

    async def _of_all(self) -> Snapshot:
        rows = await self._link.client.list_by_labels({naming.NODE_LABEL: self._node_uuid})
        names = [name_of(row) for row in rows if naming.is_ours(row.get("Labels"), self._node_uuid)]
        found = await self._inspect_all(names)
        self.processes.clear()
        self.layers.clear()
        for name, item in found.items():
            self._note(name, item)
        age = self._link.age
        return Snapshot(
            pods=tuple(pod_facts(item, age) for item in found.values() if _is_pod(item)),
            containers=tuple(container_facts(item, age) for item in found.values() if not _is_pod(item)),
        )

    async def _change(self, name: str, sequence: int) -> Change | None:
        """Full facts of one object, or None when it has to be looked at again a little later."""
        found = await self._link.client.find(name)
        if found is None:
            self.processes.pop(name, None)
            self.layers.pop(name, None)
            object_id = naming.object_id(name)
            return Change(
                sequence=sequence,
                pod=self._pod(PodId(object_id), None),
                container=self._container(ContainerId(object_id), None),
            )
        if not naming.is_ours(found["Config"]["Labels"], self._node_uuid):
            return None
        self._oom.complete(found)
        self._note(name, found)
        if _is_pod(found):
            return Change(sequence=sequence, pod=pod_facts(found, self._link.age))
        if self._oom.may_be_late(name, found["State"]):
            asyncio.get_running_loop().call_later(_LOOK_AGAIN_S, self._link.events.touch, name)
            return None
        return Change(sequence=sequence, container=container_facts(found, self._link.age))

    async def _inspect_all(self, names: list[str]) -> dict[str, Json]:
        """Inspections by name; what vanished meanwhile is left out."""
        gate = asyncio.Semaphore(self._threads)

        async def one(name: str) -> Json | None:
            async with gate:
                return await self._link.client.find(name)

        results = await all_of(one(name) for name in names)
        for found in results:
            if found is not None:
                self._oom.complete(found)
        return {name: found for name, found in zip(names, results, strict=True) if found is not None}

    def _pod(self, pod_id: PodId, found: Json | None) -> ObservedPod:
        return pod_facts(found, self._link.age) if found else ObservedPod(id=pod_id, liveness=Liveness.ABSENT)

    def _container(self, container_id: ContainerId, found: Json | None) -> ObservedContainer:
        if found is None:
            return ObservedContainer(id=container_id, liveness=Liveness.ABSENT)
        return container_facts(found, self._link.age)

    def _note(self, name: str, found: Mapping[str, Any]) -> None:
        self.layers[name] = _layer_of(found)
        pid = int(found["State"].get("Pid") or 0)
        if pid and not _is_pod(found):
            self.processes[name] = FirstProcess(pid, str(found["Id"]))
        else:
            self.processes.pop(name, None)


async def all_of(work: Iterable[Awaitable[T]]) -> list[T]:
    """Run together; the first error is raised once all have ended, so that no work goes on behind the caller."""
    results = await asyncio.gather(*work, return_exceptions=True)
    good: list[T] = []
    for result in results:
        if isinstance(result, BaseException):
            raise result
        good.append(result)
    return good


def name_of(row: Mapping[str, Any]) -> str:
    """The name of a row of the engine's list; linked names hold a second slash."""
    names = [name[1:] for name in row.get("Names") or () if name.count("/") == 1]
    return names[0] if names else str(row["Id"])


def _layer_of(found: Mapping[str, Any]) -> str:
    driver = found.get("GraphDriver") or {}
    return str((driver.get("Data") or {}).get("UpperDir") or "")


def _is_pod(found: Mapping[str, Any]) -> bool:
    return bool(found["Config"]["Labels"].get(naming.KIND_LABEL) == naming.POD_KIND)
