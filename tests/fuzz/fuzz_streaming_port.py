"""Whole connections to the streaming port from anywhere: the request, its upgrade, and a session behind it.

The port is the real one on loopback; the processes behind it answer at once. `TOKEN` in an input becomes a good token.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
import re
import socket
import struct
from collections.abc import AsyncIterator
from typing import Any

import pytest

from dispatcher.api import ExecSpec, ExecStream, Process, StreamTarget
from dispatcher.model import ContainerId, PodId
from dispatcher_streaming import carriers, upgrade
from dispatcher_streaming.config import StreamingConfig
from dispatcher_streaming.provider import Streaming
from dispatcher_streaming.tokens import Tokens
from tests.fuzz.fuzz_portforward import generate_spdy as generate_forwards
from tests.fuzz.fuzz_remotecommand import REQUESTS, generate_spdy
from tests.fuzz.fuzz_websocket import generate as generate_frames
from tests.fuzz.fuzz_websocket import wire_of
from tests.fuzz.harness import Fuzzer, finds
from tests.fuzz.wire import TOKENS as FRAMES
from tests.fuzz.wire import Script

pytestmark = [pytest.mark.fuzz, pytest.mark.timeout(0)]

HEADS = [
    (
        b"POST /exec/TOKEN HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: SPDY/3.1\r\n"
        b"X-Stream-Protocol-Version: v4.channel.k8s.io\r\nContent-Length: 0\r\n\r\n"
    ),
    (
        b"POST /portforward/TOKEN HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: SPDY/3.1\r\n"
        b"X-Stream-Protocol-Version: portforward.k8s.io\r\n\r\n"
    ),
    *(
        b"GET /%b HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\n"
        b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Protocol: %b\r\n\r\n" % pair
        for pair in (
            (b"attach/TOKEN", b"v5.channel.k8s.io"),
            (b"exec/TOKEN", b"base64.channel.k8s.io"),
            (b"portforward/TOKEN", b"SPDY/3.1+portforward.k8s.io"),
            (b"portforward/TOKEN?port=80&port=81", b"v4.channel.k8s.io"),
        )
    ),
]
LINES = sorted({line for head in HEADS for line in head.split(b"\r\n") if line})
TOKENS = [
    *FRAMES,
    *(line + b"\r\n" for line in LINES),
    *(b"\r\n", b"\r\n\r\n", b": ", b",", b" HTTP/1.1", b" HTTP/1.0", b"TOKEN", b"/exec/", b"/../", b"?port=1", b"%00"),
    *(
        b"Transfer-Encoding: chunked\r\n",
        b"Content-Length: 5\r\n",
        b"X: y\r\n",
        b"\n\n",
        b"\x00",
        b"\xff",
        b"x" * 40_000,
    ),
]
RESET = struct.pack("ii", 1, 0)
BREAK_S = 0.05  # then a client resets its connection that has not ended it
END_S = 20.0  # for the port to let a client go that has said all


class _Quick:
    """A process that says a little, takes what comes, and has ended already."""

    async def output(self) -> AsyncIterator[tuple[str, bytes]]:
        yield "stdout", b"some"
        yield "stderr", b"other"

    async def write_stdin(self, data: bytes) -> None: ...

    async def close_stdin(self) -> None: ...

    async def resize(self, width: int, height: int) -> None: ...

    async def wait(self) -> int:
        return 3

    async def kill(self) -> None: ...

    async def aclose(self) -> None: ...


class Port:
    """The port under test, with a loop of its own that outlives each input. Remembers what was logged as an error."""

    def __init__(self) -> None:
        self._runner = asyncio.Runner()
        self._errors: list[str] = []
        self._handler = logging.Handler(logging.ERROR)
        self._handler.emit = lambda record: self._errors.append(str(record.exc_info))  # type: ignore[method-assign]
        logging.getLogger().addHandler(self._handler)
        self._streaming = Streaming(StreamingConfig(max_tokens=100_000, token_lifetime_s=1.0))
        self._runner.run(self._start())

    async def _start(self) -> None:
        async def start(_id: ContainerId, _spec: ExecSpec) -> Process:
            return _Quick()

        async def attach(_id: ContainerId, _tty: bool, _in: bool, _out: bool, _err: bool) -> Process:
            return _Quick()

        async def connect(_id: PodId, _port: int) -> Process:
            return _Quick()

        await self._streaming.start(StreamTarget(exec=start, attach=attach, connect=connect))

    def close(self) -> None:
        """Stop it."""
        logging.getLogger().removeHandler(self._handler)
        self._runner.run(self._streaming.aclose())
        self._runner.close()

    def check(self, data: bytes) -> str:
        """The property: an answer in HTTP or an upgrade, no error in the log, and an end; a token works once."""
        self._errors.clear()
        choice = data[0] if data else 0
        head, mark, body = data[1:].partition(b"\r\n\r\n")
        script = (Script().compile, wire_of, bytes)[choice % 3](body)
        first, second = self._runner.run(self._converse(head + mark, script, REQUESTS[choice % len(REQUESTS)]))
        assert not self._errors, self._errors[0]
        assert not first or first.startswith(b"HTTP/1.1 "), first[:80]
        if first.startswith(b"HTTP/1.1 101"):
            assert not second.startswith(b"HTTP/1.1 101"), "a token works twice"
        kinds = re.sub(rb"[^ -~]+", b".", first.partition(b"\r\n\r\n")[2])[:24]
        return f"{first[9:12].decode('latin-1')} {kinds.decode('latin-1')} {min(len(first), 400)}"

    async def _converse(self, head: bytes, script: bytes, request: ExecStream) -> tuple[bytes, bytes]:
        kind = head.split(b"/", 2)[1] if head.count(b"/") > 1 else b""
        grant = {b"attach": self._streaming.attach_url, b"exec": self._streaming.exec_url}.get(kind)
        url = grant(request) if grant else self._streaming.port_forward_url(PodId("p" * 64), ())
        address, _, token = url.rpartition("/")
        host, port = address.removeprefix("http://").rpartition("/")[0].split(":")
        wire = head.replace(b"TOKEN", token.encode()) + script
        answers = [await _ask(host, int(port), wire, breaks_off=len(script) % 5 == 0) for _ in range(2)]
        async with asyncio.timeout(END_S):
            while others := asyncio.all_tasks() - {asyncio.current_task()}:
                await asyncio.wait(others)
        return answers[0], answers[1]


async def _ask(host: str, port: int, wire: bytes, *, breaks_off: bool) -> bytes:
    reader, writer = await asyncio.open_connection(host, port)
    answer = b""
    with contextlib.suppress(ConnectionError):
        half = len(wire) // 2
        for piece in (wire[:half], wire[half:]):
            writer.write(piece)
            await writer.drain()
        if breaks_off:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(BREAK_S):
                    answer = await reader.read(1 << 16)
                    await reader.read(1 << 16)
            writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
        else:
            writer.write_eof()
            async with asyncio.timeout(END_S):
                while more := await reader.read(1 << 16):
                    answer += more[: 4096 - len(answer)]
    writer.close()
    with contextlib.suppress(ConnectionError):
        await writer.wait_closed()
    return answer


def generate(chance: random.Random) -> bytes:
    """A request that is mostly right, and a session that fits it more often than not."""
    head = chance.choice(HEADS)
    if chance.random() < 0.3:
        lines = head.removesuffix(b"\r\n\r\n").split(b"\r\n")
        lines.insert(chance.randrange(len(lines) + 1), chance.choice(LINES))
        lines.pop(chance.randrange(len(lines)))
        head = b"\r\n".join(lines) + b"\r\n\r\n"
    if b"websocket" in head and b"SPDY/3.1+" not in head:
        return bytes([3 * chance.randrange(80) + 1]) + head + generate_frames(chance)
    session = generate_forwards(chance) if b"portforward" in head else generate_spdy(chance)
    return bytes([3 * chance.randrange(80)]) + head + session[1:]


def make_fuzzer(port: Port, **changes: Any) -> Fuzzer:
    """The fuzzer of the port."""
    return Fuzzer(check=port.check, corpus="streaming_port", tokens=TOKENS, generate=generate, **changes)


@pytest.fixture
def port(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(carriers, "CLOSE_S", 0.05)
    made = Port()
    yield made
    made.close()


def test_every_client_is_answered_and_let_go(port: Port) -> None:
    """No connection leaves a traceback, hangs, or uses a token twice."""
    print(make_fuzzer(port).run())


def _words_carelessly(self: upgrade.Head, name: str) -> list[str]:
    return [word.strip() for word in self.headers[name.lower()][0].split(",")]


def _take_again(self: Tokens[Any], kind: str, token: str) -> Any:
    granted = self._granted.get(token)
    return granted.request if granted is not None and granted.kind == kind else None


PLANTED: list[tuple[str, Any, str, Any]] = [
    ("a header that is taken for granted", upgrade.Head, "words", _words_carelessly),
    ("a token that works twice", Tokens, "take", _take_again),
]


@pytest.mark.parametrize(("name", "where", "part", "replacement"), PLANTED, ids=[planted[0] for planted in PLANTED])
def test_planted_faults_are_found(
    monkeypatch: pytest.MonkeyPatch, port: Port, name: str, where: Any, part: str, replacement: Any
) -> None:
    """Each is caught within seconds."""
    monkeypatch.setattr(where, part, replacement)
    finds(make_fuzzer(port, seconds=120, seed=1), name)
