"""Restarts, crashes between the act and the record, cancellation at every point, and the watcher's facts."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import replace

import pytest

from dispatcher.api import ContainerRef, PodRef
from dispatcher.errors import DispatcherError
from dispatcher.model import Change, Liveness, Snapshot
from dispatcher.testing.case import RuntimeCase, pod_spec
from dispatcher.testing.contract.steps import (
    DEAF,
    UNTIL_TERM,
    aclose,
    container_in,
    create,
    joined,
    look,
    look_at_pod,
    new_pod,
    read,
    remove_pod,
    script,
    start,
    start_ready,
    stop,
    until_exited,
)

pytestmark = pytest.mark.asyncio


async def test_pods_outlive_the_daemon(case: RuntimeCase) -> None:
    """A restart ends nothing: what ran runs on, answers signals, and can be stopped by the new daemon."""
    async with new_pod(case) as pod:
        container = await start_ready(case, pod, script(UNTIL_TERM))
        before = await look(case, container)
        await case.restart()
        assert await look_at_pod(case, pod) is Liveness.RUNNING
        after = await look(case, container)
        assert (after.liveness, after.started_at_ns) == (Liveness.RUNNING, before.started_at_ns)
        assert (await stop(case, container, 30)).exit_code == 7
    assert await case.leftovers() == []


async def test_what_was_made_is_found_by_its_id_alone(case: RuntimeCase) -> None:
    """After a crash between the act and the record the facts are empty: everything works with ids."""
    pod = await case.make_pod(pod_spec())
    await case.runtime.create_pod(pod)
    container = await case.make_container(pod, script(DEAF))
    await case.runtime.create_container(container)
    await case.runtime.start_container(container)
    await case.restart()
    assert pod.facts == {}
    assert container.facts == {}
    assert await look_at_pod(case, pod) is Liveness.RUNNING
    assert (await look(case, container)).liveness is Liveness.RUNNING
    assert (await stop(case, container, 0)).liveness is Liveness.EXITED
    await case.runtime.remove_container(container)
    await remove_pod(case, pod)
    assert await case.leftovers() == []


async def test_an_exit_while_the_daemon_was_away_is_not_lost(case: RuntimeCase) -> None:
    """The code of an exit that nobody watched is there afterwards, and so is the output."""
    async with new_pod(case) as pod:
        container = await start(case, pod, script("echo first; sleep 0.3; echo last; exit 9"))
        await case.restart()
        fact = await until_exited(case, container)
        assert fact.exit_code == 9
        assert joined(await read(case, container)) == b"first\nlast\n"


async def test_output_is_equal_before_and_after_a_restart(case: RuntimeCase) -> None:
    """Positions survive: a log that stands at `seq` goes on from there."""
    async with new_pod(case) as pod:
        container = await start(case, pod, script("seq 1 20; sleep 0.1; echo end"))
        before = await read(case, container)
        await case.restart()
        assert await read(case, container) == before
        assert await read(case, container, after=before[0].seq) == before[1:]


async def test_a_watch_begins_with_a_snapshot_of_everything(case: RuntimeCase) -> None:
    """Each subscription starts with all that is there, whatever was reported before."""
    async with new_pod(case) as pod:
        running = await start_ready(case, pod, script(DEAF, name="running"))
        ended = await start(case, pod, script("exit 4", name="ended"))
        await until_exited(case, ended)
        for _ in range(2):
            watching = case.runtime.watch()
            async with asyncio.timeout(case.deadline_s):
                first = await anext(watching)
            await aclose(watching)
            assert isinstance(first, Snapshot)
            assert [fact.liveness for fact in first.pods if fact.id == pod.id] == [Liveness.RUNNING]
            seen = container_in(first, running)
            assert seen is not None
            assert seen.liveness is Liveness.RUNNING
            gone = container_in(first, ended)
            assert gone is not None
            assert (gone.liveness, gone.exit_code) == (Liveness.EXITED, 4)


async def test_an_exit_is_reported_as_it_happens(case: RuntimeCase) -> None:
    """Facts after the snapshot are complete, with rising sequence numbers."""
    async with new_pod(case) as pod:
        container = await start_ready(case, pod, script(DEAF))
        watching = case.runtime.watch()
        async with asyncio.timeout(case.deadline_s):
            assert isinstance(await anext(watching), Snapshot)
            await case.runtime.stop_container(container, 0)
            numbers = []
            async for item in watching:
                if isinstance(item, Change):
                    numbers.append(item.sequence)
                    fact = item.container
                else:
                    fact = container_in(item, container)
                if fact is not None and fact.id == container.id and fact.liveness is Liveness.EXITED:
                    assert fact.exit_code == 137
                    assert fact.finished_at_ns >= fact.started_at_ns > 0
                    break
        await aclose(watching)
        assert numbers == sorted(set(numbers))


# ------------------------------------------------------------------------------------------------------- cancellation
async def _cancelled_everywhere(
    case: RuntimeCase,
    act: Callable[[], Awaitable[object]],
    undo: Callable[[], Awaitable[None]],
) -> None:
    """Run `act` again and again, cancelled a little later each time, with `undo` after each, until it is not cut off.

    A fast runtime is cancelled at every turn of the loop, a slow one at moments spread over the time that it takes.
    """
    began = time.perf_counter()
    await act()
    took_s = time.perf_counter() - began
    await undo()
    # In-memory work ends within a few turns of the loop; then every one of them is tried.
    pauses: list[Callable[[], Awaitable[None]]]
    if took_s < 0.02:
        pauses = [lambda turns=turns: _turns(turns) for turns in range(60)]  # type: ignore[misc]
    else:
        pauses = [lambda part=part: asyncio.sleep(took_s * part / 8) for part in range(9)]  # type: ignore[misc]
    for pause in pauses:
        task = asyncio.ensure_future(act())
        await pause()
        was_done = task.done()
        task.cancel()
        async with asyncio.timeout(case.deadline_s):
            await asyncio.gather(task, return_exceptions=True)
        outcome = None if task.cancelled() else task.exception()
        assert outcome is None or isinstance(outcome, DispatcherError), outcome
        await undo()
        if was_done and took_s < 0.02:
            return


async def _turns(number: int) -> None:
    for _ in range(number):
        await asyncio.sleep(0)


async def test_a_cancelled_create_pod_leaves_only_what_remove_pod_removes(case: RuntimeCase) -> None:
    """At whatever point the deadline falls."""
    pods: list[PodRef] = [await case.make_pod(pod_spec())]

    async def act() -> None:
        await case.runtime.create_pod(pods[0])

    async def undo() -> None:
        await remove_pod(case, pods[0])
        assert await case.leftovers() == []
        pods[0] = await case.make_pod(pod_spec())

    await _cancelled_everywhere(case, act, undo)
    await case.release_pod(pods[0])


async def test_a_cancelled_create_container_leaves_only_what_remove_container_removes(case: RuntimeCase) -> None:
    """The pod goes on, and can have the next one."""
    async with new_pod(case) as pod:
        nothing = await case.leftovers()
        containers = [await case.make_container(pod, script(DEAF))]

        async def act() -> None:
            await case.runtime.create_container(containers[0])

        async def undo() -> None:
            await case.runtime.remove_container(containers[0])
            assert await case.leftovers() == nothing
            containers[0] = await case.make_container(pod, script(DEAF))

        await _cancelled_everywhere(case, act, undo)
        assert await look_at_pod(case, pod) is Liveness.RUNNING


async def test_a_cancelled_start_can_be_removed(case: RuntimeCase) -> None:
    """Whether the process runs by then or not."""
    async with new_pod(case) as pod:
        nothing = await case.leftovers()
        containers = [await create(case, pod, script(DEAF))]

        async def act() -> None:
            await case.runtime.start_container(containers[0])

        async def undo() -> None:
            await case.runtime.remove_container(containers[0])
            assert await case.leftovers() == nothing
            containers[0] = await create(case, pod, script(DEAF))

        await _cancelled_everywhere(case, act, undo)


async def test_a_cancelled_stop_can_be_taken_up_again(case: RuntimeCase) -> None:
    """The client's deadline passes during the grace period; the next call ends it."""
    async with new_pod(case) as pod:
        container = await start_ready(case, pod, script(DEAF))
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.3):
                await case.runtime.stop_container(container, 60)
        assert (await stop(case, container, 0)).exit_code == 137


