"""The processes of a cgroup: how many, and how many files and sockets they have open.

Costly (a link is read per open file), so it is for metrics only, and bounded: a cgroup's processes are hostile, and may
have opened millions of files. Counting stops at `LIMIT` files per cgroup, and then says the limit.
"""

from __future__ import annotations

import contextlib
import os
import resource
from dataclasses import replace
from pathlib import Path

from dispatcher.cgroups.folders import CgroupFolders
from dispatcher.model import Usage

LIMIT = 20_000
_CHUNK = 1 << 16
_AT_MOST = 1 << 20  # bytes of a list of pids: some 150,000 of them


def read_processes(where: CgroupFolders, usage: Usage, *, first_pid: int = 0) -> Usage:
    """Return `usage` with the figures on processes. Blocks: call it in a thread.

    `first_pid` is the process whose limit on open files is told; 0 takes the first that is found.
    """
    pids = list_pids(where)
    files = sockets = 0
    for pid in pids:
        if files >= LIMIT:
            break
        more_files, more_sockets = _count_files(pid, LIMIT - files)
        files += more_files
        sockets += more_sockets
    return replace(
        usage,
        process_count=len(pids),
        file_descriptors=files,
        sockets=sockets,
        soft_file_limit=_soft_limit(first_pid or (pids[0] if pids else 0)),
    )


def list_pids(where: CgroupFolders) -> list[int]:
    """All processes of a cgroup and of those below it."""
    folder = next((f for name in ("pids", "memory", "cpu") if (f := where.folder(name)) is not None), None)
    if folder is None:
        return []
    pids: set[int] = set()
    for root, _, _ in os.walk(folder):
        pids.update(_pids_of(Path(root, "cgroup.procs")))
    return sorted(pids)


def _pids_of(path: Path) -> list[int]:
    pieces = bytearray()
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return []
    try:
        while len(pieces) < _AT_MOST and (piece := os.read(fd, _CHUNK)):
            pieces += piece
    except OSError:
        return []
    finally:
        os.close(fd)
    return [int(word) for word in pieces.split() if word.isdigit()]


def _count_files(pid: int, at_most: int) -> tuple[int, int]:
    files = sockets = 0
    with contextlib.suppress(OSError), os.scandir(f"/proc/{pid}/fd") as entries:
        for entry in entries:
            files += 1
            with contextlib.suppress(OSError):
                sockets += os.readlink(entry.path).startswith("socket:")
            if files >= at_most:
                break
    return files, sockets


def _soft_limit(pid: int) -> int | None:
    if not pid:
        return None
    try:
        return resource.prlimit(pid, resource.RLIMIT_NOFILE)[0]
    except (OSError, ValueError):
        return None
