"""A call's tree of steps: complete, bounded, kept over a restart, and nothing at all where nobody records."""

from __future__ import annotations

import asyncio
import json
import os
from contextlib import suppress
from pathlib import Path

from dispatcher import spans
from dispatcher.effects import effect
from dispatcher.observability.traces import MAX_FILE_BYTES, TraceLog
from dispatcher.spans import MAX_FACTS, MAX_SPANS, MAX_TEXT, Recording, Tree, annotate, annotate_call, step


@effect("test.spans.act")
def act() -> str:
    return "done"


@effect("test.spans.wait")
async def wait() -> None:
    await asyncio.sleep(0)


def names(tree: Tree) -> list[str]:
    return [span.name for span in tree.spans]


def test_effects_and_steps_stand_below_what_encloses_them() -> None:
    ended: list[Tree] = []
    with Recording("RunPodSandbox", ended.append, remote="00-x", correlation_id="c1") as recording:
        with step("network", plugin="bridge"):
            assert act() == "done"
            annotate(address="10.0.0.1")
        annotate_call(pod="web")
    (tree,) = ended
    assert tree is recording.tree
    assert tree.remote == "00-x"
    root, network, acted = tree.spans
    assert (network.parent, acted.parent) == (root, network)
    assert acted.name == "test.spans.act"
    assert network.facts == {"plugin": "bridge", "address": "10.0.0.1"}
    assert root.facts == {"correlation_id": "c1", "pod": "web"}
    assert 0 <= network.started_ns <= acted.started_ns <= acted.ended_ns <= network.ended_ns <= root.ended_ns


def test_without_a_recording_nothing_is_kept() -> None:
    with step("lonely"):
        annotate(a=1)
        annotate_call(b=2)
        assert act() == "done"
    assert not spans.is_recording()


def test_errors_are_on_the_steps_that_they_passed() -> None:
    ended: list[Tree] = []
    with suppress(ValueError), Recording("Call", ended.append):
        with step("fine"):
            pass
        with step("bad"):
            raise ValueError("broken")
    assert [span.error for span in ended[0].spans] == ["ValueError: broken", "", "ValueError: broken"]


async def test_work_that_outlives_its_client_ends_the_tree() -> None:
    """The client's call is cancelled; the work goes on in its own task, and the tree waits for it."""
    ended: list[Tree] = []
    go = asyncio.Event()

    async def work() -> None:
        with step("long"):
            await go.wait()
            with step("last"):
                await wait()

    with suppress(TimeoutError), Recording("Call", ended.append):
        task = asyncio.create_task(work())
        await asyncio.sleep(0)
        raise TimeoutError
    assert ended == []
    go.set()
    await task
    assert names(ended[0]) == ["Call", "long", "last", "test.spans.wait"]


async def test_a_task_that_lives_on_adds_nothing_to_a_tree_that_ended() -> None:
    ended: list[Tree] = []
    go = asyncio.Event()

    async def follow() -> None:
        await go.wait()
        with step("late"):
            act()
            annotate(late=True)

    with Recording("StartContainer", ended.append):
        task = asyncio.create_task(follow())
    go.set()
    await task
    assert names(ended[0]) == ["StartContainer"]
    assert len(ended) == 1


async def test_threads_of_the_call_belong_to_it() -> None:
    ended: list[Tree] = []
    with Recording("Call", ended.append):
        await asyncio.to_thread(act)
    assert names(ended[0]) == ["Call", "test.spans.act"]


def test_a_tree_is_bounded_whatever_happens_in_it() -> None:
    ended: list[Tree] = []
    with Recording("PullImage", ended.append, **{f"fact{n}": "x" * 5000 for n in range(100)}):
        for _ in range(5000):
            act()
        for number in range(5000):
            with step("odd"):
                annotate(number=number)
    tree = ended[0]
    assert len(tree.spans) == MAX_SPANS
    assert tree.spans[1].count == 5000
    assert tree.dropped == 5000 - (MAX_SPANS - 2)
    assert len(tree.root.facts) == MAX_FACTS
    assert all(len(str(value)) <= MAX_TEXT for value in tree.root.facts.values())


def record(log: TraceLog, pod: str, rpc: str = "RunPodSandbox") -> None:
    with log.record(rpc, pod=pod, namespace="shop"), step("network.add"):
        act()


def kept(log: TraceLog) -> list[str]:
    return [call["facts"]["pod"] for call in json.loads(log.render())]


def test_calls_are_kept_over_a_restart(tmp_path: Path) -> None:
    file = tmp_path / "traces.jsonl"
    first = TraceLog(file, keep=3)
    first.start()
    for number in range(5):
        record(first, f"p{number}")
    first.close()
    assert kept(first) == ["p2", "p3", "p4"]
    assert file.stat().st_mode & 0o777 == 0o600
    with file.open("ab") as cut:
        cut.write(b'{"call":"RunPodSandbox","facts":{"pod":"cut o')

    second = TraceLog(file, keep=3)
    second.start()
    record(second, "p5")
    second.close()
    assert kept(second) == ["p3", "p4", "p5"]
    third = TraceLog(file, keep=10)
    third.start()
    assert kept(third) == ["p0", "p1", "p2", "p3", "p4", "p5"]
    third.close()


def test_a_call_under_way_is_shown_and_secrets_are_not(tmp_path: Path) -> None:
    log = TraceLog(tmp_path / "traces.jsonl", keep=3)
    log.start()
    with log.record("PullImage", image="https://user:hunter22@registry/x"), step("images.pull"):
        (call,) = json.loads(log.render())
    assert call["state"] == "running"
    assert [(item["name"], item["depth"], item["running"]) for item in call["steps"]] == [("images.pull", 1, True)]
    log.close()
    (call,) = json.loads(log.render())
    assert call["state"] == "ok"
    assert call["facts"]["image"] == "https://***@registry/x"
    assert "hunter22" not in (tmp_path / "traces.jsonl").read_text()


def test_what_cannot_be_written_is_kept_in_memory(tmp_path: Path) -> None:
    log = TraceLog(tmp_path / "missing" / "traces.jsonl", keep=3)
    log.start()
    record(log, "web")
    log.close()
    assert kept(log) == ["web"]


def test_the_files_are_bounded(tmp_path: Path) -> None:
    file = tmp_path / "traces.jsonl"
    log = TraceLog(file, keep=1000)
    log.start()
    while not (tmp_path / "traces.jsonl.1").exists() or file.stat().st_size < MAX_FILE_BYTES // 4:
        for number in range(50):
            with log.record("RunPodSandbox", pod=f"p{number}"):
                for index in range(200):
                    with step("step", index=index):
                        pass
        assert sum(os.stat(path).st_size for path in tmp_path.iterdir()) <= 2 * MAX_FILE_BYTES
    log.close()
    assert len(log.render()) <= 5 << 20


def test_only_starts_are_kept_and_only_where_wanted(tmp_path: Path) -> None:
    log = TraceLog(tmp_path / "a", keep=3)
    assert log.wants("RunPodSandbox")
    assert not log.wants("Version")
    assert not TraceLog(tmp_path / "b", keep=0).wants("RunPodSandbox")
