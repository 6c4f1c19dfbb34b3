"""Opening log files below a directory that a pod's author may have prepared: no link is followed, nothing escapes.

The kubelet names the log directory (trusted); the relative path holds names that users chose. Each component is opened
with O_NOFOLLOW under its parent's descriptor (CVE-2024-5154, CVE-2025-0750 are about exactly this).
"""

from __future__ import annotations

import contextlib
import os
import stat
from dataclasses import dataclass
from pathlib import PurePosixPath

from dispatcher.effects import effect
from dispatcher.errors import InvalidRequest

_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


@dataclass(slots=True)
class LogFile:
    """An open log file. `inode` identifies it however it is renamed; `size` is what it holds."""

    fd: int
    inode: int

    @property
    def size(self) -> int:
        """The file's size in bytes, now."""
        return os.fstat(self.fd).st_size

    def write(self, data: bytes) -> None:
        """Append everything, in order. A record goes out in one system call, so that a tailing reader sees whole lines.

        Raises OSError (disk full); what was written until then stays and is counted by `size`.
        """
        view = memoryview(data)
        while view:
            view = view[os.write(self.fd, view) :]

    def close(self) -> None:
        """Close the descriptor. Idempotent."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


def _open_parent(directory: str, relative: str, *, create: bool) -> tuple[int, str]:
    path = PurePosixPath(relative)
    if path.is_absolute() or ".." in path.parts or not path.name:
        raise InvalidRequest("log_path must be a path below the sandbox's log directory.")
    if create:
        os.makedirs(directory, mode=0o755, exist_ok=True)
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        for part in path.parts[:-1]:
            if create:
                with contextlib.suppress(FileExistsError):
                    os.mkdir(part, 0o755, dir_fd=fd)
            inner = os.open(part, _DIRECTORY, dir_fd=fd)
            os.close(fd)
            fd = inner
    except BaseException:
        os.close(fd)
        raise
    return fd, path.name


@effect("logs.open")
def open_log(directory: str, relative: str) -> LogFile:
    """Open for appending, making the file and its folders where they are missing. Mode 0640.

    Raises:
        InvalidRequest: the path escapes, or a link or something that is no regular file stands there.
    """
    try:
        parent, name = _open_parent(directory, relative, create=True)
    except OSError as error:
        raise InvalidRequest(f"The folder of the log file {relative} cannot be used: {error.strerror}.") from error
    try:
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
        fd = os.open(name, flags, 0o640, dir_fd=parent)
    except OSError as error:
        raise InvalidRequest(f"The log file {relative} cannot be opened: {error.strerror}.") from error
    finally:
        os.close(parent)
    status = os.fstat(fd)
    if not stat.S_ISREG(status.st_mode):
        os.close(fd)
        raise InvalidRequest(f"The log file {relative} is no regular file.")
    return LogFile(fd, status.st_ino)


@effect("logs.find")
def find_log(directory: str, relative: str, inode: int) -> LogFile | None:
    """Find the file with this inode at its path or beside it (a rotation renames within the folder), or None."""
    try:
        parent, name = _open_parent(directory, relative, create=False)
    except OSError:
        return None
    try:
        beside = sorted(entry for entry in os.listdir(parent) if entry.startswith(name))
        for entry in beside:
            try:
                status = os.stat(entry, dir_fd=parent, follow_symlinks=False)
            except FileNotFoundError:
                continue
            if status.st_ino == inode and stat.S_ISREG(status.st_mode):
                fd = os.open(entry, os.O_WRONLY | os.O_APPEND | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=parent)
                return LogFile(fd, inode)
        return None
    finally:
        os.close(parent)
