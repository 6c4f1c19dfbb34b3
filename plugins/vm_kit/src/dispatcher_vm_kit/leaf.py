"""The cgroup in which a machine monitor lives: `<cgroup_parent>/cri-<id>`, made, limited and removed here.

Theory of operation. With the driver "cgroupfs" the leaf is a folder in every hierarchy (version 1) or in the one tree
(version 2); the launcher joins it before it becomes the monitor, so that all of the machine's memory is charged there.
With "systemd" the leaf is a transient scope with delegation below the pod's slice: systemd-run makes it, joins it and
then becomes the launcher, so that the pid is the same from the start. The pod's cgroup belongs to the kubelet: nothing
is written there but, on version 2, which controllers its children have. Only what was made here is removed.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from dispatcher.api import CgroupFolders, effect, expand_cgroup_parent
from dispatcher.errors import InvalidRequest, RuntimeDown
from dispatcher_vm_kit.exec import run_tool

ROOT = Path("/sys/fs/cgroup")
_OWN_SLICE = "system.slice"
OWN_PARENT = "/cri-dispatcher"  # where pods without a parent go; ours, so it goes when it is empty
_WANTED_V1 = ("cpu", "cpuacct", "cpuset", "memory", "pids", "blkio", "devices", "freezer", "hugetlb", "perf_event")
_WANTED_V2 = ("cpu", "cpuset", "memory", "pids", "io")
_ID = re.compile(r"[0-9a-f]{8,64}")
_PART = re.compile(r"[A-Za-z0-9_.:@-]{1,255}")
_REMOVE_S = 5.0
_TOOL_S = 15.0

Driver = Literal["cgroupfs", "systemd"]


@dataclass(frozen=True, slots=True, kw_only=True)
class LeafLimits:
    """Bounds of a leaf; None leaves the kernel's default. `cpu_weight` is version 2's 1 to 10000 (100 is normal)."""

    memory_bytes: int | None = None
    cpu_quota_us: int | None = None
    cpu_period_us: int = 100_000
    cpu_weight: int | None = None
    pids: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Leaf:
    """Where a leaf is. `cgroup` is for reading it: `dispatcher.api.read_usage(leaf.cgroup)`."""

    name: str
    parent: str
    driver: Driver
    cgroup: CgroupFolders

    @property
    def folders(self) -> tuple[tuple[str, Path], ...]:
        """The folders by controller on version 1, and the one folder, under "", on version 2."""
        unified = self.cgroup.unified
        if self.cgroup.version == 2 and unified is not None:
            return (("", unified),)
        return tuple(self.cgroup.paths.items())

    def exists(self) -> bool:
        """Whether anything of it is there."""
        return any(folder.exists() for _, folder in self.folders)


def find_leaf(parent: str, machine_id: str, *, driver: Driver = "cgroupfs", root: Path = ROOT) -> Leaf:
    """Say where the leaf of a machine is, whether or not it exists. Reads only which hierarchies there are.

    Args:
        parent: the pod's `cgroup_parent` as the kubelet wrote it; "" for a parent of our own.
        machine_id: our id of the pod.
        driver: how the kubelet names cgroups.
        root: where the cgroup file systems are mounted.

    Raises:
        InvalidRequest: the parent cannot be one.
    """
    if not _ID.fullmatch(machine_id):
        raise InvalidRequest(f"{machine_id!r} is not an id of ours")
    name = f"cri-{machine_id}" if driver == "cgroupfs" else f"cri-{machine_id}.scope"
    above = expand_cgroup_parent(parent or (OWN_PARENT if driver == "cgroupfs" else _OWN_SLICE))
    if above is None or not all(_PART.fullmatch(part) for part in above.parts):
        raise InvalidRequest(f"{parent!r} is not a cgroup that a pod can have")
    if driver == "systemd" and not above.name.endswith(".slice"):
        raise InvalidRequest(f"{parent!r} is not the name of a systemd slice")
    relative = above / name
    if (root / "cgroup.controllers").exists():
        where = CgroupFolders(version=2, paths={}, unified=root / relative, name=f"/{relative}")
    else:
        wanted = [each for each in _WANTED_V1 if (root / each / "cgroup.procs").exists()]
        paths = {each: root / each / relative for each in wanted}
        where = CgroupFolders(version=1, paths=paths, unified=None, name=f"/{relative}")
    return Leaf(name=name, parent=parent, driver=driver, cgroup=where)


@effect("vm.make_leaf")
def make_leaf(leaf: Leaf, limits: LeafLimits) -> None:
    """Make the leaf's folders with their limits. Idempotent. With systemd nothing is made yet: `scope_argv` does it.

    Raises:
        RuntimeDown: the kernel refused; the cause says what.
    """
    if leaf.driver == "systemd":
        return
    try:
        for controller, folder in _distinct(leaf):
            folder.mkdir(parents=True, exist_ok=True)
            if controller == "cpuset":
                _inherit_cpuset(folder)
        if leaf.cgroup.version == 2:
            _enable_controllers(leaf.folders[0][1].parent)
        _write_limits(leaf, limits)
    except OSError as error:
        raise RuntimeDown(f"the cgroup {leaf.name} below {leaf.parent or OWN_PARENT} cannot be made") from error


def _distinct(leaf: Leaf) -> Iterator[tuple[str, Path]]:
    """Every folder once: controllers may be mounted together, under several names."""
    seen = set()
    for controller, folder in leaf.folders:
        real = folder.resolve()
        if real not in seen:
            seen.add(real)
            yield controller, folder


def _inherit_cpuset(folder: Path) -> None:
    """A new cpuset of version 1 is empty and takes no process; it gets what the nearest ancestor with a value has."""
    for name in ("cpuset.cpus", "cpuset.mems"):
        missing = []
        place = folder
        while (place / name).exists() and not (place / name).read_text(encoding="ascii").strip():
            missing.append(place)
            place = place.parent
        if not missing or not (place / name).exists():
            continue
        value = (place / name).read_text(encoding="ascii").strip()
        for empty in reversed(missing):
            _write(empty / name, value)


def _enable_controllers(parent: Path) -> None:
    have = set((parent / "cgroup.controllers").read_text(encoding="ascii").split())
    passed_on = set((parent / "cgroup.subtree_control").read_text(encoding="ascii").split())
    for controller in _WANTED_V2:
        if controller in have - passed_on:
            _write(parent / "cgroup.subtree_control", f"+{controller}")


@effect("vm.limit_leaf")
async def set_limits(leaf: Leaf, limits: LeafLimits) -> None:
    """Change the limits of a leaf that exists. Idempotent.

    Raises:
        RuntimeDown: the kernel or systemd refused.
    """
    if leaf.driver == "systemd":
        await _systemctl("set-property", "--runtime", leaf.name, *scope_properties(limits))
        return
    try:
        _write_limits(leaf, limits)
    except OSError as error:
        raise RuntimeDown(f"the limits of the cgroup {leaf.name} cannot be set") from error


def _write_limits(leaf: Leaf, limits: LeafLimits) -> None:
    for controller, name, value in _settings(leaf.cgroup.version, limits):
        folder = leaf.cgroup.folder(controller)
        if folder is not None and (folder / name).exists():
            _write(folder / name, value)


def _settings(version: int, limits: LeafLimits) -> Iterator[tuple[str, str, str]]:
    """(controller, file, value) of what is limited, in the order of writing. Pure."""
    memory, quota, weight, pids = limits.memory_bytes, limits.cpu_quota_us, limits.cpu_weight, limits.pids
    if version == 2:
        yield from [("memory", "memory.max", str(memory))] if memory is not None else []
        yield from [("cpu", "cpu.max", f"{quota} {limits.cpu_period_us}")] if quota is not None else []
        yield from [("cpu", "cpu.weight", str(weight))] if weight is not None else []
    else:
        yield from [("memory", "memory.limit_in_bytes", str(memory))] if memory is not None else []
        if quota is not None:
            yield "cpu", "cpu.cfs_period_us", str(limits.cpu_period_us)
            yield "cpu", "cpu.cfs_quota_us", str(quota)
        if weight is not None:
            yield "cpu", "cpu.shares", str(max(2, round((weight - 1) * 262142 / 9999) + 2))
    if pids is not None:
        yield "pids", "pids.max", str(pids)


def _write(path: Path, value: str) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
    try:
        os.write(descriptor, value.encode("ascii"))
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def open_for_joining(leaf: Leaf) -> Iterator[tuple[int, ...]]:
    """The `cgroup.procs` files that the launcher writes itself into; closed at the end. Empty with systemd."""
    with contextlib.ExitStack() as stack:
        descriptors = []
        for _, folder in _distinct(leaf) if leaf.driver == "cgroupfs" else ():
            descriptor = os.open(folder / "cgroup.procs", os.O_WRONLY | os.O_CLOEXEC)
            stack.callback(os.close, descriptor)
            descriptors.append(descriptor)
        yield tuple(descriptors)


def scope_argv(leaf: Leaf, limits: LeafLimits) -> list[str]:
    """The words before the launcher's own that put it into the leaf: systemd-run's, or none. Pure."""
    if leaf.driver != "systemd":
        return []
    argv = ["systemd-run", "--scope", "--quiet", "--collect", f"--unit={leaf.name}"]
    argv += [f"--slice={leaf.parent.rpartition('/')[2] or _OWN_SLICE}", "--property=Delegate=yes"]
    return [*argv, *(f"--property={each}" for each in scope_properties(limits)), "--"]


def scope_properties(limits: LeafLimits) -> list[str]:
    """The limits as properties of a scope. Pure."""
    properties = []
    if limits.memory_bytes is not None:
        properties.append(f"MemoryMax={limits.memory_bytes if limits.memory_bytes >= 0 else 'infinity'}")
    if limits.cpu_quota_us is not None and limits.cpu_quota_us > 0:
        properties.append(f"CPUQuota={limits.cpu_quota_us * 100 / limits.cpu_period_us:.2f}%")
    if limits.cpu_weight is not None:
        properties.append(f"CPUWeight={limits.cpu_weight}")
    if limits.pids is not None:
        properties.append(f"TasksMax={limits.pids}")
    return properties


@effect("vm.join_leaf")
def move_into(leaf: Leaf, pid: int) -> None:
    """Move a process that runs already, such as a warm spare. What it used before stays charged where it was.

    Raises:
        RuntimeDown: the kernel refused, or the process is gone.
    """
    try:
        for _, folder in _distinct(leaf):
            _write(folder / "cgroup.procs", str(pid))
    except OSError as error:
        raise RuntimeDown(f"process {pid} cannot be moved into the cgroup {leaf.name}") from error


@effect("vm.remove_leaf")
async def remove_leaf(leaf: Leaf) -> None:
    """Remove the leaf once its processes are gone. Idempotent. A parent of our own goes when it is empty.

    Raises:
        RuntimeDown: something still runs in it.
    """
    if leaf.driver == "systemd" and leaf.exists():
        await _systemctl("stop", leaf.name)
    deadline = time.monotonic() + _REMOVE_S
    for _, folder in leaf.folders:
        while not _remove_folder(folder):
            if time.monotonic() > deadline:
                raise RuntimeDown(f"the cgroup {folder} still has processes")
            await asyncio.sleep(0.01)  # a dying process leaves its cgroup after its pidfd became readable
        if leaf.driver == "cgroupfs" and not leaf.parent:
            with contextlib.suppress(OSError):
                folder.parent.rmdir()


def _remove_folder(folder: Path) -> bool:
    try:
        folder.rmdir()
    except FileNotFoundError:
        return True
    except OSError as error:
        if error.errno == errno.EBUSY:
            return False
        raise
    return True


async def _systemctl(*words: str) -> None:
    try:
        output = await run_tool(["systemctl", *words], timeout_s=_TOOL_S)
    except (OSError, TimeoutError) as error:
        raise RuntimeDown(f"systemctl {words[0]} did not answer") from error
    if output.exit_code != 0:
        raise RuntimeDown(f"systemctl {words[0]} failed: {output.stderr.decode('utf-8', 'replace').strip()[-300:]}")
