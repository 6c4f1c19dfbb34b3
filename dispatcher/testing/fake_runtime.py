"""The runtime on top of `FakeEngine`: the daemon's part, which keeps no state. Abilities are chosen one by one."""

from __future__ import annotations

import functools
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable, Mapping
from dataclasses import replace
from typing import Any, ParamSpec, Protocol, TypeVar

from dispatcher.api import (
    CanAttach,
    CanConnect,
    CanDetailedStats,
    CanExec,
    CanPodStats,
    CanPrepare,
    CanReportFootprint,
    CanStats,
    CanTrimOutput,
    CanUpdatePod,
    CanUpdateResources,
    ContainerRef,
    ContainerUsage,
    ExecSpec,
    PodRef,
    PodUsage,
    Process,
    RuntimeFeatures,
    RuntimeHealth,
    Sizer,
)
from dispatcher.model import (
    Change,
    ContainerUser,
    CreatedContainer,
    CreatedPod,
    Facts,
    InterfaceUsage,
    Isolation,
    Liveness,
    ObservedContainer,
    OutputChunk,
    Resources,
    Snapshot,
    Usage,
)
from dispatcher.testing.fake_engine import FakeEngine

P = ParamSpec("P")
R = TypeVar("R")


class _HasEngine(Protocol):
    engine: FakeEngine


def _entered(method: Callable[P, Coroutine[Any, Any, R]]) -> Callable[P, Coroutine[Any, Any, R]]:
    """Give planted faults, and an engine that is away, their chance."""

    @functools.wraps(method)
    async def call(*args: P.args, **kwargs: P.kwargs) -> R:
        runtime: Any = args[0]
        replaced, result = await runtime.engine.enter(method.__name__)
        return result if replaced else await method(*args, **kwargs)

    return call


class FakeRuntime:
    """The core of the protocol. Made by `make_runtime`, which adds the abilities."""

    facts_schema = 1

    def __init__(
        self,
        engine: FakeEngine,
        *,
        name: str = "fake",
        isolation: Isolation = Isolation.SANDBOXED,
        option_keys: Iterable[str] = (),
        features: RuntimeFeatures | None = None,
        sizer: Sizer | None = None,
    ) -> None:
        self.engine = engine
        self.name = name
        self.isolation = isolation
        self.version = "1.0"
        self.option_keys = frozenset(option_keys)
        self._features = features or RuntimeFeatures()
        self._sizer = sizer

    @_entered
    async def start(self) -> None:
        """See Runtime.start."""

    @_entered
    async def aclose(self) -> None:
        """See Runtime.aclose. The engine lives on."""

    @_entered
    async def probe(self) -> RuntimeHealth:
        """See Runtime.probe."""
        if self.engine.down:
            return RuntimeHealth(ready=False, reason="EngineDown", message="The fake engine is away.")
        return RuntimeHealth(ready=True, engine="Fake Engine 1.0", features=self._features)

    @_entered
    async def create_pod(self, pod: PodRef) -> CreatedPod:
        """See Runtime.create_pod."""
        vcpus = self._sizer.size(pod.spec).vcpus if self._sizer is not None else 1
        await self.engine.create_pod(pod)
        return CreatedPod(facts={"engine_id": f"pod-{pod.id[:12]}", "vcpus": vcpus})

    @_entered
    async def stop_pod(self, pod: PodRef) -> None:
        """See Runtime.stop_pod."""
        await self.engine.stop_pod(pod.id)

    @_entered
    async def remove_pod(self, pod: PodRef) -> None:
        """See Runtime.remove_pod."""
        await self.engine.remove_pod(pod.id)

    @_entered
    async def create_container(self, container: ContainerRef) -> CreatedContainer:
        """See Runtime.create_container."""
        made = await self.engine.create(container)
        return CreatedContainer(
            facts={"engine_id": f"container-{container.id[:12]}"},
            granted=made.granted,
            user=ContainerUser(uid=container.spec.security.run_as_user or 0, gid=0),
        )

    @_entered
    async def start_container(self, container: ContainerRef) -> ObservedContainer:
        """See Runtime.start_container."""
        return (await self.engine.start(container)).observe()

    @_entered
    async def stop_container(self, container: ContainerRef, grace_s: float) -> ObservedContainer:
        """See Runtime.stop_container."""
        found = self.engine.containers.get(container.id)
        if found is None:
            return ObservedContainer(id=container.id, liveness=Liveness.ABSENT)
        await self.engine.stop(found, grace_s)
        return found.observe()

    @_entered
    async def remove_container(self, container: ContainerRef) -> None:
        """See Runtime.remove_container."""
        await self.engine.remove(container.id)

    @_entered
    async def inspect(self, pods: tuple[PodRef, ...], containers: tuple[ContainerRef, ...]) -> Snapshot:
        """See Runtime.inspect."""
        known = self.engine
        return Snapshot(
            pods=tuple(known.pods[pod.id].observe() for pod in pods if pod.id in known.pods),
            containers=tuple(
                known.containers[container.id].observe() for container in containers if container.id in known.containers
            ),
        )

    async def output(self, container: ContainerRef, after: int) -> AsyncIterator[OutputChunk]:
        """See Runtime.output."""
        replaced, result = await self.engine.enter("output")
        if replaced:
            yield result
            return
        async for chunk in self.engine.read(container, after):
            yield chunk

    async def watch(self) -> AsyncIterator[Snapshot | Change]:
        """See Runtime.watch."""
        async for item in self.engine.watch():
            yield item


