"""Port-forward sessions over real sockets: many connections, none of which may hold up the others."""

from __future__ import annotations

import asyncio

import pytest

from dispatcher_streaming import forwarding, portforward
from dispatcher_streaming.portforward_channels import PROTOCOLS
from dispatcher_streaming.spdy.connection import DataReceived
from tests.unit.streaming.kit import REFUSING, SEALED, dialled, served, websocket_head, within
from tests.unit.streaming.test_server import frame, unframed


async def test_hundreds_of_connections_at_once_do_not_mix() -> None:
    async with served() as world, dialled(world.forward_url()) as peer:
        found = [peer.forward(str(number), 80) for number in range(500)]
        await peer.until(lambda: len(peer.events) >= 1000)
        for number, stream in enumerate(found):
            peer.writer.write(peer.spdy.send(stream, b"%d" % number, fin=True))
        await peer.until(lambda: len(peer.ended) == 1000)
        assert [peer.data[stream] for stream in found] == [b"%d" % number for number in range(500)]
        assert all(peer.data[stream - 2] == b"" for stream in found)
        await within(lambda: all(process.killed.is_set() for _, process in world.ports))


async def flood(peer: object, stream: int, size: int) -> None:
    for _ in range(size // 32768):
        peer.writer.write(peer.spdy.send(stream, b"x" * 32768))  # type: ignore[attr-defined]
        await asyncio.sleep(0)


async def test_a_connection_whose_pod_takes_nothing_does_not_hold_up_the_others(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Within its window not at all; beyond it for a moment, then it is broken off, and it alone."""
    monkeypatch.setattr(forwarding, "STALL_S", 0.3)
    async with served() as world, dialled(world.forward_url()) as peer:
        stuck, fine = peer.forward("stuck", SEALED), peer.forward("fine", 80)
        await peer.until(lambda: len(peer.events) == 4)
        await flood(peer, stuck, 512 * 1024)
        peer.writer.write(peer.spdy.send(fine, b"one "))
        await peer.until(lambda: peer.data.get(fine) == b"one ")
        await flood(peer, stuck, 8 << 20)
        peer.writer.write(peer.spdy.send(fine, b"two", fin=True))
        await peer.until(lambda: fine in peer.ended)
        assert peer.data[fine] == b"one two"
        assert stuck - 2 in peer.ended
        assert peer.data[stuck - 2] == b""
        (sealed,) = (process for port, process in world.ports if port == SEALED)
        await within(sealed.killed.wait())


async def test_a_lone_connection_that_takes_nothing_keeps_later_ones_out_only_for_so_long(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(forwarding, "STALL_ALONE_S", 0.5)
    async with served() as world, dialled(world.forward_url()) as peer:
        stuck = peer.forward("stuck", SEALED)
        await peer.until(lambda: len(peer.events) == 2)
        await flood(peer, stuck, 8 << 20)
        late = peer.forward("late", 80)
        await peer.until(lambda: len(peer.events) > 4)
        peer.writer.write(peer.spdy.send(late, b"here", fin=True))
        await peer.until(lambda: peer.data.get(late) == b"here")


async def test_a_client_that_leaves_behind_a_stuck_connection_is_noticed() -> None:
    async with served() as world, dialled(world.forward_url()) as peer:
        stuck = peer.forward("stuck", SEALED)
        await peer.until(lambda: len(peer.events) == 2)
        await flood(peer, stuck, 16 << 20)
        peer.writer.transport.abort()
        await within(world.ports[0][1].killed.wait())


async def test_a_request_id_may_be_used_again() -> None:
    async with served() as world, dialled(world.forward_url()) as peer:
        for _ in range(20):
            stream = peer.forward("0", 80)
            count = len(peer.events)
            await peer.until(lambda: len(peer.events) >= count + 2)  # noqa: B023 - used at once
            peer.writer.write(peer.spdy.reset(stream))
        last = peer.forward("0", 80)
        await peer.until(lambda: any(getattr(event, "stream_id", 0) == last for event in peer.events))
        peer.writer.write(peer.spdy.send(last, b"still here", fin=True))
        await peer.until(lambda: last in peer.ended)
        assert peer.data[last] == b"still here"


async def test_half_pairs_are_given_up_while_the_session_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(portforward, "PAIR_S", 0.2)
    monkeypatch.setattr(forwarding, "EXPIRE_S", 0.05)
    async with served() as world, dialled(world.forward_url()) as peer:
        for number in range(1022):
            peer.writer.write(
                peer.spdy.open({"streamtype": "error", "port": "1", "requestid": str(number)}, fin=True)[1]
            )
        await peer.until(lambda: len(peer.ended) == 1022)
        stream = peer.forward("whole", 80)
        await peer.until(lambda: any(getattr(event, "stream_id", 0) == stream for event in peer.events))
        peer.writer.write(peer.spdy.send(stream, b"fine", fin=True))
        await peer.until(lambda: stream in peer.ended)


async def test_forwarded_connections_are_bounded_for_the_node() -> None:
    async with served(max_forwards=10) as world, dialled(world.forward_url()) as peer:
        found = [peer.forward(str(number), 80) for number in range(12)]
        await peer.until(lambda: {found[10] - 2, found[11] - 2} <= peer.ended)
        assert b"too many" in peer.data[found[11] - 2]
        peer.writer.write(peer.spdy.send(found[0], b"", fin=True))
        await peer.until(lambda: found[0] - 2 in peer.ended)
        await within(world.ports[0][1].killed.is_set)
        more = peer.forward("more", 80)
        peer.writer.write(peer.spdy.send(more, b"fits", fin=True))
        await peer.until(lambda: more in peer.ended)
        assert peer.data[more] == b"fits"


async def test_a_refused_port_is_an_error_of_its_connection_only() -> None:
    async with served() as world, dialled(world.forward_url()) as peer:
        bad, good = peer.forward("bad", REFUSING), peer.forward("good", 80)
        peer.writer.write(peer.spdy.send(good, b"fine", fin=True))
        await peer.until(lambda: {bad - 2, good} <= peer.ended)
        assert b"nobody listens" in peer.data[bad - 2]
        assert peer.data[good] == b"fine"


@pytest.mark.parametrize("protocol", portforward.TUNNELS)
async def test_the_tunnel_carries_the_same_bytes(protocol: str) -> None:
    """The SPDY of a session in WebSocket messages, cut anywhere."""
    async with served() as world, dialled(world.forward_url(), websocket_head(protocol)) as peer:
        assert protocol.encode() in peer.head
        error = peer.spdy.open({"streamtype": "error", "port": "80", "requestid": "0"}, fin=True)[1]
        stream, data = peer.spdy.open({"streamtype": "data", "port": "80", "requestid": "0"})
        wire = error + data + peer.spdy.send(stream, b"through", fin=True) + peer.spdy.go_away()
        for byte in wire[:-8]:
            peer.writer.write(frame(bytes([byte])))
        await within(lambda: world.ports and world.ports[0][1].killed.is_set())
        peer.writer.write(frame(wire[-8:]))
        found = b"".join(unframed(await peer.closed()))
    events = peer.spdy.receive(found)
    assert b"".join(e.data for e in events if isinstance(e, DataReceived) and e.stream_id == stream) == b"through"


@pytest.mark.parametrize("protocol", ["", *PROTOCOLS])
async def test_two_channels_carry_each_port(protocol: str) -> None:
    """Ports of the request or of the query; it ends when all connections have."""
    from dispatcher_streaming import messages

    for url_ports, query in (((80, REFUSING), "?port=1"), ((), f"?port=80&port={REFUSING}")):
        async with (
            served() as world,
            dialled(world.forward_url(*url_ports), websocket_head(protocol, query)) as peer,
        ):
            assert b" 101 " in peer.head
            opcode = 1 if messages.is_base64(protocol) else 2
            peer.writer.write(frame(messages.join(0, b"hello", protocol), opcode))
            await within(lambda: world.ports and bytes(world.ports[0][1].taken) == b"hello")
            await world.ports[0][1]._output.put(b"")
            found = [messages.split(part, protocol) for part in unframed(await peer.closed())[:-1]]
        assert found[:4] == [(0, b"\x50\0"), (1, b"\x50\0"), (2, b"\x09\0"), (3, b"\x09\0")]
        assert (0, b"hello") in found
        assert [text for channel, text in found[4:] if channel == 3] == [b"error forwarding port 9: nobody listens"]


@pytest.mark.parametrize(
    ("query", "protocol", "code"),
    [
        ("", "v4.channel.k8s.io", b" 400 "),
        ("?port=nonsense", "v4.channel.k8s.io", b" 400 "),
        ("?port=" + ",".join(["1"] * 6), "v4.base64.channel.k8s.io", b" 403 "),
        ("?port=1", "v5.channel.k8s.io", b" 403 "),
    ],
)
async def test_impossible_channels_are_refused(query: str, protocol: str, code: bytes) -> None:
    async with served() as world, dialled(world.forward_url(), websocket_head(protocol, query)) as peer:
        assert code in peer.head
