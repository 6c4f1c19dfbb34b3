"""Machines by QEMU: started cold or from a template, adopted, removed.

Theory of operation. `start` makes the machine's folder with its record first, then everything that QEMU gets as a
descriptor: listening sockets, logs, memory file, kernel. The launcher puts QEMU into its cgroup, namespaces and user.
QEMU with a state to restore comes up halted and empty; it is told the state over its monitor and set going. Whatever
fails on that way falls back to a cold boot, once, with the reason in the facts; whatever fails there is undone by
`remove`, which needs the id alone.

A template is made by starting a machine without cables and with a memory file that it writes into, waiting until the
guest is at rest, and taking its device state over the monitor. The process ends then, and the file is sealed.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import hashlib
import logging
import os
import resource
import shutil
import signal
import time
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from dispatcher.api import effect, step
from dispatcher.errors import AlreadyExists, DispatcherError, NotSupported, RuntimeDown
from dispatcher_hyper_vm.drivers import (
    GuestGate,
    GuestImage,
    LaunchSpec,
    NicSpec,
    SizeClass,
    TemplateScope,
    VmmFeatures,
    VmmHealth,
    VmSpec,
)
from dispatcher_hyper_vm.drivers.folder import MachineFolder, UserRange, list_machines
from dispatcher_hyper_vm.drivers.qemu_running import RunningQemu
from dispatcher_hyper_vm.templates import (
    Template,
    TemplateKey,
    TemplateLimits,
    TemplateRefused,
    Templates,
    close_ram,
    make_ram,
    seal_ram,
)
from dispatcher_vm_kit.acceleration import Acceleration, probe_acceleration
from dispatcher_vm_kit.exec import Child, spawn
from dispatcher_vm_kit.launcher import SHARE_CAPABILITIES, LaunchPlan, NodePrograms, open_plan
from dispatcher_vm_kit.leaf import Leaf, find_leaf, make_leaf, open_for_joining, remove_leaf, scope_argv
from dispatcher_vm_kit.process import (
    ProcessIdentity,
    find_holder,
    identify,
    is_held,
    make_lock,
    open_process,
    send_signal,
    wait_ended,
)
from dispatcher_vm_kit.qemu_argv import Boot, Nic, QemuMachine, qemu_argv
from dispatcher_vm_kit.qmp_client import Qmp, QmpRefused, listen_socket
from dispatcher_vm_kit.share import make_share, remove_share

_LOG = logging.getLogger(__name__)
_SHARE = Path("/share")  # where the launcher puts it
_IGNORE_SHARED = {"capabilities": [{"capability": "x-ignore-shared", "state": True}]}
_STATE_BYTES = 64 << 20  # more than any device state
_PIPE_BYTES = 1 << 20
_SET_PIPE_SIZE = 1031
_GONE_S = 10.0
_LOOK_S = 5.0
_TEMPLATE_MAC = "02:00:00:00:00:01"
_BARE_NIC = NicSpec(tap_fd=-1, mac=_TEMPLATE_MAC)
_TICKING_PER_S = 100  # an idle guest has about 20 timer interrupts in a second, one that ticks has 250
_KVM = Path("/dev/kvm")


@dataclass(frozen=True, slots=True, kw_only=True)
class QemuConfig:
    """How the driver works on this node.

    Attributes:
        run_folder: for the machines' folders; on a file system that a boot of the host empties.
        state_folder: for what is compiled and found out once.
        binary: QEMU, by name or path.
        acceleration: "auto", or what is to be taken.
        users_first, users_count: users of the host that machines run as, one each; 0 of them means: as root.
        start_s: how long QEMU may take to answer and to restore.
        templates: bounds of the templates.
        emulation_buffer_mib: translated code that an emulated machine keeps.
    """

    run_folder: Path
    state_folder: Path
    binary: str = "qemu-system-x86_64"
    acceleration: Literal["auto", "kvm", "tcg"] = "auto"
    users_first: int = 1_900_000_000
    users_count: int = 65536
    start_s: float = 30.0
    templates: TemplateLimits = field(default_factory=TemplateLimits)
    emulation_buffer_mib: int = 16


@dataclass(slots=True)
class _Started:
    """A QEMU whose monitor answers."""

    qmp: Qmp
    handle: int
    child: Child
    identity: ProcessIdentity
    record: dict[str, Any]


class QemuVmm:
    """See `drivers.Vmm`."""

    name = "qemu"
    features = VmmFeatures(templates=True, hotplug_disk=True, hotplug_memory=False, hotplug_vcpu=False, balloon=True)

    def __init__(self, config: QemuConfig, gate: GuestGate) -> None:
        self._config = config
        self._gate = gate
        self._programs = NodePrograms(config.state_folder / "programs")
        self._users = UserRange(config.users_first, config.users_count)
        self._templates = Templates(config.templates)
        self._probing = asyncio.Lock()
        self._acceleration: Acceleration | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._reserved: dict[str, int] = {}

    # -------------------------------------------------------------------------------------------------------- the node
    async def probe(self) -> VmmHealth:
        try:
            found = await self._accelerate()
            await self._programs.launcher()
        except DispatcherError as error:
            return VmmHealth(ready=False, reason="NoMachineMonitor", message=error.message)
        except (OSError, TimeoutError) as error:
            return VmmHealth(ready=False, reason="NoMachineMonitor", message=f"QEMU cannot be tried: {error}")
        notes = () if found.accelerator == "kvm" else (f"guests are emulated, which is slow: {found.reason}",)
        return VmmHealth(ready=True, engine=f"QEMU {found.version}", acceleration=found.accelerator, notes=notes)

    async def _accelerate(self) -> Acceleration:
        async with self._probing:
            if self._acceleration is None:
                self._acceleration = await probe_acceleration(
                    self._programs,
                    binary=self._config.binary,
                    wanted=self._config.acceleration,
                    cache=self._config.state_folder / "acceleration.json",
                )
            return self._acceleration

    async def recover(self) -> None:
        """Remove what an earlier daemon left of templates that it was making. Idempotent; call it before `prepare`."""
        for machine_id in list_machines(self._config.run_folder):
            record = MachineFolder(self._config.run_folder, machine_id).read()
            if record.get("is_template"):
                await self._remove_template_machine(machine_id, _leaf_of(record), self._template_share(machine_id))

    # --------------------------------------------------------------------------------------------------------- starting
    async def start(self, spec: VmSpec) -> RunningQemu:
        began = time.monotonic()
        acceleration = await self._accelerate()
        reason = "templates are off" if spec.templates.kind == "off" else ""
        if not reason:
            key = self._key(spec, acceleration)
            template, reason = await self._templates.get(key, lambda key: self._build(key, spec, acceleration))
            if template is not None:
                ram, state = os.dup(template.ram_fd), template.state
                try:
                    return await self._restore(spec, acceleration, key=key, ram=ram, state=state, began=began)
                except (QmpRefused, RuntimeDown, TimeoutError, OSError) as error:
                    reason = f"a clone did not start: {getattr(error, 'message', error)}"
                    _LOG.warning("machine %s boots cold, %s", spec.id[:12], reason)
                    await self.remove(spec.id, leaf=spec.launch.leaf)
                    if isinstance(error, QmpRefused):
                        self._templates.discard(key.digest, reason)
                finally:
                    os.close(ram)
        return await self._boot(spec, acceleration, reason, began)

    def prepare(self, guest: GuestImage, size: SizeClass, *, nics: int = 1, share: bool = True) -> None:
        """Have the node-wide template of a class made in the background, before the first pod asks. Never raises.

        Needs `probe` to have succeeded; else it does nothing.
        """
        if self._acceleration is not None:
            cards = (_BARE_NIC,) * nics
            spec = VmSpec(id="0" * 8, guest=guest, size=size, nics=cards, share=_SHARE if share else None)
            acceleration = self._acceleration
            key = self._key(spec, acceleration)
            self._templates.begin(key, lambda key: self._build(key, spec, acceleration))

    async def _restore(
        self, spec: VmSpec, acceleration: Acceleration, *, key: TemplateKey, ram: int, state: bytes, began: float
    ) -> RunningQemu:
        facts = {"boot": "template", "boot_reason": "", "template": key.digest[:12]}
        async with self._undone(spec):
            started = await self._launch(spec, acceleration, ram, boot=False, shared=False, facts=facts)
            async with self._owned(started):
                with step("restore"):
                    await _give_state(started.qmp, state, timeout_s=self._config.start_s)
                    await started.qmp.execute("cont")
                running = self._running(spec, started, began)
        self._templates.note_clone(key.digest, 1)
        self._follow(running, key.digest)
        return running

    async def _boot(self, spec: VmSpec, acceleration: Acceleration, reason: str, began: float) -> RunningQemu:
        ram = make_ram(spec.size.memory_bytes)
        try:
            facts = {"boot": "cold", "boot_reason": reason, "template": ""}
            async with self._undone(spec):
                started = await self._launch(spec, acceleration, ram, boot=True, shared=True, facts=facts)
                async with self._owned(started):
                    running = self._running(spec, started, began)
        finally:
            close_ram(ram)
        self._follow(running, "")
        return running

    @contextlib.asynccontextmanager
    async def _undone(self, spec: VmSpec) -> AsyncIterator[None]:
        """On any failure inside, remove what was made, in a task that a second cancellation does not reach."""
        try:
            yield
        except AlreadyExists:
            raise
        except BaseException as error:
            undo = asyncio.ensure_future(self.remove(spec.id, leaf=spec.launch.leaf))
            with contextlib.suppress(asyncio.CancelledError, DispatcherError):
                await asyncio.shield(undo)
            if isinstance(error, QmpRefused):
                raise RuntimeDown(f"the machine monitor refused: {error}") from error
            raise

    @contextlib.asynccontextmanager
    async def _owned(self, started: _Started) -> AsyncIterator[None]:
        """On a failure inside, let go of a monitor that no object owns yet."""
        try:
            yield
        except BaseException:
            await started.qmp.aclose()
            send_signal(started.handle, signal.SIGKILL)
            await asyncio.shield(wait_ended(started.handle))
            started.child.reap()
            os.close(started.handle)
            raise

    def _running(self, spec: VmSpec, started: _Started, began: float) -> RunningQemu:
        folder = MachineFolder(self._config.run_folder, spec.id)
        record = {**started.record, "start_seconds": round(time.monotonic() - began, 4)}
        folder.write(record)
        return RunningQemu(
            folder, record, qmp=started.qmp, handle=started.handle, leaf=spec.launch.leaf, child=started.child
        )

    def _follow(self, running: RunningQemu, digest: str) -> None:
        """Keep the machine's logs within bounds while it runs, and count it off its template at its end."""
        task = asyncio.create_task(self._keep_bounds(running, digest), name=f"logs of machine {running.id[:12]}")
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _keep_bounds(self, running: RunningQemu, digest: str) -> None:
        folder = MachineFolder(self._config.run_folder, running.id)
        ended = asyncio.ensure_future(running.wait())
        try:
            while not (await asyncio.wait([ended], timeout=_LOOK_S))[0]:
                folder.bound_console()
        finally:
            ended.cancel()
            self._templates.note_clone(digest, -1)

    # ---------------------------------------------------------------------------------------------------------- launching
    async def _launch(
        self,
        spec: VmSpec,
        acceleration: Acceleration,
        ram: int,
        *,
        boot: bool,
        shared: bool,
        facts: Mapping[str, Any],
    ) -> _Started:
        """Make the folder, start QEMU in its place, and connect to its monitor."""
        folder = MachineFolder(self._config.run_folder, spec.id)
        if is_held(folder.lock):
            raise AlreadyExists(f"a machine {spec.id[:12]} lives already")
        launcher = await self._programs.launcher()
        user = self._choose_user(spec.id)
        record: dict[str, Any] = {
            "id": spec.id,
            "folder": str(folder.path),
            "uid": user,
            "engine": acceleration.version,
            "acceleration": acceleration.accelerator,
            "memory_bytes": spec.size.memory_bytes,
            "vcpus": spec.size.vcpus,
            "leaf": None if spec.launch.leaf is None else _leaf_record(spec.launch.leaf),
            **facts,
        }
        try:
            folder.make(record)
            if spec.launch.leaf is not None:
                make_leaf(spec.launch.leaf, spec.launch.leaf_limits)
            if spec.share is not None:
                make_share(spec.share)
            how: dict[str, Any] = {"launcher": launcher, "ram": ram, "user": user, "boot": boot, "shared": shared}
            with contextlib.ExitStack() as stack:
                child = self._spawn(stack, folder, spec, acceleration, **how)
            handle = os.pidfd_open(child.pid)
        finally:
            self._reserved.pop(spec.id, None)
        return await self._connect(folder, record, child, handle)

    async def _connect(self, folder: MachineFolder, record: dict[str, Any], child: Child, handle: int) -> _Started:
        connecting = asyncio.ensure_future(Qmp.connect(folder.monitor, timeout_s=self._config.start_s))
        ended = asyncio.ensure_future(wait_ended(handle))
        try:
            await asyncio.wait([connecting, ended], return_when=asyncio.FIRST_COMPLETED)
            identity = identify(child.pid)
            if identity is None or not connecting.done():
                raise RuntimeDown(f"the machine monitor did not start: {folder.last_words()}")  # noqa: TRY301
            record |= {"pid": identity.pid, "start_ticks": identity.start_ticks, "started_at_ns": time.time_ns()}
            return _Started(qmp=connecting.result(), handle=handle, child=child, identity=identity, record=record)
        except BaseException:
            connecting.cancel()
            ended.cancel()
            send_signal(handle, signal.SIGKILL)
            await asyncio.shield(wait_ended(handle))
            child.reap()
            os.close(handle)
            with contextlib.suppress(asyncio.CancelledError, DispatcherError):
                await (await connecting).aclose()
            raise
        finally:
            ended.cancel()

    def _spawn(
        self,
        stack: contextlib.ExitStack,
        folder: MachineFolder,
        spec: VmSpec,
        acceleration: Acceleration,
        *,
        launcher: Path,
        ram: int,
        user: int | None,
        boot: bool,
        shared: bool,
    ) -> Child:
        """Open all that QEMU gets, and start it. Everything opened is closed again with the stack."""
        append = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC | os.O_NOFOLLOW
        own = [_close_later(stack, make_lock(folder.lock))]
        monitor, agent, console = (
            stack.enter_context(listen_socket(path)).fileno() for path in (folder.monitor, folder.agent, folder.console)
        )
        console_log, monitor_log = (
            _close_later(stack, _open(path, append)) for path in (folder.console_log, folder.monitor_log)
        )
        kernel = tuple(_boot_file(stack, path) for path in (spec.guest.kernel, spec.guest.initrd)) if boot else ()
        machine = replace(
            self._machine(spec, acceleration),
            ram_fd=ram,
            ram_shared=shared,
            boot=_boot(spec.guest, kernel) if boot else None,
            monitor_fd=monitor,
            agent_fd=agent,
            console_fd=console,
            console_log_fd=console_log,
            nics=tuple(Nic(mac=nic.mac, tap_fd=nic.tap_fd if nic.tap_fd >= 0 else None) for nic in spec.nics),
        )
        taps = tuple(nic.tap_fd for nic in spec.nics if nic.tap_fd >= 0)
        kvm = acceleration.accelerator == "kvm"
        leaf, netns = spec.launch.leaf, spec.launch.netns_path
        plan = LaunchPlan(
            lock_fd=own[0],
            cgroup_fds=stack.enter_context(open_for_joining(leaf)) if leaf is not None else (),
            netns_fd=None if netns is None else _close_later(stack, _open(netns, os.O_RDONLY | os.O_CLOEXEC)),
            own_net=netns is None,
            root_fd=_close_later(stack, _open(folder.root, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)),
            share_fd=None if spec.share is None else _close_later(stack, _open(spec.share, os.O_PATH | os.O_CLOEXEC)),
            uid=user,
            gid=user,
            groups=(_KVM.stat().st_gid,) if kvm and user is not None else (),
            capabilities=SHARE_CAPABILITIES if spec.share is not None and spec.share_owner else 0,
            oom_score_adj=spec.launch.oom_score_adj,
            limits=(
                (resource.RLIMIT_CORE, 0, 0),
                (resource.RLIMIT_NOFILE, 4096, 4096),
                (resource.RLIMIT_MEMLOCK, 0, 0),
            ),
            kept_fds=(ram, monitor, agent, console, console_log, *kernel, *taps),
            kvm=kvm,
        )
        plan_fd = stack.enter_context(open_plan(plan))
        words = scope_argv(leaf, spec.launch.leaf_limits) if leaf is not None else []
        argv = [*words, str(launcher), str(plan_fd), *qemu_argv(machine)]
        return spawn(argv, pass_fds=(*plan.fds, plan_fd), output_fd=monitor_log)

    def _machine(self, spec: VmSpec, acceleration: Acceleration) -> QemuMachine:
        """The machine without anything that only exists once it starts."""
        return QemuMachine(
            binary=_resolve(self._config.binary),
            accelerator=acceleration.accelerator,
            tsc_khz=acceleration.tsc_khz,
            memory_bytes=spec.size.memory_bytes,
            ram_fd=0,
            ram_shared=False,
            vcpus=spec.size.vcpus,
            boot=None,
            monitor_fd=0,
            agent_fd=0,
            console_fd=0,
            console_log_fd=0,
            nics=tuple(Nic(mac=_TEMPLATE_MAC) for _ in spec.nics),
            share=None if spec.share is None else _SHARE,
            share_owner=spec.share_owner,
            emulation_buffer_mib=self._config.emulation_buffer_mib,
        )

    def _choose_user(self, machine_id: str) -> int | None:
        taken = [
            MachineFolder(self._config.run_folder, each).read().get("uid")
            for each in list_machines(self._config.run_folder)
        ]
        user = self._users.choose(machine_id, [*(each for each in taken if each is not None), *self._reserved.values()])
        if user is not None:
            self._reserved[machine_id] = user
        return user

    # ---------------------------------------------------------------------------------------------------------- templates
    def _key(self, spec: VmSpec, acceleration: Acceleration) -> TemplateKey:
        """Name all that a clone of this machine cannot change."""
        spec = replace(spec, share_owner=False)  # the host's side only: clones may differ
        words = Boot(kernel=Path("kernel"), initrd=Path("initrd"), words=spec.guest.words)
        machine = replace(self._machine(spec, acceleration), boot=words)
        status = os.stat(machine.binary)
        program = f"{acceleration.version} {status.st_ino} {status.st_size} {status.st_mtime_ns}"
        domain = spec.templates.domain if spec.templates.kind == "namespace" else ""
        parts = (spec.guest.digest, program, spec.templates.kind, domain, *qemu_argv(machine))
        digest = hashlib.sha256("\0".join(parts).encode()).hexdigest()
        size = spec.size
        return TemplateKey(digest=digest, memory_bytes=size.memory_bytes, vcpus=size.vcpus, domain=domain)

    async def _build(self, key: TemplateKey, asked: VmSpec, acceleration: Acceleration) -> Template:
        """Boot a guest, wait until it is at rest, and keep its memory and device state."""
        began = time.monotonic()
        machine_id = hashlib.sha256(f"template {key.digest} {time.time_ns()}".encode()).hexdigest()
        share = None if asked.share is None else self._template_share(machine_id)
        leaf = None if asked.launch.leaf is None else _template_leaf(asked.launch.leaf, machine_id)
        spec = VmSpec(
            id=machine_id,
            guest=asked.guest,
            size=asked.size,
            nics=(_BARE_NIC,) * len(asked.nics),
            share=share,
            launch=LaunchSpec(leaf=leaf),
            templates=TemplateScope(kind="off"),
        )
        ram = make_ram(spec.size.memory_bytes)
        try:
            facts = {"boot": "cold", "boot_reason": "", "template": key.digest[:12], "is_template": True}
            started = await self._launch(spec, acceleration, ram, boot=True, shared=True, facts=facts)
            async with self._owned(started):
                agent = MachineFolder(self._config.run_folder, machine_id).agent
                await self._gate.settle(agent)
                await self._wait_at_rest(agent)
                await started.qmp.execute("stop")
                state = await _take_state(started.qmp, timeout_s=self._config.start_s)
                with contextlib.suppress(RuntimeDown):
                    await started.qmp.execute("quit")
                await wait_ended(started.handle)
            started.child.reap()
            os.close(started.handle)
            await started.qmp.aclose()
            seal_ram(ram)
        except BaseException as error:
            close_ram(ram)
            if isinstance(error, QmpRefused):
                raise TemplateRefused(f"the machine monitor refused: {error}") from error
            raise
        finally:
            await asyncio.shield(self._remove_template_machine(machine_id, leaf, share))
        return Template(key=key, ram_fd=ram, state=state, build_seconds=time.monotonic() - began)

    def _template_share(self, machine_id: str) -> Path:
        return self._config.run_folder / f".share-{machine_id[:16]}"

    async def _remove_template_machine(self, machine_id: str, leaf: Leaf | None, share: Path | None) -> None:
        await self.remove(machine_id, leaf=leaf)
        if share is not None:
            remove_share(share)

    async def _wait_at_rest(self, agent: Path) -> None:
        """Wait until the guest's timer is calm: one that ticks would cost every clone percents of a CPU for ever.

        Shortly after its start a guest still ticks; the build's deadline ends the waiting.
        """
        deadline = time.monotonic() + self._config.templates.build_s / 2
        rate = await self._gate.timer_rate(agent)
        while rate >= _TICKING_PER_S and time.monotonic() < deadline:
            rate = await self._gate.timer_rate(agent)
        if rate < _TICKING_PER_S:
            return
        raise TemplateRefused(f"the guest's timer ticks {rate:.0f} times a second, it would never be idle")

    # ----------------------------------------------------------------------------------------------- adoption and removal
    async def adopt(self, machine_id: str) -> RunningQemu | None:
        folder = MachineFolder(self._config.run_folder, machine_id)
        record = folder.read()
        if "pid" not in record or not is_held(folder.lock):
            return None
        identity = ProcessIdentity(pid=int(record["pid"]), start_ticks=int(record["start_ticks"]))
        handle = open_process(identity)
        if handle is None:
            return None
        try:
            qmp = await Qmp.connect(folder.monitor, timeout_s=self._config.start_s)
        except BaseException:
            os.close(handle)
            raise
        leaf = _leaf_of(record)
        running = RunningQemu(folder, record, qmp=qmp, handle=handle, leaf=leaf, child=None)
        self._follow(running, "")
        return running

    @effect("hyper_vm.remove_machine")
    async def remove(self, machine_id: str, *, leaf: Leaf | None = None) -> None:
        folder = MachineFolder(self._config.run_folder, machine_id)
        record = folder.read()
        deadline = time.monotonic() + _GONE_S
        while is_held(folder.lock):
            # The launcher writes its pid first of all: a holder without one is about to.
            identity = find_holder(folder.lock)
            handle = open_process(identity) if identity is not None else None
            if handle is not None:
                try:
                    send_signal(handle, signal.SIGKILL)
                    async with asyncio.timeout(_GONE_S):
                        await wait_ended(handle)
                except TimeoutError:
                    pass
                finally:
                    os.close(handle)
            if time.monotonic() > deadline:
                raise RuntimeDown(f"the monitor of the machine {machine_id[:12]} is not proven gone")
            await asyncio.sleep(0.005)
        found = _leaf_of(record) or leaf
        if found is not None:
            await remove_leaf(found)
        folder.remove()

    def machine_ids(self) -> tuple[str, ...]:
        return tuple(each for each in list_machines(self._config.run_folder) if not self._is_template(each))

    def report(self) -> Mapping[str, Any]:
        acceleration = self._acceleration
        return {
            "driver": self.name,
            "engine": acceleration.version if acceleration else "",
            "acceleration": acceleration.accelerator if acceleration else "",
            **self._templates.report(),
        }

    def _is_template(self, machine_id: str) -> bool:
        return bool(MachineFolder(self._config.run_folder, machine_id).read().get("is_template"))

    async def aclose(self) -> None:
        await self._templates.aclose()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)


