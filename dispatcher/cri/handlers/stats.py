"""ContainerStats and ListContainerStats: usage of running containers, one pass per runtime."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterable

from dispatcher.api import CanStats, ContainerUsage
from dispatcher.cri import api_pb2 as pb
from dispatcher.cri import convert
from dispatcher.cri.handlers.lookup import get_container
from dispatcher.cri.lists import named_containers
from dispatcher.deps import Deps
from dispatcher.errors import DispatcherError, Unsupported, WrongState
from dispatcher.model import ContainerRecord
from dispatcher.transitions import ContainerState

log = logging.getLogger(__name__)


async def one(request: pb.ContainerStatsRequest, deps: Deps) -> pb.ContainerStatsResponse:
    """Usage of one container, running or not; a runtime that cannot measure says so by UNIMPLEMENTED."""
    record = get_container(request.container_id, deps)
    pod = deps.store.get_pod(record.pod_id)

    runtime = deps.registry.find_ability(pod.route.runtime, CanStats)
    if runtime is None:
        raise Unsupported(f'The runtime "{pod.route.runtime}" cannot measure its containers.')
    for usage in await runtime.stats((deps.container_ref(record, pod),)):
        return pb.ContainerStatsResponse(stats=_message(record, usage))
    raise WrongState(f"The container {record.id} is {record.state}: there is nothing to measure.")


async def many(request: pb.ListContainerStatsRequest, deps: Deps) -> pb.ListContainerStatsResponse:
    """Usage of all running containers that the filter selects. What cannot be measured now is left out."""
    running = [r for r in deps.store.list_containers() if r.state is ContainerState.RUNNING]
    records = named_containers(request.filter, running, deps.store)

    by_id = {record.id: record for record in records}
    usages = await usages_of(records, deps)
    return pb.ListContainerStatsResponse(stats=[_message(by_id[u.id], u) for u in usages])


async def usages_of(records: Iterable[ContainerRecord], deps: Deps) -> list[ContainerUsage]:
    """Ask each runtime once about all of its containers; one that fails leaves out its own and fails nobody."""
    groups: dict[str, list[ContainerRecord]] = {}
    for record in records:
        pod = deps.store.find_pod(record.pod_id)
        if pod is not None:
            groups.setdefault(pod.route.runtime, []).append(record)
    found = await asyncio.gather(*(_from_runtime(name, group, deps) for name, group in groups.items()))
    return [usage for usages in found for usage in usages]


async def _from_runtime(name: str, records: list[ContainerRecord], deps: Deps) -> tuple[ContainerUsage, ...]:
    try:
        runtime = deps.registry.find_ability(name, CanStats)
        if runtime is None:
            return ()
        return await runtime.stats(
            tuple(deps.container_ref(record, deps.store.get_pod(record.pod_id)) for record in records)
        )
    except DispatcherError as error:
        log.warning("no stats", extra={"runtime": name, "cause": error.message})
        return ()


def _message(record: ContainerRecord, usage: ContainerUsage) -> pb.ContainerStats:
    stats = pb.ContainerStats(
        attributes=pb.ContainerAttributes(
            id=record.id,
            metadata=convert.container_metadata(record),
            labels=record.spec.labels,
            annotations=record.spec.annotations,
        )
    )
    stats.cpu.timestamp = usage.timestamp_ns
    stats.memory.timestamp = usage.timestamp_ns
    _set(stats.cpu.usage_core_nano_seconds, usage.cpu_usage_ns)
    _set(stats.memory.usage_bytes, usage.memory_usage_bytes)
    _set(stats.memory.working_set_bytes, usage.memory_working_set_bytes)
    _set(stats.memory.rss_bytes, usage.memory_rss_bytes)
    _set(stats.memory.page_faults, usage.memory_page_faults)
    _set(stats.memory.major_page_faults, usage.memory_major_page_faults)
    if usage.swap_usage_bytes is not None:
        stats.swap.timestamp = usage.timestamp_ns
        _set(stats.swap.swap_usage_bytes, usage.swap_usage_bytes)
    if usage.writable_layer_bytes is not None:
        stats.writable_layer.timestamp = usage.timestamp_ns
        stats.writable_layer.fs_id.mountpoint = usage.writable_layer_mountpoint
        _set(stats.writable_layer.used_bytes, usage.writable_layer_bytes)
        _set(stats.writable_layer.inodes_used, usage.writable_layer_inodes)
    return stats


def _set(field: pb.UInt64Value, value: int | None) -> None:
    """A wrapper that is absent means "not known"; zero is a figure."""
    if value is not None:
        field.value = value
