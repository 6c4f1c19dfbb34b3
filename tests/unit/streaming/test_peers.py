"""Telling that a client has gone whose bytes nobody reads: real connections on loopback."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from pathlib import Path

import pytest

from dispatcher_streaming import peers
from dispatcher_streaming.peers import PeerTable


def connected(family: socket.AddressFamily, address: str) -> tuple[socket.socket, socket.socket]:
    listener = socket.create_server((address, 0), family=family)
    client = socket.create_connection(listener.getsockname()[:2])
    server, _ = listener.accept()
    listener.close()
    return client, server


def fill(client: socket.socket) -> None:
    """Send until the other side's window is shut and this side's buffer is full."""
    client.setblocking(False)
    with contextlib.suppress(BlockingIOError):
        while True:
            client.send(b"x" * 65536)


@pytest.mark.parametrize(
    ("family", "address"), [(socket.AF_INET, "127.0.0.1"), (socket.AF_INET6, "::1")], ids=["IPv4", "IPv6"]
)
async def test_a_client_that_leaves_behind_a_shut_window_is_noticed(
    family: socket.AddressFamily, address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its end of stream cannot arrive, for the window is shut: only its own end of the connection tells."""
    monkeypatch.setattr(peers, "_FRESH_S", 0.0)
    try:
        client, server = connected(family, address)
    except OSError:
        pytest.skip("no such loopback address here")
    table = PeerTable()
    fill(client)
    assert not await table.has_left(server)
    client.close()
    async with asyncio.timeout(10):
        while not await table.has_left(server):
            await asyncio.sleep(0.01)
    server.close()
    assert await table.has_left(server)


async def test_an_idle_client_has_not_left(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers, "_FRESH_S", 0.0)
    client, server = connected(socket.AF_INET, "127.0.0.1")
    assert not await PeerTable().has_left(server)
    client.shutdown(socket.SHUT_WR)
    async with asyncio.timeout(10):
        while not await PeerTable().has_left(server):
            await asyncio.sleep(0.01)
    client.close()
    server.close()


async def test_the_table_is_read_once_for_many_who_ask(monkeypatch: pytest.MonkeyPatch) -> None:
    reads: list[Path] = []
    read_table = peers._read_table

    def counted(path: Path) -> dict[tuple[str, str], int]:
        reads.append(path)
        return read_table(path)

    monkeypatch.setattr(peers, "_read_table", counted)
    client, server = connected(socket.AF_INET, "127.0.0.1")
    table = PeerTable()
    assert await asyncio.gather(*(table.has_left(server) for _ in range(50))) == [False] * 50
    assert len(reads) == 1
    client.close()
    server.close()
