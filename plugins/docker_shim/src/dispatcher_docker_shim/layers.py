"""What writable layers take on disk, measured beside the questions and never within them.

Theory of operation. A layer is a folder of the engine's overlay storage; its owner writes what and as much as it likes.
One background task walks all layers again and again, in small steps: a step is some milliseconds in a thread, then it
rests ten times as long, so that walking never takes more than a tenth of a core, and a layer of a million files takes
long and hurts nobody. A new layer is walked at once, within `_AT_ONCE_S` for all new ones together, so that small ones
have a figure in the first answer. Figures carry the time at which they were taken.

Where the engine keeps layers otherwise (no overlay folder is told), its own sizes serve, asked for once a minute for
all of them; it does not count inodes.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import stat
import time
from collections.abc import Awaitable, Callable, Iterable, Mapping
from dataclasses import dataclass

from dispatcher.errors import RuntimeDown

AGAIN_S = 30.0
_ENGINE_AGAIN_S = 60.0
_AT_ONCE_S = 0.1
_STEP_S = 0.01
_REST = 10
_DEEPEST = 128  # folders below that are not counted: each level holds two descriptors while it is walked
_MOST_LINKS = 100_000  # files with several names that are told from each other; more are not counted


@dataclass(frozen=True, slots=True)
class Layer:
    """A measurement. `inodes` of 0: not counted."""

    at_ns: int
    used_bytes: int
    inodes: int


class Walk:
    """Adds up one folder, in steps that can be paused. Follows no link and leaves no device; counts hard links once.

    Whatever the folder holds, memory and descriptors stay bounded. Nothing is open before the first step.
    """

    def __init__(self, folder: str) -> None:
        self._first: str | None = folder
        self._stack: list[_Folder] = []
        self._links: set[int] = set()
        self._device = 0
        self.used_bytes = 0
        self.inodes = 0

    def step(self, until: float) -> bool:
        """Go on until the moment `until` of the monotonic clock. True when all was counted. Blocks for disk reads.

        Raises:
            OSError: the folder itself cannot be opened.
        """
        if self._first is not None:
            self._stack.append(_Folder(self._first, None))
            self._first = None
            status = os.fstat(self._stack[0].fd)
            self._device = status.st_dev
            self._count(status)
        while self._stack:
            folder = self._stack[-1]
            entry = folder.next_entry()
            if entry is None:
                folder.close()
                self._stack.pop()
            else:
                self._visit(folder.fd, entry)
            if time.monotonic() >= until:
                return not self._stack
        return True

    def _visit(self, parent: int, entry: os.DirEntry[str]) -> None:
        with contextlib.suppress(OSError):  # it went away meanwhile
            status = os.stat(entry.name, dir_fd=parent, follow_symlinks=False)
            if status.st_dev != self._device:
                return
            self._count(status)
            if stat.S_ISDIR(status.st_mode) and len(self._stack) < _DEEPEST:
                self._stack.append(_Folder(entry.name, parent))

    def _count(self, status: os.stat_result) -> None:
        if status.st_nlink > 1 and not stat.S_ISDIR(status.st_mode):
            if status.st_ino in self._links or len(self._links) >= _MOST_LINKS:
                return
            self._links.add(status.st_ino)
        self.used_bytes += status.st_blocks * 512
        self.inodes += 1

    def close(self) -> None:
        """Let go of what is still open. Idempotent."""
        while self._stack:
            self._stack.pop().close()


class _Folder:
    """One open folder on the way down. Raises OSError where it cannot be opened."""

    def __init__(self, name: str, parent: int | None) -> None:
        flags = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
        self.fd = os.open(name, flags, dir_fd=parent)
        try:
            self._entries = os.scandir(self.fd)
        except OSError:
            os.close(self.fd)
            raise

    def next_entry(self) -> os.DirEntry[str] | None:
        try:
            return next(self._entries, None)
        except OSError:
            return None

    def close(self) -> None:
        self._entries.close()
        os.close(self.fd)


class LayerMeter:
    """Keeps the newest figure of each layer.

    `folders` maps names of containers to their layers' folders, "" where the engine tells none; it is read, never
    changed, and says which containers there are. `ask_engine` returns sizes by name.
    """

    def __init__(
        self,
        folders: Mapping[str, str],
        ask_engine: Callable[[], Awaitable[Mapping[str, int]]],
        *,
        now_ns: Callable[[], int],
    ) -> None:
        self._folders = folders
        self._ask_engine = ask_engine
        self._now_ns = now_ns
        self._found: dict[str, Layer] = {}
        self._large: set[str] = set()  # too large for the first answer
        self._engine_at = -_ENGINE_AGAIN_S
        self._task: asyncio.Task[None] | None = None

    async def measure(self, names: Iterable[str] | None = None) -> Mapping[str, Layer]:
        """Return the newest figures of all layers, by name. Walks those of `names` (None: all) that are new, for a moment.

        The first question starts the background task; nothing is measured that nobody ever asked for.
        """
        if self._task is None:
            self._task = asyncio.create_task(self._keep_measuring(), name="measure layers")
        wanted = set(self._folders if names is None else names) - self._found.keys() - self._large
        new = {name: folder for name in wanted if (folder := self._folders.get(name))}
        if new:
            await asyncio.to_thread(self._walk_new, new)
        for gone in self._found.keys() - self._folders.keys():
            del self._found[gone]
        self._large &= self._folders.keys()
        return self._found

    async def aclose(self) -> None:
        """Stop measuring."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait({self._task})

    def _walk_new(self, folders: Mapping[str, str]) -> None:
        until = time.monotonic() + _AT_ONCE_S
        for name, folder in folders.items():
            walk = Walk(folder)
            try:
                if walk.step(until):
                    self._found[name] = Layer(self._now_ns(), walk.used_bytes, walk.inodes)
                else:
                    self._large.add(name)
            except OSError:
                continue  # the container is being removed
            finally:
                walk.close()
            if time.monotonic() >= until:
                return

    async def _keep_measuring(self) -> None:
        while True:
            began = time.monotonic()
            for name, folder in [*self._folders.items()]:
                if folder:
                    await self._walk_slowly(name, folder)
            if "" in self._folders.values() and time.monotonic() - self._engine_at >= _ENGINE_AGAIN_S:
                await self._take_engine_sizes()
            spent = time.monotonic() - began
            await asyncio.sleep(max(AGAIN_S, spent))

    async def _walk_slowly(self, name: str, folder: str) -> None:
        walk = Walk(folder)
        step: asyncio.Future[bool] | None = None
        try:
            while True:
                began = time.monotonic()
                step = asyncio.ensure_future(asyncio.to_thread(walk.step, began + _STEP_S))
                if await asyncio.shield(step):
                    break
                await asyncio.sleep((time.monotonic() - began) * _REST)
            self._found[name] = Layer(self._now_ns(), walk.used_bytes, walk.inodes)
        except OSError:
            pass  # the container is being removed
        finally:
            if step is not None and not step.done():
                await asyncio.wait({step})  # the thread still uses the descriptors
            walk.close()

    async def _take_engine_sizes(self) -> None:
        self._engine_at = time.monotonic()
        with contextlib.suppress(RuntimeDown):  # the figures of a minute ago serve
            sizes = await self._ask_engine()
            now = self._now_ns()
            for name, folder in self._folders.items():
                if not folder and name in sizes:
                    self._found[name] = Layer(now, sizes[name], 0)
