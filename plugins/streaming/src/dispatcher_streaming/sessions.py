"""Running one exec or attach: moving bytes between a carrier, a session without I/O, and the process behind it.

Every task of a session ends with it: when the client leaves, or the process ends, nothing of it is left. Input for a
process that does not read waits in a window; when that is full the carrier is not read either, so that the client waits.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable, Coroutine, Iterable
from dataclasses import dataclass
from typing import Any

from dispatcher.api import ExecStream, Process
from dispatcher.errors import DispatcherError
from dispatcher_streaming import remotecommand
from dispatcher_streaming.carriers import ByteCarrier
from dispatcher_streaming.pace import Pace
from dispatcher_streaming.windows import Budget, Window

log = logging.getLogger(__name__)

CHUNK = 32 * 1024  # as large as a Go client's own copies
STDIN_WINDOW = 256 * 1024
CREATE_S = 30.0  # for the streams of a session to stand
QUIET_S = 5.0  # without a byte behind an exit: a child may hold the pipe for ever
RESIZE_S = 0.2  # between two sizes of a terminal, each a call into the runtime

Start = Callable[[], Awaitable[Process]]


@dataclass(frozen=True, slots=True)
class Limits:
    """What sessions share, and how long an end may take.

    Args:
        budget: bytes that wait for processes and connections which are slow to take them.
        drain_s: how long a client may take to read what is left after its process ended.
    """

    budget: Budget
    drain_s: float


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a process ended: its code, or a sentence why there is none."""

    exit_code: int | None
    message: str = ""


async def run_spdy_command(
    carrier: ByteCarrier, session: remotecommand.SpdyCommand, start: Start, limits: Limits
) -> None:
    """Serve one exec or attach over SPDY until the process or the client ends."""
    runner = _Command(start, session.request, limits)
    pace = Pace()

    async def read() -> None:
        async for data in carrier.read():
            with pace.reading(len(data)):
                events, answer = session.receive(data)
                runner.take(events)
            await carrier.write(answer)
            await runner.settle(carrier)
            await pace.rest()

    async def write(stream: str, data: bytes) -> None:
        await carrier.write(session.output(stream, data))

    outcome = await runner.run(read, write)
    if outcome is not None:
        async with asyncio.timeout(limits.drain_s):
            await carrier.write(session.finish(outcome.exit_code, outcome.message))


async def run_websocket_command(
    carrier: ByteCarrier,
    session: remotecommand.WebSocketCommand,
    start: Start,
    limits: Limits,
    close: Callable[[], Awaitable[None]],
) -> None:
    """Serve one exec or attach over WebSocket until the process or the client ends."""
    runner = _Command(start, session.request, limits)
    pace = Pace()

    async def send(messages: Iterable[bytes]) -> None:
        for message in messages:
            await carrier.write(message)

    async def read() -> None:
        runner.take([remotecommand.Ready()])
        async for message in carrier.read():
            with pace.reading(len(message)):
                runner.take(session.receive(message))
            await runner.settle(carrier)
            await pace.rest()

    async def write(stream: str, data: bytes) -> None:
        await send(session.output(stream, data))

    await send(session.greeting())
    outcome = await runner.run(read, write)
    if outcome is not None:
        async with asyncio.timeout(limits.drain_s):
            await send(session.finish(outcome.exit_code, outcome.message))
            await close()


async def uncancelled(act: Coroutine[Any, Any, None]) -> None:
    """Do something to its end, also where this task is cancelled meanwhile; the cancellation is raised behind it."""
    doing = asyncio.ensure_future(act)
    try:
        await asyncio.shield(doing)
    except asyncio.CancelledError:
        await asyncio.wait({doing})
        raise


