"""The streaming port: what it answers, how sessions end, and what it refuses. Real sockets, processes of ours."""

from __future__ import annotations

import asyncio
import base64
import json
import socket
import ssl
import struct
from pathlib import Path

import pytest

from dispatcher.errors import OutOfResources, RuntimeDown
from dispatcher_streaming import remotecommand, server, sessions
from dispatcher_streaming.carriers import Link
from dispatcher_streaming.config import StreamingConfig
from dispatcher_streaming.provider import Streaming
from tests.lab.child import PartMissingError
from tests.lab.registry import make_certificates
from tests.unit.streaming.kit import SPDY, Peer, Told, dialled, served, websocket_head, within

V5 = "v5.channel.k8s.io"


def frame(payload: bytes, opcode: int = 2, *, fin: bool = True) -> bytes:
    """A client's WebSocket frame, with a mask of zeros."""
    length = len(payload)
    short = bytes([0x80 | length]) if length < 126 else bytes([0x80 | 126]) + length.to_bytes(2, "big")
    return bytes([(0x80 if fin else 0) | opcode]) + short + b"\0\0\0\0" + payload


def unframed(wire: bytes) -> list[bytes]:
    """The payloads of a server's frames."""
    found = []
    while wire:
        length, start = wire[1], 2
        if length == 126:
            length, start = int.from_bytes(wire[2:4], "big"), 4
        elif length == 127:
            length, start = int.from_bytes(wire[2:10], "big"), 10
        found.append(wire[start : start + length])
        wire = wire[start + length :]
    return found


# ------------------------------------------------------------------------------------------------------------ sessions
async def test_a_slow_client_gets_every_byte_behind_the_exit(monkeypatch: pytest.MonkeyPatch) -> None:
    """The process is long gone, and the client reads slower than the wait for silence: nothing is cut."""
    monkeypatch.setattr(sessions, "QUIET_S", 0.05)
    async with served(Told(8 << 20)) as world, dialled(world.exec_url()) as peer:
        assert b" 101 " in peer.head
        assert b"v4.channel.k8s.io" in peer.head
        peer.open("error", "stdout")
        await asyncio.sleep(0.3)  # six times as long as the wait
        await peer.until(lambda: 1 in peer.ended)
        assert len(peer.data[3]) == 8 << 20
        assert b'"3"' in peer.data[1]


async def test_a_client_that_never_reads_is_given_up_behind_the_exit() -> None:
    async with served(Told(8 << 20), drain_s=0.3) as world, dialled(world.exec_url()) as peer:
        peer.open("error", "stdout")
        await peer.writer.drain()
        await within(lambda: not world.streaming._server._sessions)  # type: ignore[union-attr]


async def test_a_client_that_leaves_ends_its_process() -> None:
    async with served(Told(65536, stays=True)) as world, dialled(world.exec_url()) as peer:
        peer.open("error", "stdout")
        await peer.writer.drain()
        peer.writer.transport.abort()
        await within(world.process.killed.wait())


@pytest.mark.parametrize("head", [SPDY, websocket_head(V5)], ids=["SPDY", "WebSocket"])
async def test_a_client_that_leaves_is_noticed_behind_input_that_nobody_reads(head: str) -> None:
    """Nothing is read from it any more, and its end waits behind megabytes that do not fit."""
    process = Told(stays=True, reads=False)
    async with served(process) as world, dialled(world.exec_url(stdin=True), head) as peer:
        if head is SPDY:
            peer.open("error", "stdin", "stdout")
            await peer.until(lambda: len(peer.events) == 3)
        block = peer.spdy.send(3, b"x" * 32768) if head is SPDY else frame(b"\0" + b"x" * 32768)
        for _ in range(1000):
            peer.writer.write(block)
            if peer.writer.transport.get_write_buffer_size() > 1 << 20:
                break
            await asyncio.sleep(0)
        assert peer.writer.transport.get_write_buffer_size(), "the server takes all of it"
        await asyncio.sleep(0.2)
        assert not process.killed.is_set()
        peer.writer.transport.abort()
        await within(process.killed.wait())