# ------------------------------------------------------------------------------------------------------ files and states
def _resolve(binary: str) -> str:
    found = shutil.which(binary)
    if found is None:
        raise NotSupported(f"{binary} is not installed; install it (apt-get install qemu-system-x86)")
    return os.path.realpath(found)


def _close_later(stack: contextlib.ExitStack, descriptor: int) -> int:
    stack.callback(os.close, descriptor)
    return descriptor


@effect("hyper_vm.open_file")
def _open(path: Path, flags: int) -> int:
    return os.open(path, flags, 0o600)


def _boot_file(stack: contextlib.ExitStack, path: Path) -> int:
    """A descriptor of a kernel or initramfs that QEMU's own user may open again: a copy in memory if need be."""
    descriptor = _close_later(stack, _open(path, os.O_RDONLY | os.O_CLOEXEC))
    if os.fstat(descriptor).st_mode & 0o004:
        return descriptor
    copy = _close_later(stack, os.memfd_create("boot-file", os.MFD_CLOEXEC))
    while os.sendfile(copy, descriptor, None, 1 << 30):
        pass
    return copy


def _boot(guest: GuestImage, descriptors: tuple[int, ...]) -> Boot:
    kernel, initrd = (Path(f"/proc/self/fd/{descriptor}") for descriptor in descriptors)
    return Boot(kernel=kernel, initrd=initrd, words=guest.words)


