"""One inotify descriptor for all followers of log files: wakes a follower when something changed in its folder.

One for the whole plugin, since the kernel grants a user 128 of them by default. A wake-up may be spurious; a lost one
(queue overflow) wakes everybody.
"""

from __future__ import annotations

import asyncio
import ctypes
import os
import struct

_IN_MODIFY, _IN_CREATE, _IN_MOVED_TO = 0x2, 0x100, 0x80
_IN_DELETE_SELF, _IN_IGNORED, _IN_Q_OVERFLOW, _IN_ONLYDIR = 0x400, 0x8000, 0x4000, 0x1000000
_EVENT = struct.Struct("iIII")


class FolderWatch:
    """Wake-ups for changes directly inside folders. Belongs to one event loop."""

    def __init__(self) -> None:
        self._libc = ctypes.CDLL(None, use_errno=True)
        self._fd = -1
        self._waiters: dict[int, set[asyncio.Event]] = {}
        self._loop: asyncio.AbstractEventLoop | None = None

    def add(self, folder: str) -> tuple[int, asyncio.Event]:
        """Begin to watch; returns a handle for `remove` and the event to wait for (and clear).

        Raises:
            OSError: the folder is missing, or the host's limit of watches is reached.
        """
        if self._fd < 0:
            self._fd = self._check(self._libc.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC))
            self._loop = asyncio.get_running_loop()
            self._loop.add_reader(self._fd, self._read)
        mask = _IN_MODIFY | _IN_CREATE | _IN_MOVED_TO | _IN_DELETE_SELF | _IN_ONLYDIR
        handle = self._check(self._libc.inotify_add_watch(self._fd, os.fsencode(folder), mask))
        event = asyncio.Event()
        self._waiters.setdefault(handle, set()).add(event)
        return handle, event

    def remove(self, handle: int, event: asyncio.Event) -> None:
        """Stop waking `event`. Idempotent."""
        waiters = self._waiters.get(handle)
        if waiters is None:
            return
        waiters.discard(event)
        if not waiters:
            del self._waiters[handle]
            self._libc.inotify_rm_watch(self._fd, handle)  # fails where the folder is gone: nothing is left to do

    def close(self) -> None:
        """Let go of the descriptor and wake everybody for the last time."""
        if self._fd >= 0 and self._loop is not None:
            self._loop.remove_reader(self._fd)
            os.close(self._fd)
        self._fd = -1
        self._wake_all()
        self._waiters.clear()

    def _read(self) -> None:
        try:
            buffer = os.read(self._fd, 65536)
        except BlockingIOError:
            return
        at = 0
        while at + _EVENT.size <= len(buffer):
            handle, mask, _cookie, length = _EVENT.unpack_from(buffer, at)
            at += _EVENT.size + length
            if mask & _IN_Q_OVERFLOW:
                self._wake_all()
            for event in self._waiters.get(handle, ()):
                event.set()
            if mask & _IN_IGNORED:
                self._waiters.pop(handle, None)

    def _wake_all(self) -> None:
        for waiters in self._waiters.values():
            for event in waiters:
                event.set()

    @staticmethod
    def _check(result: int) -> int:
        if result < 0:
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number))
        return int(result)
