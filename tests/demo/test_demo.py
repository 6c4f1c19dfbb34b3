"""`make demo`: it shows what it says, and leaves nothing, also when it is interrupted or killed."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.lab import census
from tests.lab.child import PartMissingError, find_program, wait_until

ROOT = Path(__file__).parents[2]

pytestmark = [pytest.mark.lab, pytest.mark.timeout(300)]


@pytest.fixture
def folder() -> Iterator[Path]:
    """A short-named folder for all that the demo makes. Skips where a part is missing."""
    if os.geteuid() != 0:
        pytest.skip("needs root")
    try:
        for program in ("dockerd", "docker-registry", "busybox", "unshare", "ip"):
            find_program(program)
    except PartMissingError as exc:
        pytest.skip(str(exc))
    with tempfile.TemporaryDirectory(prefix="demo-") as name:
        yield Path(name)


def left_of(folder: Path, output: str) -> list[str]:
    """What is on this machine that names the demo's folder, or one of those which it printed.

    Other tests may run meanwhile, so it is not asked what is new. The demo's network is a namespace of its own, which
    lasts as long as one of its processes.
    """
    marks = {str(folder), *re.findall(r"cri-lab-[a-z]+-[a-z0-9_]{8}", output)}
    found = [f"{kind}: {entry}" for kind, entries in census.take().kinds.items() for entry in entries]
    return [entry for entry in found if any(mark in entry for mark in marks)] + [str(path) for path in folder.iterdir()]


def start(folder: Path, output: Path) -> subprocess.Popen[bytes]:
    """Start the demo as a child, in a process group of its own, as a terminal would."""
    with output.open("wb") as stream:
        return subprocess.Popen(
            [sys.executable, "-m", "demo"],
            cwd=ROOT,
            stdin=subprocess.DEVNULL,
            stdout=stream,
            stderr=subprocess.STDOUT,
            env={**os.environ, "PYTHONUNBUFFERED": "1", "TMPDIR": str(folder)},
            start_new_session=True,
        )


def test_shows_the_route_of_each_pod(folder: Path, tmp_path: Path) -> None:
    """The demo ends well and has shown each pod's runtime, rule and reason, and each refusal."""
    output = tmp_path / "output"
    child = start(folder, output)
    child.wait()
    text = output.read_text()
    assert child.returncode == 0, text
    routes = {words[0]: words[1:4] for line in text.splitlines() if len(words := line.split()) > 3 and "/" in words[0]}
    assert routes["default/web"] == ["docker", "shared-kernel", "default"]
    assert routes["kube-system/node-agent"] == ["docker", "shared-kernel", "host-access"]
    assert routes["default/by-class"] == ["docker", "shared-kernel", "handler:docker"]
    assert "has the floor vm" in text
    assert "everything it started is gone again" in text
    wait_until(lambda: not left_of(folder, text), timeout_s=20, what="something is left")


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL], ids=lambda how: how.name)
def test_ends_early_and_leaves_nothing(folder: Path, tmp_path: Path, how: signal.Signals) -> None:
    """Interrupted in the middle it cleans up; after SIGKILL, the next start or `--clean` does."""
    output = tmp_path / "output"
    child = start(folder, output)
    wait_until(lambda: "$ dispatcher play" in output.read_text(), timeout_s=120, what="no pod is started")
    os.killpg(child.pid, how)
    child.wait()
    if how is signal.SIGKILL:
        assert child.returncode == -signal.SIGKILL
        assert left_of(folder, output.read_text())  # so the question would be answered
        command = [sys.executable, "-m", "demo", "--clean"]
        environment = {**os.environ, "TMPDIR": str(folder)}
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, check=True)
        assert b"removed 3 folders" in done.stdout
    else:
        assert child.returncode == 130, output.read_text()
    text = output.read_text()
    wait_until(lambda: not left_of(folder, text), timeout_s=20, what="something is left")
