"""Commands run in containers, and attachments to their first process, as `Process`.

Theory of operation. The engine gives an exec one hijacked connection for its streams and no way to kill it, so the
process itself is held by a pidfd: it tells of the exit at once and cannot name another process. The exit code is the
engine's. At the exit all that the process wrote is fetched from the engine at once, at whatever pace it is read
(`ahead`). A child that keeps the pipe open after the exit gets a short time, then the output ends.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import AsyncIterator, Awaitable, Callable

from dispatcher.errors import DispatcherError, InvalidRequest, NotFound, RuntimeDown, WrongState
from dispatcher_docker_shim import host
from dispatcher_docker_shim.ahead import ReadAhead
from dispatcher_docker_shim.docker_client import DockerClient
from dispatcher_docker_shim.engine_stream import EngineSocket, HijackedStream, demultiplex

_DRAIN_S = 3.0  # without a byte; the engine itself closes an exec's streams two seconds after the exit
_CODE_DEADLINE_S = 10.0
_UNREAD_S = 4.0
_KILLED, _NOT_EXECUTED = 137, 126


async def start_exec(
    client: DockerClient,
    sockets: EngineSocket,
    name: str,
    command: tuple[str, ...],
    *,
    stdin: bool,
    tty: bool,
    died: Callable[[str], asyncio.Event],
) -> ExecProcess:
    """Start a command in a running container. `died` gives the event that is set when the engine tells of the exit.

    Raises:
        InvalidRequest: it cannot be executed; the engine's words say why.
    """
    exec_id = await client.create_exec(name, command, stdin=stdin, tty=tty)
    ended = died(exec_id)
    stream = await sockets.hijack(
        f"/v{client.api}/exec/{exec_id}/start",
        {"Detach": False, "Tty": tty},
        doing="start an exec",
    )
    process = ExecProcess(client, stream, exec_id, tty=tty, ended=ended)
    try:
        started = await process.has_started()
        words = b"" if started else b"".join([data async for _, data in process.output()])
    except BaseException:
        await process.aclose()
        raise
    if started:
        return process
    await process.aclose()
    said = words[:2000].decode("utf-8", "replace").strip()
    raise InvalidRequest(f"cannot execute {command[0]!r} in the container: {said}")


class ExecProcess:
    """A command that was started in a container."""

    def __init__(
        self, client: DockerClient, stream: HijackedStream, exec_id: str, *, tty: bool, ended: asyncio.Event
    ) -> None:
        self._client = client
        self._stream = stream
        self._ahead = ReadAhead(stream)
        self._cutting: asyncio.Task[None] | None = None
        self._id = exec_id
        self._tty = tty
        self._ended = ended
        self._root: host.Stat | None = None
        self._pidfd: int | None = None
        self._closed = False
        self._code: int | None = None
        self._killed = False

    async def has_started(self) -> bool:
        """Wait until the process runs (or ran); False when it could not be executed."""
        pause_s = 0.005
        while True:
            state = await self._client.inspect_exec(self._id)
            pid = int(state.get("Pid") or 0)
            if pid > 0:
                self._hold(pid, str(state.get("ContainerID", "")))
                self._cutting = asyncio.ensure_future(self._cut_after_exit())
                return True
            if not state.get("Running") and state.get("ExitCode") is not None:
                return False
            if self._ahead.count == 0:
                await self._ahead.wait_first(pause_s)
            else:
                await asyncio.sleep(pause_s)
            pause_s = min(pause_s * 1.5, 0.1)

    def _hold(self, pid: int, container_id: str) -> None:
        """Keep a pidfd of the process, if it is still the container's."""
        fd = host.open_pidfd(pid)
        if fd is None:
            return
        root = host.read_stat(pid)
        if root is None or not host.is_in_container(pid, container_id):
            os.close(fd)
            return
        self._pidfd, self._root = fd, root

    async def output(self) -> AsyncIterator[tuple[str, bytes]]:
        async for piece in demultiplex(self._ahead, tty=self._tty):
            yield piece

    async def _cut_after_exit(self) -> None:
        """Fetch what is left at the exit, and end the output where nothing comes any more, should a child hold the pipe.

        Before it ends the engine has to tell the exit code: an older one makes it 126 when its client leaves too early.
        """
        with contextlib.suppress(DispatcherError):
            await self._wait_end()
        self._ahead.keep_all()
        with contextlib.suppress(DispatcherError):
            self._code = self._code if self._code is not None else await self._exit_code(deadline_s=_UNREAD_S)
        count = -1
        while count != self._ahead.count or not self._ahead.is_silent:
            count = self._ahead.count
            await asyncio.sleep(_DRAIN_S)
        self._stream.stop_reading()

    async def write_stdin(self, data: bytes) -> None:
        await self._stream.write(data)

    async def close_stdin(self) -> None:
        if not self._tty:  # a terminal has no half-close: the engine would end the output
            self._stream.close_write()

    async def resize(self, width: int, height: int) -> None:
        if not self._tty or not (0 < width < 65536 and 0 < height < 65536):
            return
        with contextlib.suppress(NotFound, WrongState, InvalidRequest):
            await self._client.resize_exec(self._id, width, height)

    async def wait(self) -> int:
        if self._code is None:
            await self._wait_end()
            try:
                code = await self._exit_code(deadline_s=_UNREAD_S if self._killed else _CODE_DEADLINE_S)
            except RuntimeDown:
                if not self._killed:
                    raise
                # A newer engine tells the exit only once all output is read, and nobody reads. Leaving it may make it
                # 126, which no process had: this one was killed.
                self._stream.stop_reading()
                code = await self._exit_code()
                code = _KILLED if code == _NOT_EXECUTED else code
            self._code = code
        return self._code

    async def kill(self) -> None:
        if self._root is not None and self._pidfd is not None:
            self._killed = True
            await asyncio.to_thread(host.kill_tree, self._root, self._pidfd)

    async def aclose(self) -> None:
        if self._closed:
            return
        self._closed = True
        if self._cutting is not None:
            self._cutting.cancel()
        self._ahead.close()
        self._stream.abort()
        if self._pidfd is not None:
            fd, self._pidfd = self._pidfd, None
            os.close(fd)

    async def _wait_end(self) -> None:
        """Wait until the process has ended: by its pidfd, or by asking where it could not be held."""
        if self._pidfd is None:
            await self._exit_code(deadline_s=None)
            return
        fd = os.dup(self._pidfd)
        try:
            await host.wait_pidfd(fd)
        finally:
            os.close(fd)

    async def _exit_code(self, *, deadline_s: float | None = _CODE_DEADLINE_S) -> int:
        """Ask the engine, which may learn of the exit a moment after the kernel."""
        pause_s = 0.005
        try:
            async with asyncio.timeout(deadline_s):
                while True:
                    state = await self._client.inspect_exec(self._id)
                    if not state.get("Running") and state.get("ExitCode") is not None:
                        return int(state["ExitCode"])
                    self._ended.clear()
                    with contextlib.suppress(TimeoutError):
                        await asyncio.wait_for(self._ended.wait(), pause_s)
                    pause_s = min(pause_s * 2, 0.5)
        except NotFound as error:
            raise RuntimeDown("the Docker Engine forgot the exec: its exit code is not known") from error
        except TimeoutError as error:
            raise RuntimeDown("the Docker Engine does not tell the exit code of an exec that ended") from error


