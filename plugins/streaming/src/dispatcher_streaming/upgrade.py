"""The HTTP of the streaming port: one request head, and one answer, an upgrade or an error. Nothing here knows a session."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from http import HTTPStatus

import h11
from websockets.http11 import Request
from websockets.protocol import State
from websockets.server import ServerProtocol
from websockets.typing import Subprotocol

from dispatcher_streaming.carriers import READ

MAX_HEAD = 32 * 1024
MAX_MESSAGE = (
    16 << 20
)  # of a WebSocket: clients send a whole file's content as one; what is held comes out of the budget
SPDY = "spdy/3.1"
VERSIONS = "X-Stream-Protocol-Version"


class Refused(Exception):
    """Answer with a plain HTTP error and close."""

    def __init__(self, status: int, text: str, headers: tuple[tuple[str, str], ...] = ()) -> None:
        super().__init__(text)
        self.status = status
        self.text = text
        self.headers = headers


@dataclass(slots=True)
class Head:
    """A request's head, and what came together with it."""

    method: str
    target: str
    headers: dict[str, list[str]]
    leftover: bytes

    def without(self, name: str) -> bytes:
        """The head again as bytes, but for one header: the names of sub-protocols that Kubernetes uses hold a slash,
        which the library refuses as the RFC says.
        """
        lines = [f"{self.method} {self.target} HTTP/1.1"]
        lines += [f"{key}: {value}" for key, values in self.headers.items() for value in values if key != name]
        return "\r\n".join([*lines, "", ""]).encode("latin-1")

    def words(self, name: str) -> list[str]:
        """All values of a header, split at commas."""
        return [word.strip() for value in self.headers.get(name.lower(), []) for word in value.split(",")]

    def upgrades_to(self, name: str) -> bool:
        """Whether the request asks for an upgrade to this protocol."""
        connection = {word.lower() for word in self.words("connection")}
        return "upgrade" in connection and name in {word.lower() for word in self.words("upgrade")}


async def read_head(reader: asyncio.StreamReader) -> Head:
    """Read a request's head. Raises Refused where it is none or too large, EOFError where the client left."""
    connection = h11.Connection(h11.SERVER, max_incomplete_event_size=MAX_HEAD)
    while True:
        try:
            event = connection.next_event()
        except h11.RemoteProtocolError as error:
            raise Refused(error.error_status_hint, "not HTTP") from error
        if isinstance(event, h11.Request):
            headers: dict[str, list[str]] = {}
            for name, value in event.headers:
                headers.setdefault(name.decode("ascii").lower(), []).append(value.decode("latin-1"))
            leftover = bytes(connection.trailing_data[0])
            return Head(event.method.decode("ascii"), event.target.decode("ascii"), headers, leftover)
        data = await reader.read(READ)
        if not data:
            raise EOFError("the client left before its request was complete")
        connection.receive_data(data)


def choose(offered: Sequence[str], known: Sequence[str]) -> str:
    """The first of the client's protocols that we speak too."""
    if not any(offered):
        raise Refused(400, f"the header {VERSIONS} is missing")
    for protocol in offered:
        if protocol in known:
            return protocol
    accepted = tuple(("X-Accepted-Stream-Protocol-Versions", protocol) for protocol in known)
    raise Refused(403, "none of the client's protocols is spoken here", accepted)


async def switch(writer: asyncio.StreamWriter, protocol: str) -> None:
    """Answer that SPDY is spoken from here on."""
    writer.write(
        (
            "HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: SPDY/3.1\r\n"
            f"{VERSIONS}: {protocol}\r\n\r\n"
        ).encode()
    )
    await writer.drain()


async def handshake(head: Head, writer: asyncio.StreamWriter, protocols: Sequence[str]) -> ServerProtocol:
    """Answer a WebSocket handshake. Raises Refused where no sub-protocol fits; none offered is the oldest one."""
    offered = head.words("sec-websocket-protocol")
    if any(offered) and not set(offered) & set(protocols):
        raise Refused(403, "none of the client's protocols is spoken here")
    chosen = next((p for p in offered if p in protocols), None)
    # Origins are not checked: a browser cannot know the token, and kubelets send their API server's.
    protocol = ServerProtocol(max_size=MAX_MESSAGE)
    protocol.receive_data(head.without("sec-websocket-protocol"))
    for event in protocol.events_received():
        if isinstance(event, Request):
            response = protocol.accept(event)
            if chosen is not None and response.status_code == HTTPStatus.SWITCHING_PROTOCOLS:
                response.headers["Sec-WebSocket-Protocol"] = chosen
            protocol.subprotocol = Subprotocol(chosen) if chosen is not None else None
            protocol.send_response(response)
    for data in protocol.data_to_send():
        writer.write(data)
    await writer.drain()
    if protocol.state is not State.OPEN:
        raise EOFError("the WebSocket handshake failed") from protocol.handshake_exc
    return protocol


async def answer(
    writer: asyncio.StreamWriter, status: int, text: str, headers: tuple[tuple[str, str], ...] = ()
) -> None:
    """Answer with an error and the end of the connection."""
    body = (text + "\n").encode()
    extra = "".join(f"{name}: {value}\r\n" for name, value in headers)
    phrase = HTTPStatus(status).phrase
    writer.write(
        (
            f"HTTP/1.1 {status} {phrase}\r\nContent-Type: text/plain\r\nContent-Length: {len(body)}\r\n"
            f"Connection: close\r\n{extra}\r\n"
        ).encode()
        + body
    )
    await writer.drain()
