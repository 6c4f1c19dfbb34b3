"""A look at the host paths that mounts name, and the reading of small files below them. Reads only.

The kubelet names the paths, but what lies there may change at any moment, and pods may have written it: nothing is
opened that could block, no link is followed where content is read, and everything is bounded.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass

from dispatcher_hyper_vm.mounts import FILES_LIMIT, HostPath, Kind

MAX_FILES = 1000
_KINDS = (
    (stat.S_ISREG, Kind.FILE),
    (stat.S_ISDIR, Kind.FOLDER),
    (stat.S_ISSOCK, Kind.SOCKET),
    (stat.S_ISBLK, Kind.DEVICE),
    (stat.S_ISCHR, Kind.DEVICE),
)
_TMPFS_MAGIC = "tmpfs"


@dataclass(frozen=True, slots=True, kw_only=True)
class HostFile:
    """A small file as it was read; `path` is relative to the folder that was asked for, "" for the file itself."""

    path: str
    data: bytes
    mode: int
    uid: int
    gid: int


class TooLargeError(Exception):
    """More than FILES_LIMIT bytes or MAX_FILES files."""


def look(path: str) -> HostPath | None:
    """What is at a host path, its links followed; None where nothing is. Blocks on the file system."""
    real = os.path.realpath(path)
    try:
        found = os.stat(real)
    except OSError:
        return None
    kind = next((kind for test, kind in _KINDS if test(found.st_mode)), Kind.OTHER)
    return HostPath(
        path=real,
        kind=kind,
        size_bytes=_size(real, kind, found.st_size),
        memory_bytes=_memory_size(real) if kind is Kind.FOLDER else 0,
        mode=stat.S_IMODE(found.st_mode),
        uid=found.st_uid,
        gid=found.st_gid,
    )


def _size(path: str, kind: Kind, file_size: int) -> int | None:
    if kind is Kind.FILE:
        return file_size if file_size <= FILES_LIMIT else None
    if kind is not Kind.FOLDER:
        return None
    try:
        return sum(len(file.data) for file in read_files(path))
    except (TooLargeError, OSError):
        return None


def _memory_size(path: str) -> int:
    """The size of the tmpfs that is mounted exactly here, 0 for none."""
    try:
        with open("/proc/self/mountinfo", encoding="utf-8", errors="surrogateescape") as rows:
            for row in rows:
                left, _, right = row.partition(" - ")
                fields = left.split()
                if len(fields) > 4 and _unescape(fields[4]) == path and right.split()[0] == _TMPFS_MAGIC:
                    space = os.statvfs(path)
                    return space.f_blocks * space.f_frsize
    except OSError:
        return 0
    return 0


def _unescape(field: str) -> str:
    for code, character in (("\\040", " "), ("\\011", "\t"), ("\\012", "\n"), ("\\134", "\\")):
        field = field.replace(code, character)
    return field


def read_files(path: str) -> tuple[HostFile, ...]:
    """Read a small file, or all files of a small folder as their user sees them.

    A kubelet's volume is a folder of links into `..data`; the files behind them are read, under the names of the
    links, and entries whose names begin with ".." are left out.

    Raises:
        TooLargeError: more than what travels over the agent.
        OSError: it is gone, or cannot be read.
    """
    if not os.path.isdir(path):
        return (_read(path, "", FILES_LIMIT),)
    root = os.path.realpath(path)
    files: list[HostFile] = []
    left = FILES_LIMIT
    for name in _walk(root):
        if len(files) >= MAX_FILES:
            raise TooLargeError
        file = _read(os.path.join(root, name), name, left)
        left -= len(file.data)
        files.append(file)
    return tuple(files)


def _walk(root: str, below: str = "", depth: int = 0) -> Iterator[str]:
    """Names of regular files below a folder. Links are followed where they stay in it."""
    if depth > 8:
        raise TooLargeError
    for entry in sorted(os.listdir(os.path.join(root, below))):
        if not below and entry.startswith(".."):
            continue
        name = os.path.join(below, entry)
        real = os.path.realpath(os.path.join(root, name))
        if os.path.commonpath((real, root)) != root:
            continue
        if os.path.isdir(real):
            yield from _walk(root, name, depth + 1)
        elif os.path.isfile(real):
            yield name


def _read(path: str, name: str, limit: int) -> HostFile:
    fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOCTTY)
    try:
        found = os.fstat(fd)
        if not stat.S_ISREG(found.st_mode) or found.st_size > limit:
            raise TooLargeError
        data = b""
        while len(data) <= limit and (block := os.read(fd, limit + 1 - len(data))):
            data += block
    finally:
        os.close(fd)
    if len(data) > limit:
        raise TooLargeError
    return HostFile(path=name, data=data, mode=stat.S_IMODE(found.st_mode), uid=found.st_uid, gid=found.st_gid)


def fingerprint(path: str) -> tuple[object, ...]:
    """What changes when a small source changes: cheap enough to be asked every second. () where it is gone.

    A kubelet's volume changes as one act, by its link `..data`; a file by its inode, size or time.
    """
    try:
        found = os.stat(path)
        if stat.S_ISDIR(found.st_mode):
            try:
                return (found.st_ino, os.readlink(os.path.join(path, "..data")))
            except OSError:
                return (found.st_ino, found.st_mtime_ns)
        return (found.st_ino, found.st_size, found.st_mtime_ns)
    except OSError:
        return ()
