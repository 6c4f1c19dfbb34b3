"""`kill -9` of the Docker Engine: with live-restore nothing happens to pods; without it they end with a named reason."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from dispatcher.cri import api_pb2 as pb
from tests.crash.kubelet import Kubelet, Life
from tests.lab.child import wait_until
from tests.lab.engine import Engine
from tests.lab.images import BUSYBOX, TestImages
from tests.lab.node import Node


@pytest.fixture
def life(node: Callable[..., Node], test_images: TestImages, tmp_path: Path) -> Iterator[tuple[Node, Life]]:
    current = node()
    current.client().pull(BUSYBOX)
    life = Life(Kubelet(current.client()), tmp_path, lines=200, removes_image=False)
    life.begin()
    yield current, life
    current.client().remove_all_pods()


def test_with_live_restore_pods_go_on(engine: Engine, life: tuple[Node, Life]) -> None:
    """Lists answer while the engine is away, and afterwards the container is the same one with a whole log."""
    node, pod = life
    started_at = pod.container().started_at
    engine.kill()
    try:
        assert [p.id for p in node.client().pods()] == [pod.pod_id]
        assert pod.status().state == pb.SANDBOX_READY, "a pod whose engine is merely away was shown as gone"
    finally:
        engine.start()
    node.client().wait_ready()
    pod.check()
    pod.wait_logged()
    assert pod.container().started_at == started_at, "the container was restarted"


def test_daemon_and_engine_killed_together(engine: Engine, life: tuple[Node, Life]) -> None:
    node, pod = life
    node.kill()
    engine.kill()
    node.start()  # with the engine away: the node serves what it knows
    try:
        assert [p.id for p in node.client().pods()] == [pod.pod_id]
    finally:
        engine.start()
    node.client().wait_ready()
    pod.check()
    pod.wait_logged()


def test_without_live_restore_the_reason_is_named(engine: Engine, life: tuple[Node, Life]) -> None:
    node, pod = life
    engine.set_live_restore(enabled=False)
    try:
        engine.kill()
        engine.start()
        node.client().wait_ready()
        wait_until(lambda: pod.status().state == pb.SANDBOX_NOTREADY, timeout_s=30, what="the pod is shown as ready")
        reply = pod.kubelet.call(
            "PodSandboxStatus", pb.PodSandboxStatusRequest(pod_sandbox_id=pod.pod_id, verbose=True)
        )
        assert "EngineRestarted" in reply.info["dispatcher"]
        assert pod.container().state in (pb.CONTAINER_EXITED, pb.CONTAINER_UNKNOWN)
    finally:
        engine.set_live_restore(enabled=True)
