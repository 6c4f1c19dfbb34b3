"""Pods in virtual machines: orchestration only. Who decides what is in the builders, who talks to monitors and guests
in the drivers and the agent's client.

Everything is found by names that follow from our ids, so a call works with empty facts after a crash.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import time
import uuid
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dispatcher.api import (
    ContainerRef,
    ContainerUsage,
    ExecSpec,
    ImageProvider,
    PodRef,
    Process,
    RuntimeFeatures,
    RuntimeHealth,
    Services,
    Sizer,
    VmSize,
)
from dispatcher.api.containers import first_user, read_seccomp_profile, stop_signal
from dispatcher.errors import (
    AlreadyExists,
    DispatcherError,
    InvalidRequest,
    NotFound,
    NotSupported,
    RuntimeDown,
    WrongState,
)
from dispatcher.model import (
    Change,
    ContainerId,
    ContainerUser,
    CreatedContainer,
    CreatedPod,
    Facts,
    Isolation,
    Liveness,
    NamespaceMode,
    ObservedContainer,
    ObservedPod,
    OutputChunk,
    PodId,
    ProfileType,
    Resources,
    Snapshot,
)
from dispatcher_hyper_vm import oci_spec
from dispatcher_hyper_vm.agent.values import ContainerSetup, IdMapping, PodSetup, Rootfs
from dispatcher_hyper_vm.attached import AttachedProcess
from dispatcher_hyper_vm.config import MIB, Config
from dispatcher_hyper_vm.disks import Disks, remove, usage
from dispatcher_hyper_vm.drivers import Disk, Vmm
from dispatcher_hyper_vm.exits import read_exits
from dispatcher_hyper_vm.figures import container_usage
from dispatcher_hyper_vm.hub import Hub
from dispatcher_hyper_vm.machine import Machine, layer_path
from dispatcher_hyper_vm.machines import GuestOf, Machines
from dispatcher_hyper_vm.network import guest_interfaces, guest_routes
from dispatcher_hyper_vm.oci_spec import GuestDisk, Resolved
from dispatcher_hyper_vm.seccomp import compile_profile, default_profile
from dispatcher_hyper_vm.sources import Sources, image_serial
from dispatcher_hyper_vm.stopping import Stopping
from dispatcher_vm_kit.redirect import Joint, join_interfaces
from dispatcher_vm_kit.tap import tap_name


@dataclass(frozen=True, slots=True, kw_only=True)
class _Needed:
    """The services without which no machine can be made."""

    images: ImageProvider
    sizer: Sizer


class HyperVmRuntime:
    """Pods in virtual machines of their own. Implements `Runtime` and its optional abilities."""

    name = "hyper_vm"
    isolation = Isolation.VM
    version = "0.1.0"
    facts_schema = 1
    option_keys: frozenset[str] = frozenset({"kernel"})

    def __init__(self, config: Config, services: Services, vmm: Vmm, guest_of: GuestOf) -> None:
        if services.images is None or services.sizer is None:
            raise ValueError("hyper_vm needs an image provider and a sizer")
        self._config = config
        self._needed = _Needed(images=services.images, sizer=services.sizer)
        self._now_ns = services.now_ns
        self._vmm = vmm
        self._hub = Hub(self._snapshot)
        self._machines = Machines(
            config,
            vmm,
            services.sizer,
            guest_of=guest_of,
            folder=services.state_dir / "pods",
            tell=self._hub.tell,
        )
        self._disks = Disks(services.state_dir / "blank")
        self._sources = Sources(config, services.images, self._disks)
        self._stopping = Stopping(config.kill_s)
        self._tasks: list[asyncio.Task[None]] = []

    async def start(self) -> None:
        """Begin to keep files up to date. Machines are found when they are asked for."""
        self._tasks = [asyncio.create_task(self._sources.keep_up_to_date(), name="vm-files")]

    async def aclose(self) -> None:
        """Let go of all machines, which run on."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._stopping.aclose()
        await self._machines.aclose()

    async def probe(self) -> RuntimeHealth:
        """Say whether machines can be made now."""
        health = await self._vmm.probe()
        return RuntimeHealth(
            ready=health.ready,
            reason=health.reason,
            message=health.message,
            engine=f"{health.engine}, {health.acceleration}" if health.acceleration else health.engine,
            features=RuntimeFeatures(
                user_namespaces=True, supplemental_groups_policy=True, recursive_read_only_mounts=True
            ),
            notes=health.notes,
        )

    # ------------------------------------------------------------------------------------------------------------ pods
    async def prepare_pod(self, pod: PodRef) -> Facts:
        """Start the machine while the network is being attached."""
        machine, size = await self._machines.start(pod)
        return _facts(machine, size)

    async def create_pod(self, pod: PodRef) -> CreatedPod:
        """Join the machine with the pod's network and make the guest this pod's."""
        machine, size = await self._machines.start(pod)
        interfaces = guest_interfaces(pod.attachment)
        if len(interfaces) > 1:
            raise NotSupported("this release gives a machine one network interface; the pod's network has more")
        if pod.netns_path and interfaces:
            joints = [Joint(tap=tap_name(item.device), interface=item.name) for item in interfaces]
            await join_interfaces(Path(pod.netns_path), joints)
        try:
            async with machine.deadline():
                await machine.agent.setup(self._setup(pod, size))
        except TimeoutError as error:
            raise RuntimeDown("the guest did not answer in time after its start") from error
        return CreatedPod(facts=_facts(machine, size))

    def _setup(self, pod: PodRef, size: VmSize) -> PodSetup:
        spaces = pod.spec.security.namespaces
        user = spaces.user if oci_spec.has_user_namespace(pod.spec) else None
        return PodSetup(
            hostname=pod.spec.hostname,
            interfaces=guest_interfaces(pod.attachment),
            routes=guest_routes(pod.attachment),
            sysctls=oci_spec.guest_sysctls(pod.spec.sysctls),
            time_ns=time.time_ns(),
            entropy=os.urandom(64),
            machine_id=uuid.uuid4().hex,
            resources=_pod_limits(size),
            shm_bytes=self._config.shm_bytes,
            shares_pid_namespace=spaces.pid is NamespaceMode.POD,
            uid_mappings=_mappings(user.uids) if user else (),
            gid_mappings=_mappings(user.gids) if user else (),
        )

    async def stop_pod(self, pod: PodRef) -> None:
        """End the containers and the machine; what only the guest knew is kept."""
        await self._machines.stop(pod.id)

    async def remove_pod(self, pod: PodRef) -> None:
        """Remove the machine with its layers, its share and its cgroup."""
        await self._machines.remove(pod.id)
        self._sources.forget(pod.id)

    # ------------------------------------------------------------------------------------------------------ containers
    async def create_container(self, container: ContainerRef) -> CreatedContainer:
        """Bring the image, a writable layer and all mounts into the guest, and make the container there."""
        machine = await self._machines.get(container.pod.id)
        user = await first_user(container, self._needed.images)
        planned = await self._sources.plan(container)
        disks = await asyncio.to_thread(_block_devices, container)
        built = oci_spec.build_container(
            container,
            Resolved(
                user=user,
                mounts=tuple(mount.bind for mount in planned),
                disks=tuple(disk for disk, _ in disks),
                rlimits=self._config.rlimits,
            ),
        )
        program = await asyncio.to_thread(_filter, container, built.capabilities)

        machine.remember(container.id, user=user, granted=built.granted)
        lower, upper = image_serial(container.image_id), f"u-{container.id[:32]}"
        await machine.vm.attach_disk(
            Disk(serial=lower, path=await self._needed.images.erofs(container.image_id), read_only=True)
        )
        layer = machine.layer(container.id)
        await self._disks.make(layer, self._config.layer_mib * MIB)
        await machine.vm.attach_disk(Disk(serial=upper, path=layer, read_only=False))
        for disk, path in disks:
            await machine.vm.attach_disk(
                Disk(serial=disk.serial, path=Path(path), read_only="w" not in disk.permissions)
            )
        await self._sources.bring(machine, container, planned)

        setup = ContainerSetup(
            id=container.id,
            spec=built.spec,
            rootfs=Rootfs(lower=lower, upper=upper),
            seccomp=program,
            terminal=container.spec.tty,
            stdin=container.spec.stdin,
            stdin_once=container.spec.stdin_once,
        )
        try:
            async with machine.deadline():
                with contextlib.suppress(AlreadyExists):  # the answer to an earlier try was lost
                    await machine.agent.create_container(setup)
        except TimeoutError as error:
            raise RuntimeDown("the guest did not make the container in time") from error
        return CreatedContainer(facts={"user": _user_facts(user)}, granted=built.granted, user=user, notes=built.notes)

    async def start_container(self, container: ContainerRef) -> ObservedContainer:
        """Execute its command."""
        machine = await self._machines.get(container.pod.id)
        known = (await machine.refresh()).get(container.id)
        if known is None:
            raise NotFound(f"container {container.id} does not exist in its machine")
        if known.liveness is not Liveness.CREATED:
            raise WrongState(f"container {container.id} was started before")
        try:
            async with machine.deadline():
                return await machine.take(await machine.agent.start_container(container.id))
        except TimeoutError as error:
            raise RuntimeDown("the guest did not start the container in time") from error

    async def stop_container(self, container: ContainerRef, grace_s: float) -> ObservedContainer:
        """Signal, wait, kill; see `stopping`."""
        machine = await self._machines.find(container.pod.id)
        if machine is not None and machine.is_alive:
            known = (await machine.refresh()).get(container.id)
            if known is not None and known.liveness is Liveness.RUNNING:
                await self._stopping.stop(
                    container.id,
                    _number(stop_signal(container)),
                    grace_s,
                    send=lambda number: _send(machine, container.id, number),
                    ended=lambda: machine.wait_ended(container.id),
                )
        return await self._look(container.id, container.pod.id)

    async def remove_container(self, container: ContainerRef) -> None:
        """Remove it from the guest, and its writable layer."""
        machine = await self._machines.find(container.pod.id)
        if machine is not None and machine.is_alive:
            await machine.delete(container.id)
            await machine.vm.detach_disk(f"u-{container.id[:32]}")
        await asyncio.to_thread(remove, layer_path(self._machines.folder(container.pod.id), container.id))

    async def update_resources(self, container: ContainerRef, wanted: Resources) -> Resources:
        """Change the container's cgroup in the guest."""
        machine = await self._machines.get(container.pod.id)
        granted, resources, _ = oci_spec.limits(wanted)
        async with machine.deadline():
            await machine.agent.update_container(container.id, resources)
        machine.remember(container.id, granted=granted)
        return granted

    # ----------------------------------------------------------------------------------------------------------- facts
    async def inspect(self, pods: tuple[PodRef, ...], containers: tuple[ContainerRef, ...]) -> Snapshot:
        """Facts on exactly these."""
        machines = {
            pod_id: await self._adopt(pod_id)
            for pod_id in dict.fromkeys((*(pod.id for pod in pods), *(container.pod.id for container in containers)))
        }
        for container in containers:
            machine = machines[container.pod.id]
            if isinstance(machine, Machine) and machine.is_alive and machine.owns(container.id):
                self._know_again(machine, container)
                await self._sources.adopt(machine, container)
        found = await asyncio.gather(*(self._facts_of(pod_id) for pod_id in machines))
        facts = dict(zip(machines, found, strict=True))
        return Snapshot(
            pods=tuple(_pod_fact(pod.id, machines[pod.id], is_left=self._machines.is_left(pod.id)) for pod in pods),
            containers=tuple(
                facts[container.pod.id].get(container.id) or _missing(container.id, machines[container.pod.id])
                for container in containers
            ),
        )

    def _know_again(self, machine: Machine, container: ContainerRef) -> None:
        user = container.facts.get("user")
        if machine.user_of(container.id) is None and isinstance(user, Mapping):
            machine.remember(container.id, user=_read_user(user))

    async def _adopt(self, pod_id: PodId) -> Machine | RuntimeDown | None:
        try:
            return await self._machines.find(pod_id)
        except RuntimeDown as error:
            return error

    async def _facts_of(self, pod_id: PodId) -> dict[ContainerId, ObservedContainer]:
        """What the guest says, else what was kept of it."""
        machine = await self._adopt(pod_id)
        kept = {item.id: item for item in read_exits(self._machines.folder(pod_id))}
        if not isinstance(machine, Machine):
            return kept
        if machine.is_alive:
            with contextlib.suppress(RuntimeDown):
                return {**kept, **await machine.refresh()}
        return {**machine.last_facts(), **kept}

    async def _look(self, container_id: ContainerId, pod_id: PodId) -> ObservedContainer:
        facts = await self._facts_of(pod_id)
        return facts.get(container_id) or _missing(container_id, await self._adopt(pod_id))

    async def _snapshot(self) -> Snapshot:
        machines = await self._machines.find_all()
        facts = await asyncio.gather(*(self._facts_of(machine.id) for machine in machines))
        return Snapshot(
            pods=tuple(machine.pod_fact() for machine in machines),
            containers=tuple(fact for each in facts for fact in each.values()),
        )

    def watch(self) -> AsyncIterator[Snapshot | Change]:
        """Facts as they happen."""
        return self._hub.watch()

    # ---------------------------------------------------------------------------------------------------------- output
    async def output(self, container: ContainerRef, after: int) -> AsyncIterator[OutputChunk]:
        """What the container wrote, from the guest's buffer."""
        machine = await self._machines.find(container.pod.id)
        if machine is None or not machine.is_alive:
            return
        try:
            async with contextlib.aclosing(machine.output(container.id, after)) as chunks:  # type: ignore[type-var]
                async for chunk in chunks:
                    yield chunk
        except NotFound:
            return

    async def trim_output(self, container: ContainerRef, seq: int) -> None:
        """Free the guest's buffer behind a position."""
        machine = await self._machines.find(container.pod.id)
        if machine is not None and machine.is_alive:
            async with machine.deadline():
                await machine.agent.trim_output(container.id, seq)

    # --------------------------------------------------------------------------------------------------------- streams
    async def exec(self, container: ContainerRef, spec: ExecSpec) -> Process:
        """Run a command in the container."""
        machine = await self._machines.get(container.pod.id)
        user = machine.user_of(container.id) or await first_user(container, self._needed.images)
        process = oci_spec.build_exec(container, user, spec)
        async with machine.deadline():
            return await machine.agent.exec(container.id, process, terminal=spec.tty, stdin=spec.stdin)

    async def attach(self, container: ContainerRef, *, stdin: bool, stdout: bool, stderr: bool) -> Process:
        """Attach to the first process."""
        machine = await self._machines.get(container.pod.id)
        async with machine.deadline():
            process = await machine.agent.attach(container.id, stdin=stdin)
        wanted = frozenset(name for name, wants in (("stdout", stdout), ("stderr", stderr)) if wants)
        return AttachedProcess(machine.agent, container.id, process, wanted)

    async def connect(self, pod: PodRef, port: int) -> Process:
        """Connect to a port inside the guest."""
        machine = await self._machines.get(pod.id)
        async with machine.deadline():
            return await machine.agent.connect(port)

    # ----------------------------------------------------------------------------------------------------------- usage
    async def stats(self, containers: tuple[ContainerRef, ...]) -> tuple[ContainerUsage, ...]:
        """Measure these: one question per machine, all at once."""
        wanted = {container.id for container in containers}
        pods = dict.fromkeys(container.pod.id for container in containers)
        found = await asyncio.gather(*(self._measure(pod_id) for pod_id in pods))
        return tuple(item for each in found for item in each if item.id in wanted)

    async def _measure(self, pod_id: PodId) -> tuple[ContainerUsage, ...]:
        try:
            machine = await self._machines.get(pod_id)
            async with machine.deadline(_STATS_S):
                figures = await machine.agent.stats()
        except (DispatcherError, TimeoutError):
            return ()
        now_ns = self._now_ns()
        return tuple(container_usage(item, machine, now_ns) for item in figures.containers if machine.owns(item.id))

    async def disk_usage(self) -> Mapping[str, tuple[int, int]]:
        """What the layers of all pods take."""
        return await asyncio.to_thread(_layers, self._machines.root)


