"""What brings bytes or messages to a session: a bare TCP connection after an upgrade, or a WebSocket.

The only place, with `server` and `peers`, that does I/O. A carrier writes with back-pressure; while nobody reads from it,
`pause` watches for a client that leaves.
"""

from __future__ import annotations

import asyncio
import fcntl
import struct
import termios
from collections.abc import AsyncIterator, Callable, Coroutine
from typing import Protocol

from websockets.frames import Opcode
from websockets.protocol import State
from websockets.server import ServerProtocol

from dispatcher_streaming.pace import Pace
from dispatcher_streaming.peers import PeerTable
from dispatcher_streaming.windows import Budget, Share

READ = 64 * 1024
PROBE_S = 2.0  # how often a client is looked for that is not read
CLOSE_S = 2.0  # for the answer to a WebSocket's close
LINGER_S = 5.0  # without the client reading a byte of what it was sent last
LINGER_MAX_S = 120.0


class ByteCarrier(Protocol):
    """Carries a stream of bytes both ways."""

    def read(self) -> AsyncIterator[bytes]:
        """Yield what comes, until the peer ends."""

    async def write(self, data: bytes) -> None:
        """Send, waiting while the peer does not read. Raises ConnectionError when it is gone."""

    async def pause(self, room: Coroutine[None, None, None]) -> None:
        """Wait for room instead of reading. Raises ConnectionError when the peer leaves meanwhile."""


class Link:
    """One TCP connection, with the moment when something last moved on it.

    Args:
        reader: of the connection; the memory that it takes is its limit twice and one read of the loop, 384 KiB.
        writer: of the connection.
        peers: where to look for a client that is not read.
        idle_s: after so long without a byte in either direction the connection is broken off.
    """

    def __init__(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, peers: PeerTable, idle_s: float
    ) -> None:
        self._reader = reader
        self._writer = writer
        self._peers = peers
        self._idle_s = idle_s
        self._loop = asyncio.get_running_loop()
        self._moved_s = self._loop.time()
        self._timer = self._loop.call_later(idle_s, self._check_idle)

    async def read(self) -> bytes:
        """Some bytes, b"" at the end."""
        data = await self._reader.read(READ)
        self._moved_s = self._loop.time()
        return data

    def put(self, data: bytes) -> None:
        """Send without waiting."""
        if data:
            self._writer.write(data)

    async def drain(self) -> None:
        """Wait while the peer does not read."""
        await self._writer.drain()
        self._moved_s = self._loop.time()

    @property
    def is_clear(self) -> bool:
        """Whether all that was sent is in the kernel's hands."""
        return self._writer.transport.get_write_buffer_size() == 0

    async def has_left(self) -> bool:
        """Whether the client closed its end."""
        if self._writer.transport.is_closing():
            return True
        return await self._peers.has_left(self._writer.get_extra_info("socket"))

    async def linger(self) -> None:
        """End our side and let the client read what was sent, as long as it does read.

        Closing while bytes of its wait unread would reset the connection under it.
        """
        if self._writer.can_write_eof():  # TLS has no half-close
            self._writer.write_eof()
        else:
            self._writer.close()
        reading = asyncio.ensure_future(self._discard())
        try:
            ends = self._loop.time() + LINGER_MAX_S
            unsent = self._unsent()
            while self._loop.time() < ends:
                done, _ = await asyncio.wait({reading}, timeout=LINGER_S)
                before, unsent = unsent, self._unsent()
                if done or unsent >= before:
                    return
        finally:
            reading.cancel()
            await asyncio.gather(reading, return_exceptions=True)

    def close(self) -> None:
        """Let go at once: a client that does not read must not hold the socket for ever."""
        self._timer.cancel()
        self._writer.transport.abort()

    async def _discard(self) -> None:
        while await self._reader.read(READ):
            pass

    def _unsent(self) -> int:
        """Bytes that the client's kernel has not taken yet."""
        try:
            raw = fcntl.ioctl(self._writer.get_extra_info("socket").fileno(), termios.TIOCOUTQ, b"\0" * 4)
        except (OSError, ValueError):  # a ValueError where the client reset the connection, and it is closed already
            return 0
        return int(struct.unpack("i", raw)[0]) + self._writer.transport.get_write_buffer_size()

    def _check_idle(self) -> None:
        left_s = self._moved_s + self._idle_s - self._loop.time()
        if left_s <= 0:
            self.close()
        else:
            self._timer = self._loop.call_later(left_s, self._check_idle)