class _Command:
    """The process side of an exec or attach."""

    def __init__(self, start: Start, request: ExecStream, limits: Limits) -> None:
        self._start = start
        self._request = request
        self._drain_s = limits.drain_s
        self._ready = asyncio.Event()
        self._gone = asyncio.Event()
        self._stdin = Window(STDIN_WINDOW, limits.budget)
        self._size: remotecommand.Resize | None = None
        self._resized = asyncio.Event()

    def take(self, events: Iterable[remotecommand.Event]) -> None:
        """Act on what the client sent."""
        for event in events:
            if isinstance(event, remotecommand.Ready):
                self._ready.set()
            elif isinstance(event, remotecommand.StdinData):
                self._stdin.put(event.data)
            elif isinstance(event, remotecommand.StdinEnd):
                self._stdin.end()
            elif isinstance(event, remotecommand.Resize):
                self._size = event  # a flood of sizes is one size: the last
                self._resized.set()
            else:
                self._gone.set()

    async def settle(self, carrier: ByteCarrier) -> None:
        """Wait while the process does not read its input. Raises ConnectionError when the client leaves meanwhile."""
        while self._stdin.is_full:
            await carrier.pause(self._stdin.wait_room())

    async def run(
        self, read: Callable[[], Awaitable[None]], write: Callable[[str, bytes], Awaitable[None]]
    ) -> Outcome | None:
        """Serve until the process ended (its outcome) or the client left (None)."""
        reading = asyncio.ensure_future(self._read(read))
        try:
            try:
                async with asyncio.timeout(CREATE_S):
                    await self._ready.wait()
            except TimeoutError:
                return Outcome(None, "the client did not open all of its streams")
            if self._gone.is_set():
                return None
            try:
                process = await self._start()
            except DispatcherError as error:
                return Outcome(None, error.message)
            return await self._serve(process, write)
        finally:
            reading.cancel()
            await asyncio.wait({reading})
            self._stdin.close()
            if not reading.cancelled() and (broken := reading.exception()) is not None:
                raise broken

    async def _read(self, read: Callable[[], Awaitable[None]]) -> None:
        try:
            await read()
        finally:
            self._gone.set()
            self._ready.set()

    async def _serve(self, process: Process, write: Callable[[str, bytes], Awaitable[None]]) -> Outcome | None:
        feeding = asyncio.ensure_future(self._feed(process))
        sizing = asyncio.ensure_future(self._follow_size(process))
        output = _Output(write)
        copying = asyncio.ensure_future(output.copy(process))
        waiting = asyncio.ensure_future(process.wait())
        leaving = asyncio.ensure_future(self._gone.wait())
        tasks = {feeding, sizing, copying, waiting, leaving}
        try:
            await asyncio.wait({waiting, leaving, copying}, return_when=asyncio.FIRST_COMPLETED)
            if copying.done() and not waiting.done() and not leaving.done():
                copying.result()  # a client that broke off raises here
                await asyncio.wait({waiting, leaving}, return_when=asyncio.FIRST_COMPLETED)
            if not waiting.done():
                return None
            await output.drain({copying, leaving}, self._drain_s)
            if leaving.done():
                return None
            return Outcome(waiting.result())
        except DispatcherError as error:
            return Outcome(None, error.message)
        finally:
            await uncancelled(self._leave(process, tasks, kill=not waiting.done()))

    @staticmethod
    async def _leave(process: Process, tasks: Iterable[asyncio.Future[Any]], *, kill: bool) -> None:
        if kill:
            with contextlib.suppress(DispatcherError):
                await process.kill()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await process.aclose()

    async def _feed(self, process: Process) -> None:
        """Pass the input on. Afterwards what still comes is dropped, so that the client is read on."""
        try:
            if self._request.stdin:
                with contextlib.suppress(BrokenPipeError, ConnectionError, DispatcherError):
                    while data := await self._stdin.get():
                        await process.write_stdin(data)
                    await process.close_stdin()
        finally:
            self._stdin.close()

    async def _follow_size(self, process: Process) -> None:
        while True:
            await self._resized.wait()
            self._resized.clear()
            if self._size is not None:
                with contextlib.suppress(DispatcherError):
                    await process.resize(self._size.width, self._size.height)
            await asyncio.sleep(RESIZE_S)


class _Output:
    """The output of a process on its way to the client."""

    def __init__(self, write: Callable[[str, bytes], Awaitable[None]]) -> None:
        self._write = write
        self._written = 0
        self._writing = False

    async def copy(self, process: Process) -> None:
        """Copy until the output ends."""
        async for stream, data in process.output():
            for start in range(0, len(data), CHUNK):
                self._writing = True
                await self._write(stream, data[start : start + CHUNK])
                self._writing = False
                self._written += 1

    async def drain(self, ends: set[asyncio.Future[Any]], drain_s: float) -> None:
        """Wait, behind the exit, until one of `ends` is done or nothing comes any more, but not longer than `drain_s`:
        a child may write for ever, and a client may never read.
        """
        deadline = asyncio.get_running_loop().time() + drain_s
        while (left_s := deadline - asyncio.get_running_loop().time()) > 0:
            written = self._written
            done, _ = await asyncio.wait(ends, timeout=min(QUIET_S, left_s), return_when=asyncio.FIRST_COMPLETED)
            if done or (written == self._written and not self._writing):
                return