@pytest.mark.parametrize("head", [SPDY, websocket_head(V5)], ids=["SPDY", "WebSocket"])
@pytest.mark.parametrize("stalled", [False, True])
async def test_an_idle_session_ends(head: str, stalled: bool) -> None:
    """Also where the idle one is the process, and the client could not send more if it would."""
    async with (
        served(Told(stays=True, reads=False), idle_s=0.3) as world,
        dialled(world.exec_url(stdin=True), head) as peer,
    ):
        if head is SPDY:
            peer.open("error", "stdin", "stdout")
            await peer.until(lambda: len(peer.events) == 3)
        if stalled:
            block = b"x" * 32768
            peer.writer.write(b"".join(peer.spdy.send(3, block) for _ in range(400)) if head is SPDY else b"")
            peer.writer.write(b"" if head is SPDY else frame(b"\0" + block) * 400)
        await within(world.process.killed.wait())


async def test_input_its_end_and_sizes_reach_the_process_once() -> None:
    process = Told(stays=True)
    async with served(process) as world, dialled(world.exec_url(stdin=True, tty=True)) as peer:
        peer.open("error", "stdin", "stdout", "resize")
        await peer.until(lambda: len(peer.events) == 4)
        sizes = "".join(json.dumps({"Width": width, "Height": 9}) for width in range(1, 2001))
        peer.writer.write(peer.spdy.send(3, b"abc") + peer.spdy.send(7, sizes.encode()))
        peer.writer.write(peer.spdy.send(3, b"def", fin=True))
        await within(lambda: process.ends and process.sizes and process.sizes[-1] == (2000, 9))
        assert bytes(process.taken) == b"abcdef"
        assert process.ends == 1
        assert len(process.sizes) < 20, "a flood of sizes is one size"


@pytest.mark.parametrize("protocol", [*remotecommand.WEBSOCKET_PROTOCOLS, ""])
async def test_websocket_protocols(protocol: str) -> None:
    """Greeting, input, output and status, in messages of the protocol; a handshake without one is the oldest."""
    is_text = "base64" in protocol
    async with (
        served(Told(echoes=True)) as world,
        dialled(world.exec_url(stdin=True), websocket_head(protocol)) as peer,
    ):
        assert b" 101 " in peer.head
        assert (protocol.encode() in peer.head) if protocol else (b"sec-websocket-protocol" not in peer.head.lower())
        peer.writer.write(frame(b"0" + base64.b64encode(b"hi"), 1) if is_text else frame(b"\0hi"))
        await within(lambda: bytes(world.process.taken) == b"hi")
        await world.process._output.put(b"")  # it ends
        found = unframed(await peer.closed())
    stdout = b"1" + base64.b64encode(b"hi") if is_text else b"\1hi"
    assert found[0] == (b"1" if is_text else b"\1")
    assert found[1] == stdout
    status = base64.b64decode(found[2][1:]) if is_text else found[2][1:]
    assert found[2][:1] == (b"3" if is_text else b"\3")
    expected = remotecommand.status_bytes(remotecommand.version_of(protocol or "channel.k8s.io"), 3, "")
    assert status == expected
    assert found[3] == (1000).to_bytes(2, "big")


async def test_empty_fragments_add_nothing_and_are_answered_by_nothing() -> None:
    process = Told(stays=True)
    async with served(process) as world, dialled(world.exec_url(stdin=True), websocket_head(V5)) as peer:
        peer.writer.write(frame(b"\0one ", fin=False))
        for _ in range(20_000):
            peer.writer.write(frame(b"", 0, fin=False))
        peer.writer.write(frame(b"message", 0) + frame(b"") + frame(b"\0") + frame(b"\xff\0") + frame(b"\xff\0"))
        await within(lambda: process.ends)
        assert bytes(process.taken) == b"one message"
        assert process.ends == 1


async def test_a_close_that_comes_with_the_handshake_is_no_fault(caplog: pytest.LogCaptureFixture) -> None:
    for more in (frame(b"\x03\xe8", 8), frame(b"\0early") + frame(b"\x03\xe8", 8), b"\xff" * 100):
        async with (
            served(Told(stays=True)) as world,
            dialled(world.exec_url(stdin=True), websocket_head(V5), more) as peer,
        ):
            assert b" 101 " in peer.head
            await peer.closed()
            if b"early" in more:
                assert bytes(world.process.taken) in (b"early", b"")
    assert not [record for record in caplog.records if record.levelname == "ERROR"]


