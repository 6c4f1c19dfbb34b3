"""Calls outlive their client: a deadline detaches, a retry joins, an abandoned result waits and is then undone."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest

from dispatcher.calls import Calls
from dispatcher.errors import AlreadyExists, OutOfResources, RuntimeDown


class Work:
    """Work that goes on when the test says so, and counts what happened to it."""

    def __init__(self) -> None:
        self.started = 0
        self.cancelled = 0
        self.undone: list[str] = []
        self.go = asyncio.Event()
        self.error: Exception | None = None

    async def make(self) -> str:
        self.started += 1
        try:
            await self.go.wait()
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        if self.error is not None:
            raise self.error
        return f"result {self.started}"

    async def undo(self, result: str) -> None:
        self.undone.append(result)


class Clock:
    """A sleep that ends when the test says that the time is over."""

    def __init__(self) -> None:
        self.sleeping = 0
        self.over = asyncio.Event()

    async def sleep(self, _seconds: float) -> None:
        self.sleeping += 1
        try:
            await self.over.wait()
        finally:
            self.sleeping -= 1


async def settle() -> None:
    """Let everything that can run now run."""
    for _ in range(20):
        await asyncio.sleep(0)


@pytest.fixture
def work() -> Work:
    return Work()


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
async def calls(clock: Clock) -> AsyncIterator[Calls]:
    calls = Calls(sleep=clock.sleep)
    yield calls
    await calls.aclose()


async def abandon(task: asyncio.Task[str]) -> None:
    await settle()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


async def test_a_plain_call_returns_and_leaves_nothing(calls: Calls, work: Work) -> None:
    work.go.set()
    assert await calls.run("pod", "f", work.make, work.undo) == "result 1"
    await settle()
    assert len(calls) == 0
    assert work.undone == []


async def test_equal_calls_share_one_piece_of_work(calls: Calls, work: Work) -> None:
    waiting = [asyncio.create_task(calls.run("pod", "f", work.make, work.undo)) for _ in range(5)]
    await settle()
    assert calls.is_running("pod")
    work.go.set()
    assert await asyncio.gather(*waiting) == ["result 1"] * 5
    assert work.started == 1


async def test_another_request_for_the_same_object_is_refused_while_one_runs(calls: Calls, work: Work) -> None:
    first = asyncio.create_task(calls.run("pod", "f", work.make))
    await settle()
    with pytest.raises(AlreadyExists):
        await calls.run("pod", "other", work.make)
    work.go.set()
    await first
    assert await calls.run("pod", "other", work.make) == "result 2"


async def test_different_objects_do_not_wait_for_each_other(calls: Calls, work: Work) -> None:
    blocked = asyncio.create_task(calls.run("a", "f", work.make))
    other = Work()
    other.go.set()
    assert await calls.run("b", "f", other.make) == "result 1"
    work.go.set()
    await blocked


async def test_a_client_s_deadline_detaches_and_a_retry_joins(calls: Calls, work: Work) -> None:
    await abandon(asyncio.create_task(calls.run("pod", "f", work.make, work.undo)))
    retry = asyncio.create_task(calls.run("pod", "f", work.make, work.undo))
    await settle()
    work.go.set()
    assert await retry == "result 1"
    assert (work.started, work.cancelled, work.undone) == (1, 0, [])


async def test_one_of_several_leaving_disturbs_nobody(calls: Calls, work: Work) -> None:
    staying = asyncio.create_task(calls.run("pod", "f", work.make, stop_when_abandoned=True))
    await abandon(asyncio.create_task(calls.run("pod", "f", work.make, stop_when_abandoned=True)))
    work.go.set()
    assert await staying == "result 1"


async def test_an_abandoned_result_is_kept_for_the_retry(calls: Calls, work: Work, clock: Clock) -> None:
    await abandon(asyncio.create_task(calls.run("pod", "f", work.make, work.undo)))
    work.go.set()
    await settle()
    assert clock.sleeping == 1
    with pytest.raises(AlreadyExists):
        await calls.run("pod", "other", work.make)
    assert await calls.run("pod", "f", work.make, work.undo) == "result 1"
    clock.over.set()
    await settle()
    assert (work.started, work.undone, len(calls)) == (1, [], 0)


async def test_an_abandoned_result_is_undone_when_nobody_came(calls: Calls, work: Work, clock: Clock) -> None:
    await abandon(asyncio.create_task(calls.run("pod", "f", work.make, work.undo)))
    work.go.set()
    await settle()
    clock.over.set()
    await settle()
    assert (work.undone, len(calls)) == (["result 1"], 0)
    assert await calls.run("pod", "f", work.make, work.undo) == "result 2"


async def test_a_retry_during_the_undo_waits_for_it_and_begins_anew(calls: Calls, work: Work, clock: Clock) -> None:
    undoing = asyncio.Event()

    async def undo(result: str) -> None:
        await undoing.wait()
        work.undone.append(result)

    await abandon(asyncio.create_task(calls.run("pod", "f", work.make, undo)))
    work.go.set()
    await settle()
    clock.over.set()
    await settle()
    retry = asyncio.create_task(calls.run("pod", "f", work.make, undo))
    await settle()
    assert work.started == 1
    undoing.set()
    assert await retry == "result 2"
    assert work.undone == ["result 1"]


async def test_what_is_used_in_another_way_is_not_undone(calls: Calls, work: Work, clock: Clock) -> None:
    """The kubelet found the sandbox in a list and goes on with it: `settle` says so."""
    await abandon(asyncio.create_task(calls.run("pod", "f", work.make, work.undo)))
    work.go.set()
    await settle()
    calls.settle("pod")
    calls.settle("unknown")
    clock.over.set()
    await settle()
    assert (work.undone, len(calls)) == ([], 0)


async def test_a_failure_reaches_everybody_who_waits(calls: Calls, work: Work) -> None:
    work.error = OutOfResources("The disk is full.")
    waiting = [asyncio.create_task(calls.run("pod", "f", work.make, work.undo)) for _ in range(3)]
    await settle()
    work.go.set()
    outcomes = await asyncio.gather(*waiting, return_exceptions=True)
    assert [str(outcome) for outcome in outcomes] == ["The disk is full."] * 3
    assert len(calls) == 0


async def test_a_failure_while_nobody_waits_is_forgotten(calls: Calls, work: Work, clock: Clock) -> None:
    work.error = OutOfResources("The disk is full.")
    await abandon(asyncio.create_task(calls.run("pod", "f", work.make, work.undo)))
    work.go.set()
    await settle()
    assert (len(calls), clock.sleeping, work.undone) == (0, 0, [])
    work.error = None
    assert await calls.run("pod", "f", work.make, work.undo) == "result 2"


async def test_a_failing_undo_ends_it_all_the_same(calls: Calls, work: Work, clock: Clock) -> None:
    async def undo(_result: str) -> None:
        raise RuntimeError("planted")

    await abandon(asyncio.create_task(calls.run("pod", "f", work.make, undo)))
    work.go.set()
    clock.over.set()
    await settle()
    assert len(calls) == 0


async def test_a_result_without_undo_is_not_kept(calls: Calls, work: Work, clock: Clock) -> None:
    await abandon(asyncio.create_task(calls.run("pull", "f", work.make)))
    work.go.set()
    await settle()
    assert (len(calls), clock.sleeping) == (0, 0)


async def test_a_pull_stops_when_its_last_waiter_leaves(calls: Calls, work: Work) -> None:
    await abandon(asyncio.create_task(calls.run("pull", "f", work.make, stop_when_abandoned=True)))
    await settle()
    assert (work.cancelled, len(calls)) == (1, 0)


async def test_a_new_pull_waits_until_the_stopped_one_has_cleaned_up(calls: Calls, work: Work) -> None:
    cleaning = asyncio.Event()
    cleaned: list[bool] = []

    async def make() -> str:
        work.started += 1
        if work.started > 1:
            assert cleaned, "the second began before the first had cleaned up"
            return "second"
        try:
            await asyncio.Event().wait()
        finally:
            await cleaning.wait()
            cleaned.append(True)
        return "first"

    await abandon(asyncio.create_task(calls.run("pull", "f", make, stop_when_abandoned=True)))
    await settle()
    retry = asyncio.create_task(calls.run("pull", "f", make, stop_when_abandoned=True))
    await settle()
    assert work.started == 1
    cleaning.set()
    assert await retry == "second"


async def test_a_result_in_the_very_moment_of_the_deadline_is_not_lost(calls: Calls, work: Work, clock: Clock) -> None:
    """The work ends and the client is cancelled in the same turn of the loop: the result is kept for the retry."""
    waiter = asyncio.create_task(calls.run("pod", "f", work.make, work.undo))
    await settle()
    work.go.set()
    await asyncio.sleep(0)
    waiter.cancel()
    outcome = (await asyncio.gather(waiter, return_exceptions=True))[0]
    await settle()
    if isinstance(outcome, asyncio.CancelledError):
        assert clock.sleeping == 1
    assert await calls.run("pod", "f", work.make, work.undo) in ("result 1", "result 2")
    assert work.undone == []


@pytest.mark.parametrize("turns", range(12))
async def test_whenever_the_client_leaves_the_work_is_done_once_or_undone(
    calls: Calls, work: Work, clock: Clock, turns: int
) -> None:
    work.go.set()
    waiter = asyncio.create_task(calls.run("pod", "f", work.make, work.undo))
    for _ in range(turns):
        await asyncio.sleep(0)
    waiter.cancel()
    outcome = (await asyncio.gather(waiter, return_exceptions=True))[0]
    await settle()
    clock.over.set()
    await settle()
    assert len(calls) == 0
    if work.started:
        assert (outcome == "result 1") != (work.undone == ["result 1"])


async def test_the_end_of_the_daemon_cancels_the_work_and_tells_its_waiters(clock: Clock, work: Work) -> None:
    calls = Calls(sleep=clock.sleep)
    waiter = asyncio.create_task(calls.run("pod", "f", work.make, work.undo))
    other = Work()
    await abandon(asyncio.create_task(calls.run("other", "f", other.make, other.undo)))
    other.go.set()
    await settle()
    await calls.aclose()
    with pytest.raises(RuntimeDown):
        await waiter
    assert (work.cancelled, other.undone) == (1, [])
    assert len(calls) == 0


async def test_work_runs_with_the_context_of_the_first_caller(calls: Calls) -> None:
    import contextvars

    correlation: contextvars.ContextVar[str] = contextvars.ContextVar("correlation", default="none")

    async def make() -> str:
        return correlation.get()

    correlation.set("first")
    assert await calls.run("k", "f", make) == "first"
