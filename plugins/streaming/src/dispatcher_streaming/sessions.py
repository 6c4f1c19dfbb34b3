"""Running one session: moving bytes between a carrier, a sans-I/O session object and the processes behind it.

Every task of a session belongs to its task group: when the client leaves, or the process ends, nothing of it is left.
What waits for a process that does not read is bounded; then the carrier is not read either, so that the client waits.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass
from typing import Any

from dispatcher.api import ExecStream, Process
from dispatcher.errors import DispatcherError
from dispatcher_streaming import portforward, remotecommand
from dispatcher_streaming.carriers import ByteCarrier

log = logging.getLogger(__name__)

CHUNK = 32 * 1024  # as large as a Go client's own copies
QUEUED = 16  # chunks that wait for one process or connection: with 64 KiB reads at most 1 MiB
CREATE_S = 30.0  # for the streams of a session or connection to stand
DRAIN_S = 5.0  # without a byte behind an exit (a child may hold the pipe for ever)
STALLS = 12  # such waits in a row for a client that does not read
DRAIN_MAX_S = 300.0  # for all output behind an exit (a child may write for ever)
LINGER_S = 5.0  # for a client to read the end of its session

Start = Callable[[], Awaitable[Process]]
Connect = Callable[[int], Awaitable[Process]]
_END = b""


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a process ended: its code, or a sentence why there is none."""

    exit_code: int | None
    message: str = ""


async def run_spdy_command(carrier: ByteCarrier, session: remotecommand.SpdyCommand, start: Start) -> None:
    """Serve one exec or attach over SPDY until the process or the client ends."""
    runner = _Command(start, session.request)

    async def read() -> None:
        async for data in carrier.read():
            events, answer = session.receive(data)
            await carrier.write(answer)
            await runner.take(events)

    async def write(stream: str, data: bytes) -> None:
        await carrier.write(session.output(stream, data))

    outcome = await runner.run(read, write)
    if outcome is not None:
        await carrier.write(session.finish(outcome.exit_code, outcome.message))


async def run_websocket_command(
    carrier: ByteCarrier, session: remotecommand.WebSocketCommand, start: Start, close: Callable[[], Awaitable[None]]
) -> None:
    """Serve one exec or attach over WebSocket until the process or the client ends."""
    runner = _Command(start, session.request)

    async def send(messages: Iterable[bytes]) -> None:
        for message in messages:
            await carrier.write(message)

    async def read() -> None:
        await runner.take([remotecommand.Ready()])
        async for message in carrier.read():
            await runner.take(session.receive(message))

    async def write(stream: str, data: bytes) -> None:
        await send(session.output(stream, data))

    await send(session.greeting())
    outcome = await runner.run(read, write)
    if outcome is not None:
        await send(session.finish(outcome.exit_code, outcome.message))
        await close()


class _Command:
    """The process side of an exec or attach."""

    def __init__(self, start: Start, request: ExecStream) -> None:
        self._start = start
        self._request = request
        self._ready = asyncio.Event()
        self._gone = asyncio.Event()
        self._stdin: asyncio.Queue[bytes] = asyncio.Queue(QUEUED)
        self._size: remotecommand.Resize | None = None
        self._resized = asyncio.Event()

    async def take(self, events: Iterable[remotecommand.Event]) -> None:
        """Act on what the client sent; waits while the process does not read its input."""
        for event in events:
            if isinstance(event, remotecommand.Ready):
                self._ready.set()
            elif isinstance(event, remotecommand.StdinData):
                await self._stdin.put(event.data)
            elif isinstance(event, remotecommand.StdinEnd):
                await self._stdin.put(_END)
            elif isinstance(event, remotecommand.Resize):
                self._size = event  # a flood of sizes is one size: the last
                self._resized.set()
            else:
                self._gone.set()

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
            await output.drain({copying, leaving})
            if leaving.done():
                return None
            return Outcome(waiting.result())
        except DispatcherError as error:
            return Outcome(None, error.message)
        finally:
            if not waiting.done():
                await asyncio.shield(asyncio.ensure_future(process.kill()))
            for task in tasks:
                task.cancel()
            await asyncio.wait(tasks)
            await process.aclose()

    async def _feed(self, process: Process) -> None:
        if not self._request.stdin:
            return
        with contextlib.suppress(BrokenPipeError, ConnectionError):
            while (data := await self._stdin.get()) != _END:
                await process.write_stdin(data)
            await process.close_stdin()
        while True:
            await self._stdin.get()  # nobody reads it any more: what still comes is dropped, so that the reader goes on

    async def _follow_size(self, process: Process) -> None:
        while True:
            await self._resized.wait()
            self._resized.clear()
            if self._size is not None:
                with contextlib.suppress(DispatcherError):
                    await process.resize(self._size.width, self._size.height)


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

    async def drain(self, ends: set[asyncio.Future[Any]]) -> None:
        """Wait, behind the exit, until one of `ends` is done, nothing comes any more, or the client does not read."""
        deadline = asyncio.get_running_loop().time() + DRAIN_MAX_S
        stalls = 0
        while asyncio.get_running_loop().time() < deadline and stalls < STALLS:
            written = self._written
            done, _ = await asyncio.wait(ends, timeout=DRAIN_S, return_when=asyncio.FIRST_COMPLETED)
            if done or (written == self._written and not self._writing):
                return
            stalls = stalls + 1 if written == self._written else 0