_STATS_S = 2.0


def _facts(machine: Machine, size: VmSize) -> dict[str, Any]:
    return {
        **machine.vm.facts,
        "vcpus": size.vcpus,
        "guest_memory_bytes": size.guest_memory_bytes,
        "charge": size.charge,
        "notes": list(size.notes),
    }


def _pod_limits(size: VmSize) -> dict[str, Any]:
    return {} if size.limit_bytes is None else {"memory": {"limit": size.limit_bytes, "swap": size.limit_bytes}}


def _mappings(mappings: tuple[Any, ...]) -> tuple[IdMapping, ...]:
    return tuple(IdMapping(container_id=item.container_id, host_id=item.host_id, size=item.length) for item in mappings)


def _user_facts(user: ContainerUser) -> dict[str, Any]:
    return {"uid": user.uid, "gid": user.gid, "groups": list(user.supplemental_groups)}


def _read_user(facts: Mapping[str, Any]) -> ContainerUser:
    return ContainerUser(uid=facts["uid"], gid=facts["gid"], supplemental_groups=tuple(facts["groups"]))


def _pod_fact(pod_id: PodId, machine: Machine | RuntimeDown | None, *, is_left: bool) -> ObservedPod:
    if isinstance(machine, Machine):
        return machine.pod_fact()
    if isinstance(machine, RuntimeDown):
        return ObservedPod(id=pod_id, liveness=Liveness.UNKNOWN, reason="VmSilent", message=machine.message)
    if is_left:
        return ObservedPod(
            id=pod_id, liveness=Liveness.EXITED, reason="VmDied", message="the pod's virtual machine does not run"
        )
    return ObservedPod(id=pod_id, liveness=Liveness.ABSENT)


