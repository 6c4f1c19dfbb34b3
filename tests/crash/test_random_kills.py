"""`kill -9` of the daemon at seeded random moments while several workers run pods: nothing is lost, doubled or restarted.

A few kills in every run, a hundred in a soak run. DISPATCHER_SEED chooses other moments.
"""

from __future__ import annotations

import os
import random
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.crash.kubelet import Kubelet, Life, Supervisor
from tests.lab.images import BUSYBOX, TestImages
from tests.lab.node import Node

SEED = int(os.environ.get("DISPATCHER_SEED", "20261"))
WORKERS = 3


class Worker:
    """Runs pods one after another until told to stop; keeps one long-lived pod beside them."""

    def __init__(self, node: Node, folder: Path, number: int, stop: threading.Event) -> None:
        self.kubelet = Kubelet(node.client())
        self.folder = folder / f"worker-{number}"
        self.stop = stop
        self.lives = 0
        self.long = Life(self.kubelet, self.folder, name=f"long-{number}", lines=300, removes_image=False)

    def run(self) -> None:
        self.long.begin()
        started_at = self.long.container().started_at
        while not self.stop.is_set():
            life = Life(self.kubelet, self.folder, name=f"{self.folder.name}-{self.lives}", removes_image=False)
            life.begin()
            life.wait_logged()
            life.check()
            life.end()
            self.lives += 1
        self.long.check()
        self.long.wait_logged()
        assert self.long.container().started_at == started_at, "a container was restarted"
        self.long.end()


@pytest.mark.parametrize(
    "kills",
    [
        pytest.param(12, marks=pytest.mark.timeout(600)),
        pytest.param(100, marks=[pytest.mark.soak, pytest.mark.timeout(3600)]),
    ],
)
def test_random_kills_under_load(
    kills: int,
    node: Callable[..., Node],
    test_images: TestImages,
    tmp_path: Path,
    nothing_left: Callable[[Node], None],
    capsys: pytest.CaptureFixture[str],
) -> None:
    current = node()
    current.client().pull(BUSYBOX)
    chance = random.Random(SEED)
    stop = threading.Event()
    workers = [Worker(current, tmp_path, number, stop) for number in range(WORKERS)]
    with Supervisor(current) as supervisor, ThreadPoolExecutor(WORKERS) as pool:
        running = [pool.submit(worker.run) for worker in workers]
        try:
            for kill in range(kills):
                time.sleep(chance.uniform(0.0, 4.0))
                current.kill()
                supervisor.wait_for(kill + 1)
                if any(future.done() for future in running):
                    break
        finally:
            stop.set()
        for future in running:
            future.result(timeout=300)
    nothing_left(current)
    lives = sum(worker.lives for worker in workers)
    with capsys.disabled():
        print(f"\n{kills} kills (seed {SEED}): {lives} pods lived and ended, {supervisor.restarts} restarts")
    assert lives >= WORKERS