async def run_port_forward(carrier: ByteCarrier, connect: Connect) -> None:
    """Serve one port-forward session: many connections, each with its own tasks, until the client leaves."""
    session = portforward.PortForward()
    forwards: dict[str, _Forward] = {}
    async with asyncio.TaskGroup() as group:
        async for received in carrier.read():
            events, answer = session.receive(received)
            await carrier.write(answer)
            for event in events:
                if isinstance(event, portforward.Connect):
                    forward = forwards[event.key] = _Forward(session, carrier, event.key)
                    forward.task = group.create_task(forward.run(connect, event.port))
                    forward.task.add_done_callback(lambda _, key=event.key: forwards.pop(key, None))  # type: ignore[misc]
                elif isinstance(event, portforward.Data) and event.key in forwards:
                    await forwards[event.key].put(event.data)
                elif isinstance(event, portforward.End) and event.key in forwards:
                    await forwards[event.key].put(_END)
                elif isinstance(event, portforward.Reset) and event.key in forwards:
                    forwards[event.key].cancel()
                elif isinstance(event, portforward.Gone):
                    break
            else:
                continue
            break
        for forward in list(forwards.values()):
            forward.cancel()


class _Forward:
    """One forwarded connection."""

    def __init__(self, session: portforward.PortForward, carrier: ByteCarrier, key: str) -> None:
        self._session = session
        self._carrier = carrier
        self._key = key
        self._queue: asyncio.Queue[bytes] = asyncio.Queue(QUEUED)
        self.task: asyncio.Task[None] | None = None

    async def put(self, data: bytes) -> None:
        """Queue bytes for the pod. A connection that ended meanwhile takes them no more."""
        assert self.task is not None
        putting = asyncio.ensure_future(self._queue.put(data))
        await asyncio.wait({putting, self.task}, return_when=asyncio.FIRST_COMPLETED)
        putting.cancel()

    def cancel(self) -> None:
        """Give the connection up."""
        if self.task is not None:
            self.task.cancel()

    async def run(self, connect: Connect, port: int) -> None:
        """Connect and copy both ways until both are done; tell the client how it ended."""
        try:
            stream = await connect(port)
        except DispatcherError as error:
            await self._carrier.write(self._session.fail(self._key, f"error forwarding port {port}: {error.message}"))
            return
        sending = asyncio.ensure_future(self._send(stream))
        try:
            async for _, data in stream.output():
                for start in range(0, len(data), CHUNK):
                    await self._carrier.write(self._session.data(self._key, data[start : start + CHUNK]))
            await self._carrier.write(self._session.end(self._key))
        except ConnectionError as error:
            log.debug("a forwarded connection broke", extra={"cause": str(error)})
        finally:
            sending.cancel()
            await asyncio.wait({sending})
            await stream.kill()
            await stream.aclose()

    async def _send(self, stream: Process) -> None:
        with contextlib.suppress(BrokenPipeError, ConnectionError):
            while (data := await self._queue.get()) != _END:
                await stream.write_stdin(data)
            await stream.close_stdin()
