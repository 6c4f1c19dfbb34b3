"""Long-lived connections to the engine: hijacked exec and attach streams, the event stream, and the ping.

Theory of operation. Each stream is a UNIX connection of its own. HTTP is h11's work; after "101" (or a raw answer to
a hijacking request) the bytes belong to the stream. Without a terminal the engine multiplexes both outputs: 8 bytes of
header (stream number, three zeros, big-endian length), then the payload. Memory per stream is bounded by the reader's
limit and one piece: who does not read stops the engine, which stops the process.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import struct
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import h11

from dispatcher.api import effect
from dispatcher.errors import RuntimeDown
from dispatcher_docker_shim.errors import EngineAway, from_status

_PIECE = 64 * 1024
_MAX_EVENT = 1 << 20
_MAX_ERROR_BODY = 64 * 1024
_PEER_CREDENTIALS = struct.Struct("3i")


@dataclass(frozen=True, slots=True, kw_only=True)
class Pong:
    """What a ping tells: the engine's newest API, and its process where the socket is its own."""

    api: tuple[int, int]
    pid: int


class EngineSocket:
    """Opens streams to one engine."""

    def __init__(self, path: str, *, connect_deadline_s: float = 5.0) -> None:
        self._path = path
        self._connect_deadline_s = connect_deadline_s

    async def ping(self) -> Pong:
        """Ask whether the engine answers. Raises EngineAway."""
        connection = await self._connect()
        try:
            pid = _peer_pid(connection.writer)
            async with asyncio.timeout(self._connect_deadline_s):
                await connection.send("GET", "/_ping", None)
                response = await connection.response()
                if response.status_code != 200:
                    raise EngineAway(f"Docker Engine at {self._path} answers its ping with {response.status_code}")
        except (OSError, h11.ProtocolError, TimeoutError) as error:
            raise EngineAway(f"Docker Engine at {self._path} does not answer") from error
        finally:
            connection.abort()
        headers = {name.decode("ascii").lower(): value.decode("ascii") for name, value in response.headers}
        major, _, minor = headers.get("api-version", "1.41").partition(".")
        return Pong(api=(int(major), int(minor)), pid=pid)

    async def events(self, api: str, filters: Mapping[str, list[str]]) -> AsyncGenerator[dict[str, Any], None]:
        """Yield events until the engine goes away. The first item is empty: from it on, no event is missed.

        Raises:
            EngineAway: always at the end.
        """
        connection = await self._connect()
        try:
            query = f"filters={_quote(json.dumps(filters))}"
            async with asyncio.timeout(self._connect_deadline_s):
                await connection.send("GET", f"/v{api}/events?{query}", None)
                response = await connection.response()
                if response.status_code != 200:
                    raise from_status(response.status_code, await connection.body(), doing="subscribe to events")
            yield {}
            buffer = b""
            async for piece in connection.pieces():
                buffer += piece
                *lines, buffer = buffer.split(b"\n")
                if len(buffer) > _MAX_EVENT:
                    raise EngineAway("Docker Engine sent an event without end")
                for line in lines:
                    if line.strip():
                        yield json.loads(line)
            raise EngineAway("Docker Engine closed its event stream")
        except (OSError, h11.ProtocolError, TimeoutError, ValueError) as error:
            raise EngineAway("Docker Engine's event stream broke") from error
        finally:
            connection.abort()

    @effect("docker.open_stream")
    async def hijack(self, path: str, body: Mapping[str, Any] | None, *, doing: str) -> HijackedStream:
        """POST and take the connection over. Raises the error of the engine's answer, or EngineAway."""
        connection = await self._connect()
        try:
            async with asyncio.timeout(self._connect_deadline_s):
                await connection.send("POST", path, body, upgrade=True)
                response = await connection.response(upgrade=True)
            text = ""
            if response.status_code not in (101, 200):
                async with asyncio.timeout(self._connect_deadline_s):
                    text = await connection.body()
        except BaseException as error:
            connection.abort()
            if isinstance(error, OSError | h11.ProtocolError | TimeoutError):
                raise EngineAway(f"Docker Engine did not answer while trying to {doing}") from error
            raise
        if response.status_code in (101, 200):
            return HijackedStream(connection.reader, connection.writer, connection.leftover())
        connection.abort()
        raise from_status(response.status_code, text, doing=doing)

    async def _connect(self) -> _Connection:
        try:
            async with asyncio.timeout(self._connect_deadline_s):
                reader, writer = await asyncio.open_unix_connection(self._path, limit=_PIECE)
        except (OSError, TimeoutError) as error:
            raise EngineAway(f"Docker Engine cannot be reached at {self._path}; is it running?") from error
        return _Connection(reader, writer)


