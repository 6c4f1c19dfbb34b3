"""The launcher: a small static C program, compiled on the node, that becomes the machine monitor within its bounds.

The daemon cannot join another cgroup or namespace itself, and Python between fork and exec is neither fast nor safe.
What the launcher is told is a `LaunchPlan`: numbers, and descriptors that the daemon opened. `launcher/launcher.c`
tells the order of work.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import os
import platform
import resource
import shutil
import struct
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path

from dispatcher.api import effect
from dispatcher.errors import NotSupported
from dispatcher_vm_kit.exec import compile_c

KEEP_ID = 0xFFFFFFFF
_MAGIC = 0x314C5644
_OWN_MOUNTS, _OWN_NET, _NO_HUGE_PAGES, _NEED_KVM = 1, 2, 4, 8
_MAX_CGROUPS, _MAX_LIMITS, _MAX_GROUPS, _MAX_KEPT = 16, 8, 4, 32

# What a process needs to act for the owners of the files of a shared folder; nothing of it reaches beyond the folder,
# since a machine with these has a mount namespace in which there is nothing else to write to.
SHARE_CAPABILITIES = 1 << 0 | 1 << 1 | 1 << 2 | 1 << 3 | 1 << 4  # CHOWN, DAC_OVERRIDE, DAC_READ_SEARCH, FOWNER, FSETID


@dataclass(frozen=True, slots=True, kw_only=True)
class LaunchPlan:
    """What the launcher does before it becomes the program. Every descriptor is open here and stays the caller's.

    Attributes:
        lock_fd: a file that gets the pid, and is kept open by the program for its life.
        cgroup_fds: `cgroup.procs` files, open for writing.
        netns_fd: the network namespace to join; None with `own_net` makes an empty one.
        root_fd: an empty folder named "root", on which the program's own file tree is put together: system folders
            read-only, /proc without other users' processes, a private /tmp, and the shared folder as /share.
        share_fd: the folder that becomes /share; mounts made below it on the host later appear there, too.
        uid, gid, groups: the user of the program; None stays who we are.
        capabilities: a mask; what the program keeps as another user than root.
        oom_score_adj: raised to what we have where it may not be lowered.
        limits: `(resource, soft, hard)` as in the resource module.
        kept_fds: what the program finds open, besides 0 to 2, the lock and nothing else.
        kvm: the program may open /dev/kvm.
    """

    lock_fd: int | None = None
    cgroup_fds: tuple[int, ...] = ()
    netns_fd: int | None = None
    own_net: bool = False
    root_fd: int | None = None
    share_fd: int | None = None
    uid: int | None = None
    gid: int | None = None
    groups: tuple[int, ...] = ()
    capabilities: int = 0
    oom_score_adj: int = 0
    limits: tuple[tuple[int, int, int], ...] = ((resource.RLIMIT_CORE, 0, 0),)
    kept_fds: tuple[int, ...] = field(default=())
    kvm: bool = False

    @property
    def fds(self) -> tuple[int, ...]:
        """Every descriptor that the launcher needs to find open."""
        optional = (self.lock_fd, self.netns_fd, self.root_fd, self.share_fd)
        return (*(fd for fd in optional if fd is not None), *self.cgroup_fds, *self.kept_fds)


def pack_plan(plan: LaunchPlan) -> bytes:
    """The plan as the launcher's `struct plan`. Pure.

    Raises:
        ValueError: more of something than the record holds.
    """
    kept = (*plan.kept_fds, *(() if plan.lock_fd is None else (plan.lock_fd,)))
    counts = (len(plan.cgroup_fds), len(plan.limits), len(plan.groups), len(kept))
    if any(
        count > most for count, most in zip(counts, (_MAX_CGROUPS, _MAX_LIMITS, _MAX_GROUPS, _MAX_KEPT), strict=True)
    ):
        raise ValueError("the plan holds more than the launcher's record")
    flags = _NO_HUGE_PAGES | (_OWN_NET if plan.own_net else 0) | (_NEED_KVM if plan.kvm else 0)
    flags |= _OWN_MOUNTS if plan.root_fd is not None else 0
    packed = struct.pack(
        "=2I4i2Ii5IQ",
        *(_MAGIC, flags),
        *(-1 if fd is None else fd for fd in (plan.lock_fd, plan.netns_fd, plan.root_fd, plan.share_fd)),
        *(KEEP_ID if number is None else number for number in (plan.uid, plan.gid)),
        plan.oom_score_adj,
        *counts,
        0,
        plan.capabilities,
    )
    packed += struct.pack(f"={_MAX_CGROUPS}i", *_filled(plan.cgroup_fds, _MAX_CGROUPS))
    packed += struct.pack(f"={_MAX_GROUPS}I", *_filled(plan.groups, _MAX_GROUPS))
    packed += struct.pack(f"={_MAX_KEPT}i", *_filled(kept, _MAX_KEPT))
    for name, soft, hard in (*plan.limits, *((0, 0, 0),) * (_MAX_LIMITS - len(plan.limits))):
        packed += struct.pack("=2I2Q", name, 0, soft & (1 << 64) - 1, hard & (1 << 64) - 1)
    return packed


def _filled(numbers: Sequence[int], size: int) -> tuple[int, ...]:
    return (*numbers, *(0,) * (size - len(numbers)))


@contextlib.contextmanager
def open_plan(plan: LaunchPlan) -> Iterator[int]:
    """A descriptor from which the launcher reads the plan; closed at the end of the block."""
    memory = os.memfd_create("launch-plan", os.MFD_CLOEXEC)
    try:
        os.write(memory, pack_plan(plan))
        yield memory
    finally:
        os.close(memory)


_STATIC = ("-std=gnu11", "-O2", "-static", "-s", "-Wall", "-Wextra", "-Wl,--build-id=none")
_BARE = ("-nostdlib", "-static", "-no-pie", "-s", "-Wl,-Ttext=0x100000,-e,start32,--build-id=none,-z,noexecstack")
_FLAGS = {"launcher": _STATIC, "tsc": _STATIC, "probe": _BARE}


class NodePrograms:
    """The C programs of this kit, compiled once per source and kept in a folder of the node."""

    def __init__(self, folder: Path, *, compilers: tuple[str, ...] = ("cc", "gcc", "musl-gcc")) -> None:
        self._folder = folder
        self._compilers = compilers
        self._lock = asyncio.Lock()

    async def launcher(self) -> Path:
        """The launcher's path, compiling it if needed. Idempotent; concurrent calls share the work.

        Raises:
            NotSupported: no compiler on the node, or it failed; the message says what to install.
        """
        return await self._program("launcher")

    async def tsc(self) -> Path:
        """The path of the program that measures the time stamp counter. As `launcher`."""
        return await self._program("tsc")

    async def probe(self) -> Path:
        """The path of the smallest guest, a kernel that says that it ran. As `launcher`."""
        return await self._program("probe")

    async def _program(self, name: str) -> Path:
        source = files("dispatcher_vm_kit").joinpath("launcher", f"{name}.c").read_text(encoding="utf-8")
        key = hashlib.sha256("\0".join((source, *_FLAGS[name], platform.machine())).encode()).hexdigest()[:24]
        kept = self._folder / f"{name}-{key}"
        async with self._lock:
            if not kept.exists():
                await self._make(name, source, kept)
        return kept

    @effect("vm.make_program")
    async def _make(self, name: str, source: str, kept: Path) -> None:
        compiler = next((found for each in self._compilers if (found := shutil.which(each))), None)
        if compiler is None:
            raise NotSupported(
                f"the VM {name} has to be compiled once, but none of {', '.join(self._compilers)} is installed; "
                "install gcc and libc6-dev",
            )
        self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{name}-", dir=self._folder) as work:
            path = Path(work) / f"{name}.c"
            path.write_text(source, encoding="utf-8")
            await compile_c(compiler, _FLAGS[name], path, Path(work) / name)
            os.replace(Path(work) / name, kept)
