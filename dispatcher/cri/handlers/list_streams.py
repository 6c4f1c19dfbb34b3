"""The streaming forms of the lists (KEP-5825): the same entries in batches, nothing at all for an empty list."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from typing import Any, TypeVar

from dispatcher.cri import api_pb2 as pb
from dispatcher.cri import convert
from dispatcher.cri.handlers import images, stats
from dispatcher.cri.lists import Lists
from dispatcher.deps import Deps

BATCH = 500  # entries of 1.5 KB make messages well below the limit of 16 MiB
T = TypeVar("T")

Stream = Callable[[Any, Deps], AsyncIterator[Any]]


def _batches(entries: Sequence[T]) -> Iterator[Sequence[T]]:
    for start in range(0, len(entries), BATCH):
        yield entries[start : start + BATCH]


def streams(lists: Lists) -> dict[str, Stream]:
    """The table of list streams, by RPC."""

    async def pods(request: pb.StreamPodSandboxesRequest, deps: Deps) -> AsyncIterator[pb.StreamPodSandboxesResponse]:
        for batch in _batches(lists.select_pods(request.filter)):
            yield pb.StreamPodSandboxesResponse(pod_sandboxes=[convert.pod_item(record) for record in batch])

    async def containers(request: pb.StreamContainersRequest, deps: Deps) -> AsyncIterator[pb.StreamContainersResponse]:
        for batch in _batches(lists.select_containers(request.filter)):
            yield pb.StreamContainersResponse(containers=[convert.container_item(record) for record in batch])

    async def all_images(request: pb.StreamImagesRequest, deps: Deps) -> AsyncIterator[pb.StreamImagesResponse]:
        reply = await images.list_images(pb.ListImagesRequest(filter=request.filter), deps)
        for batch in _batches(reply.images):
            yield pb.StreamImagesResponse(images=batch)

    async def container_stats(
        request: pb.StreamContainerStatsRequest, deps: Deps
    ) -> AsyncIterator[pb.StreamContainerStatsResponse]:
        reply = await stats.many(pb.ListContainerStatsRequest(filter=request.filter), deps)
        for batch in _batches(reply.stats):
            yield pb.StreamContainerStatsResponse(container_stats=batch)

    return {
        "StreamPodSandboxes": pods,
        "StreamContainers": containers,
        "StreamImages": all_images,
        "StreamContainerStats": container_stats,
    }
