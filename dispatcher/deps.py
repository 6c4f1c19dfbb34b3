"""What handlers work with: named collaborators, put together once in `app`. A handler is given this and nothing else."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from dispatcher.api import ContainerRef, ImageProvider, NetworkProvider, PodRef, Runtime
from dispatcher.calls import Calls
from dispatcher.facts import FactKeeper
from dispatcher.locks import Locks
from dispatcher.logs.pumps import LogPumps
from dispatcher.model import ContainerRecord, ImageId, PluginStamp, PodId, PodRecord
from dispatcher.observability.traces import TraceLog
from dispatcher.policy import PolicyEngine
from dispatcher.registry import Registry
from dispatcher.store import Store


@dataclass(frozen=True, slots=True, kw_only=True)
class Deps:
    """The collaborators of the handlers."""

    store: Store
    registry: Registry
    policy: PolicyEngine
    calls: Calls
    locks: Locks
    logs: LogPumps
    facts: FactKeeper
    now_ns: Callable[[], int]
    pods_dir: Path
    netns_dir: Path
    cgroup_driver: Callable[[], str]
    overdue_runtimes: Callable[[], tuple[str, ...]]  # required ones that are down for too long
    conditions: Callable[[], tuple[tuple[str, bool, str, str], ...]]  # what is wrong with our own files
    info: Callable[[], dict[str, str]]  # verbose info of Status
    traces: TraceLog
    topics: Mapping[str, Callable[[], str]]  # texts that our own commands ask for

    @property
    def images(self) -> ImageProvider:
        """The active image store."""
        return self.registry.images

    @property
    def network(self) -> NetworkProvider:
        """The active network provider."""
        return self.registry.network

    def netns_path(self, pod_id: PodId) -> Path:
        """Where the pod's network namespace is mounted."""
        return self.netns_dir / pod_id

    def state_dir(self, pod_id: PodId) -> Path:
        """The pod's own folder."""
        return self.pods_dir / pod_id

    def runtime_of(self, pod: PodRecord) -> Runtime:
        """The pod's runtime. Raises NoRuntime when its plugin is not loaded."""
        return self.registry.runtime(pod.route.runtime)

    def stamp(self, runtime: Runtime) -> PluginStamp:
        """What a record says of the plugin that makes its facts."""
        return PluginStamp(name=runtime.name, version=runtime.version, facts_schema=runtime.facts_schema)

    def pod_ref(self, pod: PodRecord) -> PodRef:
        """The pod as its runtime is told of it."""
        return PodRef(
            id=pod.id,
            spec=pod.spec,
            facts=pod.facts,
            attachment=pod.attachment,
            netns_path=pod.plan.netns_path if pod.plan is not None else "",
            options=pod.route.options,
            state_dir=str(self.state_dir(pod.id)),
        )

    def container_ref(self, container: ContainerRecord, pod: PodRecord) -> ContainerRef:
        """The container as its runtime is told of it."""
        return ContainerRef(
            id=container.id,
            pod=self.pod_ref(pod),
            spec=container.spec,
            image_id=ImageId(container.image_id),
            image=self.images.get(ImageId(container.image_id)).config,
            facts=container.facts,
            granted=container.granted,
        )
