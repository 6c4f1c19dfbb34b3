"""Carrying a container's output from its runtime into its log file: each line exactly once, whatever dies meanwhile.

Theory of operation. The runtime's buffer is durable and every chunk has a position `seq` in it. A record of the log is
a function of its chunk (`records.render`). The checkpoint in the container's record says: what follows `seq` begins at
`offset` of the file with `inode`. After a crash the pump replays from the checkpoint and skips as many bytes as that
file holds behind `offset`; they are the same bytes. A checkpoint is committed when the file changes (rotation), at the
end, and every CHECKPOINT_BYTES; only then may the runtime free its buffer up to `seq`.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable

from dispatcher.api import CanTrimOutput, ContainerRef, Runtime
from dispatcher.errors import DispatcherError, WrongState
from dispatcher.logs.files import LogFile, find_log, open_log
from dispatcher.logs.records import render
from dispatcher.model import ContainerId, LogCheckpoint

log = logging.getLogger(__name__)

CHECKPOINT_BYTES = 1 << 20
_RETRY_S = 1.0

Commit = Callable[[ContainerId, LogCheckpoint], Awaitable[None]]


class LogPump:
    """The pump of one container. `run` is its task's body; `reopen` may be called while it runs."""

    def __init__(self, runtime: Runtime, container: ContainerRef, checkpoint: LogCheckpoint, commit: Commit) -> None:
        self._runtime = runtime
        self._container = container
        self._commit = commit
        self._base = checkpoint
        self._seq = checkpoint.seq
        self._skip = 0
        self._file: LogFile | None = None
        self._lock = asyncio.Lock()  # between records: rotation must not cut into one
        self._path = (container.pod.spec.log_directory, container.spec.log_path)

    @property
    def writes_a_file(self) -> bool:
        """False where CRI asked for no log: the output is then read and dropped, so that the container never blocks."""
        return bool(self._path[0] and self._path[1])

    async def open(self) -> None:
        """Open the file, before the container starts. Idempotent. Commits the first checkpoint."""
        if not self.writes_a_file or self._file is not None:
            return
        if self._base.inode:
            self._file = find_log(*self._path, self._base.inode)
            if self._file is not None:
                self._skip = max(0, self._file.size - self._base.offset)
                return
        self._file = open_log(*self._path)
        await self._checkpoint()

    async def run(self) -> None:
        """Pump until the container has exited and all is written. Waits out an engine that is away and a full disk."""
        await self.open()
        while True:
            try:
                async with contextlib.aclosing(self._runtime.output(self._container, self._seq)) as chunks:  # type: ignore[type-var]
                    async for chunk in chunks:
                        await self._write(render(chunk))
                        self._seq = chunk.seq
                        await self._checkpoint_if_due()
                break
            except DispatcherError as error:
                log.warning(
                    "log pump waits for the runtime", extra={"container_id": self._container.id, "cause": str(error)}
                )
                await asyncio.sleep(_RETRY_S)
        if self._file is not None:
            await self._checkpoint()
            self._file.close()

    async def reopen(self) -> None:
        """Go on in a fresh file at the log's path (the kubelet renamed the old one). The file exists on return."""
        if not self.writes_a_file:
            return
        async with self._lock:
            if self._file is None:
                raise WrongState("The container's log is not open.")
            fresh = open_log(*self._path)
            if fresh.inode == self._file.inode:
                fresh.close()
                return
            old, self._file = self._file, fresh
            self._skip = 0
            try:
                await self._checkpoint()
            except BaseException:
                self._file = old
                fresh.close()
                raise
            old.close()

    def close(self) -> None:
        """Let go of the file, when the pump's task was cancelled."""
        if self._file is not None:
            self._file.close()

    async def _write(self, data: bytes) -> None:
        async with self._lock:
            if self._file is None:
                return
            skipped = min(self._skip, len(data))
            self._skip -= skipped
            data = data[skipped:]
            while data:
                before = self._file.size
                try:
                    self._file.write(data)
                    return
                except OSError as error:
                    # The disk is full, most likely. Nothing is lost: the runtime's buffer holds it until this passes.
                    log.error("log write failed", extra={"container_id": self._container.id, "cause": str(error)})
                    data = data[self._file.size - before :]
                    await asyncio.sleep(_RETRY_S)

    async def _checkpoint_if_due(self) -> None:
        written = self._seq - self._base.seq if self._file is None else self._file.size - self._base.offset
        if self._skip == 0 and written >= CHECKPOINT_BYTES:
            await self._checkpoint()

    async def _checkpoint(self) -> None:
        if self._skip:
            return  # still replaying: the old checkpoint is the true one
        if self._file is None:
            base = LogCheckpoint(seq=self._seq)
        else:
            base = LogCheckpoint(seq=self._seq, inode=self._file.inode, offset=self._file.size)
        await self._commit(self._container.id, base)
        self._base = base
        if isinstance(self._runtime, CanTrimOutput) and base.seq:
            try:
                await self._runtime.trim_output(self._container, base.seq)
            except DispatcherError as error:
                log.info("output not trimmed", extra={"container_id": self._container.id, "cause": str(error)})
