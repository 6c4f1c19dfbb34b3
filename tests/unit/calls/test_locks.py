"""One operation per pod at a time; and undo in reverse, whatever fails, hangs or is cancelled meanwhile."""

from __future__ import annotations

import asyncio

import pytest

from dispatcher.locks import Locks


async def test_holders_of_one_key_take_turns_in_order() -> None:
    locks, order = Locks(), []

    async def work(number: int) -> None:
        async with locks.hold("pod"):
            order.append(f"in {number}")
            await asyncio.sleep(0)
            order.append(f"out {number}")

    await asyncio.gather(*(work(number) for number in range(5)))
    assert order == [word for number in range(5) for word in (f"in {number}", f"out {number}")]
    assert len(locks) == 0


async def test_keys_are_apart() -> None:
    locks = Locks()
    async with locks.hold("a"), locks.hold("b"):
        assert locks.is_held("a")
        assert locks.is_held("b")
        assert not locks.is_held("c")
        assert len(locks) == 2
    assert len(locks) == 0


async def test_a_cancelled_wait_and_a_failing_holder_leave_no_lock_behind() -> None:
    locks = Locks()
    async with locks.hold("pod"):
        waiting = asyncio.create_task(locks.hold("pod").__aenter__())
        await asyncio.sleep(0)
        waiting.cancel()
        await asyncio.gather(waiting, return_exceptions=True)
        assert locks.is_held("pod")
    with pytest.raises(RuntimeError):
        async with locks.hold("pod"):
            raise RuntimeError
    assert len(locks) == 0