def _missing(container_id: ContainerId, machine: Machine | RuntimeDown | None) -> ObservedContainer:
    """A container of which nothing is known: absent, unless the guest cannot be asked."""
    silent = isinstance(machine, RuntimeDown)
    return ObservedContainer(id=container_id, liveness=Liveness.UNKNOWN if silent else Liveness.ABSENT)


async def _send(machine: Machine, container: ContainerId, number: int) -> None:
    with contextlib.suppress(NotFound):
        async with machine.deadline():
            await machine.agent.signal_container(container, number, everything=number == signal.SIGKILL)


def _number(name: str) -> int:
    """The number of a signal by name or number; a name that this kernel does not have is TERM."""
    if name.isdigit():
        return int(name)
    base, sign, offset = name.partition("+") if "+" in name else name.partition("-")
    try:
        number = int(signal.Signals[base])
        return number + (int(offset) if sign == "+" else -int(offset) if sign else 0)
    except (KeyError, ValueError):
        return int(signal.SIGTERM)


def _filter(container: ContainerRef, capabilities: frozenset[str]) -> bytes:
    kind = oci_spec.wants_seccomp(container)
    if kind is None:
        return b""
    profile = default_profile() if kind is ProfileType.RUNTIME_DEFAULT else read_seccomp_profile(container)
    return compile_profile(profile or {}, capabilities)


