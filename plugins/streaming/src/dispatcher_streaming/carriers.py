"""What brings bytes or messages to a session: a bare TCP connection after an upgrade, or a WebSocket.

The only place, with `server`, that does I/O. A carrier writes with back-pressure and ends with one deadline.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Protocol

from websockets.frames import Opcode
from websockets.protocol import State
from websockets.server import ServerProtocol

READ = 64 * 1024


class ByteCarrier(Protocol):
    """Carries a stream of bytes both ways."""

    def read(self) -> AsyncIterator[bytes]:
        """Yield what comes, until the peer ends."""

    async def write(self, data: bytes) -> None:
        """Send, waiting while the peer does not read. Raises ConnectionError when it is gone."""


class RawCarrier:
    """The connection itself."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, leftover: bytes = b"") -> None:
        self._reader = reader
        self._writer = writer
        self._leftover = leftover

    async def read(self) -> AsyncIterator[bytes]:
        """Yield what comes, beginning with what came with the request."""
        if self._leftover:
            yield self._leftover
        while data := await self._reader.read(READ):
            yield data

    async def write(self, data: bytes) -> None:
        """Send, waiting while the peer does not read."""
        if data:
            self._writer.write(data)
            await self._writer.drain()


class WebSocketCarrier:
    """A WebSocket after its handshake. Yields whole messages; as a `ByteCarrier` their borders mean nothing."""

    def __init__(
        self,
        protocol: ServerProtocol,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        *,
        text: bool = False,
    ) -> None:
        self._protocol = protocol
        self._reader = reader
        self._writer = writer
        self._text = text
        self._parts = bytearray()  # no list: empty fragments without end would make it grow

    async def read(self) -> AsyncIterator[bytes]:
        """Yield messages until the peer closes. Pings are answered here."""
        for message in self._messages():
            yield message
        while self._protocol.state is State.OPEN:
            data = await self._reader.read(READ)
            if not data:
                return
            self._protocol.receive_data(data)
            await self._flush()
            for message in self._messages():
                yield message

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
                async with asyncio.timeout(2):
                    async for _ in self.read():
                        pass
            except (TimeoutError, ConnectionError):
                return

    async def _flush(self) -> None:
        for data in self._protocol.data_to_send():
            if data:
                self._writer.write(data)
        await self._writer.drain()
