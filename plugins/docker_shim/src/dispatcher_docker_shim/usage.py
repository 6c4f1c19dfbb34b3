"""What containers use: one pass over their cgroups in a thread, and the figures of their writable layers."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping

from dispatcher.api import ContainerRef, ContainerUsage, find_cgroup_of_process, read_processes, read_usage
from dispatcher.model import ContainerId, FilesystemUsage, Usage
from dispatcher_docker_shim import naming
from dispatcher_docker_shim.engine import EngineLink
from dispatcher_docker_shim.facts import FirstProcess, name_of
from dispatcher_docker_shim.layers import Layer, LayerMeter


class UsageReader:
    """Measures. `processes` are the first processes of running containers, `folders` the writable layers of all, by name."""

    def __init__(
        self,
        link: EngineLink,
        processes: Mapping[str, FirstProcess],
        folders: Mapping[str, str],
        *,
        node_uuid: str,
        now_ns: Callable[[], int],
    ) -> None:
        self._link = link
        self._processes = processes
        self._node_uuid = node_uuid
        self._now_ns = now_ns
        self._layers = LayerMeter(folders, self._ask_sizes, now_ns=now_ns)

    async def aclose(self) -> None:
        """Stop measuring layers."""
        await self._layers.aclose()

    async def of_containers(
        self, containers: tuple[ContainerRef, ...], *, detailed: bool = False
    ) -> tuple[ContainerUsage, ...]:
        """Usage of those that run; the others are left out."""
        names = {container.id: naming.engine_name(container.id) for container in containers}
        running = {object_id: self._processes[name] for object_id, name in names.items() if name in self._processes}
        layers, usages = await asyncio.gather(
            self._layers.measure(names.values()), asyncio.to_thread(_read_all, running, detailed, self._now_ns)
        )
        return tuple(
            ContainerUsage(id=object_id, usage=usage, writable_layer=self._layer(layers.get(names[object_id])))
            for object_id, usage in usages.items()
        )

    async def of_disk(self) -> dict[str, tuple[int, int]]:
        """Bytes and inodes of all writable layers that were measured, under the engine's data folder."""
        layers = await self._layers.measure()
        if self._link.traits is None:
            return {}
        used = sum(layer.used_bytes for layer in layers.values())
        return {self._link.traits.root_dir: (used, sum(layer.inodes for layer in layers.values()))}

    def _layer(self, layer: Layer | None) -> FilesystemUsage | None:
        if layer is None or self._link.traits is None:
            return None
        return FilesystemUsage(
            timestamp_ns=layer.at_ns,
            mountpoint=self._link.traits.root_dir,
            used_bytes=layer.used_bytes,
            inodes_used=layer.inodes,
        )

    async def _ask_sizes(self) -> dict[str, int]:
        rows = await self._link.client.list_by_labels({naming.NODE_LABEL: self._node_uuid}, size=True)
        return {name_of(row): int(row.get("SizeRw") or 0) for row in rows}


def _read_all(
    processes: Mapping[ContainerId, FirstProcess], detailed: bool, now_ns: Callable[[], int]
) -> dict[ContainerId, Usage]:
    """One pass. Which cgroup it is comes from the kernel: a pid that was reused belongs to another one."""
    found = {}
    for object_id, (pid, engine_id) in processes.items():
        where = find_cgroup_of_process(pid, owner=engine_id)
        usage = read_usage(where, detailed=detailed, now_ns=now_ns) if where is not None else None
        if where is not None and usage is not None:
            found[object_id] = read_processes(where, usage, first_pid=pid) if detailed else usage
    return found
