"""Exec, attach and connections into a pod."""

from __future__ import annotations

import asyncio
import hashlib
import os
import socket
import time
from pathlib import Path

import pytest

from dispatcher.api import (
    CanAttach,
    CanConnect,
    CanExec,
    CanReportFootprint,
    CanStats,
    CanTrimOutput,
    CanUpdateResources,
    ContainerRef,
    ExecSpec,
    PodRef,
    run_in_namespace,
)
from dispatcher.errors import InvalidRequest, NotFound, WrongState
from dispatcher.model import Liveness
from tests.docker.kit import DEADLINE_S, World, container_spec, descendants_of, finish

pytestmark = [pytest.mark.lab, pytest.mark.asyncio(loop_scope="session")]


async def sleeper(world: World, busybox: str) -> tuple[PodRef, ContainerRef]:
    pod = await world.make_pod()
    return pod, await world.run(pod, busybox, container_spec("sleep", "100000"))


async def test_abilities_are_offered(world: World) -> None:
    """The core finds what this runtime can do by type."""
    for ability in (CanExec, CanAttach, CanConnect, CanUpdateResources, CanStats, CanTrimOutput, CanReportFootprint):
        assert isinstance(world.runtime, ability)


async def test_streams_and_exit_code(world: World, busybox: str) -> None:
    """Both outputs whole and apart, the process's own exit code, 128+signal for a death by signal."""
    pod, container = await sleeper(world, busybox)
    assert await world.exec(container, "sh", "-c", "echo out; echo err >&2; exit 7") == (7, b"out\n", b"err\n")
    assert (await world.exec(container, "sh", "-c", "kill -9 $$"))[0] == 137
    assert await world.exec(container, "true") == (0, b"", b"")
    for _ in range(10):  # neither the first nor the last byte is lost
        assert (await world.exec(container, "printf", "x"))[1] == b"x"
    with pytest.raises(InvalidRequest, match="no-such-command"):
        await world.exec(container, "no-such-command")
    await world.runtime.stop_container(container, 0)
    with pytest.raises(WrongState):
        await world.exec(container, "true")
    await world.runtime.remove_container(container)
    with pytest.raises(NotFound):
        await world.exec(container, "true")
    await world.remove_pod(pod)


async def test_stdin_both_ways_and_half_close(world: World, busybox: str) -> None:
    """Megabytes through stdin and back are unharmed, and end of input reaches the process."""
    pod, container = await sleeper(world, busybox)
    process = await world.runtime.exec(container, ExecSpec(command=("cat",), stdin=True))
    data = os.urandom(8 << 20)

    async def feed() -> None:
        await process.write_stdin(data)
        await process.close_stdin()
        await process.close_stdin()

    feeding = asyncio.create_task(feed())
    code, out, err = await finish(process)
    await feeding
    assert (code, err, hashlib.sha256(out).digest()) == (0, b"", hashlib.sha256(data).digest())
    await world.remove_pod(pod)


async def test_terminal_and_resize(world: World, busybox: str) -> None:
    """A terminal is one, has the size that was set, and an absurd size is ignored."""
    pod, container = await sleeper(world, busybox)
    process = await world.runtime.exec(container, ExecSpec(command=("sh",), tty=True, stdin=True))
    await process.resize(0, -1)
    await process.resize(123, 45)
    await process.write_stdin(b"tty && stty size; exit 3\n")
    code, out, _ = await finish(process)
    assert code == 3
    assert b"45 123" in out
    assert b"/dev/pts/" in out
    await process.resize(10, 10)
    await world.remove_pod(pod)


async def test_kill_takes_the_whole_tree(world: World, busybox: str) -> None:
    """Killing an exec kills its children, also those whose parent is gone; the container lives on."""
    pod, container = await sleeper(world, busybox)
    first = world.engine.inspect(f"cri_{container.id}")["State"]["Pid"]
    script = "(sleep 4321 &); sleep 4321 & sh -c 'sleep 4321; true' & echo started; wait"
    process = await world.runtime.exec(container, ExecSpec(command=("sh", "-c", script)))
    stream = process.output()
    assert await anext(stream) == ("stdout", b"started\n")
    await process.kill()
    await process.kill()
    async with asyncio.timeout(DEADLINE_S):
        assert await process.wait() == 137
        while descendants_of(first):
            await asyncio.sleep(0.02)
    assert (await world.facts(container)).liveness is Liveness.RUNNING
    await process.aclose()
    await world.remove_pod(pod)


async def test_what_was_written_before_the_exit_is_kept_for_a_slow_reader(world: World, busybox: str) -> None:
    """The engine forgets it two seconds after the exit; its reader comes later. As much is written as fits on the way,
    and a little more or less, since only what the engine has not fetched itself yet can be lost.
    """
    pod, container = await sleeper(world, busybox)

    async def run(size: int) -> tuple[int, int, bytes]:
        script = f"head -c {size} /dev/zero; printf end; exit 9"
        process = await world.runtime.exec(container, ExecSpec(command=("sh", "-c", script)))
        await asyncio.sleep(8)
        code, out, _ = await finish(process)
        return code, len(out), out[-4:]

    sizes = [900_000 + 100_000 * step for step in range(10)]
    found = await asyncio.gather(*(run(size) for size in sizes))
    assert found == [(9, size + 3, b"\0end") for size in sizes]
    await world.remove_pod(pod)


