"""Sessions with the agent of a guest over a UNIX socket, and a channel that keeps one alive.

`Session` is one connection: it ends with the connection, and everything in flight ends with it. `Channel` connects
again for as long as the guest's socket is there. What frames mean is in `protocol`, what requests mean in `client`.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any

from dispatcher.errors import DispatcherError, RuntimeDown
from dispatcher_hyper_vm.agent.protocol import (
    MAX_PAYLOAD,
    WINDOW,
    Credit,
    Data,
    Ended,
    Event,
    Hello,
    HostConnection,
    Message,
    RemoteProtocolError,
    Reply,
    Reset,
)

log = logging.getLogger(__name__)

_READ_BYTES = 256 * 1024
_RETRY_S = (0.02, 1.0)  # first and longest pause between two attempts to connect
_GREETING_S = (1.0, 16.0)  # how long a connection may stay without a greeting, at first and at most
_FAULT_RETRY_S = 5.0  # after the guest broke the protocol


class AgentAway(RuntimeDown):
    """The agent cannot be reached now, or went away before it answered. What was asked may have been done."""


class StreamReset(DispatcherError):
    """The guest let go of a stream; the message is its reason."""


class GuestStream:
    """One stream of a session, for one reader and one writer. Not reading it holds the guest's side back."""

    def __init__(self, session: Session, number: int, window: int) -> None:
        self._session = session
        self._window = window
        self._queue: deque[Data] = deque()
        self._changed = asyncio.Event()
        self._ended = False
        self._error: Exception | None = None
        self._sending = asyncio.Lock()
        self.id = number
        self.exit_code: int | None = None

    async def receive(self) -> Data | None:
        """Return the next bytes, or None at the end.

        Raises:
            AgentAway: the session ended before the stream did.
            StreamReset: the guest let go of it.
        """
        while not self._queue:
            if self._ended:
                return None
            if self._error is not None:
                raise self._error
            self._changed.clear()
            await self._changed.wait()
        data = self._queue.popleft()
        self._session.grant(self.id, data.position, self._window)
        return data

    async def wait_ended(self) -> None:
        """Wait until the guest has ended its direction; what it sent may still be unread.

        Raises:
            AgentAway, StreamReset: as `receive`.
        """
        while not self._ended:
            if self._error is not None:
                raise self._error
            self._changed.clear()
            await self._changed.wait()

    async def write(self, data: bytes) -> None:
        """Write all of `data`, waiting while the guest takes none.

        Raises:
            BrokenPipeError: the other end is closed, or the stream gone.
        """
        async with self._sending:
            while data:
                if self._error is not None:
                    raise BrokenPipeError(str(self._error))
                room = self._session.sendable(self.id)
                if not room:
                    self._changed.clear()
                    await self._changed.wait()
                    continue
                size = min(room, MAX_PAYLOAD, len(data))
                await self._session.send_data(self.id, data[:size])
                data = data[size:]

    async def end(self) -> None:
        """Close our direction behind all that is being written. Idempotent."""
        async with self._sending:
            self._session.end_stream(self.id)

    def reset(self) -> None:
        """Let go of the stream. Idempotent; never waits."""
        self._session.reset_stream(self.id)
        if not self._ended:
            self.fail(StreamReset("The stream was closed here."))

    # Called by the session.
    def feed(self, data: Data) -> None:
        """Take data that arrived."""
        self._queue.append(data)
        self._changed.set()

    def wake(self) -> None:
        """Let a writer look again: credit arrived."""
        self._changed.set()

    def finish(self, code: int | None) -> None:
        """The guest's direction ended."""
        self._ended = True
        self.exit_code = code
        self._changed.set()

    def fail(self, error: Exception) -> None:
        """The stream is gone; what arrived before can still be read."""
        if self._error is None:
            self._error = error
        self._changed.set()


