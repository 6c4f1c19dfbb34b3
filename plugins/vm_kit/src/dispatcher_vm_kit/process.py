"""Processes that outlive the daemon: who they are, whether they live, and their end, by pidfd and never by pid alone.

A machine's lock file is open in its monitor for the monitor's life, locked as one open file with the daemon that
started it: whoever can take the lock knows that no process of the machine is left, however the pid was reused. The
launcher writes its pid, which is the monitor's, into that file.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import fcntl
import os
import signal
from dataclasses import dataclass
from pathlib import Path

from dispatcher.api import effect


@dataclass(frozen=True, slots=True, kw_only=True)
class ProcessIdentity:
    """A process for good: its pid, and its start in clock ticks since boot, which tells it from a later one."""

    pid: int
    start_ticks: int


def identify(pid: int) -> ProcessIdentity | None:
    """Who has this pid now, or None."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    return ProcessIdentity(pid=pid, start_ticks=int(stat.rpartition(")")[2].split()[19]))


def open_process(identity: ProcessIdentity) -> int | None:
    """A pidfd of exactly this process, or None when it is gone. The caller closes it."""
    try:
        handle = os.pidfd_open(identity.pid)
    except OSError as error:
        if error.errno in {errno.ESRCH, errno.EINVAL}:
            return None
        raise
    if identify(identity.pid) != identity:
        os.close(handle)
        return None
    return handle


async def wait_ended(handle: int) -> None:
    """Wait until the process behind a pidfd has ended; it is not reaped. Cancellation leaves nothing behind."""
    loop = asyncio.get_running_loop()
    ended: asyncio.Future[None] = loop.create_future()

    def settle() -> None:
        if not ended.done():
            ended.set_result(None)

    watched = os.dup(handle)  # the loop knows one reader per descriptor, and there may be several waiters
    loop.add_reader(watched, settle)
    try:
        await ended
    finally:
        loop.remove_reader(watched)
        os.close(watched)


@effect("vm.signal")
def send_signal(handle: int, number: signal.Signals) -> None:
    """Send a signal to the process behind a pidfd; one that has ended already is no error."""
    with contextlib.suppress(ProcessLookupError):
        signal.pidfd_send_signal(handle, number)


# ------------------------------------------------------------------------------------------------------- the lock file
@effect("vm.make_lock")
def make_lock(path: Path) -> int:
    """Make the lock file of a machine that is about to start, and lock it. The descriptor is for the launcher.

    Raises:
        BlockingIOError: a process of an earlier start is still alive.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.ftruncate(descriptor, 0)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def is_held(path: Path) -> bool:
    """Whether a process of the machine may be alive. False is proof that none is."""
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    else:
        return False
    finally:
        os.close(descriptor)


def find_holder(path: Path) -> ProcessIdentity | None:
    """The process that holds the lock by what the launcher wrote, checked against its open files; else None."""
    try:
        pid = int(path.read_text(encoding="ascii"))
        wanted = path.stat()
    except (OSError, ValueError):
        return None
    identity = identify(pid)
    if identity is None:
        return None
    with contextlib.suppress(OSError), os.scandir(f"/proc/{pid}/fd") as entries:
        for entry in entries:
            with contextlib.suppress(OSError):
                status = os.stat(entry.path)
                if (status.st_dev, status.st_ino) == (wanted.st_dev, wanted.st_ino):
                    return identity
    return None
