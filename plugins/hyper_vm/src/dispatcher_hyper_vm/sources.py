"""Bringing the sources of a container's mounts into its pod's guest, and keeping copied files up to date.

Each source is brought once per machine, whoever asks first; bringing one again changes nothing, so a restarted daemon
asks again for what the containers on record need. The ways are told in `mounts`.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from dispatcher.api import ContainerRef, ImageProvider
from dispatcher.api.containers import pod_files
from dispatcher.errors import DispatcherError, InvalidRequest
from dispatcher.model import ImageId, Mount
from dispatcher_hyper_vm.agent.values import GuestFile, Owner
from dispatcher_hyper_vm.config import MIB, Config
from dispatcher_hyper_vm.disks import Disks
from dispatcher_hyper_vm.drivers import Disk
from dispatcher_hyper_vm.host_paths import HostFile, TooLargeError, fingerprint, look, read_files
from dispatcher_hyper_vm.machine import Machine, Report
from dispatcher_hyper_vm.mounts import HostPath, Kind, PlannedMount, Way, plan_mount
from dispatcher_hyper_vm.shares import bind_share

log = logging.getLogger(__name__)

_REPORT_PATH = "io.kubernetes.container.terminationMessagePath"  # an annotation of the kubelet's own
_EMPTY_DIR_IMAGE = ".cri-dispatcher.ext4"
SHARE_TAG = "share"


@dataclass(slots=True)
class _Copied:
    """A source whose files were copied: where from, and what they looked like."""

    host: HostPath
    seen: tuple[object, ...]


def image_serial(image_id: str) -> str:
    """The serial of an image's disk."""
    return f"i-{image_id.removeprefix('sha256:')[:32]}"