async def test_the_end_of_a_terminals_input_does_not_end_its_output(world: World, busybox: str) -> None:
    """A terminal has no half-close: the command goes on, and is heard."""
    pod, container = await sleeper(world, busybox)
    process = await world.runtime.exec(container, ExecSpec(command=("sh",), tty=True, stdin=True))
    await process.write_stdin(b"sleep 1; echo still he''re; exit 6\n")
    await process.close_stdin()
    code, out, _ = await finish(process)
    assert code == 6
    assert b"still here" in out
    await world.remove_pod(pod)


async def test_the_end_of_an_attachments_input_is_the_processs_only_with_stdin_once(world: World, busybox: str) -> None:
    pod = await world.make_pod()
    script = "while read line; do echo got $line; done; echo over; exit 5"
    container = await world.run(pod, busybox, container_spec("sh", "-c", script, stdin=True))
    first = await world.runtime.attach(container, stdin=True, stdout=True, stderr=True)
    await first.write_stdin(b"one\n")
    await first.close_stdin()
    second = await world.runtime.attach(container, stdin=True, stdout=True, stderr=True)
    output = first.output()
    async with asyncio.timeout(DEADLINE_S):
        assert await anext(output) == ("stdout", b"got one\n")
        await second.write_stdin(b"two\n")
        assert await anext(output) == ("stdout", b"got two\n")
    assert (await world.facts(container)).liveness is Liveness.RUNNING
    for process in (first, second):
        await process.kill()
        await process.aclose()
    await world.remove_pod(pod)


async def test_a_daemon_that_holds_the_pipe_does_not_hold_the_exec(world: World, busybox: str) -> None:
    """Output ends a bounded time after the process ended, though a child keeps the pipe open."""
    pod, container = await sleeper(world, busybox)
    began = time.monotonic()
    assert await world.exec(container, "sh", "-c", "sleep 4321 & echo done") == (0, b"done\n", b"")
    assert time.monotonic() - began < 15
    await world.remove_pod(pod)


async def test_endless_output_costs_bounded_memory(world: World, busybox: str) -> None:
    """A process whose output nobody reads is held back, and can still be killed."""
    pod, container = await sleeper(world, busybox)
    process = await world.runtime.exec(container, ExecSpec(command=("yes",)))
    before = Path("/proc/self/statm").read_text().split()[1]
    await asyncio.sleep(1)
    grown = (int(Path("/proc/self/statm").read_text().split()[1]) - int(before)) * os.sysconf("SC_PAGESIZE")
    assert grown < 8 << 20
    await process.kill()
    async with asyncio.timeout(DEADLINE_S):
        assert await process.wait() == 137
    await process.aclose()
    await world.remove_pod(pod)


async def test_attach_gets_output_and_gives_input(world: World, busybox: str) -> None:
    """Several attachments each get all output; input reaches the process; the exit ends them with its code."""
    pod = await world.make_pod()
    script = "while read line; do echo got $line; done; exit 5"
    container = await world.run(pod, busybox, container_spec("sh", "-c", script, stdin=True, stdin_once=True))
    listener = await world.runtime.attach(container, stdin=False, stdout=True, stderr=True)
    writer = await world.runtime.attach(container, stdin=True, stdout=True, stderr=True)
    await writer.write_stdin(b"one\ntwo\n")
    await writer.close_stdin()
    results = await asyncio.gather(finish(writer), finish(listener))
    assert list(results) == [(5, b"got one\ngot two\n", b"")] * 2
    with pytest.raises(WrongState):
        await world.runtime.attach(container, stdin=False, stdout=True, stderr=True)
    await world.remove_pod(pod)


async def test_leaving_an_attachment_leaves_the_container(world: World, busybox: str) -> None:
    """A client that goes away costs the container nothing."""
    pod = await world.make_pod()
    container = await world.run(pod, busybox, container_spec("sh", "-c", "while sleep 0.05; do echo x; done"))
    process = await world.runtime.attach(container, stdin=False, stdout=True, stderr=True)
    assert (await anext(process.output()))[1].startswith(b"x\n")
    await process.kill()
    assert (await world.facts(container)).liveness is Liveness.RUNNING
    await world.remove_pod(pod)


async def test_connect_reaches_only_the_pods_ports(world: World) -> None:
    """A byte stream to a port on the pod's loopback, which the host cannot reach; half-close and refusal work."""
    pod = await world.make_pod()
    assert pod.attachment is not None

    def listen() -> socket.socket:
        return socket.create_server(("127.0.0.1", 8080))

    server = await run_in_namespace(Path(pod.attachment.netns_path), listen)
    server.setblocking(False)

    async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        data = await reader.read(-1)  # until the client's half-close
        writer.write(data[::-1])
        writer.close()

    serving = await asyncio.start_server(echo, sock=server)
    process = await world.runtime.connect(pod, 8080)
    await process.write_stdin(b"abc")
    await process.close_stdin()
    assert await finish(process) == (0, b"cba", b"")
    serving.close()
    with pytest.raises(InvalidRequest, match="8081"):
        await world.runtime.connect(pod, 8081)
    await world.remove_pod(pod)
    with pytest.raises(NotFound):
        await world.runtime.connect(pod, 8080)
