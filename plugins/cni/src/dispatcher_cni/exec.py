"""Running a network plugin: the only module here that starts processes.

Theory of operation. A plugin is a child in a session of its own, so that a deadline ends it with everything that it
started. Its input comes from a memory file (a plugin that does not read cannot block us), its output is read from two
pipes with a bound each. Its end is told by a pidfd, not by the end of its output: a plugin that leaves a daemon behind
with our pipe open has answered all the same. No child watcher is involved, so no thread is.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import signal
import subprocess
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from dispatcher.api import annotate, effect

OUTPUT_LIMIT = 1 << 20
STDERR_KEPT = 16 << 10
_LINGER_S = 1.0  # how long output may still come after the end of the process
_KILL_S = 5.0
_BUSY_TRIES = 5
_BUSY_PAUSE_S = 0.2


class PluginHung(Exception):
    """The plugin did not end in its time; it and all of its children were killed."""


class PluginOverflow(Exception):
    """The plugin printed more than it may; it was killed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PluginOutput:
    """How a plugin ended and what it printed; `exit_code` is negative for a death by signal, as in subprocess."""

    exit_code: int
    stdout: bytes
    stderr: bytes


class _Pipe:
    """The reading end of one pipe: keeps the first bytes, reads on to a limit, then says that it is too much."""

    def __init__(self, *, keep: int) -> None:
        self.data = bytearray()
        self._keep = keep
        self._seen = 0
        self._loop = asyncio.get_running_loop()
        self.closed: asyncio.Future[None] = self._loop.create_future()
        self.overflowed: asyncio.Future[None] = self._loop.create_future()
        self._reader, self.writer = os.pipe2(os.O_CLOEXEC)
        os.set_blocking(self._reader, False)
        self._loop.add_reader(self._reader, self._read)

    def _read(self) -> None:
        try:
            chunk = os.read(self._reader, 1 << 16)
        except BlockingIOError:
            return
        if not chunk:
            self.close()
            return
        self._seen += len(chunk)
        self.data += chunk[: self._keep - len(self.data)]
        if self._seen > OUTPUT_LIMIT and not self.overflowed.done():
            self.overflowed.set_result(None)

    def close_writer(self) -> None:
        """Let go of our copy of the writing end, once the child has its own."""
        if self.writer >= 0:
            os.close(self.writer)
            self.writer = -1

    def close(self) -> None:
        """Stop reading."""
        self.close_writer()
        if not self.closed.done():
            self._loop.remove_reader(self._reader)
            os.close(self._reader)
            self.closed.set_result(None)


@effect("cni.exec")
async def run_plugin(
    path: Path,
    *,
    stdin: bytes,
    environment: Mapping[str, str],
    timeout_s: float,
    inherited_fd: int | None = None,
) -> PluginOutput:
    """Run one plugin to its end.

    `environment` is all that it gets. `inherited_fd` stays open in it and in its children. Cancellation kills it with
    its children before it is passed on.

    Raises:
        PluginHung: the deadline passed.
        PluginOverflow: too much output.
        OSError: it cannot be started.
    """
    annotate(plugin=path.name, command=environment.get("CNI_COMMAND", ""))
    with contextlib.ExitStack() as stack:
        stdout, stderr = _Pipe(keep=OUTPUT_LIMIT), _Pipe(keep=STDERR_KEPT)
        stack.callback(stdout.close)
        stack.callback(stderr.close)
        memory = os.memfd_create("cni-request", os.MFD_CLOEXEC)
        stack.callback(os.close, memory)
        os.write(memory, stdin)
        os.lseek(memory, 0, os.SEEK_SET)
        process = await _start(
            lambda: subprocess.Popen(
                [str(path)],
                stdin=memory,
                stdout=stdout.writer,
                stderr=stderr.writer,
                env=dict(environment),
                cwd="/",
                close_fds=True,
                pass_fds=() if inherited_fd is None else (inherited_fd,),
                start_new_session=True,
            )
        )
        try:
            stdout.close_writer()
            stderr.close_writer()
            await _wait(process, timeout_s, stdout.overflowed, stderr.overflowed)
        except BaseException:
            await asyncio.shield(_kill(process))
            raise
        exit_code = process.wait()  # it has ended: this only reaps
        await asyncio.wait([stdout.closed, stderr.closed], timeout=_LINGER_S)
        return PluginOutput(exit_code=exit_code, stdout=bytes(stdout.data), stderr=bytes(stderr.data))


async def _start(start: Callable[[], subprocess.Popen[bytes]]) -> subprocess.Popen[bytes]:
    """Start it; an executable that an installer is still writing is tried again for a second."""
    for _ in range(_BUSY_TRIES):
        try:
            return start()
        except OSError as error:
            if error.errno != errno.ETXTBSY:
                raise
        await asyncio.sleep(_BUSY_PAUSE_S)
    return start()


async def _wait(process: subprocess.Popen[bytes], timeout_s: float, *overflowed: asyncio.Future[None]) -> None:
    """Wait until the process has ended, without reaping it."""
    loop = asyncio.get_running_loop()
    ended: asyncio.Future[None] = loop.create_future()
    handle = os.pidfd_open(process.pid)
    loop.add_reader(handle, _settle, ended)
    try:
        done, _ = await asyncio.wait([ended, *overflowed], timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
        if ended in done:
            return
        raise PluginOverflow if done else PluginHung
    finally:
        loop.remove_reader(handle)
        os.close(handle)


def _settle(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)


async def _kill(process: subprocess.Popen[bytes]) -> None:
    """Kill it with all that it started. Until it is reaped, its id and its group's can be nobody else's."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    with contextlib.suppress(PluginHung):  # it sits in the kernel: it ends when the kernel lets it go
        await _wait(process, _KILL_S)
        process.wait()
