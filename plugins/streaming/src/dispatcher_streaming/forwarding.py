"""Running one port-forward session: many connections, each with its own tasks and window, until the client leaves.

What a pod is slow to take waits in the window of its connection, so that the others go on. A window that is full holds
the session up, for clients know no flow control but that of the whole connection. That is bounded: a connection that
takes nothing at all is broken off, soon where others wait for it, later where it is alone.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass
from typing import Protocol

from dispatcher.api import Process
from dispatcher.errors import DispatcherError
from dispatcher_streaming import portforward
from dispatcher_streaming.carriers import ByteCarrier
from dispatcher_streaming.pace import Pace
from dispatcher_streaming.sessions import CHUNK, uncancelled
from dispatcher_streaming.windows import Budget, Window

log = logging.getLogger(__name__)

WINDOW = 1 << 20
STALL_S = 5.0  # that a connection may hold up the others of its session
STALL_ALONE_S = 60.0  # that it may hold up those which may still come
EXPIRE_S = 1.0  # how often half-open pairs are looked for

Connect = Callable[[int], Awaitable[Process]]
Wire = bytes | list[bytes]


class ForwardSession(Protocol):
    """A port-forward session without I/O: `portforward.PortForward` or `portforward_channels.ChannelForward`."""

    @property
    def half_close_s(self) -> float:
        """How long a pod is still sent to that has ended its own side, while nothing moves."""

    @property
    def is_over(self) -> bool:
        """Whether the server is to end the session."""

    def receive(self, data: bytes, /) -> tuple[list[portforward.Event], Wire]:
        """What the peer's bytes mean, and what to send back."""

    def expire(self) -> Wire:
        """What to send to connections that did not come about in time."""

    def data(self, key: str, data: bytes) -> Wire:
        """Bytes of the pod."""

    def end_output(self, key: str) -> Wire:
        """The pod will send no more."""

    def end(self, key: str) -> Wire:
        """A connection is over."""

    def fail(self, key: str, message: str) -> Wire:
        """A connection failed."""

    def give_up(self, key: str) -> Wire:
        """A connection is broken off because it takes nothing."""


@dataclass(frozen=True, slots=True)
class ForwardLimits:
    """What sessions share.

    Args:
        budget: bytes that wait for pods which are slow to take them.
        connections: forwarded connections, each with a socket of ours.
    """

    budget: Budget
    connections: Budget


async def run_port_forward(
    carrier: ByteCarrier,
    session: ForwardSession,
    connect: Connect,
    limits: ForwardLimits,
    opening: Iterable[portforward.Event] = (),
) -> None:
    """Serve one session until the client leaves, or the session is over by itself.

    Args:
        carrier: to the client.
        session: its protocol.
        connect: opens a connection to a port of the pod.
        limits: what all sessions share.
        opening: what to do before anything comes.
    """
    runner = _Session(carrier, session, connect, limits)
    async with asyncio.TaskGroup() as group:
        runner.group = group
        watching = group.create_task(runner.expire())
        reading = group.create_task(runner.read(opening))
        over = group.create_task(runner.over.wait())
        await asyncio.wait({reading, over}, return_when=asyncio.FIRST_COMPLETED)
        for task in (watching, reading, over):
            task.cancel()
        runner.cancel_all()


