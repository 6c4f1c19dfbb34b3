"""The file systems that writable layers are on: their size, and the names of devices."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True, kw_only=True)
class Filesystem:
    """A mounted file system. `device` is its source, such as /dev/sda1."""

    device: str
    size_bytes: int
    inodes: int
    inodes_free: int


def read_filesystems(mountpoints: Iterable[str]) -> dict[str, Filesystem]:
    """Measure the file systems that these folders are on. Blocks: call it in a thread. What is gone is left out."""
    found = {}
    for mountpoint in mountpoints:
        try:
            number = os.stat(mountpoint).st_dev
            size = os.statvfs(mountpoint)
        except OSError:
            continue
        found[mountpoint] = Filesystem(
            device=_source_of(number),
            size_bytes=size.f_blocks * size.f_frsize,
            inodes=size.f_files,
            inodes_free=size.f_ffree,
        )
    return found


def device_name(major: int, minor: int) -> str:
    """The path of a block device, by the kernel's numbers; the numbers themselves where it has no name."""
    try:
        for line in Path(f"/sys/dev/block/{major}:{minor}/uevent").read_text(encoding="utf-8").splitlines():
            if line.startswith("DEVNAME="):
                return f"/dev/{line.removeprefix('DEVNAME=')}"
    except OSError:
        pass
    return f"{major}:{minor}"


def _source_of(number: int) -> str:
    """What a file system was mounted from. Without a block device, its type stands for it."""
    wanted = f"{os.major(number)}:{os.minor(number)}"
    try:
        lines = Path("/proc/self/mountinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return wanted
    for line in lines:
        fields, _, rest = line.partition(" - ")
        if fields.split(" ", 3)[2] == wanted:
            kind, source, *_ = rest.split(" ")
            return source if source.startswith("/") else kind
    return wanted