class Sources:
    """Sources of all machines. One task keeps copied files up to date."""

    def __init__(self, config: Config, images: ImageProvider, disks: Disks) -> None:
        self._config = config
        self._images = images
        self._disks = disks
        self._copied: dict[tuple[str, str], _Copied] = {}
        self._machines: dict[str, Machine] = {}
        self._brought: dict[str, set[str]] = {}
        self._locks: dict[str, asyncio.Lock] = {}

    async def plan(self, container: ContainerRef) -> tuple[PlannedMount, ...]:
        """Look at the host and decide how each mount reaches the guest; the pod's own files included.

        Raises:
            InvalidRequest, NotSupported: see `mounts.plan_mount`.
        """
        return await asyncio.to_thread(self._plan, container)

    def _plan(self, container: ContainerRef) -> tuple[PlannedMount, ...]:
        mounts = list(container.spec.mounts)
        own = {mount.container_path.rstrip("/") for mount in mounts}
        mounts += [
            Mount(container_path=target, host_path=source)
            for target, source in pod_files(container).items()
            if target not in own
        ]
        report = container.spec.annotations.get(_REPORT_PATH, "")
        planned = []
        for mount in mounts:
            found = None
            if mount.image is None:
                if not mount.host_path.startswith("/"):
                    raise InvalidRequest(f"host path {mount.host_path!r} is not absolute")
                found = look(mount.host_path)
            planned.append(plan_mount(mount, found, report_path=report, allow_share=self._config.host_folders == "9p"))
        return tuple(planned)

    async def bring(self, machine: Machine, container: ContainerRef, planned: Sequence[PlannedMount]) -> None:
        """Bring what is not in the guest yet.

        Raises:
            RuntimeDown, OutOfResources, InvalidRequest: a source could not be brought; what was brought stays.
        """
        self._machines[machine.id] = machine
        async with self._locks.setdefault(machine.id, asyncio.Lock()):
            brought = self._brought.setdefault(machine.id, set())
            for mount in planned:
                if mount.name not in brought:
                    await self._bring(machine, container, mount)
                    if mount.way is not Way.REPORT:
                        brought.add(mount.name)

    async def _bring(self, machine: Machine, container: ContainerRef, mount: PlannedMount) -> None:
        agent = machine.agent
        if mount.way is Way.IMAGE:
            image_id = ImageId(mount.image_id)
            path = await self._images.erofs(image_id)
            serial = image_serial(image_id)
            await machine.vm.attach_disk(Disk(serial=serial, path=path, read_only=True))
            await agent.mount_disk(mount.name, serial, filesystem="erofs", read_only=True)
            return
        assert mount.host is not None
        host = mount.host
        if mount.way is Way.FILES:
            await self._copy(machine, mount.name, host)
        elif mount.way is Way.REPORT:
            machine.remember(container.id, report=Report(name=mount.name, host_path=host.path))
            await agent.write_files(mount.name, [GuestFile(path="file", mode=0o666)])
        elif mount.way is Way.MEMORY:
            await agent.mount_tmpfs(
                mount.name, size_bytes=host.memory_bytes, mode=host.mode, uid=host.uid, gid=host.gid
            )
        elif mount.way is Way.EMPTY_DIR:
            await self._bring_empty_dir(machine, mount.name, host)
        else:
            await asyncio.to_thread(bind_share, machine.folder / "share", mount.name, host.path, follows=mount.slave)
            await agent.mount_share(SHARE_TAG)

    async def _bring_empty_dir(self, machine: Machine, name: str, host: HostPath) -> None:
        image = Path(host.path) / _EMPTY_DIR_IMAGE
        await self._disks.make(image, self._config.empty_dir_mib * MIB)
        serial = f"v-{name.rpartition('-')[2]}"
        await machine.vm.attach_disk(Disk(serial=serial, path=image, read_only=False))
        owner = Owner(mode=host.mode, uid=host.uid, gid=host.gid)
        await machine.agent.mount_disk(name, serial, owner=owner)

    async def _copy(self, machine: Machine, name: str, host: HostPath) -> None:
        seen = await asyncio.to_thread(fingerprint, host.path)
        try:
            files = await asyncio.to_thread(read_files, host.path)
        except (TooLargeError, OSError) as error:
            raise InvalidRequest(f"host path {host.path!r} cannot be read: {error}") from error
        is_folder = host.kind is Kind.FOLDER
        await machine.agent.write_files(name, [_guest_file(file) for file in files], atomic=is_folder)
        self._copied[machine.id, name] = _Copied(host, seen)

    async def adopt(self, machine: Machine, container: ContainerRef) -> None:
        """After a restart of the daemon: know again what this container's mounts need, so that it stays up to date."""
        try:
            for mount in await self.plan(container):
                assert mount.host is not None or mount.way is Way.IMAGE
                if mount.way is Way.FILES and mount.host is not None:
                    self._machines[machine.id] = machine
                    self._copied.setdefault((machine.id, mount.name), _Copied(mount.host, ()))
                elif mount.way is Way.REPORT and mount.host is not None:
                    machine.remember(container.id, report=Report(name=mount.name, host_path=mount.host.path))
        except DispatcherError as error:
            log.info("mounts are not followed", extra={"container_id": container.id, "cause": error.message})

    def forget(self, machine_id: str) -> None:
        """The machine is gone."""
        self._machines.pop(machine_id, None)
        self._brought.pop(machine_id, None)
        self._locks.pop(machine_id, None)
        for key in [key for key in self._copied if key[0] == machine_id]:
            del self._copied[key]

    async def keep_up_to_date(self) -> None:
        """Copy again what changed on the host, for ever. A guest that does not answer is tried again later."""
        while True:
            await asyncio.sleep(self._config.sync_s)
            for key, copied in list(self._copied.items()):
                machine = self._machines.get(key[0])
                if machine is None or not machine.is_alive:
                    continue
                seen = fingerprint(copied.host.path)
                if seen in ((), copied.seen):
                    continue
                try:
                    async with machine.deadline():
                        await self._copy(machine, key[1], copied.host)
                except (DispatcherError, TimeoutError) as error:
                    log.info("files are not up to date", extra={"pod_id": key[0], "cause": str(error)})


def _guest_file(file: HostFile) -> GuestFile:
    return GuestFile(path=file.path or "file", data=file.data, mode=file.mode, uid=file.uid, gid=file.gid)
