"""Puts the runtime together: the only module here that knows which driver there is."""

from __future__ import annotations

import asyncio
from pathlib import Path

from dispatcher.api import Services
from dispatcher_hyper_vm.config import Config
from dispatcher_hyper_vm.drivers import GuestImage
from dispatcher_hyper_vm.drivers.qemu import QemuConfig, QemuVmm
from dispatcher_hyper_vm.gate import AgentGate
from dispatcher_hyper_vm.guest.registry import find_guest
from dispatcher_hyper_vm.runtime import HyperVmRuntime


def make_runtime(config: Config, services: Services) -> HyperVmRuntime:
    """The runtime of this node. Nothing begins before its `start`."""
    guests = Path(config.guests_dir)

    async def guest_of(name: str) -> GuestImage:
        guest = await asyncio.to_thread(find_guest, guests, name)
        return GuestImage(kernel=guest.kernel, initrd=guest.initramfs, digest=guest.digest)

    vmm = QemuVmm(
        QemuConfig(run_folder=services.run_dir / "vm", state_folder=services.state_dir, binary=config.qemu),
        AgentGate(),
    )
    return HyperVmRuntime(config, services, vmm, guest_of)