async def test_the_server_closes_only_after_the_client_has_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bytes of the client that wait unread would make a close a reset, and that would take the status away from it."""
    for head in (SPDY, websocket_head(V5)):
        async with served(Told(65536)) as world, dialled(world.exec_url(stdin=True), head) as peer:
            if head is SPDY:
                peer.open("error", "stdin", "stdout")
            await within(lambda: not world.streaming._tokens)
            for _ in range(10):
                peer.writer.write(peer.spdy.send(3, b"late " * 100) if head is SPDY else frame(b"\0late"))
                await asyncio.sleep(0.02)
            if head is SPDY:
                await peer.until(lambda: 1 in peer.ended)
                assert b'"3"' in peer.data[1]
            else:
                assert any(b'"3"' in part for part in unframed(await peer.closed()))


async def test_a_reset_while_the_end_is_read_is_no_fault(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    lingering = asyncio.Event()
    linger = Link.linger

    async def told(self: Link) -> None:
        lingering.set()
        await linger(self)

    monkeypatch.setattr(Link, "linger", told)
    async with served(Told(65536)) as world, dialled(world.exec_url()) as peer:
        peer.open("error", "stdout")
        await within(lingering.wait())
        accepted = peer.writer.get_extra_info("socket")
        accepted.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        peer.writer.transport.abort()
        await within(lambda: not world.streaming._server._sessions)  # type: ignore[union-attr]
    assert not [record for record in caplog.records if record.levelname == "ERROR"]


async def test_peers_that_vanish_are_looked_for_by_the_kernel() -> None:
    """A host that lost power sends no end: keep-alive finds it within a minute."""
    async with served(Told(stays=True)) as world, dialled(world.exec_url()) as peer:
        peer.open("error", "stdout")
        await peer.until(lambda: len(peer.events) == 2)
        (task,) = world.streaming._server._sessions  # type: ignore[union-attr]
        writer = task.get_coro().cr_frame.f_locals["writer"]  # type: ignore[union-attr]
        accepted = writer.get_extra_info("socket")
        assert accepted.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
        idle, interval, count = (
            accepted.getsockopt(socket.IPPROTO_TCP, option)
            for option in (socket.TCP_KEEPIDLE, socket.TCP_KEEPINTVL, socket.TCP_KEEPCNT)
        )
        assert idle + interval * count <= 60


async def test_streams_that_do_not_all_come_have_a_deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sessions, "CREATE_S", 0.2)
    async with served() as world, dialled(world.exec_url(stdin=True)) as peer:
        peer.open("error", "stdin")
        await peer.until(lambda: 1 in peer.ended)
        assert b"did not open all" in peer.data[1]


# ------------------------------------------------------------------------------------------------------------ refusals
@pytest.mark.parametrize(
    ("path", "head", "code"),
    [
        ("/exec/unknown", SPDY, b"404"),
        ("/other/x", SPDY, b"404"),
        (None, SPDY.replace("v5.channel", "v9.channel").replace("v4.channel", "v8.channel"), b"403"),
        (None, SPDY.replace("X-Stream-Protocol-Version", "X-Other"), b"400"),
        (None, websocket_head("v9.channel.k8s.io"), b"403"),
        (None, "GET {path} HTTP/1.1\r\nHost: x\r\n\r\n", b"400"),
        (None, "PUT {path} HTTP/1.1\r\nHost: x\r\n\r\n", b"404"),
        (None, "no http at all\r\n\r\n", b"400"),
        (None, SPDY.replace("Host: x", "Host: x\r\nX-Bomb: " + "x" * 400_000), b"431"),
        (None, SPDY.replace("Host: x", "X-Bomb: y\r\n" * 20_000 + "Host: x"), b"431"),
    ],
)
async def test_what_is_refused_is_told_in_http(path: str | None, head: str, code: bytes) -> None:
    async with served() as world:
        url = world.exec_url()
        if path is not None:
            url = url.split("/exec/")[0] + path
        async with dialled(url, head) as peer:
            assert peer.head.split()[1] == code
            await peer.closed()


async def test_a_token_opens_its_own_kind_of_session_once() -> None:
    async with served(Told(stays=True)) as world:
        url = world.exec_url()
        async with dialled(url.replace("/exec/", "/attach/")) as peer:
            assert b" 404 " in peer.head
        async with dialled(url) as peer:
            assert b" 101 " in peer.head
        async with dialled(url) as peer:
            assert b" 404 " in peer.head


async def test_sessions_are_bounded_and_one_that_ends_makes_room() -> None:
    async with served(Told(stays=True), max_connections=2) as world:
        async with dialled(world.exec_url()) as first, dialled(world.exec_url()) as second:
            assert b" 101 " in first.head
            assert b" 101 " in second.head
            async with dialled(world.exec_url()) as third:
                assert b" 503 " in third.head
        await within(lambda: not world.streaming._server._sessions)  # type: ignore[union-attr]
        async with dialled(world.exec_url()) as fourth:
            assert b" 101 " in fourth.head


async def test_sockets_without_a_request_keep_nobody_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """Half-open ones are dropped when their time is over, or the oldest when there are too many."""
    monkeypatch.setattr(server, "HEAD_S", 0.5)
    monkeypatch.setattr(server, "MAX_WAITING", 20)
    async with served(Told(stays=True)) as world:
        host, port = world.exec_url().removeprefix("http://").split("/")[0].split(":")
        silent = [await asyncio.open_connection(host, int(port)) for _ in range(60)]
        async with dialled(world.exec_url()) as peer:
            assert b" 101 " in peer.head
        async with asyncio.timeout(10):
            assert [await reader.read() for reader, _ in silent] == [b""] * 60
        for _, writer in silent:
            writer.close()


async def test_tokens_are_bounded_in_number_and_memory() -> None:
    async with served(Told(stays=True), max_tokens=100) as world:
        granted, refused = 0, 0
        for _ in range(10_000):
            try:
                world.exec_url()
                granted += 1
            except OutOfResources:
                refused += 1
        assert (granted, refused) == (100, 9_900)
    async with served(Told(stays=True)) as world:
        command = ("x" * (5 << 20),)
        with pytest.raises(OutOfResources):  # noqa: PT012 - one of the first few is
            for _ in range(4):
                world.exec_url(command=command)
        world.exec_url()


async def test_a_large_message_is_one_input_and_too_many_of_them_are_refused() -> None:
    """Some clients send a file as one message. What is held of such messages comes out of one budget."""

    def long_frame(size: int) -> bytes:
        return b"\x82\xff" + size.to_bytes(8, "big") + b"\0\0\0\0" + b"\0" + b"x" * (size - 1)

    async with served(Told(stays=True), buffer_bytes=4 << 20) as world:
        async with dialled(world.exec_url(stdin=True), websocket_head(V5)) as peer:
            peer.writer.write(long_frame(1_900_000))
            await within(lambda: len(world.process.taken) == 1_899_999)
        world.process = Told(stays=True)
        async with dialled(world.exec_url(stdin=True), websocket_head(V5)) as peer:
            peer.writer.write(long_frame(15 << 20))
            assert (1013).to_bytes(2, "big") in await peer.closed()
        world.process = Told(stays=True)
        async with dialled(world.exec_url(stdin=True), websocket_head(V5)) as peer:
            peer.writer.write(long_frame(17 << 20)[:100])
            assert (1009).to_bytes(2, "big") in await peer.closed()
        world.process = Told(stays=True)
        async with dialled(world.exec_url(stdin=True), websocket_head(V5)) as peer:
            peer.writer.write(frame(b"\0more"))
            await within(lambda: bytes(world.process.taken) == b"more")


# ----------------------------------------------------------------------------------------------------------------- TLS
async def test_with_a_certificate_tls_is_spoken_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server, "HEAD_S", 2.0)
    try:
        make_certificates(tmp_path)
    except PartMissingError as missing:
        pytest.skip(str(missing))
    cert, key = tmp_path / "server.crt", tmp_path / "server.key"
    trust = ssl.create_default_context(cafile=str(tmp_path / "ca.crt"))
    async with served(Told(4 << 20), tls_cert=cert, tls_key=key) as world:
        url = world.exec_url()
        assert url.startswith("https://127.0.0.1:")
        host, port = url.removeprefix("https://").split("/")[0].split(":")
        plain, sender = await asyncio.open_connection(host, int(port))
        sender.write(b"GET / HTTP/1.1\r\n\r\n")
        assert b"HTTP" not in await plain.read()
        sender.close()
        reader, writer = await asyncio.open_connection(host, int(port), ssl=trust)
        writer.write(SPDY.format(path="/exec/" + url.split("/exec/")[1]).encode())
        peer = Peer(reader, writer, await reader.readuntil(b"\r\n\r\n"))
        peer.open("error", "stdout")
        await asyncio.sleep(0.2)
        await peer.until(lambda: 1 in peer.ended)
        assert len(peer.data[3]) == 4 << 20
        writer.close()


async def test_a_certificate_that_cannot_be_used_is_named(tmp_path: Path) -> None:
    (tmp_path / "c").write_text("no certificate")
    streaming = Streaming(StreamingConfig.model_validate({"tls_cert": tmp_path / "c", "tls_key": tmp_path / "c"}))
    with pytest.raises(RuntimeDown, match=str(tmp_path / "c")):
        await streaming.start(None)  # type: ignore[arg-type]
