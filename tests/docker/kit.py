"""A Docker runtime on a real engine with the real image store, and short ways to make pods and containers in it."""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
import uuid
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from dispatcher.api import (
    ContainerRef,
    ExecSpec,
    PodRef,
    Process,
    Services,
    ensure_namespace,
    remove_namespace,
)
from dispatcher.model import (
    Attachment,
    Change,
    ContainerMetadata,
    ContainerSecurity,
    ContainerSpec,
    EnvVar,
    Image,
    Liveness,
    NamespaceMode,
    NamespaceOptions,
    ObservedContainer,
    ObservedPod,
    OutputChunk,
    PodMetadata,
    PodSecurity,
    PodSpec,
    Snapshot,
    Stream,
    make_container_id,
    make_pod_id,
)
from dispatcher_docker_shim.config import parse
from dispatcher_docker_shim.runtime import DockerRuntime
from dispatcher_images.config import ImagesConfig
from dispatcher_images.provider import OciImages
from tests.lab.child import patient
from tests.lab.engine import Engine, engine_section
from tests.lab.images import UPSTREAM_HOSTS
from tests.lab.registry import Registry

DEADLINE_S = patient(30)


@dataclass
class World:
    """One runtime and what it made. `seen` collects every fact of the watcher, oldest first."""

    engine: Engine
    folder: Path
    images: OciImages
    runtime: DockerRuntime
    services: Services
    section: dict[str, object]
    seen: list[ObservedPod | ObservedContainer] = field(default_factory=list)
    snapshots: list[Snapshot] = field(default_factory=list)
    news: asyncio.Condition = field(default_factory=asyncio.Condition)
    pods: list[PodRef] = field(default_factory=list)
    _watcher: asyncio.Task[None] | None = None

    @classmethod
    async def open(cls, engine: Engine, registry: Registry, folder: Path, **section: object) -> World:
        """Start an image store and a runtime on the engine, and wait until it is ready."""
        mirrors = {host: [f"http://{registry.address}"] for host in UPSTREAM_HOSTS}
        folder.mkdir(parents=True, exist_ok=True)
        base = Services(
            state_dir=folder / "images",
            run_dir=folder / "run",
            node_uuid=str(uuid.uuid4()),
            now_ns=time.time_ns,
        )
        base.state_dir.mkdir()
        images = OciImages(ImagesConfig.model_validate({"mirrors": mirrors}), base)
        await images.start(())
        services = replace(base, state_dir=folder / "docker", images=images)
        settings = {**engine_section(engine.socket), **section}
        world = cls(engine, folder, images, DockerRuntime(parse(settings), services), services, settings)
        await world.begin()
        return world

    async def begin(self) -> None:
        """Start the runtime and its watcher."""
        await self.runtime.start()
        self._watcher = asyncio.create_task(self._watch())
        await self.until_ready()

    async def until_ready(self) -> None:
        async with asyncio.timeout(DEADLINE_S):
            while not (health := await self.runtime.probe()).ready:
                assert health.reason in {"EngineStarting", "EngineDown"}, health
                await asyncio.sleep(0.02)

    async def restart_runtime(self) -> None:
        """As a restart of the daemon: a new runtime that knows nothing."""
        await self.end()
        self.runtime = DockerRuntime(parse(self.section), self.services)
        await self.begin()

    async def end(self) -> None:
        if self._watcher is not None:
            self._watcher.cancel()
            await asyncio.gather(self._watcher, return_exceptions=True)
        await self.runtime.aclose()

    async def close(self) -> None:
        for pod in self.pods:
            await self.remove_pod(pod)
        await self.end()
        await self.images.aclose()

    async def _watch(self) -> None:
        async for item in self.runtime.watch():
            async with self.news:
                if isinstance(item, Snapshot):
                    self.snapshots.append(item)
                    self.seen += [*item.pods, *item.containers]
                else:
                    assert isinstance(item, Change)
                    self.seen += [fact for fact in (item.pod, item.container) if fact is not None]
                self.news.notify_all()

    async def until_seen(self, container: ContainerRef, liveness: Liveness) -> ObservedContainer:
        """The first fact of the watcher that shows the container so."""

        def find() -> ObservedContainer | None:
            facts = (fact for fact in self.seen if isinstance(fact, ObservedContainer) and fact.id == container.id)
            return next((fact for fact in facts if fact.liveness is liveness), None)

        async with asyncio.timeout(DEADLINE_S), self.news:
            while (found := find()) is None:
                await self.news.wait()
            return found

    async def image(self, reference: str) -> Image:
        return self.images.find(reference) or await self.images.pull(reference, None)

    # ------------------------------------------------------------------------------------------------------------ pods
    async def make_pod(self, spec: PodSpec | None = None, *, host_network: bool = False) -> PodRef:
        """Create a pod's namespace and its sandbox."""
        if spec is None:
            mode = NamespaceMode.NODE if host_network else NamespaceMode.POD
            security = PodSecurity(namespaces=NamespaceOptions(network=mode))
            spec = pod_spec(security=security, hostname="" if host_network else "pod")
        attachment = None
        pod_id = make_pod_id()
        if not spec.uses_host_network:
            path = self.folder / "run" / "netns" / pod_id
            await ensure_namespace(path)
            attachment = Attachment(netns_path=str(path))
        pod = PodRef(id=pod_id, spec=spec, attachment=attachment)
        self.pods.append(pod)
        made = await self.runtime.create_pod(pod)
        pod = replace(pod, facts=made.facts)
        self.pods[-1] = pod
        return pod

    async def remove_pod(self, pod: PodRef) -> None:
        await self.runtime.stop_pod(pod)
        if pod.attachment is not None:
            await remove_namespace(Path(pod.attachment.netns_path))
        await self.runtime.remove_pod(pod)
        self.pods = [kept for kept in self.pods if kept.id != pod.id]

    # ------------------------------------------------------------------------------------------------------ containers
    async def refer(self, pod: PodRef, image: str, spec: ContainerSpec) -> ContainerRef:
        """A container's reference, with nothing made yet."""
        found = await self.image(image)
        container_id = make_container_id()
        self.images.lease(container_id, found.id)
        return ContainerRef(id=container_id, pod=pod, spec=spec, image_id=found.id, image=found.config)

    async def make(self, pod: PodRef, image: str, spec: ContainerSpec) -> ContainerRef:
        """Create a container."""
        container = await self.refer(pod, image, spec)
        made = await self.runtime.create_container(container)
        return replace(container, facts=made.facts)

    async def run(self, pod: PodRef, image: str, spec: ContainerSpec) -> ContainerRef:
        """Create and start a container."""
        container = await self.make(pod, image, spec)
        started = await self.runtime.start_container(container)
        assert started.liveness in {Liveness.RUNNING, Liveness.EXITED}, started
        return container

    async def output(self, container: ContainerRef, after: int = 0) -> list[OutputChunk]:
        """All output from a position on, until the container has ended."""
        async with asyncio.timeout(DEADLINE_S):
            return [chunk async for chunk in self.runtime.output(container, after)]

    async def text(self, pod: PodRef, image: str, *command: str, **fields: object) -> str:
        """What a command prints in a fresh container: standard output, then standard error."""
        container = await self.run(pod, image, container_spec(*command, **fields))
        chunks = await self.output(container)
        await self.runtime.remove_container(container)
        ordered = sorted(chunks, key=lambda chunk: chunk.stream is Stream.STDERR)
        return b"".join(chunk.data for chunk in ordered).decode()

    async def facts(self, container: ContainerRef) -> ObservedContainer:
        return (await self.runtime.inspect((), (container,))).containers[0]

    async def exec(self, container: ContainerRef, *command: str, **fields: object) -> tuple[int, bytes, bytes]:
        """Run a command to its end: code, stdout, stderr."""
        process = await self.runtime.exec(container, ExecSpec(command=command, **fields))  # type: ignore[arg-type]
        return await finish(process)


