"""An initramfs in the "newc" format, whose bytes depend on nothing but its contents."""

from __future__ import annotations

import stat
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """A file, folder or device. `mode` has the type, as stat(2) has it."""

    path: str
    mode: int
    data: bytes = b""
    device: tuple[int, int] = (0, 0)


def folder(path: str) -> Entry:
    """A folder that all may enter."""
    return Entry(path=path, mode=stat.S_IFDIR | 0o755)


def make_initramfs(entries: Sequence[Entry]) -> bytes:
    """Return the archive, uncompressed: a guest's kernel takes longer to unpack it than to copy it."""
    out = bytearray()
    for number, entry in enumerate((*entries, Entry(path="TRAILER!!!", mode=0)), 1):
        name = entry.path.encode() + b"\0"
        fields = (number, entry.mode, 0, 0, 1, 0, len(entry.data), 0, 0, *entry.device, len(name), 0)
        out += b"070701" + b"".join(b"%08X" % value for value in fields) + name
        out += bytes(-len(out) % 4)
        out += entry.data
        out += bytes(-len(out) % 4)
    out += bytes(-len(out) % 512)
    return bytes(out)