async def _pause(link: Link, room: Coroutine[None, None, None], beat: Callable[[], bytes]) -> None:
    """Wait for room instead of reading.

    Now and then the peer is looked for, and gets a few bytes that mean nothing: where it is a proxy whose own client has
    gone, writing these on is how it finds out.
    """
    waiting = asyncio.ensure_future(room)
    try:
        while not (await asyncio.wait({waiting}, timeout=PROBE_S))[0]:
            if await link.has_left():
                raise ConnectionResetError("the client left while nobody read from it")
            if link.is_clear:
                link.put(beat())
    finally:
        waiting.cancel()
        await asyncio.gather(waiting, return_exceptions=True)


class RawCarrier:
    """The connection itself.

    Args:
        link: the connection.
        leftover: what came together with the request.
        beat: bytes that mean nothing to the peer and that it does not answer.
    """

    def __init__(self, link: Link, leftover: bytes = b"", beat: bytes = b"") -> None:
        self._link = link
        self._leftover = leftover
        self._nothing = beat

    async def read(self) -> AsyncIterator[bytes]:
        """Yield what comes, beginning with what came with the request."""
        if self._leftover:
            yield self._leftover
        while data := await self._link.read():
            yield data

    async def write(self, data: bytes) -> None:
        """Send, waiting while the peer does not read."""
        if data:
            self._link.put(data)
            await self._link.drain()

    async def pause(self, room: Coroutine[None, None, None]) -> None:
        """See ByteCarrier.pause."""
        await _pause(self._link, room, lambda: self._nothing)


class WebSocketCarrier:
    """A WebSocket after its handshake. Yields whole messages; as a `ByteCarrier` their borders mean nothing.

    Args:
        protocol: after its handshake; its own limit bounds one message.
        link: the connection.
        budget: where the bytes of large messages come from that are not complete.
        leftover: what came together with the request.
        text: send text messages.
    """

    def __init__(
        self, protocol: ServerProtocol, link: Link, budget: Budget, leftover: bytes = b"", *, text: bool = False
    ) -> None:
        self._protocol = protocol
        self._link = link
        self._leftover = leftover
        self._text = text
        self._parts = bytearray()  # no list: empty fragments without end would make it grow
        self._share = Share(budget)
        self._pace = Pace()

    async def read(self) -> AsyncIterator[bytes]:
        """Yield messages until the peer closes. Pings are answered here.

        Raises ConnectionError when a message is large and the memory for such is used up.
        """
        data, self._leftover = self._leftover, b""
        try:
            while self._is_open():
                if data:
                    with self._pace.reading(len(data)):
                        self._protocol.receive_data(data)
                        messages = self._messages()
                    await self._flush()
                    for message in messages:
                        yield message
                    await self._pace.rest()
                    if not self._share.fit(len(self._protocol.reader.buffer) + len(self._parts)):
                        self._protocol.fail(1013, "too many large messages at once")
                        await self._flush()
                        raise ConnectionAbortedError("no memory is left for a large message")
                if self._is_open() and not (data := await self._link.read()):
                    return
        finally:
            self._share.fit(0)

    def _is_open(self) -> bool:
        return self._protocol.state is State.OPEN

    def _messages(self) -> list[bytes]:
        messages = []
        for frame in self._protocol.events_received():
            opcode = getattr(frame, "opcode", None)
            if opcode in (Opcode.TEXT, Opcode.BINARY, Opcode.CONT):
                self._parts += frame.data  # type: ignore[union-attr]
                if frame.fin:  # type: ignore[union-attr]
                    messages.append(bytes(self._parts))
                    self._parts.clear()
        return messages

    async def write(self, data: bytes) -> None:
        """Send one message."""
        if not data:
            return
        if self._protocol.state is not State.OPEN:
            raise ConnectionResetError("the WebSocket is closed")
        if self._text:
            self._protocol.send_text(data)
        else:
            self._protocol.send_binary(data)
        await self._flush()

    async def close(self) -> None:
        """Send the close frame and wait a moment for the peer's."""
        if self._protocol.state is State.OPEN:
            self._protocol.send_close(1000)
            await self._flush()
            try:
                async with asyncio.timeout(CLOSE_S):
                    async for _ in self.read():
                        pass
            except (TimeoutError, ConnectionError):
                return

    async def pause(self, room: Coroutine[None, None, None]) -> None:
        """See ByteCarrier.pause."""
        await _pause(self._link, room, self._pong)

    def _pong(self) -> bytes:
        if self._protocol.state is State.OPEN:
            self._protocol.send_pong(b"")  # one that nothing asked for, so that no answer comes
        return b"".join(self._protocol.data_to_send())

    async def _flush(self) -> None:
        for data in self._protocol.data_to_send():
            self._link.put(data)
        await self._link.drain()