class _Exec:
    @_entered
    async def exec(self: _HasEngine, container: ContainerRef, spec: ExecSpec) -> Process:
        """See CanExec."""
        return await self.engine.execute(container, spec)


class _Attach:
    @_entered
    async def attach(self: _HasEngine, container: ContainerRef, *, stdin: bool, stdout: bool, stderr: bool) -> Process:  # noqa: ARG002
        """See CanAttach."""
        return await self.engine.attach(container, stdin=stdin)


class _Connect:
    @_entered
    async def connect(self: _HasEngine, pod: PodRef, port: int) -> Process:
        """See CanConnect."""
        return await self.engine.connect(pod.id, port)


class _UpdateResources:
    @_entered
    async def update_resources(self: _HasEngine, container: ContainerRef, wanted: Resources) -> Resources:
        """See CanUpdateResources."""
        self.engine.find(container).granted = wanted
        return wanted


class _UpdatePod:
    @_entered
    async def update_pod_resources(
        self: _HasEngine, pod: PodRef, overhead: Resources | None, wanted: Resources | None
    ) -> None:
        """See CanUpdatePod."""


class _Stats:
    @_entered
    async def stats(self: _HasEngine, containers: tuple[ContainerRef, ...]) -> tuple[ContainerUsage, ...]:
        """See CanStats."""
        found = (self.engine.containers.get(container.id) for container in containers)
        now = time.time_ns()
        return tuple(
            ContainerUsage(id=container.ref.id, usage=_usage(now, container.started_at_ns))
            for container in found
            if container is not None and container.liveness is Liveness.RUNNING
        )


class _DetailedStats:
    @_entered
    async def detailed_stats(self: _HasEngine, containers: tuple[ContainerRef, ...]) -> tuple[ContainerUsage, ...]:
        """See CanDetailedStats."""
        found = (self.engine.containers.get(container.id) for container in containers)
        now = time.time_ns()
        return tuple(
            ContainerUsage(id=item.ref.id, usage=replace(_usage(now, item.started_at_ns), process_count=1))
            for item in found
            if item is not None and item.liveness is Liveness.RUNNING
        )


class _PodStats:
    @_entered
    async def pod_stats(self: _HasEngine, pods: tuple[PodRef, ...], *, detailed: bool) -> tuple[PodUsage, ...]:
        """See CanPodStats."""
        now = time.time_ns()
        found = ((pod, self.engine.pods.get(pod.id)) for pod in pods)
        return tuple(
            PodUsage(
                id=pod.id,
                usage=replace(_usage(now, now), cpu_user_ns=0 if detailed else None),
                interfaces=(InterfaceUsage(name="eth0", rx_bytes=1),),
            )
            for pod, known in found
            if known is not None and known.observe().liveness is Liveness.RUNNING
        )


def _usage(now_ns: int, started_at_ns: int) -> Usage:
    return Usage(
        timestamp_ns=now_ns,
        cpu_usage_ns=max(0, now_ns - started_at_ns) // 100,
        memory_usage_bytes=1 << 20,
        memory_working_set_bytes=1 << 19,
    )


class _Prepare:
    @_entered
    async def prepare_pod(self: _HasEngine, pod: PodRef) -> Facts:
        """See CanPrepare."""
        return {"prepared": pod.id[:12]}


class _TrimOutput:
    @_entered
    async def trim_output(self: _HasEngine, container: ContainerRef, seq: int) -> None:
        """See CanTrimOutput."""
        found = self.engine.find(container)
        found.chunks[:] = [chunk for chunk in found.chunks if chunk.seq > seq]


class _Footprint:
    @_entered
    async def disk_usage(self: _HasEngine) -> Mapping[str, tuple[int, int]]:
        """See CanReportFootprint."""
        return self.engine.disk_usage()


ABILITIES: Mapping[type, type] = {
    CanExec: _Exec,
    CanAttach: _Attach,
    CanConnect: _Connect,
    CanUpdateResources: _UpdateResources,
    CanUpdatePod: _UpdatePod,
    CanStats: _Stats,
    CanDetailedStats: _DetailedStats,
    CanPodStats: _PodStats,
    CanPrepare: _Prepare,
    CanTrimOutput: _TrimOutput,
    CanReportFootprint: _Footprint,
}
# Left out of the usual set: what is trimmed cannot be replayed, which most tests want to see; and pods are measured by
# the core, as with most runtimes.
USUAL = frozenset(ABILITIES) - {CanTrimOutput, CanPodStats}


def make_runtime(engine: FakeEngine | None = None, *, abilities: Iterable[type] = USUAL, **fields: Any) -> FakeRuntime:
    """Return a runtime with exactly these abilities, on an engine of its own unless one is given.

    `fields` are those of FakeRuntime: name, isolation, option_keys, features, sizer.
    """
    mixins = tuple(ABILITIES[ability] for ability in sorted(set(abilities), key=lambda ability: ability.__name__))
    kind: type[FakeRuntime] = type("FakeRuntime", (*mixins, FakeRuntime), {})
    return kind(engine or FakeEngine(), **fields)
