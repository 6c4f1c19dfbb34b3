"""A machine that QEMU runs: its disks, memory, CPUs and end."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import signal
import stat
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import Any

from dispatcher.api import effect, read_usage
from dispatcher.errors import InvalidRequest, OutOfResources, RuntimeDown
from dispatcher_hyper_vm.drivers import Disk, VmEnd, VmState
from dispatcher_hyper_vm.drivers.folder import MachineFolder
from dispatcher_vm_kit.exec import Child
from dispatcher_vm_kit.leaf import Leaf
from dispatcher_vm_kit.process import send_signal, wait_ended
from dispatcher_vm_kit.qemu_argv import FIRST_FREE_SET, SCSI_BUS
from dispatcher_vm_kit.qmp_client import Qmp, QmpRefused

_SERIAL = re.compile(r"[a-z0-9][a-z0-9-]{0,35}")
_TARGETS = 255
_DISK = "disk-"
_UNPLUG_S = 10.0
_QUIT_S = 5.0
_ENDED_BY = {"guest-shutdown": "PoweredOff", "guest-reset": "GuestPanic", "guest-panic": "GuestPanic"}


class RunningQemu:
    """See `drivers.RunningVm`. Made by the driver, with an open pidfd that this object closes."""

    def __init__(
        self,
        folder: MachineFolder,
        facts: Mapping[str, Any],
        *,
        qmp: Qmp,
        handle: int,
        leaf: Leaf | None,
        child: Child | None,
    ) -> None:
        self._folder = folder
        self._facts = dict(facts)
        self._qmp = qmp
        self._handle = handle
        self._leaf = leaf
        self._child = child
        self._slots = asyncio.Lock()
        self._stopping = False
        self._watch = asyncio.create_task(self._watch_end(), name=f"machine {folder.id[:12]}")

    @property
    def id(self) -> str:
        return self._folder.id

    @property
    def facts(self) -> Mapping[str, Any]:
        return self._facts

    @property
    def agent_socket(self) -> Path:
        return self._folder.agent

    @property
    def console_log(self) -> Path:
        return self._folder.console_log

    @property
    def console_socket(self) -> Path:
        return self._folder.console

    @property
    def leaf(self) -> Leaf | None:
        return self._leaf

    # ------------------------------------------------------------------------------------------------------------ disks
    @effect("hyper_vm.attach_disk")
    async def attach_disk(self, disk: Disk) -> None:
        if not _SERIAL.fullmatch(disk.serial):
            raise InvalidRequest(f"{disk.serial!r} is not a disk's serial")
        async with self._slots:
            plugged = await self._plugged()
            if disk.serial in plugged:
                return
            taken = set(plugged.values())
            target = next((number for number in range(_TARGETS) if number not in taken), None)
            if target is None:
                raise OutOfResources(f"the machine has no room for another disk, it has {_TARGETS}")
            async with self._refusals():
                await self._plug(disk, target)

    async def _plug(self, disk: Disk, target: int) -> None:
        try:
            descriptor = os.open(disk.path, (os.O_RDONLY if disk.read_only else os.O_RDWR) | os.O_CLOEXEC)
        except OSError as error:
            raise RuntimeDown(f"the disk {disk.path} cannot be opened: {error.strerror}") from error
        node, number = f"node{target}", FIRST_FREE_SET + target
        try:
            kind = os.fstat(descriptor).st_mode
            if not (stat.S_ISREG(kind) or stat.S_ISBLK(kind)):
                raise InvalidRequest(f"{disk.path} is neither a file nor a block device")
            await self._drop_node(node)  # of an unplugging that was cut short
            await self._qmp.give_to_set(descriptor, number)
        finally:
            os.close(descriptor)
        file = {
            "driver": "host_device" if stat.S_ISBLK(kind) else "file",
            "filename": f"/dev/fdset/{number}",
            "locking": "off",  # one image for many machines; writable ones have one owner, and that is us
        }
        options = {"driver": "raw", "node-name": node, "read-only": disk.read_only, "discard": "unmap", "file": file}
        try:
            await self._qmp.execute("blockdev-add", options)
        finally:
            # QEMU keeps what it opened; the set itself would keep it open for ever.
            await self._qmp.execute("remove-fd", {"fdset-id": number})
        device: dict[str, Any] = {"driver": "scsi-hd", "id": _DISK + disk.serial, "drive": node, "bus": SCSI_BUS}
        device |= {"channel": 0, "scsi-id": target, "lun": 0, "share-rw": True, "serial": disk.serial}
        try:
            await self._qmp.execute("device_add", device)
        except QmpRefused:
            await self._drop_node(node)
            raise

    @effect("hyper_vm.detach_disk")
    async def detach_disk(self, serial: str) -> None:
        async with self._slots, self._refusals():
            target = (await self._plugged()).get(serial)
            if target is None:
                return
            async with self._qmp.expect_deleted(_DISK + serial) as gone:
                await self._qmp.execute("device_del", {"id": _DISK + serial})
                try:
                    async with asyncio.timeout(_UNPLUG_S):
                        await gone.wait()
                except TimeoutError as error:
                    raise RuntimeDown(f"the guest did not let go of the disk {serial}") from error
            await self._drop_node(f"node{target}")

    async def _drop_node(self, node: str) -> None:
        nodes = await self._qmp.execute("query-named-block-nodes", {"flat": True})
        if any(each.get("node-name") == node for each in nodes):
            await self._qmp.execute("blockdev-del", {"node-name": node})

    async def disks(self) -> tuple[str, ...]:
        async with self._slots, self._refusals():
            return tuple(sorted(await self._plugged()))

    async def _plugged(self) -> dict[str, int]:
        """Serials and their target numbers, as QEMU has them: the truth also after an adoption."""
        devices = await self._qmp.execute("qom-list", {"path": "/machine/peripheral"})
        serials = [name.removeprefix(_DISK) for d in devices if (name := str(d.get("name"))).startswith(_DISK)]
        return {serial: await self._target(serial) for serial in serials}

    async def _target(self, serial: str) -> int:
        where = {"path": f"/machine/peripheral/{_DISK}{serial}", "property": "scsi-id"}
        return int(await self._qmp.execute("qom-get", where))

    # ----------------------------------------------------------------------------------------------- memory and the CPUs
    @effect("hyper_vm.balloon")
    async def set_balloon(self, target_bytes: int) -> None:
        async with self._refusals():
            await self._qmp.execute("balloon", {"value": min(target_bytes, int(self._facts["memory_bytes"]))})

    async def balloon_bytes(self) -> int:
        async with self._refusals():
            return int((await self._qmp.execute("query-balloon"))["actual"])

    async def state(self) -> VmState:
        async with self._refusals():
            answer = await self._qmp.execute("query-status")
        return VmState.RUNNING if answer.get("running") else VmState.PAUSED

    async def pause(self) -> None:
        async with self._refusals():
            await self._qmp.execute("stop")

    async def resume(self) -> None:
        async with self._refusals():
            await self._qmp.execute("cont")

    @contextlib.asynccontextmanager
    async def _refusals(self) -> AsyncIterator[None]:
        """What QEMU refuses becomes an error that a runtime knows."""
        try:
            yield
        except QmpRefused as error:
            raise RuntimeDown(f"the machine {self.id[:12]} refuses: {error}") from error
        except (KeyError, TypeError, ValueError) as error:
            raise RuntimeDown(f"the monitor of the machine {self.id[:12]} answered nonsense") from error

    # ---------------------------------------------------------------------------------------------------------- the end
    async def wait(self) -> VmEnd:
        return await asyncio.shield(self._watch)

    async def power_off(self, grace_s: float) -> VmEnd:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(grace_s):
                return await self.wait()
        self._stopping = True
        # Asked to quit, QEMU writes out what it holds of the disks.
        with contextlib.suppress(RuntimeDown, QmpRefused, TimeoutError):
            async with asyncio.timeout(_QUIT_S):
                await self._qmp.execute("quit")
                return await self.wait()
        return await self.kill()

    @effect("hyper_vm.kill")
    async def kill(self) -> VmEnd:
        self._stopping = True
        if not self._watch.done():
            send_signal(self._handle, signal.SIGKILL)
        return await self.wait()

    async def _watch_end(self) -> VmEnd:
        try:
            await wait_ended(self._handle)
        finally:
            os.close(self._handle)
        code = self._child.reap() if self._child is not None else None
        await self._qmp.aclose()
        return self._explain(code)

    def _explain(self, code: int | None) -> VmEnd:
        """Why it ended, from what QEMU said last, its status where it was our child, and its cgroup."""
        usage = read_usage(self._leaf.cgroup, detailed=True) if self._leaf is not None else None
        if self._stopping or self._qmp.ended_by.startswith("host-qmp"):
            return VmEnd(reason="Stopped", exit_code=code)
        if reason := _ENDED_BY.get(self._qmp.ended_by):
            return VmEnd(reason=reason, message=f"the guest ended by {self._qmp.ended_by}", exit_code=code)
        if usage is not None and usage.oom_kills:
            return VmEnd(
                reason="OutOfMemory", message="the host killed the monitor: its cgroup is full", exit_code=code
            )
        if code is not None and code < 0:
            return VmEnd(reason="Killed", message=f"the monitor died of signal {-code}", exit_code=code)
        words = self._folder.last_words()
        return VmEnd(reason="Failed" if code or words else "Killed", message=words, exit_code=code)

    async def aclose(self) -> None:
        """Let go. `wait` raises CancelledError from then on, unless the end was seen before."""
        if not self._watch.done():
            self._watch.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._watch
            await self._qmp.aclose()
