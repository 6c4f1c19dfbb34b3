"""What is attached, in files of ours: one per pod, from before its first plugin runs until its last DEL has succeeded.

The core's record is the truth about a pod; the journal is what the record cannot know. While a chain runs it holds the
result of the plugins that have already run, so that DEL after a crash in between knows the addresses to free. And it
names attachments whose record is lost, so that the clean-up at start-up finds them. Its writes are not synced: they
survive the death of the daemon, and after the death of the machine namespaces and rules are gone too, while a plan
for the addresses is still in the record.

A second file per pod is a lock that a plugin inherits: while it is held although we do not, a plugin that a former
daemon started is still at work.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import json
import os
import re
import signal
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dispatcher.api import effect
from dispatcher.errors import NetworkFailed
from dispatcher.model import NetworkPlan
from dispatcher_cni.plan import AttachmentPlan

_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,127}")
_POLL_S = 0.05


@dataclass(frozen=True, slots=True, kw_only=True)
class JournalEntry:
    """One attachment: its plan, and the newest result; None while no plugin has answered."""

    plan: AttachmentPlan
    result: Mapping[str, Any] | None


class Journal:
    """The folder of attachments, and the locks beside it. Files are tiny, so they are read and written in place."""

    def __init__(self, *, folder: Path, lock_folder: Path) -> None:
        self._folder = folder
        self._locks = lock_folder

    @effect("cni.journal.open")
    def open(self) -> None:
        """Make the folders. Idempotent."""
        for folder in (self._folder, self._locks):
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)

    def ids(self) -> tuple[str, ...]:
        """The container ids of all attachments on file, and of those with nothing but a lock left."""
        attached = {path.stem for path in self._folder.glob("*.json")}
        return tuple(sorted(attached | {path.name for path in self._locks.iterdir() if _ID.fullmatch(path.name)}))

    def holds(self, container_id: str) -> bool:
        """Tell whether an attachment is on file, readable or not."""
        return self._path(container_id).exists()

    def find(self, container_id: str) -> JournalEntry | None:
        """Return an attachment, or None where there is none or the file cannot be read."""
        try:
            content = json.loads(self._path(container_id).read_bytes())
            plan = NetworkPlan(plugin="cni", netns_path=content["netnsPath"], content=content["plan"])
            return JournalEntry(plan=AttachmentPlan.from_network_plan(plan), result=content["result"])
        except (OSError, ValueError, KeyError, TypeError, NetworkFailed):
            return None

    @effect("cni.journal.write")
    def write(self, plan: AttachmentPlan, result: Mapping[str, Any] | None) -> None:
        """Put an attachment on file, replacing what was there as one act."""
        content = {"netnsPath": plan.netns_path, "plan": plan.to_network_plan().content, "result": result}
        path = self._path(plan.container_id)
        temporary = path.with_suffix(".new")
        temporary.write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")
        temporary.replace(path)

    @effect("cni.journal.remove")
    def remove(self, container_id: str) -> None:
        """Forget an attachment. Idempotent."""
        path = self._path(container_id)
        path.with_suffix(".new").unlink(missing_ok=True)
        path.unlink(missing_ok=True)

    @contextlib.asynccontextmanager
    async def hold(self, container_id: str, *, patience_s: float) -> AsyncIterator[PluginLock]:
        """Hold the pod's lock while plugins are run for it.

        A plugin of a former daemon is given `patience_s` to end (half of an interrupted DEL is worse than a wait),
        then it is killed.

        Raises:
            NetworkFailed: it cannot be killed.
        """
        path = self._locks / self._checked(container_id)
        lock = PluginLock(path)
        try:
            if not await lock.take(patience_s):
                _kill_holders(path)
                if not await lock.take(patience_s):
                    raise NetworkFailed(
                        f"A network plugin that an earlier daemon started for pod {container_id} does not end; "
                        f"the processes that hold {path} open are its."
                    )
            yield lock
            _remove_lock(path)
        finally:
            lock.close()

    def _path(self, container_id: str) -> Path:
        return self._folder / f"{self._checked(container_id)}.json"

    @staticmethod
    def _checked(container_id: str) -> str:
        if not _ID.fullmatch(container_id):
            raise NetworkFailed(f"{container_id[:80]!r} is not a pod id.")
        return container_id


class PluginLock:
    """A locked file that one plugin at a time inherits. While it is locked and in its place, that plugin works.

    Each plugin gets a new file. What a plugin leaves behind on purpose, a daemon of its own, holds a file that is not
    in its place any more, and is nobody's business.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._handle = -1
        self._used = False

    async def take(self, patience_s: float) -> bool:
        """Lock the file; False if it stays locked by somebody else for `patience_s`."""
        if self._handle < 0:
            self._handle = _open_lock(self._path)
        loop = asyncio.get_running_loop()
        deadline = loop.time() + patience_s
        while True:
            try:
                fcntl.flock(self._handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if loop.time() >= deadline:
                    return False
            else:
                return True
            await asyncio.sleep(_POLL_S)

    def for_next_plugin(self) -> int:
        """Return the descriptor that the next plugin is to inherit. The one before it has ended."""
        if self._used:
            self.close()
            self._handle = _renew_lock(self._path)
            fcntl.flock(self._handle, fcntl.LOCK_EX | fcntl.LOCK_NB)  # a new file: nobody else can hold it
        self._used = True
        return self._handle

    def close(self) -> None:
        """Let go of the file. Idempotent."""
        if self._handle >= 0:
            os.close(self._handle)
            self._handle = -1


@effect("cni.lock.open")
def _open_lock(path: Path) -> int:
    return os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)


@effect("cni.lock.renew")
def _renew_lock(path: Path) -> int:
    path.unlink(missing_ok=True)
    return os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)


@effect("cni.lock.remove")
def _remove_lock(path: Path) -> None:
    path.unlink(missing_ok=True)


@effect("cni.kill_stray")
def _kill_holders(path: Path) -> None:
    """Kill every process but this one that has the lock file open."""
    for process in Path("/proc").iterdir():
        if not process.name.isdigit() or int(process.name) == os.getpid():
            continue
        try:
            pidfd = os.pidfd_open(int(process.name))
        except OSError:
            continue
        try:
            # Looked at behind the pidfd: if the id now belongs to somebody else, the signal goes nowhere.
            if any(_same(link, path) for link in (process / "fd").iterdir()):
                signal.pidfd_send_signal(pidfd, signal.SIGKILL)
        except OSError:
            continue
        finally:
            os.close(pidfd)


def _same(link: Path, path: Path) -> bool:
    try:
        return str(link.readlink()) == str(path)
    except OSError:
        return False
