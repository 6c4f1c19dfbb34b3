"""Exec, attach and port-forward, for runtimes that have them: bytes in, bytes out, and an honest exit code."""

from __future__ import annotations

import asyncio

import pytest

from dispatcher.api import CanAttach, CanConnect, CanExec, ExecSpec, Process
from dispatcher.errors import InvalidRequest
from dispatcher.testing.case import RuntimeCase
from dispatcher.testing.contract.steps import (
    DEAF,
    ability,
    aclose,
    drain,
    joined,
    new_pod,
    read,
    read_until,
    script,
    start,
    start_ready,
)

pytestmark = pytest.mark.asyncio


def sh(text: str, **fields: bool) -> ExecSpec:
    """A script to execute."""
    return ExecSpec(command=("sh", "-c", text), **fields)


# --------------------------------------------------------------------------------------------------------------- exec
async def test_exec_gives_streams_and_code(case: RuntimeCase) -> None:
    """Both streams apart, to the last byte, and the code of the process."""
    runtime = ability(case, CanExec)
    async with new_pod(case) as pod:
        container = await start_ready(case, pod, script(DEAF))
        process = await runtime.exec(container, sh("echo out; echo err >&2; printf end; exit 42"))
        assert await drain(case, process) == (b"out\nend", b"err\n", 42)


@pytest.mark.parametrize("code", [0, 1, 126, 255])
async def test_exec_codes_are_exact(case: RuntimeCase, code: int) -> None:
    """Probes depend on them."""
    runtime = ability(case, CanExec)
    async with new_pod(case) as pod:
        container = await start_ready(case, pod, script(DEAF))
        assert await drain(case, await runtime.exec(container, sh(f"exit {code}"))) == (b"", b"", code)


async def test_exec_sees_end_of_input_and_goes_on_writing(case: RuntimeCase) -> None:
    """Half-close: stdin ends, output does not."""
    runtime = ability(case, CanExec)
    async with new_pod(case) as pod:
        container = await start_ready(case, pod, script(DEAF))
        process = await runtime.exec(container, sh("cat; echo done", stdin=True))
        await process.write_stdin(b"some ")
        await process.write_stdin(b"bytes ")
        await process.close_stdin()
        await process.close_stdin()
        assert await drain(case, process) == (b"some bytes done\n", b"", 0)


async def test_exec_carries_much_data_both_ways(case: RuntimeCase) -> None:
    """4 MiB through cat, unharmed, with reading and writing at the same time."""
    runtime = ability(case, CanExec)
    data = bytes(range(256)) * 16384
    async with new_pod(case) as pod:
        container = await start_ready(case, pod, script(DEAF))
        process = await runtime.exec(container, ExecSpec(command=("cat",), stdin=True))

        async def write() -> None:
            for start_at in range(0, len(data), 65536):
                await process.write_stdin(data[start_at : start_at + 65536])
            await process.close_stdin()

        writing = asyncio.create_task(write())
        out, err, code = await drain(case, process)
        await writing
        assert (out == data, err, code) == (True, b"", 0)


async def test_exec_can_be_killed(case: RuntimeCase) -> None:
    """`kill` ends a process that ignores everything, twice is no error, and the container goes on."""
    runtime = ability(case, CanExec)
    async with new_pod(case) as pod:
        container = await start_ready(case, pod, script(DEAF))
        process = await runtime.exec(container, sh("trap '' TERM; echo up; while :; do sleep 0.05; done"))
        await read_until(case, process, b"up\n")
        await process.kill()
        await process.kill()
        async with asyncio.timeout(case.deadline_s):
            assert await process.wait() != 0
        await process.aclose()
        assert await drain(case, await runtime.exec(container, sh("echo alive"))) == (b"alive\n", b"", 0)


async def test_exec_of_no_program_is_an_invalid_request(case: RuntimeCase) -> None:
    """It is the request that is wrong, not the runtime."""
    runtime = ability(case, CanExec)
    async with new_pod(case) as pod:
        container = await start_ready(case, pod, script(DEAF))
        with pytest.raises(InvalidRequest):  # noqa: PT012 - from the call, or at the latest from its streams
            process = await runtime.exec(container, ExecSpec(command=("/no/such/program",)))
            await drain(case, process)


async def test_exec_with_a_terminal_merges_streams_and_takes_sizes(case: RuntimeCase) -> None:
    """A terminal has one output; its size may change at any time, also after the end."""
    runtime = ability(case, CanExec)
    async with new_pod(case) as pod:
        container = await start_ready(case, pod, script(DEAF))
        process = await runtime.exec(container, sh("echo out; echo err >&2", tty=True))
        await process.resize(100, 40)
        out, err, code = await drain(case, process)
        assert (out, err, code) == (b"out\r\nerr\r\n", b"", 0)
        await process.resize(80, 25)


