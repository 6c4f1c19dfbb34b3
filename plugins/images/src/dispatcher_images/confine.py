"""How the worker process gives up power before it looks at an image: limits, capabilities, root folder.

Standard library only. Linux only. Each function raises OSError where the kernel refuses: the worker then ends, it
never goes on with more power than it should have.
"""

from __future__ import annotations

import ctypes
import os
import resource
import signal
import struct

from dispatcher_images.hostile import Limits

_PR_SET_PDEATHSIG = 1
_PR_CAPBSET_READ = 23
_PR_CAPBSET_DROP = 24
_PR_SET_NO_NEW_PRIVS = 38
_PR_CAP_AMBIENT = 47
_PR_CAP_AMBIENT_CLEAR_ALL = 4
_CAPABILITY_VERSION_3 = 0x20080522

CHOWN, DAC_OVERRIDE, DAC_READ_SEARCH, FOWNER, FSETID, SETFCAP = 0, 1, 2, 3, 4, 31
# What making a root file system takes: owners, modes, set-id bits and file capabilities. Not: device nodes, mounts.
UNPACK_CAPABILITIES = frozenset({CHOWN, DAC_OVERRIDE, FOWNER, FSETID, SETFCAP})


def die_with_parent(parent_pid: int) -> None:
    """Be killed when the daemon dies. `parent_pid` closes the race with a parent that is dead already."""
    _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent_pid:
        raise SystemExit(1)


def limit_resources(limits: Limits) -> None:
    """Bound memory, file size, CPU time and open files; no core dumps."""
    for which, value in (
        (resource.RLIMIT_AS, limits.max_memory_bytes),
        (resource.RLIMIT_FSIZE, limits.max_file_bytes),
        (resource.RLIMIT_CPU, limits.max_cpu_s),
        (resource.RLIMIT_NOFILE, 1024),
        (resource.RLIMIT_CORE, 0),
    ):
        _, hard = resource.getrlimit(which)
        bound = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(which, (bound, bound))


def enter_root(folder: str) -> None:
    """Make `folder` the root and the working folder of this process."""
    os.chdir(folder)
    os.chroot(".")
    os.chdir("/")
    os.umask(0o022)


def keep_capabilities(kept: frozenset[int]) -> None:
    """Drop every capability but these, also for programs that are started later."""
    _prctl(_PR_SET_NO_NEW_PRIVS, 1)
    number = 0
    while _LIBC.prctl(_PR_CAPBSET_READ, number, 0, 0, 0) >= 0:
        if number not in kept:
            _prctl(_PR_CAPBSET_DROP, number)
        number += 1
    ctypes.set_errno(0)
    _prctl(_PR_CAP_AMBIENT, _PR_CAP_AMBIENT_CLEAR_ALL)
    mask = sum(1 << capability for capability in kept)
    low, high = mask & 0xFFFFFFFF, mask >> 32
    header = struct.pack("=Ii", _CAPABILITY_VERSION_3, 0)
    sets = struct.pack("=6I", low, low, 0, high, high, 0)
    if _LIBC.capset(ctypes.c_char_p(header), ctypes.c_char_p(sets)) != 0:
        _raise_errno()


def sync_file_system(folder: str) -> None:
    """Write out the file system that holds `folder`, so that a finished tree survives a power cut."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        if _LIBC.syncfs(fd) != 0:
            _raise_errno()
    finally:
        os.close(fd)


_LIBC = ctypes.CDLL(None, use_errno=True)


def _prctl(option: int, value: int) -> None:
    if _LIBC.prctl(option, value, 0, 0, 0) != 0:
        _raise_errno()


def _raise_errno() -> None:
    code = ctypes.get_errno()
    raise OSError(code, os.strerror(code))