class AttachProcess:
    """An attachment to a container's first process.

    Args:
        client: for the size of its terminal.
        stream: what the engine gave.
        name: of the container in the engine.
        pid: of the process; 0 where it is not known.
        tty: it has a terminal.
        closes_stdin: the end of this input is the end of the process's (stdin_once); else another attachment may follow.
        exit_code: asks for its exit code, once its output has ended.
    """

    def __init__(
        self,
        client: DockerClient,
        stream: HijackedStream,
        name: str,
        *,
        pid: int,
        tty: bool,
        closes_stdin: bool,
        exit_code: Callable[[], Awaitable[int]],
    ) -> None:
        self._client = client
        self._stream = stream
        self._ahead = ReadAhead(stream)
        self._name = name
        self._tty = tty
        self._closes_stdin = closes_stdin
        self._exit_code = exit_code
        self._over = asyncio.Event()
        self._pidfd = host.open_pidfd(pid) if pid > 0 else None
        self._ending = asyncio.ensure_future(self._keep_all_at_exit())

    async def _keep_all_at_exit(self) -> None:
        if self._pidfd is not None:
            await host.wait_pidfd(self._pidfd)
            self._ahead.keep_all()

    async def output(self) -> AsyncIterator[tuple[str, bytes]]:
        try:
            async for piece in demultiplex(self._ahead, tty=self._tty):
                yield piece
        finally:
            self._over.set()

    async def write_stdin(self, data: bytes) -> None:
        await self._stream.write(data)

    async def close_stdin(self) -> None:
        # Half-closing where the input stays open would make the engine end the output: so it does for a terminal, which
        # has no half-close either, and for a container without StdinOnce.
        if self._closes_stdin and not self._tty:
            self._stream.close_write()

    async def resize(self, width: int, height: int) -> None:
        if not self._tty or not (0 < width < 65536 and 0 < height < 65536):
            return
        with contextlib.suppress(DispatcherError):
            await self._client.resize(self._name, width, height)

    async def wait(self) -> int:
        await self._over.wait()
        return await self._exit_code()

    async def kill(self) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        self._over.set()
        self._ending.cancel()
        await asyncio.gather(self._ending, return_exceptions=True)
        self._ahead.close()
        self._stream.abort()
        if self._pidfd is not None:
            fd, self._pidfd = self._pidfd, None
            os.close(fd)
