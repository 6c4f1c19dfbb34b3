"""Machines by QEMU: started cold or from a template, adopted, removed.

Theory of operation. `start` makes the machine's folder with its record first, then everything that QEMU gets as a
descriptor: listening sockets, logs, memory file, kernel. The launcher puts QEMU into its cgroup, namespaces and user.
QEMU with a state to restore comes up halted and empty; it is told the state over its monitor and set going. Whatever
fails on that way falls back to a cold boot, once, with the reason in the facts; whatever fails there is undone by
`remove`, which needs the id alone.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import time
from collections.abc import AsyncIterator, Mapping
from typing import Any

from dispatcher.api import effect, step
from dispatcher.errors import AlreadyExists, DispatcherError, RuntimeDown
from dispatcher_hyper_vm.drivers import GuestGate, GuestImage, SizeClass, VmmFeatures, VmmHealth, VmSpec
from dispatcher_hyper_vm.drivers.folder import MachineFolder, list_machines
from dispatcher_hyper_vm.drivers.qemu_launch import (
    BARE_NIC,
    SHARE,
    QemuConfig,
    QemuLauncher,
    Started,
    leaf_of,
    owned,
)
from dispatcher_hyper_vm.drivers.qemu_running import RunningQemu
from dispatcher_hyper_vm.drivers.qemu_state import give_state
from dispatcher_hyper_vm.drivers.qemu_template import TemplateMaker
from dispatcher_hyper_vm.templates import TemplateKey, Templates, close_ram, make_ram
from dispatcher_vm_kit.acceleration import Acceleration, probe_acceleration
from dispatcher_vm_kit.launcher import NodePrograms
from dispatcher_vm_kit.leaf import Leaf, remove_leaf
from dispatcher_vm_kit.process import ProcessIdentity, find_holder, is_held, open_process, send_signal, wait_ended
from dispatcher_vm_kit.qmp_client import Qmp, QmpRefused

__all__ = ["QemuConfig", "QemuVmm"]

_LOG = logging.getLogger(__name__)
_GONE_S = 10.0
_LOOK_S = 5.0


class QemuVmm:
    """See `drivers.Vmm`."""

    name = "qemu"
    features = VmmFeatures(templates=True, hotplug_disk=True, hotplug_memory=False, hotplug_vcpu=False, balloon=True)

    def __init__(self, config: QemuConfig, gate: GuestGate) -> None:
        self._config = config
        self._programs = NodePrograms(config.state_folder / "programs")
        self._launcher = QemuLauncher(config, self._programs)
        self._maker = TemplateMaker(config, self._launcher, gate, lambda each, leaf: self.remove(each, leaf=leaf))
        self._templates = Templates(config.templates)
        self._probing = asyncio.Lock()
        self._acceleration: Acceleration | None = None
        self._tasks: set[asyncio.Task[None]] = set()

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
                await self._maker.remove_machine(machine_id, leaf_of(record))

    # --------------------------------------------------------------------------------------------------------- starting
    async def start(self, spec: VmSpec) -> RunningQemu:
        began = time.monotonic()
        acceleration = await self._accelerate()
        reason = "templates are off" if spec.templates.kind == "off" else ""
        if not reason:
            key = self._maker.key(spec, acceleration)
            template, reason = await self._templates.get(key, lambda key: self._maker.make(key, spec, acceleration))
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
            cards = (BARE_NIC,) * nics
            spec = VmSpec(id="0" * 8, guest=guest, size=size, nics=cards, share=SHARE if share else None)
            acceleration = self._acceleration
            key = self._maker.key(spec, acceleration)
            self._templates.begin(key, lambda key: self._maker.make(key, spec, acceleration))

    async def _restore(
        self, spec: VmSpec, acceleration: Acceleration, *, key: TemplateKey, ram: int, state: bytes, began: float
    ) -> RunningQemu:
        facts = {"boot": "template", "boot_reason": "", "template": key.digest[:12]}
        async with self._undone(spec):
            started = await self._launcher.launch(spec, acceleration, ram, boot=False, shared=False, facts=facts)
            async with owned(started):
                with step("restore"):
                    await give_state(started.qmp, state, timeout_s=self._config.start_s)
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
                started = await self._launcher.launch(spec, acceleration, ram, boot=True, shared=True, facts=facts)
                async with owned(started):
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

    def _running(self, spec: VmSpec, started: Started, began: float) -> RunningQemu:
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
        leaf = leaf_of(record)
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
        found = leaf_of(record) or leaf
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