async def finish(process: Process) -> tuple[int, bytes, bytes]:
    """Read a process to its end."""
    streams = {"stdout": b"", "stderr": b""}
    async with asyncio.timeout(DEADLINE_S):
        async for name, data in process.output():
            streams[name] += data
        code = await process.wait()
    await process.aclose()
    return code, streams["stdout"], streams["stderr"]


def pod_spec(**fields: object) -> PodSpec:
    metadata = PodMetadata(name="pod", namespace="default", uid=str(uuid.uuid4()))
    return PodSpec(metadata=metadata, **fields)  # type: ignore[arg-type]


def container_spec(*command: str, **fields: object) -> ContainerSpec:
    """A spec with the defaults of a kubelet: its own PID namespace."""
    fields.setdefault("security", security())
    return ContainerSpec(
        metadata=ContainerMetadata(name="main"),
        image_ref="",
        command=command,
        **fields,  # type: ignore[arg-type]
    )


def security(**fields: object) -> ContainerSecurity:
    fields.setdefault("namespaces", NamespaceOptions(pid=NamespaceMode.CONTAINER))
    return ContainerSecurity(**fields)  # type: ignore[arg-type]


def env(**values: str) -> tuple[EnvVar, ...]:
    return tuple(EnvVar(key=key, value=value.encode()) for key, value in values.items())


def descendants_of(pid: int) -> list[int]:
    """Living processes below a process, by /proc. Zombies, which their parent did not reap, do not count."""
    parents = {}
    for name in os.listdir("/proc"):
        if name.isdigit():
            with contextlib.suppress(OSError):
                state, parent = Path(f"/proc/{name}/stat").read_text().rpartition(")")[2].split()[:2]
                if state != "Z":
                    parents[int(name)] = int(parent)
    found: list[int] = [pid]
    for root in found:
        found += [child for child, parent in parents.items() if parent == root]
    return found[1:]


async def take(stream: AsyncIterator[OutputChunk], count: int) -> list[OutputChunk]:
    """The first `count` chunks."""
    found: list[OutputChunk] = []
    async with asyncio.timeout(DEADLINE_S):
        async for chunk in stream:
            found.append(chunk)
            if len(found) == count:
                break
    return found


def texts(chunks: Sequence[OutputChunk]) -> list[str]:
    return [chunk.data.decode("utf-8", "replace") for chunk in chunks]
