"""A contract that passes everything is worth nothing: each planted fault is found by the test that is meant for it."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from dispatcher.api import ContainerRef, PodRef
from dispatcher.model import Change, CreatedPod, Liveness, ObservedContainer, OutputChunk, Snapshot
from dispatcher.testing import FakeCase, FakeEngine, FakeRuntime, make_runtime
from dispatcher.testing.contract import test_life, test_output, test_recovery, test_streams
from dispatcher.testing.fake_engine import FakeContainer, FakePod

ContractTest = Callable[..., Awaitable[None]]


class ForgetsAtRestart(FakeRuntime):
    """Finds its things by the facts of the record, not by their id."""

    async def inspect(self, pods: tuple[PodRef, ...], containers: tuple[ContainerRef, ...]) -> Snapshot:
        pods = tuple(pod for pod in pods if pod.facts)
        return await super().inspect(pods, tuple(container for container in containers if container.facts))


class LeaksOnCancel(FakeRuntime):
    """Makes something under another name first, and forgets that name when it is cancelled."""

    async def create_pod(self, pod: PodRef) -> CreatedPod:
        self.engine.pods["temporary"] = FakePod(pod)
        await asyncio.sleep(0)
        made = await super().create_pod(pod)
        del self.engine.pods["temporary"]
        return made


class StopFails(FakeRuntime):
    """Complains when it is asked to stop what is gone."""

    async def stop_pod(self, pod: PodRef) -> None:
        if pod.id not in self.engine.pods:
            raise KeyError(pod.id)
        await super().stop_pod(pod)


class KeepsContainers(FakeRuntime):
    """Removes the sandbox only."""

    async def remove_pod(self, pod: PodRef) -> None:
        self.engine.pods.pop(pod.id, None)


class InventsCodes(FakeRuntime):
    """Reports success for everything."""

    async def inspect(self, pods: tuple[PodRef, ...], containers: tuple[ContainerRef, ...]) -> Snapshot:
        found = await super().inspect(pods, containers)
        return replace(found, containers=tuple(replace(fact, exit_code=0) for fact in found.containers))


class SignalsTwice(FakeRuntime):
    """Each stop sends the signal."""

    async def stop_container(self, container: ContainerRef, grace_s: float) -> ObservedContainer:
        found = self.engine.containers.get(container.id)
        if found is not None and found.program is not None and grace_s:
            found.program.signal("SIGTERM")
            await asyncio.sleep(0)
        return await super().stop_container(container, grace_s)


class IgnoresLaterDeadlines(FakeRuntime):
    """The first grace period counts, whatever comes later."""

    stopping: dict[str, asyncio.Task[ObservedContainer]]

    async def stop_container(self, container: ContainerRef, grace_s: float) -> ObservedContainer:
        self.stopping = getattr(self, "stopping", {})
        if container.id not in self.stopping:
            self.stopping[container.id] = asyncio.ensure_future(super().stop_container(container, grace_s))
        return await asyncio.shield(self.stopping[container.id])


class LosesTheTail(FakeRuntime):
    """Ends the output with the process instead of with the last byte."""

    async def output(self, container: ContainerRef, after: int) -> AsyncIterator[OutputChunk]:
        last: OutputChunk | None = None
        async for chunk in super().output(container, after):
            if last is not None:
                yield last
            last = chunk


class Rechunks(FakeRuntime):
    """Joins what it replays."""

    async def output(self, container: ContainerRef, after: int) -> AsyncIterator[OutputChunk]:
        if not after:
            async for chunk in super().output(container, after):
                yield chunk
            return
        chunks = [chunk async for chunk in super().output(container, after)]
        if chunks:
            yield replace(chunks[-1], data=b"".join(chunk.data for chunk in chunks))


class CountsFromZero(FakeRuntime):
    """Positions that mean something else after a restart."""

    async def output(self, container: ContainerRef, after: int) -> AsyncIterator[OutputChunk]:
        async for chunk in super().output(container, after):
            yield replace(chunk, seq=chunk.seq - id(self) % 1000)


class ChangesFirst(FakeRuntime):
    """Watches without a snapshot."""

    async def watch(self) -> AsyncIterator[Snapshot | Change]:
        async for item in super().watch():
            if isinstance(item, Change):
                yield item


class KillsAtClose(FakeRuntime):
    """Takes its pods down with it."""

    async def aclose(self) -> None:
        for container in self.engine.containers.values():
            self.engine.kill(container)


class MixesStreams(FakeRuntime):
    """Everything is standard output."""

    async def output(self, container: ContainerRef, after: int) -> AsyncIterator[OutputChunk]:
        async for chunk in super().output(container, after):
            yield replace(chunk, stream=type(chunk.stream).STDOUT)


class SucceedsToStartNothing(FakeRuntime):
    """A command that does not exist is RUNNING."""

    async def start_container(self, container: ContainerRef) -> ObservedContainer:
        return replace(await super().start_container(container), liveness=Liveness.RUNNING, exit_code=None, reason="")


class RunsTwice(FakeRuntime):
    """A second start is another run."""

    async def start_container(self, container: ContainerRef) -> ObservedContainer:
        found: FakeContainer = self.engine.find(container)
        if found.liveness is Liveness.EXITED:
            found.liveness, found.task = Liveness.CREATED, None
        return await super().start_container(container)


BITES: list[tuple[type[FakeRuntime], ContractTest]] = [
    (ForgetsAtRestart, test_recovery.test_what_was_made_is_found_by_its_id_alone),
    (LeaksOnCancel, test_recovery.test_a_cancelled_create_pod_leaves_only_what_remove_pod_removes),
    (StopFails, test_life.test_stopping_and_removing_what_never_existed_succeeds),
    (KeepsContainers, test_life.test_removing_a_pod_removes_its_containers),
    (InventsCodes, test_life.test_the_exit_code_is_the_process_s_own),
    (SignalsTwice, test_life.test_a_shorter_stop_moves_the_deadline_and_signals_no_second_time),
    (IgnoresLaterDeadlines, test_life.test_a_shorter_stop_moves_the_deadline_and_signals_no_second_time),
    (LosesTheTail, test_output.test_all_of_it_arrives_in_order),
    (LosesTheTail, test_output.test_it_follows_what_runs),
    (Rechunks, test_output.test_reading_again_from_any_position_gives_the_same_chunks),
    (CountsFromZero, test_recovery.test_output_is_equal_before_and_after_a_restart),
    (ChangesFirst, test_recovery.test_a_watch_begins_with_a_snapshot_of_everything),
    (KillsAtClose, test_recovery.test_pods_outlive_the_daemon),
    (MixesStreams, test_life.test_standard_error_is_kept_apart),
    (SucceedsToStartNothing, test_life.test_a_command_that_cannot_be_executed_is_no_success),
    (RunsTwice, test_life.test_starting_a_second_time_starts_nothing),
]


class FaultyCase(FakeCase):
    """A runtime with a planted fault under test. Short deadlines: what hangs is found fast."""

    deadline_s = 1.0

    def __init__(self, kind: type[FakeRuntime]) -> None:
        super().__init__()
        self._kind = kind
        self._runtime = kind(self.engine)

    async def restart(self) -> None:
        await self._runtime.aclose()
        self._runtime = self._kind(self.engine)


@pytest.mark.parametrize(("kind", "test"), BITES, ids=lambda value: value.__name__)
async def test_a_planted_fault_is_found(kind: type[FakeRuntime], test: ContractTest) -> None:
    case = FaultyCase(kind)
    arguments: dict[str, Any] = {"code": 3} if test is test_life.test_the_exit_code_is_the_process_s_own else {}
    with pytest.raises((AssertionError, TimeoutError, KeyError, StopAsyncIteration)):
        await test(case, **arguments)
    await case.engine.aclose()


class LosesExecOutput(FakeEngine):
    async def execute(self, ref: ContainerRef, spec: Any) -> Any:
        process = await super().execute(ref, spec)
        process.output = _nothing  # type: ignore[method-assign]
        return process


async def _nothing() -> AsyncIterator[tuple[str, bytes]]:
    return
    yield


async def test_lost_output_of_exec_is_found() -> None:
    case = FakeCase()
    case.engine = LosesExecOutput()
    case._runtime = make_runtime(case.engine)
    with pytest.raises(AssertionError):
        await test_streams.test_exec_gives_streams_and_code(case)
    await case.engine.aclose()


# --------------------------------------------------------------------------------------------------------- command line
def run(*arguments: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """Run the suite as a plugin author does: somewhere else, with nothing of this project's configuration."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--pyargs", "dispatcher.testing"]
    return subprocess.run(
        [*command, "-W", "ignore", *arguments],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": os.getcwd()},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def test_the_suite_runs_by_its_command(tmp_path: Path) -> None:
    done = run("--runtime=fake", "-k", "says_what_it_is or ready", folder=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2 passed" in done.stdout


def test_the_suite_takes_a_case_of_the_author_s(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(
        "from dispatcher.testing import FakeCase\n"
        "async def case(folder):\n"
        "    found = FakeCase()\n"
        "    found.runtime.name = ''\n"
        "    yield found\n"
    )
    done = run("--runtime=mine:case", "-k", "says_what_it_is", folder=tmp_path)
    assert done.returncode == 1
    assert "test_it_says_what_it_is" in done.stdout
    done = run("--runtime=nosuch", "-k", "says_what_it_is", folder=tmp_path)
    assert "there is no such case; known are fake" in done.stdout + done.stderr
