"""Measures containers and pods: each runtime is asked once, and what belongs to the pod is read by the core.

Theory of operation. Three readings of one question run beside each other: the runtimes' figures of containers (and of
pods, where a runtime has its own), one pass over the pods' cgroups in a thread, one pass over their namespaces in
another. Nothing is asked per pod or per container, and no file is read on the loop. A runtime that fails leaves out its
own containers and fails nobody.

A pod's figures are, in this order: those of its runtime; those of the cgroup that the kubelet named for it, unless
another pod on record names the same one; the sum of its containers.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import PurePosixPath

from dispatcher.api import CanDetailedStats, CanPodStats, CanStats, ContainerUsage, PodUsage
from dispatcher.cgroups import expand_cgroup_parent, find_cgroup_of_parent, list_pids, read_usage
from dispatcher.deps import Deps
from dispatcher.errors import DispatcherError
from dispatcher.model import ContainerRecord, InterfaceUsage, Isolation, PodId, PodRecord, Usage
from dispatcher.stats.filesystems import Filesystem, device_name, read_filesystems
from dispatcher.stats.interfaces import order_interfaces, read_interfaces
from dispatcher.stats.rates import CpuRates
from dispatcher.transitions import ContainerState

log = logging.getLogger(__name__)

_SUMMED = (
    "cpu_usage_ns",
    "memory_usage_bytes",
    "memory_working_set_bytes",
    "memory_rss_bytes",
    "memory_page_faults",
    "memory_major_page_faults",
    "swap_usage_bytes",
    "thread_count",
    "cpu_user_ns",
    "cpu_system_ns",
    "memory_cache_bytes",
    "memory_mapped_file_bytes",
    "memory_kernel_bytes",
    "process_count",
    "file_descriptors",
    "sockets",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class ContainerFigures:
    """A container with its figures. `cpu_rate` is in billionths of a core; `filesystem` is read for metrics only."""

    record: ContainerRecord
    measured: ContainerUsage
    cpu_rate: int | None
    filesystem: Filesystem | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class PodFigures:
    """A pod with its figures and its containers'. `interfaces` has the default one first; None: the node's network.

    `usage` is None where nothing of the pod could be measured.
    """

    record: PodRecord
    usage: Usage | None
    cpu_rate: int | None
    interfaces: tuple[InterfaceUsage, ...] | None
    containers: tuple[ContainerFigures, ...]
    timestamp_ns: int


class Meter:
    """See the module. Subscribes to the store to forget what was removed."""

    def __init__(self, deps: Deps) -> None:
        self._deps = deps
        self._rates = CpuRates()
        self._devices: dict[tuple[int, int], str] = {}
        deps.store.subscribe(self._on_commit)

    def _on_commit(self, old: PodRecord | ContainerRecord | None, new: PodRecord | ContainerRecord | None) -> None:
        if old is not None and new is None:
            self._rates.drop(old.id)

    def device_name(self, major: int, minor: int) -> str:
        """The path of a block device. Blocks once per device that `pods` did not look at before."""
        return self._devices.get((major, minor)) or device_name(major, minor)

    async def containers(self, records: Iterable[ContainerRecord], *, detailed: bool = False) -> list[ContainerFigures]:
        """Measure those that run, in the order of `records`; what cannot be measured now is left out."""
        running = [record for record in records if record.state is ContainerState.RUNNING]
        groups: dict[str, list[tuple[ContainerRecord, PodRecord]]] = {}
        for record in running:
            pod = self._deps.store.find_pod(record.pod_id)
            if pod is not None:
                groups.setdefault(pod.route.runtime, []).append((record, pod))
        found = await asyncio.gather(*(self._ask_stats(name, group, detailed) for name, group in groups.items()))
        by_id = {measured.id: measured for group in found for measured in group}
        filesystems: dict[str, Filesystem] = {}
        if detailed:
            layers = {measured.writable_layer.mountpoint for measured in by_id.values() if measured.writable_layer}
            filesystems = await asyncio.to_thread(read_filesystems, layers)
        return [self._container(record, by_id[record.id], filesystems) for record in running if record.id in by_id]

    async def pods(self, records: Sequence[PodRecord], *, detailed: bool = False) -> list[PodFigures]:
        """Measure these pods, with their containers, in their order."""
        everyone = [container for pod in records for container in self._deps.store.list_containers(pod.id)]
        namespaces = [pod for pod in records if not pod.spec.uses_host_network]
        containers, own, cgroups, devices = await asyncio.gather(
            self.containers(everyone, detailed=detailed),
            self._ask_pod_stats(records, detailed),
            asyncio.to_thread(_read_cgroups, self._cgroups_of(records), detailed),
            read_interfaces([self._deps.netns_path(pod.id) for pod in namespaces]),
        )
        if detailed:
            await asyncio.to_thread(
                self._learn_devices, [c.measured.usage for c in containers] + list(cgroups.values())
            )
        by_pod: dict[PodId, list[ContainerFigures]] = {}
        for container in containers:
            by_pod.setdefault(container.record.pod_id, []).append(container)
        interfaces = {pod.id: found for pod, found in zip(namespaces, devices, strict=True)}
        return [
            self._pod(pod, own.get(pod.id), cgroups.get(pod.id), by_pod.get(pod.id, []), interfaces.get(pod.id))
            for pod in records
        ]

    # ------------------------------------------------------------------------------------------------------ putting together
    def _container(
        self, record: ContainerRecord, measured: ContainerUsage, filesystems: dict[str, Filesystem]
    ) -> ContainerFigures:
        usage, layer = measured.usage, measured.writable_layer
        return ContainerFigures(
            record=record,
            measured=measured,
            cpu_rate=self._rates.take(record.id, usage.timestamp_ns, usage.cpu_usage_ns),
            filesystem=filesystems.get(layer.mountpoint) if layer else None,
        )

    def _pod(
        self,
        pod: PodRecord,
        own: PodUsage | None,
        of_cgroup: Usage | None,
        containers: list[ContainerFigures],
        found: tuple[InterfaceUsage, ...] | None,
    ) -> PodFigures:
        usage = own.usage if own else of_cgroup
        if usage is None:
            usage = sum_usages([container.measured.usage for container in containers], self._deps.now_ns())
        interfaces = None
        if own is not None and own.interfaces is not None:
            interfaces = order_interfaces(own.interfaces, pod.attachment)
        elif found is not None:
            attached_only = pod.route.isolation is Isolation.VM
            interfaces = order_interfaces(found, pod.attachment, attached_only=attached_only)
        return PodFigures(
            record=pod,
            usage=usage,
            cpu_rate=self._rates.take(pod.id, usage.timestamp_ns, usage.cpu_usage_ns) if usage else None,
            interfaces=interfaces,
            containers=tuple(containers),
            timestamp_ns=self._deps.now_ns(),
        )

    def _cgroups_of(self, records: Sequence[PodRecord]) -> dict[PodId, str]:
        """The cgroups that belong to one pod alone, by pod."""
        # A new attempt of a pod is another sandbox in the same cgroup; the old one does not run any more.
        owners: dict[PurePosixPath, set[str]] = {}
        for pod in self._deps.store.list_pods():
            name = expand_cgroup_parent(pod.spec.cgroup_parent)
            if name is not None:
                owners.setdefault(name, set()).add(pod.spec.metadata.uid)
        found = {}
        for pod in records:
            name = expand_cgroup_parent(pod.spec.cgroup_parent)
            if name is not None and len(owners.get(name, ())) == 1:
                found[pod.id] = pod.spec.cgroup_parent
        return found

    def _learn_devices(self, usages: Iterable[Usage]) -> None:
        for usage in usages:
            for io in usage.device_io:
                key = (io.major, io.minor)
                if key not in self._devices and len(self._devices) < 1024:
                    self._devices[key] = device_name(*key)

    # --------------------------------------------------------------------------------------------------------------- runtimes
    async def _ask_stats(
        self, name: str, group: list[tuple[ContainerRecord, PodRecord]], detailed: bool
    ) -> tuple[ContainerUsage, ...]:
        deps = self._deps
        try:
            more = deps.registry.find_ability(name, CanDetailedStats) if detailed else None
            less = deps.registry.find_ability(name, CanStats)
            if more is None and less is None:
                return ()
            refs = tuple(deps.container_ref(record, pod) for record, pod in group)
            if more is not None:
                return await more.detailed_stats(refs)
            return await less.stats(refs) if less is not None else ()
        except DispatcherError as error:
            log.warning("no stats", extra={"runtime": name, "cause": error.message})
            return ()

    async def _ask_pod_stats(self, records: Sequence[PodRecord], detailed: bool) -> dict[PodId, PodUsage]:
        groups: dict[str, list[PodRecord]] = {}
        for pod in records:
            groups.setdefault(pod.route.runtime, []).append(pod)
        found: dict[PodId, PodUsage] = {}
        for name, group in groups.items():
            try:
                runtime = self._deps.registry.find_ability(name, CanPodStats)
                if runtime is None:
                    continue
                refs = tuple(self._deps.pod_ref(pod) for pod in group)
                found.update({item.id: item for item in await runtime.pod_stats(refs, detailed=detailed)})
            except DispatcherError as error:
                log.warning("no pod stats", extra={"runtime": name, "cause": error.message})
        return found


def _read_cgroups(parents: dict[PodId, str], detailed: bool) -> dict[PodId, Usage]:
    """One pass over the pods' cgroups; what is not there is left out."""
    found = {}
    for pod_id, parent in parents.items():
        where = find_cgroup_of_parent(parent)
        usage = read_usage(where, detailed=detailed) if where is not None else None
        if where is None or usage is None:
            continue
        # Open files are told per container: counting them here again would double the longest part of the work.
        found[pod_id] = replace(usage, process_count=len(list_pids(where))) if detailed else usage
    return found


def sum_usages(usages: Sequence[Usage], now_ns: int) -> Usage | None:
    """Add up what can be added up: no limits, no pressure. None for nothing to add."""
    if not usages:
        return None
    total: dict[str, int] = {}
    for usage in usages:
        for name in _SUMMED:
            value = getattr(usage, name)
            if value is not None:
                total[name] = total.get(name, 0) + value
    return Usage(timestamp_ns=min(usage.timestamp_ns for usage in usages) or now_ns, **total)  # type: ignore[arg-type]
