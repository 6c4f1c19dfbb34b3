"""What containers use: one pass over their cgroups, and the engine's figures for their writable layers."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

from dispatcher.api import ContainerRef, ContainerUsage
from dispatcher.errors import RuntimeDown
from dispatcher_docker_shim import cgroups, naming
from dispatcher_docker_shim.engine import EngineLink
from dispatcher_docker_shim.facts import name_of

_LAYERS_FOR_S = 60.0


class UsageReader:
    """Measures. Measuring layers walks disks, so the engine is asked for all of them once a minute at most."""

    def __init__(self, link: EngineLink, pids: Mapping[str, int], *, node_uuid: str, now_ns: Callable[[], int]) -> None:
        self._link = link
        self._pids = pids
        self._node_uuid = node_uuid
        self._now_ns = now_ns
        self._layers: dict[str, int] = {}
        self._layers_at = -_LAYERS_FOR_S

    async def of_containers(self, containers: tuple[ContainerRef, ...]) -> tuple[ContainerUsage, ...]:
        """Usage of those that run; the others are left out."""
        await self._refresh_layers()
        mountpoint = self._link.traits.root_dir if self._link.traits else ""
        rows = []
        for container in containers:
            name = naming.engine_name(container.id)
            where = cgroups.of_process(self._pids[name]) if name in self._pids else None
            usage = cgroups.usage(where) if where else None
            if usage is None:
                continue
            rows.append(
                ContainerUsage(
                    id=container.id,
                    timestamp_ns=self._now_ns(),
                    cpu_usage_ns=usage.cpu_usage_ns,
                    memory_usage_bytes=usage.memory_usage_bytes,
                    memory_working_set_bytes=usage.memory_working_set_bytes,
                    memory_rss_bytes=usage.memory_rss_bytes,
                    memory_page_faults=usage.page_faults,
                    memory_major_page_faults=usage.major_page_faults,
                    swap_usage_bytes=usage.swap_bytes,
                    writable_layer_bytes=self._layers.get(name),
                    writable_layer_mountpoint=mountpoint,
                ),
            )
        return tuple(rows)

    async def of_disk(self) -> dict[str, tuple[int, int]]:
        """Bytes of all writable layers, under the engine's data folder. Inodes are not told by the engine."""
        await self._refresh_layers()
        if self._link.traits is None:
            return {}
        return {self._link.traits.root_dir: (sum(self._layers.values()), 0)}

    async def _refresh_layers(self) -> None:
        if time.monotonic() - self._layers_at < _LAYERS_FOR_S:
            return
        self._layers_at = time.monotonic()
        try:
            rows = await self._link.client.list_by_labels({naming.NODE_LABEL: self._node_uuid}, size=True)
        except RuntimeDown:
            return  # the figures of a minute ago serve
        self._layers = {name_of(row): int(row.get("SizeRw") or 0) for row in rows}
