"""Sparse file-system images on the host: writable layers of containers, and emptyDirs.

An image is a copy of a blank one of its size, which was formatted once: a copy costs a few milliseconds, mkfs much
more. Copies share a UUID, so the guest mounts disks by their serial only. A file is as large as what is written to it,
never as its size says.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
from pathlib import Path

from dispatcher.api import effect
from dispatcher.errors import NotSupported, OutOfResources
from dispatcher_vm_kit.exec import run_tool

_BLOCK = 1 << 20
_FORMAT_S = 120.0


class Disks:
    """Makes images from blank ones that it keeps in `folder`."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._locks: dict[int, asyncio.Lock] = {}

    async def make(self, path: Path, size_bytes: int) -> None:
        """Make an ext4 image of `size_bytes` at `path`, unless there is one. Idempotent; a crash leaves no half image.

        Raises:
            NotSupported: mkfs.ext4 is missing.
            OutOfResources: the disk is full.
        """
        if path.exists():
            return
        blank = await self._blank(size_bytes)
        try:
            await asyncio.to_thread(_copy_sparse, blank, path)
        except OSError as error:
            raise OutOfResources(f"no disk image can be made in {path.parent}: {error.strerror}") from error

    async def _blank(self, size_bytes: int) -> Path:
        path = self._folder / f"blank-{size_bytes}.ext4"
        async with self._locks.setdefault(size_bytes, asyncio.Lock()):
            if not path.exists():
                await _format(path, size_bytes)
        return path


@effect("vm.format_blank")
async def _format(path: Path, size_bytes: int) -> None:
    program = shutil.which("mkfs.ext4", path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin")
    if program is None:
        raise NotSupported("Virtual machines need mkfs.ext4 for writable layers: install the package e2fsprogs.")
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    work = path.with_suffix(".new")
    with contextlib.suppress(FileNotFoundError):
        work.unlink()
    work.touch(mode=0o600)
    os.truncate(work, size_bytes)
    # No journal: a layer dies with its machine, and what a machine has not written back is lost with or without one.
    features = ["-O", "^has_journal,^resize_inode", "-E", "lazy_itable_init=1", "-m", "0"]
    output = await run_tool([program, "-q", "-F", *features, str(work)], timeout_s=_FORMAT_S)
    if output.exit_code != 0:
        words = output.stderr.decode("utf-8", "replace").strip()[-300:]
        raise OutOfResources(f"no blank disk image can be made in {path.parent}: {words}")
    os.replace(work, path)


@effect("vm.make_disk")
def _copy_sparse(source: Path, target: Path) -> None:
    """Copy the data of a sparse file and keep its holes; the result appears whole or not at all."""
    target.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    work = target.with_name(f"{target.name}.new")
    reading = os.open(source, os.O_RDONLY | os.O_CLOEXEC)
    try:
        size = os.fstat(reading).st_size
        writing = os.open(work, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        try:
            os.ftruncate(writing, size)
            for start, end in _extents(reading, size):
                _copy_range(reading, writing, start, end)
        finally:
            os.close(writing)
    finally:
        os.close(reading)
    os.replace(work, target)


def _extents(fd: int, size: int) -> list[tuple[int, int]]:
    """Where a file has data. A file system that cannot tell has data everywhere."""
    found: list[tuple[int, int]] = []
    position = 0
    while position < size:
        try:
            start = os.lseek(fd, position, os.SEEK_DATA)
        except OSError:
            break
        position = os.lseek(fd, start, os.SEEK_HOLE)
        found.append((start, position))
    return found


def _copy_range(reading: int, writing: int, start: int, end: int) -> None:
    position = start
    while position < end:
        data = os.pread(reading, min(_BLOCK, end - position), position)
        if not data:
            return
        os.pwrite(writing, data, position)
        position += len(data)


def usage(path: Path) -> int:
    """What an image really takes of its disk, in bytes; 0 where it is gone."""
    try:
        return os.stat(path).st_blocks * 512
    except OSError:
        return 0


@effect("vm.remove_disk")
def remove(path: Path) -> None:
    """Remove an image. Idempotent."""
    for each in (path, path.with_name(f"{path.name}.new")):
        with contextlib.suppress(FileNotFoundError):
            each.unlink()