class _Connection:
    """One HTTP exchange over a stream pair."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer
        self._http = h11.Connection(h11.CLIENT, max_incomplete_event_size=_PIECE)

    async def send(self, method: str, target: str, body: Mapping[str, Any] | None, *, upgrade: bool = False) -> None:
        content = b"" if body is None else json.dumps(body).encode()
        headers = [("Host", "docker"), ("User-Agent", "cri-dispatcher")]
        if method == "POST":
            headers += [("Content-Type", "application/json"), ("Content-Length", str(len(content)))]
        if upgrade:
            headers += [("Connection", "Upgrade"), ("Upgrade", "tcp")]
        request = h11.Request(method=method, target=target, headers=headers)
        wire = (self._http.send(request) or b"") + (self._http.send(h11.Data(data=content)) or b"" if content else b"")
        self.writer.write(wire + (self._http.send(h11.EndOfMessage()) or b""))
        await self.writer.drain()

    async def response(self, *, upgrade: bool = False) -> h11.Response | h11.InformationalResponse:
        """The answer's head: a final response, or 101 where an upgrade was asked for."""
        while True:
            event = await self._event()
            if isinstance(event, h11.Response):
                return event
            if isinstance(event, h11.InformationalResponse) and upgrade and event.status_code == 101:
                return event
            if not isinstance(event, h11.InformationalResponse):
                raise h11.RemoteProtocolError(f"expected a response, found {type(event).__name__}")

    async def pieces(self) -> AsyncIterator[bytes]:
        """The body in pieces, until its end."""
        while True:
            event = await self._event()
            if isinstance(event, h11.Data):
                yield bytes(event.data)
            else:
                return

    async def body(self) -> str:
        """A short body: the message of an engine's error, or its text."""
        content = b""
        async for piece in self.pieces():
            content += piece
            if len(content) > _MAX_ERROR_BODY:
                break
        try:
            return str(json.loads(content)["message"])
        except (ValueError, KeyError, TypeError):
            return content.decode("utf-8", "replace")

    def leftover(self) -> bytes:
        """Bytes of the hijacked stream that came together with the answer's head."""
        return bytes(self._http.trailing_data[0])

    def abort(self) -> None:
        self.writer.transport.abort()

    async def _event(self) -> Any:
        while True:
            event = self._http.next_event()
            if event is not h11.NEED_DATA:
                return event
            self._http.receive_data(await self.reader.read(_PIECE))


class HijackedStream:
    """A raw two-way connection to a process's streams."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, leftover: bytes) -> None:
        self._reader = reader
        self._writer = writer
        self._ahead = leftover

    async def read(self) -> bytes:
        """Some bytes, or b"" at the end. A connection that broke counts as ended."""
        if self._ahead:
            data, self._ahead = self._ahead[:_PIECE], self._ahead[_PIECE:]
            return data
        try:
            return await self._reader.read(_PIECE)
        except OSError:
            return b""

    def stop_reading(self) -> None:
        """Make `read` report the end once what has arrived is read."""
        self._writer.transport.abort()

    async def write(self, data: bytes) -> None:
        """Write all, waiting while the engine does not take it. Raises BrokenPipeError."""
        try:
            for start in range(0, len(data), _PIECE):
                self._writer.write(data[start : start + _PIECE])
                await self._writer.drain()
        except (OSError, RuntimeError) as error:
            raise BrokenPipeError("the process closed its input") from error

    def close_write(self) -> None:
        """Half-close. Idempotent."""
        with contextlib.suppress(OSError, RuntimeError, NotImplementedError):
            if self._writer.can_write_eof():
                self._writer.write_eof()

    def abort(self) -> None:
        """Close both directions at once. Idempotent."""
        self._writer.transport.abort()


class Readable(Protocol):
    """What brings the bytes of a stream."""

    async def read(self) -> bytes:
        """Some bytes, or b"" at the end."""


async def demultiplex(stream: Readable, *, tty: bool) -> AsyncIterator[tuple[str, bytes]]:
    """Yield ("stdout" | "stderr", bytes) in order, in pieces of at most 64 KiB.

    Raises:
        RuntimeDown: the engine broke the framing.
    """
    if tty:
        while data := await stream.read():
            yield "stdout", data
        return
    buffer = b""
    name, remaining = "", 0
    while True:
        if remaining and buffer:
            piece, buffer = buffer[:remaining], buffer[remaining:]
            remaining -= len(piece)
            yield name, piece
            continue
        if not remaining and len(buffer) >= 8:
            number, remaining = buffer[0], int.from_bytes(buffer[4:8], "big")
            if number > 2 or buffer[1:4] != b"\0\0\0":
                raise RuntimeDown("Docker Engine sent a stream frame that cannot be read")
            name, buffer = ("stderr" if number == 2 else "stdout"), buffer[8:]
            continue
        data = await stream.read()
        if not data:
            return
        buffer += data


def _peer_pid(writer: asyncio.StreamWriter) -> int:
    peer = writer.get_extra_info("socket")
    raw = peer.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _PEER_CREDENTIALS.size)
    return int(_PEER_CREDENTIALS.unpack(raw)[0])


def _quote(text: str) -> str:
    from urllib.parse import quote

    return quote(text, safe="")
