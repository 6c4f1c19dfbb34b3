"""The benchmark runs on a real daemon, beside the empty server, and reports what it says it reports."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from bench import cri, streams
from tests.lab.child import wait_until
from tests.lab.images import BUSYBOX, TestImages
from tests.lab.node import Node

pytestmark = [pytest.mark.lab, pytest.mark.timeout(240)]

SCRIPT = Path(__file__).parents[2] / "bench/cri.py"


def test_a_small_run(node: Callable[..., Node], test_images: TestImages) -> None:
    del test_images
    own = node(config={"metrics": {"listen": "127.0.0.1:19478"}})
    start = f"{sys.executable} -m dispatcher serve --config {own.config_path}"
    words = ["--ours", str(own.socket), "--metrics", "http://127.0.0.1:19478", "--image", BUSYBOX, "-o", "json"]
    small = ["--rounds", "1", "--calls", "4", "--relists", "2", "--pods", "2", "--recoveries", "1"]
    done = subprocess.run(
        [sys.executable, str(SCRIPT), *words, *small, "--ours-start", start],
        capture_output=True,
        text=True,
        check=False,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    names = set(report["measurements"])
    assert {
        "RunPodSandbox",
        "ExecSync",
        "Version",
        "ListPodSandbox(2)",
        "idle PLEG tick (2)",
        "full relist (2)",
    } <= names
    assert report["measurements"]["full relist (2)"]["floor"]["n"] == 2
    assert report["measurements"]["recovery after kill -9 (2)"]["dispatcher"]["n"] == 1
    assert {"  of it our own", "  of it docker.create_pod", "  of it cni.add"} <= names
    assert next(value for name, value in report["facts"].items() if name.startswith("stale"))["dispatcher"] == 0
    assert report["facts"]["memory with 2 pods"]["dispatcher"]["rss_mib"] > 10
    assert own.client().pods() == []

    # What the benchmark started again is not the node's own child.
    pid = cri.Socket("dispatcher", str(own.socket)).pid
    os.kill(pid, signal.SIGTERM)
    wait_until(lambda: not own.socket.exists(), timeout_s=30, what="the daemon does not end")
    own.stop()


def test_streams_are_measured(node: Callable[..., Node], test_images: TestImages) -> None:
    """Each kind of transfer arrives whole, and leaves nothing."""
    del test_images
    own = node()
    socket = cri.Socket("dispatcher", str(own.socket))
    results = streams.run([socket], rounds=1, trips=1, mib=1, say=lambda _text: None)
    assert {"exec round trip", "exec stdout 1 MiB", "port-forward to pod 1 MiB"} <= set(results.samples)
    assert all(len(samples["dispatcher"]) == 1 for samples in results.samples.values())
    assert results.facts["exec stdin 1 MiB, MiB/s"]["dispatcher"] > 0
    assert own.client().pods() == []