class Session:
    """One connection to an agent, from its greeting to its end.

    Args:
        on_event: called with each event's message; must not block.
    """

    def __init__(
        self,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        on_event: Callable[[Message], None],
    ) -> None:
        self._reader = reader
        self._writer = writer
        self._on_event = on_event
        self._protocol = HostConnection()
        self._waiting: dict[int, asyncio.Future[Message]] = {}
        self._streams: dict[int, GuestStream] = {}
        self._greeting: asyncio.Future[Hello] = asyncio.get_running_loop().create_future()
        self._task: asyncio.Task[None] | None = None
        self._error: DispatcherError | None = None
        self.ended = asyncio.Event()

    @classmethod
    async def open(cls, path: str, on_event: Callable[[Message], None]) -> Session:
        """Connect and greet. The caller's deadline bounds it: a guest may stay silent for ever.

        Raises:
            AgentAway: there is no such socket, or nobody listens.
            RemoteProtocolError: what answers is no agent.
            VersionMismatch: no version is shared.
        """
        try:
            reader, writer = await asyncio.open_unix_connection(path, limit=_READ_BYTES)
        except OSError as error:
            raise AgentAway("The virtual machine's agent socket cannot be reached.") from error
        session = cls(reader, writer, on_event)
        session._task = asyncio.create_task(session._run(), name="agent session")
        try:
            await asyncio.shield(session._greeting)
        except BaseException:
            await session.aclose()
            raise
        return session

    @property
    def hello(self) -> Hello:
        """The guest's greeting."""
        return self._greeting.result()

    @property
    def error(self) -> DispatcherError | None:
        """Why the session ended, or None while it lasts."""
        return self._error

    async def request(self, body: Mapping[str, Any], blob: bytes = b"") -> Message:
        """Ask, and wait for the answer. Cancelling drops the answer, not what was asked.

        Raises:
            AgentAway: the session ended first.
            RequestTooLarge: the request does not fit.
        """
        if self._error is not None:
            raise AgentAway("The virtual machine's agent went away.") from self._error
        number, frames = self._protocol.request(Message(body, blob))
        future: asyncio.Future[Message] = asyncio.get_running_loop().create_future()
        self._waiting[number] = future
        self._writer.writelines(frames)
        await self._drain()
        return await future

    def open_stream(self, position: int = 0, window: int = WINDOW) -> GuestStream:
        """Make a stream that a request will name. The caller resets it when the request fails.

        Raises:
            AgentAway: the session has ended.
        """
        if self._error is not None:
            raise AgentAway("The virtual machine's agent went away.") from self._error
        number = self._protocol.open_stream(position, window)
        stream = self._streams[number] = GuestStream(self, number, window)
        return stream

    async def aclose(self) -> None:
        """Close the connection. Idempotent. Requests and streams in flight end with AgentAway."""
        self._end(AgentAway("The connection to the virtual machine's agent was closed."))
        if self._task is not None and self._task is not asyncio.current_task():
            self._task.cancel()
            await asyncio.wait({self._task})
        with contextlib.suppress(OSError):
            await self._writer.wait_closed()

    # ------------------------------------------------------------------------------------------ for the streams of it
    def grant(self, stream: int, consumed: int, window: int) -> None:
        """Extend the guest's credit, once half of it is used up."""
        if self._error is None:
            self._write(self._protocol.grant_if_low(stream, consumed, window))

    def sendable(self, stream: int) -> int:
        """See HostConnection.sendable."""
        return self._protocol.sendable(stream)

    async def send_data(self, stream: int, data: bytes) -> None:
        """Send data within the credit."""
        self._write(self._protocol.send_data(stream, data))
        await self._drain()

    def end_stream(self, stream: int) -> None:
        """Close our direction of a stream."""
        self._write(self._protocol.end_stream(stream))

    def reset_stream(self, stream: int) -> None:
        """Let go of a stream."""
        self._streams.pop(stream, None)
        self._write(self._protocol.reset_stream(stream))

    # ------------------------------------------------------------------------------------------------------- the task
    async def _run(self) -> None:
        try:
            self._writer.write(self._protocol.begin())
            while data := await self._reader.read(_READ_BYTES):
                self._protocol.receive(data)
                while (event := self._protocol.next_event()) is not None:
                    self._dispatch(event)
            self._end(AgentAway("The virtual machine closed its agent socket."))
        except DispatcherError as error:
            self._end(error)
        except OSError as error:
            away = AgentAway("The connection to the virtual machine's agent broke.")
            away.__cause__ = error
            self._end(away)

    def _dispatch(self, event: Hello | Reply | Event | Data | Credit | Ended | Reset) -> None:
        match event:
            case Hello():
                if not self._greeting.done():
                    self._greeting.set_result(event)
            case Reply():
                future = self._waiting.pop(event.id)
                if not future.done():
                    future.set_result(event.message)
            case Event():
                self._on_event(event.message)
            case Data():
                self._streams[event.stream].feed(event)
            case Credit():
                self._streams[event.stream].wake()
            case Ended():
                self._streams[event.stream].finish(event.code)
            case Reset():
                self._streams.pop(event.stream).fail(StreamReset(event.reason))

    def _end(self, error: DispatcherError) -> None:
        if self._error is not None:
            return
        self._error = error
        if not self._greeting.done():
            self._greeting.set_exception(error)
            self._greeting.exception()  # looked at: nobody may be waiting any more
        away = AgentAway("The virtual machine's agent went away before it answered.")
        away.__cause__ = error
        for future in self._waiting.values():
            if not future.done():
                future.set_exception(away)
                future.exception()
        self._waiting.clear()
        for stream in self._streams.values():
            stream.fail(away)
        self._streams.clear()
        self._writer.close()
        self.ended.set()

    def _write(self, data: bytes) -> None:
        if data and self._error is None:
            self._writer.write(data)

    async def _drain(self) -> None:
        with contextlib.suppress(OSError):  # the reader notices the end, and says so
            await self._writer.drain()


