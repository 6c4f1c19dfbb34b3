"""One operation per pod at a time; and undo in reverse, whatever fails, hangs or is cancelled meanwhile."""

from __future__ import annotations

import asyncio

import pytest

from dispatcher.locks import Locks
from dispatcher.undo import Undo


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


# ---------------------------------------------------------------------------------------------------------------- undo
class Steps:
    def __init__(self) -> None:
        self.done: list[str] = []

    async def step(self, name: str) -> None:
        await asyncio.sleep(0)
        self.done.append(name)

    def plain(self, name: str) -> None:
        self.done.append(name)

    async def fail(self, name: str) -> None:
        self.done.append(name)
        raise OSError("planted")

    async def hang(self, name: str) -> None:
        self.done.append(name)
        await asyncio.Event().wait()


async def test_a_block_that_keeps_undoes_nothing() -> None:
    steps = Steps()
    async with Undo() as undo:
        undo.push(steps.step, "a")
        undo.keep()
    assert steps.done == []


async def test_a_failing_block_undoes_in_reverse_and_fails() -> None:
    steps = Steps()
    with pytest.raises(ValueError, match="the reason"):  # noqa: PT012 - the block is the matter
        async with Undo() as undo:
            undo.push(steps.step, "a")
            undo.push(steps.plain, "b")
            undo.push(steps.step, "c")
            raise ValueError("the reason")
    assert steps.done == ["c", "b", "a"]
    assert undo.failures == []


async def test_leaving_without_keep_undoes_too() -> None:
    steps = Steps()
    async with Undo() as undo:
        undo.push(steps.step, "a")
    assert steps.done == ["a"]


async def test_a_step_that_fails_or_hangs_does_not_stop_the_rest() -> None:
    steps = Steps()
    with pytest.raises(ValueError, match="the reason"):  # noqa: PT012 - the block is the matter
        async with Undo(step_timeout_s=0.02) as undo:
            undo.push(steps.step, "first")
            undo.push(steps.fail, "fails")
            undo.push(steps.hang, "hangs")
            undo.push(steps.step, "last")
            raise ValueError("the reason")
    assert steps.done == ["last", "hangs", "fails", "first"]
    assert [(failure.step, type(failure.error)) for failure in undo.failures] == [
        ("Steps.hang", TimeoutError),
        ("Steps.fail", OSError),
    ]


async def test_a_cancelled_block_is_undone_and_stays_cancelled() -> None:
    steps = Steps()

    async def work() -> None:
        async with Undo() as undo:
            undo.push(steps.step, "a")
            await asyncio.Event().wait()

    task = asyncio.create_task(work())
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert steps.done == ["a"]


@pytest.mark.parametrize("reason", ["cancelled", "failed"])
async def test_further_cancellations_do_not_abandon_the_undo(reason: str) -> None:
    steps, gate = Steps(), asyncio.Event()

    async def slow() -> None:
        await gate.wait()
        steps.done.append("slow")

    async def work() -> None:
        async with Undo() as undo:
            undo.push(steps.step, "a")
            undo.push(slow)
            if reason == "failed":
                raise ValueError("the reason")
            await asyncio.Event().wait()

    task = asyncio.create_task(work())
    for _ in range(3):
        await asyncio.sleep(0.001)
        task.cancel()
    await asyncio.sleep(0.001)
    assert not task.done()
    gate.set()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert steps.done == ["slow", "a"]
