"""`exec -i` and `exec -it`: input, terminals, exit codes, over the daemon's streaming server."""

from __future__ import annotations

import os
import pty
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.commands.test_pods import Commands
from tests.lab.client import unique
from tests.lab.images import BUSYBOX, TestImages
from tests.lab.node import Node

pytestmark = [pytest.mark.lab, pytest.mark.timeout(120)]


@pytest.fixture(scope="module")
def command(
    node: Callable[..., Node], test_images: TestImages, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Commands]:
    del test_images
    commands = Commands(node(), tmp_path_factory.mktemp("sessions") / "pods")
    yield commands
    commands("rm", "--all", "-f", "--time", "0")


@pytest.fixture(scope="module")
def pod(command: Commands) -> str:
    name = unique("session")
    started = command("run", "-d", "--name", name, BUSYBOX, "sleep", "100000")
    assert started.returncode == 0, started.stderr
    return name


def test_input_reaches_the_command_and_ends(command: Commands, pod: str) -> None:
    done = command("exec", "-i", pod, "--", "sh", "-c", "cat; echo err >&2; exit 6", stdin="one\ntwo\n")
    assert (done.returncode, done.stdout, done.stderr) == (6, "one\ntwo\n", "err\n")


def test_a_file_passes_both_ways_unharmed(command: Commands, pod: str, tmp_path: Path) -> None:
    data = os.urandom(3 << 20)
    (tmp_path / "in").write_bytes(data)
    with (tmp_path / "in").open("rb") as source, (tmp_path / "out").open("wb") as target:
        argv = command.argv("exec", "-i", pod, "cat")
        done = subprocess.run(argv, stdin=source, stdout=target, check=False, timeout=60, env=command.env)
    assert done.returncode == 0
    assert (tmp_path / "out").read_bytes() == data


def test_a_session_ends_with_the_command_though_input_stays_open(command: Commands, pod: str) -> None:
    reader, writer = os.pipe()
    try:
        argv = command.argv("exec", "-i", pod, "--", "sh", "-c", "echo done; exit 2")
        done = subprocess.run(argv, stdin=reader, capture_output=True, check=False, timeout=60, env=command.env)
    finally:
        os.close(reader)
        os.close(writer)
    assert (done.returncode, done.stdout) == (2, b"done\n")


def test_a_command_that_is_not_there(command: Commands, pod: str) -> None:
    done = command("exec", "-i", pod, "no-such-program", stdin="")
    assert done.returncode in (125, 126, 127)
    assert "no-such-program" in done.stderr + done.stdout


def test_a_terminal_is_a_terminal(command: Commands, pod: str) -> None:
    master, slave = pty.openpty()
    child = subprocess.Popen(
        command.argv("exec", "-it", pod, "sh"), stdin=slave, stdout=slave, stderr=slave, env=command.env
    )
    os.close(slave)
    seen = b""
    try:
        while b"# " not in seen:
            seen += os.read(master, 4096)
        os.write(master, b"test -t 0 && echo a-$((1+1))-terminal; exit 4\r")
        while b"a-2-terminal" not in seen:
            seen += os.read(master, 4096)
        assert child.wait(30) == 4
    finally:
        child.kill()
        child.wait()
        os.close(master)


def test_a_time_limit_does_not_go_with_a_session(command: Commands, pod: str) -> None:
    assert command("exec", "-i", "--timeout", "5", pod, "cat").returncode == 2
