"""Follows an engine's log file: the durable buffer between a container and the log file that the core writes.

A position is an offset in the engine's file, always behind a whole entry, so reading goes on exactly there after any
restart. The file is read directly: the engine's own API would neither give positions nor survive its restart.
"""

from __future__ import annotations

import asyncio
import ctypes
import errno
import os
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass

from dispatcher.api import effect
from dispatcher.errors import RuntimeDown
from dispatcher.model import OutputChunk
from dispatcher_docker_shim.inotify import FolderWatch
from dispatcher_docker_shim.log_formats import DECODERS, MAX_ENTRY

_BLOCK = 256 * 1024
_STEP = 1 << 20
_LOOK_AGAIN_S = 5.0  # in case the kernel drops a wake-up; costs one read(2)
# In case the engine drops an event. It costs a call per container, so a quiet node must not do it often: each pause is
# twice the one before it, and an event begins anew.
_ASK_FIRST_S, _ASK_LAST_S = 5.0, 60.0
_SEEK_DATA = 3
_KEEP_SIZE, _PUNCH_HOLE = 1, 2


@dataclass(frozen=True, slots=True)
class LogFile:
    """Where the engine keeps a container's output, and in which format."""

    path: str
    driver: str

    @property
    def folder(self) -> str:
        """The folder that tells of changes; it may appear after the file was asked for."""
        return os.path.dirname(self.path)


def log_file(root_dir: str, engine_id: str, driver: str) -> LogFile:
    """The log file of a container. Pure."""
    folder = os.path.join(root_dir, "containers", engine_id)
    if driver == "local":
        return LogFile(os.path.join(folder, "local-logs", "container.log"), driver)
    return LogFile(os.path.join(folder, f"{engine_id}-json.log"), driver)


async def follow(
    file: LogFile,
    after: int,
    *,
    watch: FolderWatch,
    has_ended: Callable[[], Awaitable[bool]],
    ended: asyncio.Event,
) -> AsyncIterator[OutputChunk]:
    """Yield entries behind `after`, until the container ended and all was yielded.

    `has_ended` asks the engine whether the container's output is complete (it never starts again); `ended` is set
    when that may have changed. It is asked *before* the last read, so nothing written in between is lost.

    Raises:
        RuntimeDown: the file cannot be read.
    """
    decode = DECODERS[file.driver]
    position, pending = after, b""
    fd, folder = -1, _Folder(watch)
    ask, asked_at, pause_s = True, 0.0, _ASK_FIRST_S
    try:
        while True:
            folder.follow(file.folder)
            if ask:
                asked_at = time.monotonic()
            if fd < 0:
                fd = _open(file.path)
                position = _first_data(fd, position) if fd >= 0 else position
            complete = ask and await has_ended()
            if complete and fd < 0:
                fd = _open(file.path)
            while fd >= 0 and (block := _read(fd, position + len(pending), file.path)):
                entries, used = decode(pending + block)
                for entry in entries:
                    seq = position + entry.end
                    yield OutputChunk(stream=entry.stream, time_ns=entry.time_ns, seq=seq, data=entry.data)
                pending = (pending + block)[used:]
                position += used
                if len(pending) > 2 * MAX_ENTRY:
                    raise RuntimeDown(f"the engine's log {file.path} holds an entry without end at {position}")
            if complete:
                return
            ask = await _wait(folder.changed, ended)
            if ask:
                pause_s = _ASK_FIRST_S
            elif time.monotonic() - asked_at >= pause_s:
                ask, pause_s = True, min(2 * pause_s, _ASK_LAST_S)
    finally:
        if fd >= 0:
            os.close(fd)
        folder.leave()


class _Folder:
    """A watch on the log's folder, or on the nearest one above it that exists already."""

    def __init__(self, watch: FolderWatch) -> None:
        self._watch = watch
        self._path = ""
        self._handle: tuple[int, asyncio.Event] | None = None

    @property
    def changed(self) -> asyncio.Event | None:
        return self._handle[1] if self._handle else None

    def follow(self, path: str) -> None:
        if self._path == path:
            return
        for candidate in (path, os.path.dirname(path)):
            if candidate == self._path:
                return
            try:
                handle = self._watch.add(candidate)
            except OSError:
                continue
            self.leave()
            self._path, self._handle = candidate, handle
            return

    def leave(self) -> None:
        if self._handle is not None:
            self._watch.remove(*self._handle)
        self._path, self._handle = "", None


class Trimmer:
    """Frees the part of a log file that is on record elsewhere, in steps of at least 1 MiB."""

    def __init__(self) -> None:
        self._libc = ctypes.CDLL(None, use_errno=True)
        self._freed: dict[str, int] = {}

    def due(self, file: LogFile, seq: int) -> bool:
        """True when enough is to be freed to be worth a system call."""
        return seq - self._freed.get(file.path, 0) >= _STEP

    @effect("docker.punch_log")
    def free(self, file: LogFile, seq: int) -> bool:
        """Free whole blocks before `seq`; offsets stay what they are. False where the file system cannot."""
        try:
            fd = os.open(file.path, os.O_WRONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
        except OSError:
            return True
        try:
            mode = _PUNCH_HOLE | _KEEP_SIZE
            result = self._libc.fallocate(fd, mode, ctypes.c_longlong(0), ctypes.c_longlong(seq))
            self._freed[file.path] = seq
            return bool(result == 0 or ctypes.get_errno() not in (errno.EOPNOTSUPP, errno.ENOSYS))
        finally:
            os.close(fd)

    def forget(self, file: LogFile) -> None:
        """The container is gone."""
        self._freed.pop(file.path, None)


def _open(path: str) -> int:
    try:
        return os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    except FileNotFoundError:
        return -1
    except OSError as error:
        raise RuntimeDown(f"the engine's log {path} cannot be opened: {error.strerror}") from error


def _first_data(fd: int, position: int) -> int:
    """Where data begins at or behind `position`: a freed part is skipped."""
    try:
        return os.lseek(fd, position, _SEEK_DATA)
    except OSError:
        return position  # nothing there yet, or a file system without holes


def _read(fd: int, offset: int, path: str) -> bytes:
    try:
        return os.pread(fd, _BLOCK, offset)
    except OSError as error:
        raise RuntimeDown(f"the engine's log {path} cannot be read: {error.strerror}") from error


async def _wait(changed: asyncio.Event | None, ended: asyncio.Event) -> bool:
    """Wait for a change, or for a while; True when the container may have ended."""
    waits = [asyncio.ensure_future(event.wait()) for event in (changed, ended) if event is not None]
    try:
        await asyncio.wait(waits, timeout=_LOOK_AGAIN_S, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for wait in waits:
            wait.cancel()
    ask = ended.is_set()
    if changed is not None:
        changed.clear()
    ended.clear()
    return ask
