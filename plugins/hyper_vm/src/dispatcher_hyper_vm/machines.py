"""The machines of all pods: making them, finding those of an earlier daemon, and taking them apart.

A machine is found by its pod's id alone: the driver keeps its own record in its run folder, and what is made here lies
in `<state folder>/pods/<id>`. Acts on one machine take turns.
"""

from __future__ import annotations

import asyncio
import os
import shutil
from collections.abc import Awaitable, Callable, Iterable
from pathlib import Path

from dispatcher.api import PodRef, Sizer, VmSize, effect
from dispatcher.errors import NotFound, RuntimeDown
from dispatcher.model import PodId
from dispatcher_hyper_vm.config import Config
from dispatcher_hyper_vm.drivers import (
    GuestImage,
    LaunchSpec,
    NicSpec,
    RunningVm,
    SizeClass,
    TemplateScope,
    Vmm,
    VmSpec,
)
from dispatcher_hyper_vm.machine import Machine, Tell
from dispatcher_hyper_vm.oci_spec import check_pod
from dispatcher_vm_kit.leaf import Leaf, LeafLimits, find_leaf
from dispatcher_vm_kit.share import remove_share
from dispatcher_vm_kit.tap import make_tap

GuestOf = Callable[[str], Awaitable[GuestImage]]


class Machines:
    """All machines of this node."""

    def __init__(self, config: Config, vmm: Vmm, sizer: Sizer, *, guest_of: GuestOf, folder: Path, tell: Tell) -> None:
        self._config = config
        self._vmm = vmm
        self._sizer = sizer
        self._guest_of = guest_of
        self._folder = folder
        self._tell = tell
        self._machines: dict[PodId, Machine] = {}
        self._locks: dict[PodId, asyncio.Lock] = {}

    @property
    def root(self) -> Path:
        """Where the folders of all pods lie."""
        return self._folder

    def folder(self, pod_id: PodId) -> Path:
        """Where the layers, the share and the exits of a pod lie."""
        return self._folder / pod_id

    def lock(self, pod_id: PodId) -> asyncio.Lock:
        """Held by acts on one machine."""
        return self._locks.setdefault(pod_id, asyncio.Lock())

    # --------------------------------------------------------------------------------------------------------- finding
    async def find(self, pod_id: PodId) -> Machine | None:
        """The pod's machine, adopted where an earlier daemon made it; None where none lives.

        One that died under this daemon is still found, with its end.
        """
        if (machine := self._machines.get(pod_id)) is not None:
            return machine
        if pod_id not in self._vmm.machine_ids():
            return None
        async with self.lock(pod_id):
            if pod_id not in self._machines:
                vm = await self._vmm.adopt(pod_id)
                if vm is None:
                    return None
                self._machines[pod_id] = self._follow(pod_id, vm)
            return self._machines[pod_id]

    async def get(self, pod_id: PodId) -> Machine:
        """The pod's living machine.

        Raises:
            NotFound: there is none.
            RuntimeDown: it does not answer.
        """
        machine = await self.find(pod_id)
        if machine is None or not machine.is_alive:
            raise NotFound(f"the virtual machine of pod {pod_id[:12]} does not run")
        return machine

    async def find_all(self) -> tuple[Machine, ...]:
        """All machines that live or died under this daemon. One that does not answer is left out."""
        found = await asyncio.gather(
            *(self.find(PodId(each)) for each in self._vmm.machine_ids()), return_exceptions=True
        )
        for each in found:
            if isinstance(each, BaseException) and not isinstance(each, RuntimeDown):
                raise each
        return tuple(self._machines.values())

    def is_left(self, pod_id: PodId) -> bool:
        """True where something of a machine is left, whether or not it lives."""
        return pod_id in self._vmm.machine_ids() or self.folder(pod_id).exists()

    def _follow(self, pod_id: PodId, vm: RunningVm) -> Machine:
        machine = Machine(
            pod_id,
            vm,
            folder=self.folder(pod_id),
            tell=self._tell,
            agent_deadline_s=self._config.agent_deadline_s,
        )
        machine.start()
        return machine

    # ---------------------------------------------------------------------------------------------------------- making
    async def start(self, pod: PodRef) -> tuple[Machine, VmSize]:
        """Start the pod's machine, or find it started. The guest is not this pod's yet.

        Raises:
            NotSupported: the pod cannot live in a machine, or no machine can be started here.
            OutOfResources: the node cannot hold it.
            RuntimeDown: the monitor did not start.
        """
        check_pod(pod.spec)
        size = await asyncio.to_thread(self._sizer.size, pod.spec)
        if (machine := await self.find(pod.id)) is not None and machine.is_alive:
            return machine, size
        guest = await self._guest_of(str(pod.options.get("kernel", self._config.kernel)))
        async with self.lock(pod.id):
            folder = self.folder(pod.id)
            await asyncio.to_thread(_make_folder, folder)
            taps = [await make_tap(Path(pod.netns_path), 0)] if pod.netns_path else []
            try:
                vm = await self._vmm.start(self._spec(pod, size, guest, taps))
            finally:
                for fd in taps:
                    os.close(fd)
            machine = self._machines[pod.id] = self._follow(pod.id, vm)
        return machine, size

    def _spec(self, pod: PodRef, size: VmSize, guest: GuestImage, taps: Iterable[int]) -> VmSpec:
        return VmSpec(
            id=pod.id,
            guest=guest,
            size=SizeClass(memory_bytes=size.guest_memory_bytes, vcpus=size.vcpus),
            nics=tuple(NicSpec(tap_fd=fd) for fd in taps),
            share=self.folder(pod.id) / "share",
            share_owner=True,
            launch=LaunchSpec(
                leaf=leaf_of(pod, size),
                leaf_limits=LeafLimits(
                    memory_bytes=_monitor_limit(size),
                    cpu_quota_us=size.cpu_quota_us,
                    cpu_period_us=size.cpu_period_us,
                    cpu_weight=size.cpu_weight,
                ),
                netns_path=Path(pod.netns_path) if pod.netns_path else None,
                oom_score_adj=size.oom_score_adj,
            ),
            templates=TemplateScope(
                kind=self._config.templates,
                domain=pod.spec.metadata.namespace if self._config.templates == "namespace" else "",
            ),
        )

    # ----------------------------------------------------------------------------------------------------- taking apart
    async def stop(self, pod_id: PodId) -> None:
        """End all containers, keep how they ended, let the guest write back, and end the machine. Idempotent.

        Raises:
            RuntimeDown: its end is not proven.
        """
        machine = await self.find(pod_id)
        if machine is None:
            if pod_id in self._vmm.machine_ids():
                await self._vmm.remove(pod_id)
            return
        async with self.lock(pod_id):
            if not machine.is_alive:
                return
            machine.is_being_stopped()
            await machine.end_containers(self._config.power_off_s)
            await machine.drain(self._config.drain_s)
            machine.keep_exits()
            await machine.ask_to_power_off(self._config.power_off_s)
            machine.end = await machine.vm.power_off(self._config.power_off_s)

    async def remove(self, pod_id: PodId) -> None:
        """Remove all that was ever made for the pod. Idempotent.

        Raises:
            RuntimeDown: something of it is not proven gone.
        """
        machine = self._machines.get(pod_id)
        async with self.lock(pod_id):
            if machine is not None:
                machine.is_being_stopped()
            await self._vmm.remove(pod_id)
            if machine is not None:
                await machine.aclose()
                self._machines.pop(pod_id, None)
            await asyncio.to_thread(_remove_folder, self.folder(pod_id))
        self._locks.pop(pod_id, None)

    async def aclose(self) -> None:
        """Let go of all machines, which run on."""
        await asyncio.gather(*(machine.aclose() for machine in self._machines.values()), return_exceptions=True)
        self._machines.clear()
        await self._vmm.aclose()


