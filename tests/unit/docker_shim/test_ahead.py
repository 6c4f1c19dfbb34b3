"""Reading ahead of a slow reader: little while the process runs, all that can be there once it has ended."""

from __future__ import annotations

import asyncio

from dispatcher_docker_shim.ahead import AFTER_EXIT, RUNNING, ReadAhead


class Engine:
    """A stream of 16 KiB pieces; `taken` says how many bytes of them were fetched."""

    def __init__(self, size: int) -> None:
        self._left = size
        self.taken = 0

    async def read(self) -> bytes:
        await asyncio.sleep(0)
        piece = b"x" * min(16384, self._left)
        self._left -= len(piece)
        self.taken += len(piece)
        return piece


async def rest(ahead: ReadAhead) -> int:
    found = 0
    while data := await ahead.read():
        found += len(data)
    return found


async def settled(engine: Engine) -> int:
    """How much is fetched though nobody reads."""
    taken = -1
    while taken != engine.taken:
        taken = engine.taken
        await asyncio.sleep(0.01)
    return taken


async def test_while_the_process_runs_little_is_kept_and_at_its_exit_all() -> None:
    engine = Engine(AFTER_EXIT)
    ahead = ReadAhead(engine)  # type: ignore[arg-type]
    assert RUNNING <= await settled(engine) <= RUNNING + 16384
    assert len(await ahead.read()) == 16384
    assert await settled(engine) <= RUNNING + 2 * 16384
    assert not ahead.is_silent
    ahead.keep_all()
    assert await settled(engine) == AFTER_EXIT
    assert await rest(ahead) == AFTER_EXIT - 16384
    assert await ahead.read() == b""


async def test_what_a_child_writes_on_is_bounded() -> None:
    engine = Engine(100 << 20)
    ahead = ReadAhead(engine)  # type: ignore[arg-type]
    ahead.keep_all()
    assert await settled(engine) <= AFTER_EXIT + 16384
    ahead.close()
    ahead.close()
    assert await ahead.read() == b""


async def test_the_first_bytes_are_waited_for_but_not_for_ever() -> None:
    class Silent(Engine):
        async def read(self) -> bytes:
            await asyncio.Event().wait()
            return b""

    ahead = ReadAhead(Silent(0))  # type: ignore[arg-type]
    await ahead.wait_first(0.01)
    assert ahead.is_silent
    ahead.close()
    ahead = ReadAhead(Engine(10))  # type: ignore[arg-type]
    async with asyncio.timeout(10):
        await ahead.wait_first(60)
    assert await rest(ahead) == 10
