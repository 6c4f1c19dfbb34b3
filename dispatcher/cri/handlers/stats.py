"""Stats and metrics of containers and pods. What is measured where is `dispatcher.stats`'s matter."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterable

from dispatcher.api import CanStats
from dispatcher.cri import api_pb2 as pb
from dispatcher.cri.batches import in_turns
from dispatcher.cri.handlers.lookup import get_container, get_pod, require_ready
from dispatcher.cri.lists import is_selected, named_containers
from dispatcher.cri.measured import container_stats, pod_stats
from dispatcher.cri.metric_table import descriptors, pod_metrics
from dispatcher.deps import Deps
from dispatcher.errors import Unsupported, WrongState
from dispatcher.model import PodRecord
from dispatcher.stats import ContainerFigures, Meter, PodFigures
from dispatcher.transitions import ContainerState, PodState


class StatsHandlers:
    """The RPCs on stats and metrics, over one meter."""

    def __init__(self, deps: Deps) -> None:
        self._meter = Meter(deps)

    # ---------------------------------------------------------------------------------------------------- containers
    async def container(self, request: pb.ContainerStatsRequest, deps: Deps) -> pb.ContainerStatsResponse:
        """Usage of one container; a runtime that cannot measure says so by UNIMPLEMENTED."""
        record = get_container(request.container_id, deps)
        pod = deps.store.get_pod(record.pod_id)
        if deps.registry.find_ability(pod.route.runtime, CanStats) is None:
            raise Unsupported(f'The runtime "{pod.route.runtime}" cannot measure its containers.')
        for figures in await self._meter.containers([record]):
            return pb.ContainerStatsResponse(stats=container_stats(figures))
        raise WrongState(f"The container {record.id} is {record.state}: there is nothing to measure.")

    async def containers(self, request: pb.ListContainerStatsRequest, deps: Deps) -> pb.ListContainerStatsResponse:
        """Usage of all running containers that the filter selects. What cannot be measured now is left out."""
        reply = pb.ListContainerStatsResponse()
        async for message in in_turns(await self.select_containers(request.filter, deps), container_stats):
            reply.stats.append(message)
        return reply

    async def select_containers(self, wanted: pb.ContainerStatsFilter, deps: Deps) -> list[ContainerFigures]:
        """Measure what a filter selects."""
        running = [r for r in deps.store.list_containers() if r.state is ContainerState.RUNNING]
        return await self._meter.containers(named_containers(wanted, running, deps.store))

    # ---------------------------------------------------------------------------------------------------------- pods
    async def pod(self, request: pb.PodSandboxStatsRequest, deps: Deps) -> pb.PodSandboxStatsResponse:
        """Usage of one pod with its containers. NOT_FOUND for no such pod, FAILED_PRECONDITION for one that ended."""
        record = require_ready(get_pod(request.pod_sandbox_id, deps))
        figures = await self._meter.pods([record])
        return pb.PodSandboxStatsResponse(stats=pod_stats(figures[0]))

    async def pods(self, request: pb.ListPodSandboxStatsRequest, deps: Deps) -> pb.ListPodSandboxStatsResponse:
        """Usage of all ready pods that the filter selects."""
        reply = pb.ListPodSandboxStatsResponse()
        async for message in in_turns(await self.select_pods(request.filter, deps), pod_stats):
            reply.stats.append(message)
        return reply

    async def select_pods(self, wanted: pb.PodSandboxStatsFilter, deps: Deps) -> list[PodFigures]:
        """Measure what a filter selects."""
        records: Iterable[PodRecord] = _ready_pods(deps)
        if wanted.id:
            pod_id = deps.store.resolve_pod_id(wanted.id)
            records = [r for r in records if r.id == pod_id]
        if wanted.label_selector:
            records = [r for r in records if is_selected(r.spec.labels, wanted.label_selector)]
        return await self._meter.pods(list(records))

    # ------------------------------------------------------------------------------------------------------- metrics
    async def metric_descriptors(
        self, request: pb.ListMetricDescriptorsRequest, deps: Deps
    ) -> pb.ListMetricDescriptorsResponse:
        """The names and label keys of all metrics, which never change while we run."""
        return pb.ListMetricDescriptorsResponse(descriptors=descriptors())

    async def metrics(self, request: pb.ListPodSandboxMetricsRequest, deps: Deps) -> pb.ListPodSandboxMetricsResponse:
        """All series of all ready pods and their running containers, measured now."""
        reply = pb.ListPodSandboxMetricsResponse()
        async for message in self.each_pod_metrics(deps):
            reply.pod_metrics.append(message)
        return reply

    async def each_pod_metrics(self, deps: Deps) -> AsyncIterator[pb.PodSandboxMetrics]:
        """The same, pod by pod: others get their turn on the loop in between."""
        for figures in await self._meter.pods(_ready_pods(deps), detailed=True):
            yield pod_metrics(figures, self._meter.device_name)
            await asyncio.sleep(0)


def _ready_pods(deps: Deps) -> list[PodRecord]:
    return [record for record in deps.store.list_pods() if record.state is PodState.READY]