def _monitor_limit(size: VmSize) -> int | None:
    """The limit of a monitor outside its pod's cgroup: what it was granted, and its guest's memory once more. Pure.

    The first clone of a template that writes to a page which no other has touched is charged for two: the page of the
    template's file that its write brings into being, and its own copy. Measured: a guest that fills 120 MiB for the
    first time takes 280 MiB, later ones 170.
    """
    return None if size.charge_limit_bytes is None else size.charge_limit_bytes + size.guest_memory_bytes


def leaf_of(pod: PodRef, size: VmSize) -> Leaf:
    """Where the machine's cgroup is: in the pod's own, or beside it at the node's cost. Pure but for a look."""
    parent = pod.spec.cgroup_parent
    is_systemd = parent.endswith(".slice")
    return find_leaf(parent if size.charge == "pod" else "", pod.id, driver="systemd" if is_systemd else "cgroupfs")


@effect("vm.make_pod_folder")
def _make_folder(folder: Path) -> None:
    (folder / "layers").mkdir(mode=0o700, parents=True, exist_ok=True)


@effect("vm.remove_pod_folder")
def _remove_folder(folder: Path) -> None:
    if folder.exists():
        remove_share(folder / "share")  # first: nothing may be walked into that is not ours
        shutil.rmtree(folder)