class _Session:
    """The connections of one session."""

    def __init__(self, carrier: ByteCarrier, session: ForwardSession, connect: Connect, limits: ForwardLimits) -> None:
        self._carrier = carrier
        self._session = session
        self._connect = connect
        self._limits = limits
        self._forwards: dict[str, _Forward] = {}
        self.group: asyncio.TaskGroup | None = None
        self.over = asyncio.Event()

    async def read(self, opening: Iterable[portforward.Event]) -> None:
        """Act on what comes, until the client leaves."""
        await self._take(opening)
        pace = Pace()
        async for received in self._carrier.read():
            with pace.reading(len(received)):
                events, answer = self._session.receive(received)
            await self.send(answer)
            if not await self._take(events):
                return
            for key in {event.key for event in events if isinstance(event, portforward.Data)}:
                await self._settle(key)
            await pace.rest()

    async def _take(self, events: Iterable[portforward.Event]) -> bool:
        """Act on events. False when the client is leaving."""
        for event in events:
            if isinstance(event, portforward.Gone):
                return False
            if isinstance(event, portforward.Connect):
                await self._open(event)
            elif (forward := self._forwards.get(event.key)) is not None:
                if isinstance(event, portforward.Data):
                    forward.window.put(event.data)
                elif isinstance(event, portforward.End):
                    forward.window.end()
                else:
                    forward.cancel()
        return True

    async def _open(self, event: portforward.Connect) -> None:
        if not self._limits.connections.take(1):
            await self.send(self._session.fail(event.key, "too many connections are forwarded on this node"))
            return
        assert self.group is not None
        forward = self._forwards[event.key] = _Forward(self, event.key, Window(WINDOW, self._limits.budget))
        forward.task = self.group.create_task(forward.run(self._connect, event.port))
        forward.task.add_done_callback(lambda _: self._close(event.key, forward))

    def _close(self, key: str, forward: _Forward) -> None:
        self._limits.connections.give(1)
        forward.window.close()
        if self._forwards.get(key) is forward:  # the client may use its request ids again
            del self._forwards[key]
        if self._session.is_over:
            self.over.set()

    async def _settle(self, key: str) -> None:
        """Wait while a connection has no room, as long as it takes something now and then."""
        while (forward := self._forwards.get(key)) is not None and forward.window.is_full:
            moved = forward.window.moved
            try:
                async with asyncio.timeout(STALL_S if len(self._forwards) > 1 else STALL_ALONE_S):
                    await self._carrier.pause(forward.window.wait_room())
            except TimeoutError:
                if forward.window.moved == moved:
                    log.info("a forwarded connection was broken off: the pod takes nothing", extra={"key": key})
                    forward.cancel()
                    await self.send(self._session.give_up(key))
                    return

    async def expire(self) -> None:
        """Look for half-open pairs, for ever."""
        while True:
            await asyncio.sleep(EXPIRE_S)
            await self.send(self._session.expire())

    async def send(self, wire: Wire) -> None:
        """Send bytes, or messages one by one."""
        for part in [wire] if isinstance(wire, bytes) else wire:
            await self._carrier.write(part)

    def cancel_all(self) -> None:
        """Give all connections up."""
        for forward in list(self._forwards.values()):
            forward.cancel()

    @property
    def protocol(self) -> ForwardSession:
        """The session without I/O."""
        return self._session


class _Forward:
    """One forwarded connection."""

    def __init__(self, session: _Session, key: str, window: Window) -> None:
        self._session = session
        self._key = key
        self.window = window
        self.task: asyncio.Task[None] | None = None

    def cancel(self) -> None:
        """Give the connection up."""
        self.window.close()
        if self.task is not None:
            self.task.cancel()

    async def run(self, connect: Connect, port: int) -> None:
        """Connect and copy both ways until both are done; tell the client how it ended."""
        session, protocol = self._session, self._session.protocol
        try:
            stream = await connect(port)
        except DispatcherError as error:
            await session.send(protocol.fail(self._key, f"error forwarding port {port}: {error.message}"))
            return
        sending = asyncio.ensure_future(self._send(stream))
        try:
            async for _, data in stream.output():
                for start in range(0, len(data), CHUNK):
                    await session.send(protocol.data(self._key, data[start : start + CHUNK]))
            await session.send(protocol.end_output(self._key))
            await self._finish_sending(sending, protocol.half_close_s)
            await session.send(protocol.end(self._key))
        except DispatcherError as error:
            await session.send(protocol.fail(self._key, f"port {port}: {error.message}"))
        except ConnectionError as error:
            log.debug("a forwarded connection broke", extra={"cause": str(error)})
        finally:
            await uncancelled(self._leave(stream, sending))

    @staticmethod
    async def _leave(stream: Process, sending: asyncio.Future[None]) -> None:
        sending.cancel()
        await asyncio.gather(sending, return_exceptions=True)
        with contextlib.suppress(DispatcherError):
            await stream.kill()
        await stream.aclose()

    async def _finish_sending(self, sending: asyncio.Future[None], quiet_s: float) -> None:
        """The pod has said its last word: pass on what the client still sends, as long as something moves."""
        moved = -1
        while not sending.done() and moved != self.window.moved:
            moved = self.window.moved
            await asyncio.wait({sending}, timeout=quiet_s)

    async def _send(self, stream: Process) -> None:
        try:
            with contextlib.suppress(BrokenPipeError, ConnectionError, DispatcherError):
                while data := await self.window.get():
                    await stream.write_stdin(data)
                await stream.close_stdin()
        finally:
            self.window.close()