def _block_devices(container: ContainerRef) -> list[tuple[GuestDisk, str]]:
    """The node's block devices that the container asks for: plugged into its machine. Others cannot be had there.

    Raises:
        InvalidRequest, NotSupported: see the message.
    """
    import stat

    disks = []
    for device in container.spec.devices:
        if oci_spec.is_guest_device(device):
            continue
        try:
            found = os.stat(device.host_path)
        except OSError:
            raise InvalidRequest(f"device {device.host_path} does not exist on this node") from None
        if not stat.S_ISBLK(found.st_mode):
            raise NotSupported(
                f"device {device.host_path} of the node cannot be used from inside a virtual machine; {_ADVICE}"
            )
        serial = f"b-{os.major(found.st_rdev)}-{os.minor(found.st_rdev)}"
        path = device.container_path or device.host_path
        disks.append((GuestDisk(path=path, serial=serial, permissions=device.permissions), device.host_path))
    if container.spec.cdi_devices:
        raise NotSupported(f"CDI devices cannot be used from inside a virtual machine; {_ADVICE}")
    return disks


_ADVICE = 'route such pods to a runtime that shares the node\'s kernel: "runtime: docker" in the policy file'


def _layers(root: Path) -> dict[str, tuple[int, int]]:
    total, count = 0, 0
    for path in root.glob("*/layers/*.ext4"):
        total += usage(path)
        count += 1
    return {str(root): (total, count)} if root.exists() else {}