def _leaf_record(leaf: Leaf) -> dict[str, str]:
    return {"parent": leaf.parent, "driver": leaf.driver}


def _leaf_of(record: Mapping[str, Any]) -> Leaf | None:
    kept = record.get("leaf")
    return None if not kept else find_leaf(kept["parent"], record["id"], driver=kept["driver"])


def _template_leaf(leaf: Leaf, machine_id: str) -> Leaf:
    """Templates belong to no pod: their cgroup is below our own parent."""
    return find_leaf("", machine_id, driver=leaf.driver)


@effect("hyper_vm.give_state")
async def _give_state(qmp: Qmp, state: bytes, *, timeout_s: float) -> None:
    """Restore a device state into a machine that waits for one. Its memory is in place already."""
    reader, writer = os.pipe2(os.O_CLOEXEC)
    try:
        try:
            await qmp.execute("migrate-set-capabilities", _IGNORE_SHARED)
            await qmp.give_fd(reader, "state")
        finally:
            os.close(reader)
        await qmp.execute("migrate-incoming", {"uri": "fd:state"})
        await _fill(writer, state)
    finally:
        os.close(writer)
    await qmp.wait_migrated(timeout_s=timeout_s)


async def _fill(writer: int, state: bytes) -> None:
    """Write it all; usually it fits into the pipe at once."""
    room = fcntl.fcntl(writer, _SET_PIPE_SIZE, _PIPE_BYTES)
    if len(state) <= room:
        os.write(writer, state)
        return
    view = memoryview(state)
    while view:
        written = await asyncio.to_thread(os.write, writer, view[:room])
        view = view[written:]


@effect("hyper_vm.take_state")
async def _take_state(qmp: Qmp, *, timeout_s: float) -> bytes:
    """The device state of a halted machine, without its memory."""
    reader, writer = os.pipe2(os.O_CLOEXEC)
    try:
        try:
            await qmp.execute("migrate-set-capabilities", _IGNORE_SHARED)
            await qmp.give_fd(writer, "state")
        finally:
            os.close(writer)
        reading = asyncio.ensure_future(asyncio.to_thread(_read_all, reader))
        await qmp.execute("migrate", {"uri": "fd:state"})
        await qmp.wait_migrated(timeout_s=timeout_s)
        async with asyncio.timeout(timeout_s):
            return await asyncio.shield(reading)
    finally:
        os.close(reader)


def _read_all(reader: int) -> bytes:
    found = bytearray()
    while chunk := os.read(reader, _PIPE_BYTES):
        found += chunk
        if len(found) > _STATE_BYTES:
            raise TemplateRefused("the machine's device state has no end")
    return bytes(found)
