"""The streaming forms of the lists (KEP-5825): the same entries in batches, nothing at all for an empty list.

A batch is bounded by its size, not by a count: labels and annotations may be long. So a node of any size can be listed,
where a list in one message ends at the 16 MiB that a client takes.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from typing import Any

from dispatcher.cri import api_pb2 as pb
from dispatcher.cri import convert
from dispatcher.cri.batches import cut, in_batches, in_turns
from dispatcher.cri.handlers import images
from dispatcher.cri.handlers.stats import StatsHandlers
from dispatcher.cri.lists import Lists
from dispatcher.cri.measured import container_stats, pod_stats
from dispatcher.deps import Deps

Stream = Callable[[Any, Deps], AsyncIterator[Any]]


def streams(lists: Lists, stats: StatsHandlers) -> dict[str, Stream]:
    """The table of list streams, by RPC."""

    async def pods(request: pb.StreamPodSandboxesRequest, deps: Deps) -> AsyncIterator[bytes]:
        # The entries are field 1 of both replies, so that what was rendered for the list serves here.
        for batch in cut(lists.each_pod(request.filter)):
            yield batch

    async def containers(request: pb.StreamContainersRequest, deps: Deps) -> AsyncIterator[bytes]:
        for batch in cut(lists.each_container(request.filter)):
            yield batch

    async def all_images(request: pb.StreamImagesRequest, deps: Deps) -> AsyncIterator[pb.StreamImagesResponse]:
        async for batch in in_batches(in_turns(images.select(request.filter, deps), convert.image)):
            yield pb.StreamImagesResponse(images=batch)

    async def all_container_stats(
        request: pb.StreamContainerStatsRequest, deps: Deps
    ) -> AsyncIterator[pb.StreamContainerStatsResponse]:
        found = await stats.select_containers(request.filter, deps)
        async for batch in in_batches(in_turns(found, container_stats)):
            yield pb.StreamContainerStatsResponse(container_stats=batch)

    async def all_pod_stats(
        request: pb.StreamPodSandboxStatsRequest, deps: Deps
    ) -> AsyncIterator[pb.StreamPodSandboxStatsResponse]:
        found = await stats.select_pods(request.filter, deps)
        async for batch in in_batches(in_turns(found, pod_stats)):
            yield pb.StreamPodSandboxStatsResponse(pod_sandbox_stats=batch)

    async def all_metrics(
        request: pb.StreamPodSandboxMetricsRequest, deps: Deps
    ) -> AsyncIterator[pb.StreamPodSandboxMetricsResponse]:
        async for batch in in_batches(stats.each_pod_metrics(deps)):
            yield pb.StreamPodSandboxMetricsResponse(pod_sandbox_metrics=batch)

    return {
        "StreamPodSandboxes": pods,
        "StreamContainers": containers,
        "StreamImages": all_images,
        "StreamContainerStats": all_container_stats,
        "StreamPodSandboxStats": all_pod_stats,
        "StreamPodSandboxMetrics": all_metrics,
    }
