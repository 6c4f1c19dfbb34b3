"""`kill -9` of the daemon before and after every act on the outside world: the retry finishes what was begun.

The failpoints are collected from a run (a trace of the whole life of a pod), so a new one is covered as soon as it is
passed. For each one the daemon is killed there once, started again, and the same pod's life goes on.

Between the end of one act and the beginning of the next nothing durable happens, so "before" an act is the same moment
as "after" the one in front of it; the usual run kills after each act, and before the first. The soak run kills before
and after each act, at every passage of it: around each single commit of a record, above all.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.crash.kubelet import Kubelet, Life, Supervisor
from tests.lab.images import TestImages
from tests.lab.node import Node

pytestmark = pytest.mark.timeout(1500)


def trace_of(node: Node, folder: Path, *, every_passage: bool) -> list[str]:
    """Every failpoint that a pod's life passes, start and end of the daemon included, armed to kill there, in order."""
    trace = folder / "trace"
    node.stop()
    node.start(
        env={
            "DISPATCHER_FAILPOINTS": "*:before=trace,*:after=trace",
            "DISPATCHER_FAILPOINT_TRACE": str(trace),
        }
    )
    life = Life(Kubelet(node.client()), folder)
    life.begin()
    life.wait_logged()
    life.check()
    life.end()
    node.stop()
    passages: Counter[str] = Counter()
    points: list[str] = []
    for name in trace.read_text().split():
        passages[name] += 1
        is_chosen = passages[name] == 1 and (name.endswith(":after") or not points)
        if is_chosen or every_passage:
            points.append(f"{name}=kill@{passages[name]}")
    return points


@pytest.mark.parametrize(
    "every_passage",
    [
        pytest.param(False, id="first-passage"),
        pytest.param(True, id="every-passage", marks=[pytest.mark.soak, pytest.mark.timeout(7200)]),
    ],
)
def test_killed_at_every_failpoint(
    every_passage: bool,
    node: Callable[..., Node],
    test_images: TestImages,
    tmp_path: Path,
    nothing_left: Callable[[Node], None],
    capsys: pytest.CaptureFixture[str],
) -> None:
    current = node()
    points = trace_of(current, tmp_path, every_passage=every_passage)
    assert len(points) > 30, points
    not_hit = []
    for number, point in enumerate(points):
        current.stop()
        current.start(env={"DISPATCHER_FAILPOINTS": point}, wait=False)
        killed_at = kill_and_go_on(current, tmp_path, point, number)
        if not killed_at:
            not_hit.append(point)
    current.stop()
    current.start()
    nothing_left(current)
    with capsys.disabled():
        print(f"\nkilled at {len(points) - len(not_hit)} of {len(points)} failpoints; not passed: {not_hit or 'none'}")
    # What a warm store no longer does (such as writing a blob that is there) may not be passed a second time.
    assert len(not_hit) <= len(points) // 5, not_hit


def kill_and_go_on(node: Node, folder: Path, point: str, number: int) -> bool:
    """Live a pod's life through a kill at `point`. True when the kill came."""
    life = Life(Kubelet(node.client()), folder, name=f"kill-{number}")
    try:
        with Supervisor(node) as supervisor:
            life.begin()
            life.wait_logged()
            life.check()
            life.end()
    except BaseException as error:
        error.add_note(f"killed at {point}; daemon's log:\n{node.log_text()[-6000:]}")
        raise
    return supervisor.restarts > 0 or not node.running
