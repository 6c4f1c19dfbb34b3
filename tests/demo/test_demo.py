"""`make demo`: it shows what it says, and leaves nothing, also when it is interrupted or killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.lab import census
from tests.lab.child import PartMissingError, find_program, wait_until
from tests.lab.sweep import sweep_stale

ROOT = Path(__file__).parents[2]
# What tests that run beside this one may change: the census compares the whole machine.
ENVIRONMENT = {**os.environ, "PYTHONUNBUFFERED": "1"}

pytestmark = [pytest.mark.lab, pytest.mark.timeout(300)]


@pytest.fixture(autouse=True)
def clean_machine(tmp_path: Path) -> Iterator[None]:
    """Skip where a part is missing; afterwards, nothing is left that was not there before."""
    if os.geteuid() != 0:
        pytest.skip("needs root")
    try:
        for program in ("dockerd", "docker-registry", "busybox", "unshare", "ip"):
            find_program(program)
    except PartMissingError as exc:
        pytest.skip(str(exc))
    before = census.take()
    yield
    census.assert_clean(before)


def start(output: Path) -> subprocess.Popen[bytes]:
    """Start the demo as a child, in a process group of its own, as a terminal would."""
    with output.open("wb") as stream:
        return subprocess.Popen(
            [sys.executable, "-m", "demo"],
            cwd=ROOT,
            stdin=subprocess.DEVNULL,
            stdout=stream,
            stderr=subprocess.STDOUT,
            env=ENVIRONMENT,
            start_new_session=True,
        )


def test_shows_the_route_of_each_pod(tmp_path: Path) -> None:
    """The demo ends well and has shown each pod's runtime, rule and reason, and each refusal."""
    output = tmp_path / "output"
    child = start(output)
    child.wait()
    text = output.read_text()
    assert child.returncode == 0, text
    routes = {words[0]: words[1:4] for line in text.splitlines() if len(words := line.split()) > 3 and "/" in words[0]}
    assert routes["default/web"] == ["docker", "shared-kernel", "default"]
    assert routes["kube-system/node-agent"] == ["docker", "shared-kernel", "host-access"]
    assert routes["default/by-class"] == ["docker", "shared-kernel", "handler:docker"]
    assert "has the floor vm" in text
    assert "everything it started is gone again" in text


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL], ids=lambda how: how.name)
def test_ends_early_and_leaves_nothing(tmp_path: Path, how: signal.Signals) -> None:
    """Interrupted in the middle it cleans up; after SIGKILL, the next start or `--clean` does."""
    output = tmp_path / "output"
    child = start(output)
    wait_until(lambda: "$ dispatcher play" in output.read_text(), timeout_s=120, what="no pod is started")
    os.killpg(child.pid, how)
    child.wait()
    if how is signal.SIGKILL:
        assert child.returncode == -signal.SIGKILL
        done = subprocess.run([sys.executable, "-m", "demo", "--clean"], cwd=ROOT, capture_output=True, check=True)
        assert b"removed" in done.stdout
        assert sweep_stale() == []
    else:
        assert child.returncode == 130, output.read_text()