async def test_a_size_without_a_terminal_is_ignored(case: RuntimeCase) -> None:
    """Clients send sizes whether or not there is a terminal."""
    runtime = ability(case, CanExec)
    async with new_pod(case) as pod:
        container = await start_ready(case, pod, script(DEAF))
        process = await runtime.exec(container, sh("echo fine"))
        await process.resize(1, 1)
        assert await drain(case, process) == (b"fine\n", b"", 0)


async def test_many_execs_at_once_do_not_mix(case: RuntimeCase) -> None:
    """Probes of many containers come at the same moment."""
    runtime = ability(case, CanExec)
    async with new_pod(case) as pod:
        container = await start_ready(case, pod, script(DEAF))

        async def run(number: int) -> tuple[bytes, bytes, int]:
            return await drain(case, await runtime.exec(container, sh(f"echo {number}; exit {number}")))

        found = await asyncio.gather(*(run(number) for number in range(8)))
        assert found == [(b"%d\n" % number, b"", number) for number in range(8)]


async def test_exec_output_is_no_container_output(case: RuntimeCase) -> None:
    """What a command beside the first process writes never reaches the container's log."""
    runtime = ability(case, CanExec)
    async with new_pod(case) as pod:
        container = await start_ready(case, pod, script(DEAF))
        await drain(case, await runtime.exec(container, sh("echo private")))
        await case.runtime.stop_container(container, 0)
        assert joined(await read(case, container)) == b"ready\n"


# ------------------------------------------------------------------------------------------------------------- attach
async def test_attach_reaches_the_first_process(case: RuntimeCase) -> None:
    """Input goes in, output comes out, also to the log; each of several attachments gets all of it."""
    runtime = ability(case, CanAttach)
    async with new_pod(case) as pod:
        container = await start(case, pod, script("cat", stdin=True))
        first = await runtime.attach(container, stdin=True, stdout=True, stderr=True)
        second = await runtime.attach(container, stdin=False, stdout=True, stderr=True)
        await first.write_stdin(b"hello\n")
        assert await read_until(case, first, b"hello\n") == b"hello\n"
        assert await read_until(case, second, b"hello\n") == b"hello\n"
        output = case.runtime.output(container, 0)
        async with asyncio.timeout(case.deadline_s):
            assert (await anext(output)).data == b"hello\n"
        await aclose(output)
        for process in (first, second):
            await process.kill()
            await process.aclose()


async def test_detaching_leaves_the_container_alone(case: RuntimeCase) -> None:
    """`kill` of an attachment only detaches."""
    runtime = ability(case, CanAttach)
    async with new_pod(case) as pod:
        container = await start(case, pod, script("cat", stdin=True))
        gone = await runtime.attach(container, stdin=True, stdout=True, stderr=True)
        await gone.kill()
        await gone.aclose()
        again = await runtime.attach(container, stdin=True, stdout=True, stderr=True)
        await again.write_stdin(b"still here\n")
        assert await read_until(case, again, b"here\n") == b"still here\n"
        await again.kill()
        await again.aclose()


async def test_an_attachment_ends_with_the_process(case: RuntimeCase) -> None:
    """Its output ends; nothing hangs."""
    runtime = ability(case, CanAttach)
    async with new_pod(case) as pod:
        container = await start(case, pod, script("read line; echo bye; exit 3", stdin=True))
        process = await runtime.attach(container, stdin=True, stdout=True, stderr=True)
        await process.write_stdin(b"\n")
        found = b""
        async with asyncio.timeout(case.deadline_s):
            async for _stream, data in process.output():
                found += bytes(data)
        assert found == b"bye\n"
        await process.aclose()


# ------------------------------------------------------------------------------------------------------------ connect
async def test_connect_is_a_stream_to_a_port_of_the_pod(case: RuntimeCase) -> None:
    """Bytes go to localhost of the pod and come back; several connections do not mix."""
    runtime = ability(case, CanConnect)
    async with new_pod(case) as pod:
        await start_ready(case, pod, script("echo up; nc -ll -p 8080 -e cat"))
        connections: list[Process] = []
        async with asyncio.timeout(case.deadline_s):
            while len(connections) < 2:
                try:  # the echo server is a moment away after its first word
                    connections.append(await runtime.connect(pod, 8080))
                except InvalidRequest:
                    await asyncio.sleep(0.05)
        for number, connection in enumerate(connections):
            await connection.write_stdin(b"ping %d\n" % number)
        for number, connection in enumerate(connections):
            assert await read_until(case, connection, b"\n") == b"ping %d\n" % number
        for connection in connections:
            await connection.kill()
            await connection.aclose()


async def test_connect_where_nothing_listens_is_refused(case: RuntimeCase) -> None:
    """With an error for this connection, not for the session."""
    runtime = ability(case, CanConnect)
    async with new_pod(case) as pod:
        await start_ready(case, pod, script(DEAF))
        with pytest.raises(InvalidRequest):
            await runtime.connect(pod, 8099)
