"""Getting a QEMU to run in its place: everything that it is given is opened here, and the launcher told where it goes.

A machine's folder with its record comes first. What fails half-way is the caller's to undo, by the machine's id.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import resource
import shutil
import signal
import time
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from dispatcher.api import effect
from dispatcher.errors import AlreadyExists, DispatcherError, NotSupported, RuntimeDown
from dispatcher_hyper_vm.drivers import GuestImage, NicSpec, VmSpec
from dispatcher_hyper_vm.drivers.folder import MachineFolder, UserRange, list_machines
from dispatcher_hyper_vm.templates import TemplateLimits
from dispatcher_vm_kit.acceleration import Acceleration
from dispatcher_vm_kit.exec import Child, spawn
from dispatcher_vm_kit.launcher import SHARE_CAPABILITIES, LaunchPlan, NodePrograms, open_plan
from dispatcher_vm_kit.leaf import Leaf, find_leaf, make_leaf, open_for_joining, scope_argv
from dispatcher_vm_kit.process import identify, is_held, make_lock, send_signal, wait_ended
from dispatcher_vm_kit.qemu_argv import Boot, Nic, QemuMachine, qemu_argv
from dispatcher_vm_kit.qmp_client import Qmp, listen_socket
from dispatcher_vm_kit.share import make_share

SHARE = Path("/share")  # where the launcher puts it
TEMPLATE_MAC = "02:00:00:00:00:01"
BARE_NIC = NicSpec(tap_fd=-1, mac=TEMPLATE_MAC)  # a card without a cable
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
class Started:
    """A QEMU whose monitor answers, and that no object owns yet."""

    qmp: Qmp
    handle: int
    child: Child
    record: dict[str, Any]


@contextlib.asynccontextmanager
async def owned(started: Started) -> AsyncIterator[None]:
    """On a failure inside, end and let go of a monitor that no object owns yet."""
    try:
        yield
    except BaseException:
        await started.qmp.aclose()
        await _end(started.handle, started.child)
        raise


async def _end(handle: int, child: Child) -> None:
    send_signal(handle, signal.SIGKILL)
    await asyncio.shield(wait_ended(handle))
    child.reap()
    os.close(handle)


class QemuLauncher:
    """Starts QEMUs for a driver."""

    def __init__(self, config: QemuConfig, programs: NodePrograms) -> None:
        self._config = config
        self._programs = programs
        self._users = UserRange(config.users_first, config.users_count)
        self._reserved: dict[str, int] = {}

    async def launch(
        self,
        spec: VmSpec,
        acceleration: Acceleration,
        ram: int,
        *,
        boot: bool,
        shared: bool,
        facts: Mapping[str, Any],
    ) -> Started:
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

    async def _connect(self, folder: MachineFolder, record: dict[str, Any], child: Child, handle: int) -> Started:
        connecting = asyncio.ensure_future(Qmp.connect(folder.monitor, timeout_s=self._config.start_s))
        ended = asyncio.ensure_future(wait_ended(handle))
        try:
            await asyncio.wait([connecting, ended], return_when=asyncio.FIRST_COMPLETED)
            identity = identify(child.pid)
            if identity is None or not connecting.done():
                raise RuntimeDown(f"the machine monitor did not start: {folder.last_words()}")  # noqa: TRY301
            record |= {"pid": identity.pid, "start_ticks": identity.start_ticks, "started_at_ns": time.time_ns()}
            return Started(qmp=connecting.result(), handle=handle, child=child, record=record)
        except BaseException:
            connecting.cancel()
            ended.cancel()
            await _end(handle, child)
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
            self.machine(spec, acceleration),
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

    def machine(self, spec: VmSpec, acceleration: Acceleration) -> QemuMachine:
        """The machine without anything that only exists once it starts."""
        return QemuMachine(
            binary=resolve_binary(self._config.binary),
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
            nics=tuple(Nic(mac=TEMPLATE_MAC) for _ in spec.nics),
            share=None if spec.share is None else SHARE,
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


# ----------------------------------------------------------------------------------------------------------------- files
def resolve_binary(binary: str) -> str:
    """The program's own path. Raises NotSupported where it is not installed."""
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


def leaf_of(record: Mapping[str, Any]) -> Leaf | None:
    """The cgroup leaf that a machine's record names, or None."""
    kept = record.get("leaf")
    return None if not kept else find_leaf(kept["parent"], record["id"], driver=kept["driver"])
