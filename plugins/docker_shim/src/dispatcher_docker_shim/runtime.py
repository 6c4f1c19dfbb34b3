"""The Docker runtime: orchestration only. Who decides what is in the builders, who talks to the engine in the clients.

Everything is addressed by names that follow from our ids, so a call works with empty facts after a crash.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Mapping
from dataclasses import replace
from typing import Any

from dispatcher.api import (
    ContainerRef,
    ContainerUsage,
    ExecSpec,
    PodRef,
    Process,
    RuntimeHealth,
    Services,
    find_cgroup_of_process,
)
from dispatcher.api.containers import stop_signal
from dispatcher.errors import DispatcherError, InvalidRequest, NotFound, NotSupported, RuntimeDown, WrongState
from dispatcher.model import (
    Change,
    CreatedContainer,
    CreatedPod,
    Isolation,
    Liveness,
    NamespaceMode,
    ObservedContainer,
    OutputChunk,
    Resources,
    Snapshot,
)
from dispatcher_docker_shim import cgroups, host, naming
from dispatcher_docker_shim.config import Config
from dispatcher_docker_shim.connect import open_in_netns
from dispatcher_docker_shim.container_config import build_container, merge_limits
from dispatcher_docker_shim.engine import EngineLink
from dispatcher_docker_shim.errors import EngineConflict
from dispatcher_docker_shim.facts import EngineFacts, all_of, name_of
from dispatcher_docker_shim.inotify import FolderWatch
from dispatcher_docker_shim.limits_in_force import in_force
from dispatcher_docker_shim.observe import container_facts
from dispatcher_docker_shim.oom import OomWitness
from dispatcher_docker_shim.output import LogFile, Trimmer, follow, log_file
from dispatcher_docker_shim.pause_config import build_pause
from dispatcher_docker_shim.process import AttachProcess, start_exec
from dispatcher_docker_shim.resolve import resolve
from dispatcher_docker_shim.stopping import Stopping
from dispatcher_docker_shim.usage import UsageReader

_log = logging.getLogger(__name__)

_PAUSE_READY_S = 10.0
_PAUSE_EXITS = {
    11: "the namespace file could not be opened",
    12: "the namespace could not be entered: the engine's seccomp profile or security module forbids setns",
}


class DockerRuntime:
    """Pods in a Docker Engine. Implements `Runtime` and every optional ability but `CanPrepare` and `CanPodStats`."""

    name = "docker"
    isolation = Isolation.SHARED_KERNEL
    version = "0.1.0"
    facts_schema = 1
    option_keys: frozenset[str] = frozenset()

    def __init__(self, config: Config, services: Services) -> None:
        self._config = config
        self._node_uuid = services.node_uuid
        self._link = EngineLink(config, services)
        self._client = self._link.client
        self._events = self._link.events
        self._oom = OomWitness(config.oom_settle_s)
        self._facts = EngineFacts(self._link, self._oom, node_uuid=self._node_uuid, threads=config.threads)
        self._usage = UsageReader(
            self._link, self._facts.processes, self._facts.layers, node_uuid=self._node_uuid, now_ns=services.now_ns
        )
        self._stopping = Stopping(self._client, self._events, kill_deadline_s=config.kill_deadline_s)
        self._folders = FolderWatch()
        self._trimmer = Trimmer()

    async def start(self) -> None:
        """Begin to subscribe to the engine, which may be away."""
        await self._link.start()

    async def aclose(self) -> None:
        """Let go of connections, threads and waits; containers run on."""
        await self._usage.aclose()
        await self._stopping.aclose()
        await self._link.aclose()
        self._folders.close()
        self._oom.close()

    async def probe(self) -> RuntimeHealth:
        """Say whether pods can be made now."""
        return await self._link.probe()

    # ------------------------------------------------------------------------------------------------------------ pods
    async def create_pod(self, pod: PodRef) -> CreatedPod:
        """Run the pause in the pod's namespace and check by the kernel that it is there."""
        traits = self._link.need_traits()
        image = await self._link.pause.ensure()
        config, notes = build_pause(
            pod,
            image=image,
            node_uuid=self._node_uuid,
            traits=traits,
            oci_runtime=self._config.oci_runtime,
            shm_bytes=self._config.shm_bytes,
        )
        name = naming.engine_name(pod.id)
        made = await self._create(name, config)
        await self._client.start(name)
        facts: dict[str, Any] = {"engine_id": made["Id"], "notes": list(notes)}
        netns = "" if pod.spec.uses_host_network or pod.attachment is None else pod.attachment.netns_path
        facts.update(await self._await_pause(name, netns))
        return CreatedPod(facts=facts)

    async def _await_pause(self, name: str, netns_path: str) -> dict[str, int]:
        """Wait until the pause has entered its namespace. Raises WrongState when it ended or stays elsewhere."""
        wanted = host.netns_inode(netns_path) if netns_path else 0
        found = await self._client.inspect(name)
        pid = int(found["State"].get("Pid") or 0)
        stat = host.read_stat(pid) if pid else None
        deadline = asyncio.get_running_loop().time() + _PAUSE_READY_S
        pause_s = 0.001
        while stat is not None and host.is_running(pid, stat.started):
            if not wanted or host.netns_inode_of(pid) == wanted:
                return {"pid": pid, "started": stat.started, "netns": wanted}
            if asyncio.get_running_loop().time() > deadline:
                raise WrongState("the pod's pause container did not enter the pod's network namespace")
            await asyncio.sleep(pause_s)
            pause_s = min(pause_s * 2, 0.1)
        while (state := (await self._client.inspect(name))["State"]).get("Running"):
            if asyncio.get_running_loop().time() > deadline:
                break
            await asyncio.sleep(0.02)  # the kernel tells of the exit before the engine does
        code = state.get("ExitCode")
        why = _PAUSE_EXITS.get(int(code or 0), f"it ended with code {code}")
        raise WrongState(f"the pod's pause container does not run: {why}")

    async def stop_pod(self, pod: PodRef) -> None:
        """Kill the pod's containers, then its pause."""
        try:
            rows = await self._client.list_by_labels(self._pod_labels(pod))
            containers = [name_of(row) for row in rows if row["Labels"].get(naming.KIND_LABEL) != naming.POD_KIND]
            await all_of(self._stopping.stop(name, signal="SIGKILL", grace_s=0) for name in containers)
            await self._stopping.stop(naming.engine_name(pod.id), signal="SIGKILL", grace_s=0)
        except RuntimeDown:
            if not await self._is_proven_gone(pod):
                raise

    async def _is_proven_gone(self, pod: PodRef) -> bool:
        """Without the engine: true when nothing runs in the pod's network namespace, by the kernel's own account."""
        inode, pid, started = (pod.facts.get(key) for key in ("netns", "pid", "started"))
        if not inode or not pid or host.is_running(int(pid), int(started or 0)):
            return False
        return not await asyncio.to_thread(host.processes_in_netns, int(inode))

    async def remove_pod(self, pod: PodRef) -> None:
        """Remove every container of the pod, its pause last."""
        rows = await self._client.list_by_labels(self._pod_labels(pod))
        pause = naming.engine_name(pod.id)
        await all_of(self._remove(name_of(row)) for row in rows if name_of(row) != pause)
        await self._remove(pause)

    # ------------------------------------------------------------------------------------------------------ containers
    async def create_container(self, container: ContainerRef) -> CreatedContainer:
        """Make the container from the engine's copy of its image, which is loaded first where it is missing."""
        traits, copies = self._link.need_traits(), self._link.need_copies()
        wanted = container.spec.resources or Resources()
        notes = cgroups.check_extra(wanted.hugepage_limits, wanted.unified, version=traits.cgroup_version)
        await self._check_target(container)
        tag = copies.tag(container.image_id)
        rlimits = dict(self._config.rlimits)
        resolved = await resolve(container, copies.images, image_tag=tag, rlimits=rlimits)
        built = build_container(
            container,
            resolved,
            node_uuid=self._node_uuid,
            traits=traits,
            log_driver=self._config.log_driver,
            oci_runtime=self._config.oci_runtime,
        )
        await copies.ensure(container.image_id)
        name = naming.engine_name(container.id)
        try:
            made = await self._create(name, built.config)
        except NotFound:  # somebody pruned the engine's images
            await copies.ensure(container.image_id, look_again=True)
            made = await self._create(name, built.config)
        file = log_file(traits.root_dir, str(made["Id"]), self._config.log_driver)
        return CreatedContainer(
            facts={"engine_id": made["Id"], "log": file.path, "driver": file.driver},
            granted=built.granted,
            user=resolved.user,
            notes=notes + built.notes + tuple(str(item) for item in made.get("Warnings") or ()),
        )

    async def start_container(self, container: ContainerRef) -> ObservedContainer:
        """Start it, and set the limits that the engine has no word for."""
        name = naming.engine_name(container.id)
        before = await self._client.find(name)
        if before is None:
            raise NotFound(f"container {container.id} does not exist in the Docker Engine")
        if before["State"].get("Status") != "created" or before["State"].get("ExitCode"):
            raise WrongState(f"container {container.id} was started before")
        self._oom.look()
        try:
            await self._client.start(name)
        except RuntimeDown:
            raise
        except DispatcherError:
            facts = container_facts(await self._client.inspect(name), self._link.age)
            if facts.liveness is not Liveness.EXITED:
                raise
            return facts
        found = await self._facts.settled(name)
        await self._limit_further(container, name, found)
        return container_facts(found, self._link.age)

    async def _limit_further(self, container: ContainerRef, name: str, found: Mapping[str, Any]) -> None:
        wanted = container.granted or container.spec.resources
        pid = int(found["State"].get("Pid") or 0)
        if wanted is None or not pid or not (wanted.hugepage_limits or wanted.unified):
            return
        where = find_cgroup_of_process(pid, owner=str(found["Id"]))
        if where is None:
            return  # it ended at once
        try:
            cgroups.write_extra(where, wanted.hugepage_limits, wanted.unified)
        except DispatcherError:
            if host.read_stat(pid) is None:
                return
            await self._stopping.stop(name, signal="SIGKILL", grace_s=0)
            raise

    async def stop_container(self, container: ContainerRef, grace_s: float) -> ObservedContainer:
        """Signal, wait, kill; see `stopping`."""
        name = naming.engine_name(container.id)
        await self._stopping.stop(name, signal=stop_signal(container), grace_s=grace_s)
        try:
            return await self._facts.container(name)
        except NotFound:
            return ObservedContainer(id=container.id, liveness=Liveness.ABSENT)

    async def remove_container(self, container: ContainerRef) -> None:
        """Remove it with its writable layer and anonymous volumes."""
        await self._remove(naming.engine_name(container.id))

    async def update_resources(self, container: ContainerRef, wanted: Resources) -> Resources:
        """Change limits now, all or none, and read back from the kernel what holds.

        What the engine has no word for is written to the container's own cgroup first, and put back when the engine
        refuses the rest. The engine never changes an OOM score.
        """
        traits = self._link.need_traits()
        name = naming.engine_name(container.id)
        found = await self._client.inspect(name)
        granted, limits = merge_limits(wanted, traits)
        granted = replace(granted, oom_score_adj=int(found["HostConfig"].get("OomScoreAdj") or 0))
        cgroups.check_extra(wanted.hugepage_limits, wanted.unified, version=traits.cgroup_version)
        pid = int(found["State"].get("Pid") or 0)
        where = find_cgroup_of_process(pid, owner=str(found["Id"])) if pid else None
        if where is None:
            await self._client.update(name, limits)
            return granted  # extras are written when it starts
        with cgroups.extra_kept_if_done(where, wanted.hugepage_limits, wanted.unified):
            await self._client.update(name, limits)
        return await asyncio.to_thread(in_force, where, granted)

    async def update_pod_resources(self, pod: PodRef, overhead: Resources | None, wanted: Resources | None) -> None:
        """The containers are in the pod's cgroup, which its owner has resized before it tells: nothing is left to do.

        A pod without such a cgroup has no limits of its own, so that a change of them is refused.
        """
        del overhead, wanted
        if not pod.spec.cgroup_parent:
            raise NotSupported(f"the pod {pod.id} has no cgroup of its own, so nothing limits its containers together")

    # ----------------------------------------------------------------------------------------------------------- facts
    async def inspect(self, pods: tuple[PodRef, ...], containers: tuple[ContainerRef, ...]) -> Snapshot:
        """Facts on exactly these."""
        return await self._facts.of_exactly(pods, containers)

    def watch(self) -> AsyncIterator[Snapshot | Change]:
        """Facts as they happen."""
        return self._facts.watch()

    # ---------------------------------------------------------------------------------------------------------- output
    async def output(self, container: ContainerRef, after: int) -> AsyncIterator[OutputChunk]:
        """What the container wrote, from the engine's own log file; see `output`."""
        name = naming.engine_name(container.id)
        file = await self._log_file(container)
        if file is None:
            return
        ended = asyncio.Event()
        self._events.on_end(name, ended)
        try:
            chunks = follow(
                file, after, watch=self._folders, has_ended=lambda: self._facts.has_ended(name), ended=ended
            )
            async with contextlib.aclosing(chunks):  # type: ignore[type-var]
                async for chunk in chunks:
                    yield chunk
        finally:
            self._events.off_end(name, ended)

    async def trim_output(self, container: ContainerRef, seq: int) -> None:
        """Free the engine's log behind a position, in steps."""
        file = await self._log_file(container)
        if file is None or not self._trimmer.due(file, seq):
            return
        if not await asyncio.to_thread(self._trimmer.free, file, seq):
            self._link.notes.add("the engine's logs grow until their containers go: its file system has no holes")

    async def _log_file(self, container: ContainerRef) -> LogFile | None:
        path, driver = container.facts.get("log"), container.facts.get("driver")
        if path and driver:
            return LogFile(str(path), str(driver))
        found = await self._client.find(naming.engine_name(container.id))
        if found is None:
            return None
        driver = str(found["HostConfig"]["LogConfig"]["Type"])
        return log_file(self._link.need_traits().root_dir, str(found["Id"]), driver)

    # --------------------------------------------------------------------------------------------------------- streams
    async def exec(self, container: ContainerRef, spec: ExecSpec) -> Process:
        """Run a command in the container."""
        return await start_exec(
            self._client,
            self._link.sockets,
            naming.engine_name(container.id),
            spec.command,
            stdin=spec.stdin,
            tty=spec.tty,
            died=self._events.exec_ended,
        )

    async def attach(self, container: ContainerRef, *, stdin: bool, stdout: bool, stderr: bool) -> Process:
        """Attach to the first process."""
        name = naming.engine_name(container.id)
        state = (await self._client.inspect(name))["State"]
        if not state.get("Running"):
            raise WrongState(f"container {container.id} is not running")
        flags = {"stream": True, "stdin": stdin and container.spec.stdin, "stdout": stdout, "stderr": stderr}
        query = "&".join(f"{key}={int(value)}" for key, value in flags.items())
        stream = await self._link.sockets.hijack(
            f"/v{self._client.api}/containers/{name}/attach?{query}",
            None,
            doing="attach to a container",
        )

        async def exit_code() -> int:
            for _ in range(20):
                facts = container_facts(await self._client.inspect(name), self._link.age)
                if facts.liveness is Liveness.EXITED:
                    return facts.exit_code or 0
                await asyncio.sleep(0.05)
            return 0  # detached from a container that runs on

        return AttachProcess(
            self._client,
            stream,
            name,
            pid=int(state.get("Pid") or 0),
            tty=container.spec.tty,
            closes_stdin=container.spec.stdin_once,
            exit_code=exit_code,
        )

    async def connect(self, pod: PodRef, port: int) -> Process:
        """Connect inside the pod's namespace."""
        path = "" if pod.spec.uses_host_network or pod.attachment is None else pod.attachment.netns_path
        return await open_in_netns(path, port)

    # ----------------------------------------------------------------------------------------------------------- usage
    async def stats(self, containers: tuple[ContainerRef, ...]) -> tuple[ContainerUsage, ...]:
        """Measure containers."""
        return await self._usage.of_containers(containers)

    async def detailed_stats(self, containers: tuple[ContainerRef, ...]) -> tuple[ContainerUsage, ...]:
        """Measure containers with all figures, those of their processes as well."""
        return await self._usage.of_containers(containers, detailed=True)

    async def disk_usage(self) -> Mapping[str, tuple[int, int]]:
        """Measure the writable layers."""
        return await self._usage.of_disk()

    # --------------------------------------------------------------------------------------------------------- helpers
    async def _create(self, name: str, config: Mapping[str, Any]) -> dict[str, Any]:
        """Create; what an earlier try under this name left behind is removed first."""
        try:
            return await self._client.create(name, config)
        except EngineConflict:
            left = await self._client.find(name)
            if left is not None and not naming.is_ours(left["Config"]["Labels"], self._node_uuid):
                raise
            await self._client.remove(name)
            return await self._client.create(name, config)

    async def _remove(self, name: str) -> None:
        await self._client.remove(name)

    async def _check_target(self, container: ContainerRef) -> None:
        """A target PID namespace must belong to a container of the same pod."""
        spaces = container.spec.security.namespaces
        if spaces.pid is not NamespaceMode.TARGET:
            return
        found = await self._client.find(naming.engine_name(spaces.target_id))
        labels = found["Config"]["Labels"] if found else {}
        if labels.get(naming.POD_LABEL) != container.pod.id:
            raise InvalidRequest(f"target container {spaces.target_id} is not a container of this pod")

    def _pod_labels(self, pod: PodRef) -> dict[str, str]:
        return {naming.NODE_LABEL: self._node_uuid, naming.POD_LABEL: pod.id}
