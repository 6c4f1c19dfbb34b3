"""`dispatcher trace` on a real node: each part of a start is there, failures too, and a restart forgets none."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tests.lab.client import CriClient, refused
from tests.lab.images import BUSYBOX, TestImages
from tests.lab.node import Node

pytestmark = pytest.mark.lab


@pytest.fixture(scope="module")
def traced(node: Callable[..., Node], test_images: TestImages) -> Iterator[tuple[Node, CriClient]]:
    made = node()
    client = made.client()
    client.ensure_image(BUSYBOX)
    yield made, client
    client.remove_all_pods()


def trace(node: Node, *arguments: str) -> Any:
    ended = node.command("trace", *arguments, "-o", "json")
    assert ended.returncode == 0, ended.stderr
    return json.loads(ended.stdout)


def test_a_start_is_told_step_by_step(traced: tuple[Node, CriClient]) -> None:
    node, client = traced
    with client.run_pod() as pod:
        pod.run()
        found = trace(node, pod.id[:12])
        page = node.command("trace", pod.id[:12]).stdout
    assert (found["id"], found["state"], found["runtime"], found["rule"]) == (pod.id, "ok", "docker", "default")
    calls = {call["call"]: call for call in found["calls"]}
    assert set(calls) == {"RunPodSandbox", "CreateContainer", "StartContainer"}
    steps = [item["name"] for item in calls["RunPodSandbox"]["steps"]]
    for wanted in ("validate", "route", "commit", "netns.ensure", "network.add", "cni.exec", "runtime.create_pod"):
        assert wanted in steps
    plugins = [
        item["facts"]["plugin"]
        for item in calls["RunPodSandbox"]["steps"]
        if item["name"] == "cni.exec" and item["facts"]["command"] == "ADD"
    ]
    assert plugins == ["bridge", "portmap"]
    assert "docker.start_container" in steps
    created = [item["name"] for item in calls["CreateContainer"]["steps"]]
    assert {"images.lease", "runtime.create_container", "docker.create_container"} <= set(created)
    assert "runtime.start_container" in [item["name"] for item in calls["StartContainer"]["steps"]]
    for call in calls.values():
        for item in call["steps"]:
            assert 0 <= item["offset_ms"] <= item["offset_ms"] + item["duration_ms"] <= call["duration_ms"] + 0.01
    assert "cni.exec" in page
    assert "plugin=bridge command=ADD" in page


def test_a_start_that_failed_is_kept_with_its_reason_and_over_a_restart(traced: tuple[Node, CriClient]) -> None:
    node, client = traced
    conflist = node.bridge_conflist()
    bridge = {**conflist["plugins"][0], "bridge": "a-name-that-is-too-long"}  # type: ignore[index]
    broken = {**conflist, "plugins": [bridge]}
    node.write_conflist(broken)
    try:
        config = client.pod_config()
        with refused():
            client.run_pod(config)
    finally:
        node.write_conflist(conflist)
    name = config.metadata.name
    found = trace(node, name)
    assert found["state"] == "failed"
    (call,) = found["calls"]
    assert "bridge failed at ADD" in call["error"]
    assert "undo" in [item["name"] for item in call["steps"]]
    node.kill()
    node.start()
    assert trace(node, name) == found
    assert name in [start["name"] for start in trace(node)]


def test_a_pod_that_never_started_is_not_found(traced: tuple[Node, CriClient]) -> None:
    node, _ = traced
    ended = node.command("trace", "never-was")
    assert ended.returncode == 4
    assert "never-was" in ended.stderr