class Channel:
    """Keeps a session with one guest alive: connects, and connects again, until it is closed.

    Args:
        path: the UNIX socket on which the virtual machine listens.
        on_event: called with each event of any session.
        on_session: called with each new session, before anybody else gets it.
    """

    def __init__(
        self,
        path: str,
        on_event: Callable[[Message], None],
        on_session: Callable[[Session], None] = lambda _session: None,
    ) -> None:
        self._path = path
        self._on_event = on_event
        self._on_session = on_session
        self._session: Session | None = None
        self._ready = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self.fault: DispatcherError | None = None  # why there is no session, where that is more than "not yet"

    def start(self) -> None:
        """Begin to connect. Idempotent."""
        if self._task is None:
            self._task = asyncio.create_task(self._run(), name="agent channel")

    @property
    def is_connected(self) -> bool:
        """True while there is a session."""
        return self._ready.is_set()

    async def session(self) -> Session:
        """Return the live session, waiting for one. The caller's deadline bounds it.

        Raises:
            RemoteProtocolError, VersionMismatch: what answers there is no agent of ours.
            AgentAway: the channel is closed.
        """
        while self._session is None or not self._ready.is_set():
            if self.fault is not None:
                raise self.fault
            if self._task is None or self._task.done():
                raise AgentAway("The channel to the virtual machine's agent is closed.")
            await self._ready.wait()
        return self._session

    async def aclose(self) -> None:
        """End the session, and connect no more. Idempotent."""
        task, self._task = self._task, None
        if task is not None:
            task.cancel()
            await asyncio.wait({task})
        self._ready.set()  # whoever waits learns that it is closed
        self._session = None

    async def _run(self) -> None:
        pause, longest = _RETRY_S
        patience, most_patience = _GREETING_S
        while True:
            session = None
            try:
                session = await self._open(patience)
                patience = _GREETING_S[0]
                self.fault = None
                self._on_session(session)
                self._session = session
                self._ready.set()
                await session.ended.wait()
                pause = _RETRY_S[0]
                raise session.error or AgentAway("The session ended.")
            except AgentAway as error:
                log.debug("no agent", extra={"socket": self._path, "cause": str(error)})
                self._lose()
                patience = min(2 * patience, most_patience)
                await asyncio.sleep(pause)
                pause = min(2 * pause, longest)
            except DispatcherError as error:
                log.warning("agent refused", extra={"socket": self._path, "cause": str(error)})
                self.fault = error
                self._ready.set()  # whoever waits learns why
                self._lose()
                await asyncio.sleep(_FAULT_RETRY_S)
            finally:
                if session is not None:
                    await session.aclose()

    async def _open(self, patience_s: float) -> Session:
        """A greeted session. A guest whose port slept through our connecting hears the next one: so none is waited for
        for ever, and each longer than the one before, for guests that are slow.
        """
        try:
            async with asyncio.timeout(patience_s):
                return await Session.open(self._path, self._on_event)
        except TimeoutError as error:
            raise AgentAway("The virtual machine's agent did not greet.") from error

    def _lose(self) -> None:
        self._session = None
        if self.fault is None:
            self._ready.clear()


__all__ = ["AgentAway", "Channel", "GuestStream", "RemoteProtocolError", "Session", "StreamReset"]
