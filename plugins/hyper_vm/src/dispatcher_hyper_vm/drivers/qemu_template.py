"""Making a template: a guest is booted without cables, left alone until it is at rest, and kept."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import os
import time
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import replace
from pathlib import Path
from typing import Any

from dispatcher.errors import RuntimeDown
from dispatcher_hyper_vm.drivers import GuestGate, LaunchSpec, TemplateScope, VmSpec
from dispatcher_hyper_vm.drivers.folder import MachineFolder
from dispatcher_hyper_vm.drivers.qemu_launch import BARE_NIC, QemuConfig, QemuLauncher, owned
from dispatcher_hyper_vm.drivers.qemu_state import take_state
from dispatcher_hyper_vm.templates import Template, TemplateKey, TemplateRefused, close_ram, make_ram, seal_ram
from dispatcher_vm_kit.acceleration import Acceleration
from dispatcher_vm_kit.leaf import Leaf, find_leaf
from dispatcher_vm_kit.process import wait_ended
from dispatcher_vm_kit.qemu_argv import Boot, qemu_argv
from dispatcher_vm_kit.qmp_client import QmpRefused
from dispatcher_vm_kit.share import remove_share

TICKING_PER_S = 100  # an idle guest has about 20 timer interrupts in a second, one that ticks has 250
Remove = Callable[[str, Leaf | None], Awaitable[None]]


class TemplateMaker:
    """Names and makes templates. `remove` ends and removes a machine by its id."""

    def __init__(self, config: QemuConfig, launcher: QemuLauncher, gate: GuestGate, remove: Remove) -> None:
        self._config = config
        self._launcher = launcher
        self._gate = gate
        self._remove = remove

    def key(self, spec: VmSpec, acceleration: Acceleration) -> TemplateKey:
        """Name all that a clone of this machine cannot change."""
        spec = replace(spec, share_owner=False)  # the host's side only: clones may differ
        words = Boot(kernel=Path("kernel"), initrd=Path("initrd"), words=spec.guest.words)
        machine = replace(self._launcher.machine(spec, acceleration), boot=words)
        status = os.stat(machine.binary)
        program = f"{acceleration.version} {status.st_ino} {status.st_size} {status.st_mtime_ns}"
        domain = spec.templates.domain if spec.templates.kind == "namespace" else ""
        parts = (spec.guest.digest, program, spec.templates.kind, domain, *qemu_argv(machine))
        digest = hashlib.sha256("\0".join(parts).encode()).hexdigest()
        size = spec.size
        return TemplateKey(digest=digest, memory_bytes=size.memory_bytes, vcpus=size.vcpus, domain=domain)

    async def make(self, key: TemplateKey, asked: VmSpec, acceleration: Acceleration) -> Template:
        """Boot a guest, wait until it is at rest, and keep its memory and device state."""
        began = time.monotonic()
        machine_id = hashlib.sha256(f"template {key.digest} {time.time_ns()}".encode()).hexdigest()
        share = None if asked.share is None else self._share(machine_id)
        leaf = None if asked.launch.leaf is None else _template_leaf(asked.launch.leaf, machine_id)
        spec = VmSpec(
            id=machine_id,
            guest=asked.guest,
            size=asked.size,
            nics=(BARE_NIC,) * len(asked.nics),
            share=share,
            launch=LaunchSpec(leaf=leaf),
            templates=TemplateScope(kind="off"),
        )
        ram = make_ram(spec.size.memory_bytes)
        try:
            facts = {"boot": "cold", "boot_reason": "", "template": key.digest[:12], "is_template": True}
            started = await self._launcher.launch(spec, acceleration, ram, boot=True, shared=True, facts=facts)
            async with owned(started):
                agent = MachineFolder(self._config.run_folder, machine_id).agent
                await self._unless_it_ends(started.handle, self._wait_at_rest(agent))
                await started.qmp.execute("stop")
                state = await take_state(started.qmp, timeout_s=self._config.start_s)
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
            await asyncio.shield(self.remove_machine(machine_id, leaf))
        return Template(key=key, ram_fd=ram, state=state, build_seconds=time.monotonic() - began)

    def _share(self, machine_id: str) -> Path:
        return self._config.run_folder / f".share-{machine_id[:16]}"

    async def remove_machine(self, machine_id: str, leaf: Leaf | None) -> None:
        """Remove a machine that was to become a template, by its id. Idempotent."""
        await self._remove(machine_id, leaf)
        remove_share(self._share(machine_id))

    async def _unless_it_ends(self, handle: int, work: Coroutine[Any, Any, None]) -> None:
        """Do this work with the guest, but no longer than its monitor lives."""
        working, ended = asyncio.ensure_future(work), asyncio.ensure_future(wait_ended(handle))
        try:
            await asyncio.wait([working, ended], return_when=asyncio.FIRST_COMPLETED)
            if not working.done():
                raise TemplateRefused("the guest ended while it started")
            await working
        finally:
            for task in (working, ended):
                task.cancel()
            await asyncio.wait([working, ended])

    async def _wait_at_rest(self, agent: Path) -> None:
        """Wait until the guest is up and its timer calm: one that ticks would cost every clone percents of a CPU for ever.

        Shortly after its start a guest still ticks; the build's deadline ends the waiting.
        """
        await self._gate.settle(agent)
        deadline = time.monotonic() + self._config.templates.build_s / 2
        rate = await self._gate.timer_rate(agent)
        while rate >= TICKING_PER_S and time.monotonic() < deadline:
            rate = await self._gate.timer_rate(agent)
        if rate < TICKING_PER_S:
            return
        raise TemplateRefused(f"the guest's timer ticks {rate:.0f} times a second, it would never be idle")


def _template_leaf(leaf: Leaf, machine_id: str) -> Leaf:
    """Templates belong to no pod: their cgroup is below our own parent."""
    return find_leaf("", machine_id, driver=leaf.driver)