async def test_a_cancelled_reader_and_watcher_hold_nothing(case: RuntimeCase) -> None:
    """Iterators end when their task does, and new ones work."""
    async with new_pod(case) as pod:
        container = await start_ready(case, pod, script(DEAF))
        for source in (lambda: case.runtime.output(container, 0), case.runtime.watch):
            task = asyncio.create_task(_consume(source))
            await asyncio.sleep(0.05)
            task.cancel()
            async with asyncio.timeout(case.deadline_s):
                await asyncio.gather(task, return_exceptions=True)
            assert task.cancelled()
        assert (await look(case, container)).liveness is Liveness.RUNNING


async def _consume(source: Callable[[], AsyncIterator[object]]) -> None:
    async for _ in source():
        pass


async def test_inspect_answers_for_exactly_what_was_asked(case: RuntimeCase) -> None:
    """Others' facts are not mixed in, and what is not there is absent."""
    async with new_pod(case) as pod, new_pod(case, pod_spec("other")) as other:
        mine = await start_ready(case, pod, script(DEAF))
        theirs = await start_ready(case, other, script(DEAF))
        unknown: ContainerRef = replace(await case.make_container(pod, script("true", name="unknown")), facts={})
        snapshot = await case.runtime.inspect((pod,), (mine, unknown))
        assert {fact.id for fact in snapshot.pods if fact.liveness is not Liveness.ABSENT} == {pod.id}
        assert {fact.id for fact in snapshot.containers if fact.liveness is not Liveness.ABSENT} == {mine.id}
        assert theirs.id not in {fact.id for fact in snapshot.containers}
