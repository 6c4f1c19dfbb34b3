"""A client that costs much time to understand is read more slowly, and others are not."""

from __future__ import annotations

import asyncio
import time

import pytest

from dispatcher_streaming import pace
from dispatcher_streaming.pace import Pace
from tests.unit.streaming.kit import SPDY, Told, dialled, served, websocket_head
from tests.unit.streaming.test_server import V5, frame


@pytest.fixture
def slept(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Processor time and clock that a test sets; what was slept is noted and passes at once."""
    found: list[float] = []

    async def sleep(seconds: float) -> None:
        found.append(seconds)

    monkeypatch.setattr(pace.asyncio, "sleep", sleep)  # type: ignore[attr-defined]
    return found


async def test_a_burst_is_free_and_what_follows_is_paid_for(
    slept: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    used, now = [0.0], [100.0]
    monkeypatch.setattr(time, "thread_time", lambda: used[0])
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    session = Pace()
    for _ in range(1000):
        with session.reading(65536):
            used[0] += 0.001  # ten times what data costs
        await session.rest()
    with session.reading(0):
        used[0] += 0.9 * pace.BURST_S + pace.FREE_S
    await session.rest()
    assert slept == []
    with session.reading(0):
        used[0] += 0.01 + 0.1 * pace.BURST_S + pace.FREE_S
    await session.rest()
    assert slept == [pytest.approx(0.01 / pace.SHARE)]
    now[0] += 10.0  # all is paid
    with session.reading(0):
        used[0] += pace.BURST_S / 2
    await session.rest()
    assert len(slept) == 1
    with session.reading(0):
        used[0] += 60.0
    await session.rest()
    assert slept[1:] == [pace.MOST_S]


@pytest.mark.parametrize("kind", ["pings", "sizes", "fragments"])
async def test_floods_of_the_smallest_frames_are_held_back(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    rested: list[float] = []
    rest = Pace.rest

    async def noted(self: Pace) -> None:
        rested.append(max(0.0, self._debt_s - pace.BURST_S))
        await rest(self)

    monkeypatch.setattr(Pace, "rest", noted)
    monkeypatch.setattr(pace, "MOST_S", 0.05)
    head = SPDY if kind != "fragments" else websocket_head(V5)
    async with (
        served(Told(stays=True)) as world,
        dialled(world.exec_url(stdin=True, tty=True), head) as peer,
    ):
        if kind == "fragments":
            flood = frame(b"\0", fin=False) + frame(b"", 0, fin=False) * 20_000
        else:
            peer.open("error", "stdin", "stdout", "resize")
            await peer.until(lambda: len(peer.events) == 4)
            size = peer.spdy.send(7, b'{"Width":1,"Height":1}' * 2000)
            flood = peer.spdy.ping(1) * 50_000 if kind == "pings" else size * 20
        peer.writer.write(flood)
        async with asyncio.timeout(20):
            while not any(rested):
                await asyncio.wait({asyncio.ensure_future(peer.reader.read(65536))}, timeout=0.05)


async def test_data_is_never_held_back(monkeypatch: pytest.MonkeyPatch) -> None:
    rested: list[float] = []
    rest = Pace.rest

    async def noted(self: Pace) -> None:
        rested.append(self._debt_s)
        await rest(self)

    monkeypatch.setattr(Pace, "rest", noted)
    process = Told(stays=True)
    async with served(process) as world, dialled(world.exec_url(stdin=True)) as peer:
        peer.open("error", "stdin", "stdout")
        await peer.until(lambda: len(peer.events) == 3)
        block = peer.spdy.send(3, b"x" * 32768)
        for _ in range(1000):
            peer.writer.write(block)
            await peer.writer.drain()
        async with asyncio.timeout(20):
            while len(process.taken) < 32768 * 1000:
                await asyncio.sleep(0.01)
    assert len(rested) >= 500
    assert max(rested) < pace.BURST_S
