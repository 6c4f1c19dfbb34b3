"""`dispatcher top` on a real node: a container that works is seen to work, one that sleeps is not."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator

import pytest

from tests.lab.client import CriClient
from tests.lab.images import BUSYBOX, TestImages
from tests.lab.node import Node

pytestmark = pytest.mark.lab


@pytest.fixture(scope="module")
def used(node: Callable[..., Node], test_images: TestImages) -> Iterator[tuple[Node, CriClient]]:
    made = node()
    client = made.client()
    client.ensure_image(BUSYBOX)
    yield made, client
    client.remove_all_pods()


def test_who_works_is_seen(used: tuple[Node, CriClient]) -> None:
    node, client = used
    with client.run_pod() as pod:
        busy = pod.run(
            command=["sh", "-c", "while :; do echo x | nc -u -w 1 10.255.255.1 9; done & while :; do :; done"]
        )
        idle = pod.run(command=["sleep", "1d"])
        ended = node.command("top", "--once", "--interval", "1", "-o", "json")
        page = node.command("top", "--once", "--interval", "0.5", pod.id[:12])
    assert ended.returncode == 0, ended.stderr
    (row,) = [row for row in json.loads(ended.stdout) if row["id"] == pod.id]
    figures = {item["id"]: item for item in row["containers"]}
    assert figures[busy.id]["cpu_millicores"] > 100 > figures[idle.id]["cpu_millicores"]
    assert 0 < figures[idle.id]["memory_bytes"] < 64 << 20
    assert row["cpu_millicores"] >= figures[busy.id]["cpu_millicores"] / 2
    assert row["memory_bytes"] >= figures[idle.id]["memory_bytes"]
    assert row["network_sent_bytes"] > 0
    assert row["network_sent_bytes_per_s"] >= 0
    assert page.returncode == 0
    lines = page.stdout.splitlines()
    assert lines[0].split()[:4] == ["ID", "POD", "CONTAINER", "CPU(m)"]
    assert len(lines) == 4


def test_a_pod_that_does_not_exist(used: tuple[Node, CriClient]) -> None:
    node, _ = used
    assert node.command("top", "--once", "never-was").returncode == 4
