"""Output: every byte once, whatever happens in between. A log record is a function of its chunk, so chunks are stable."""

from __future__ import annotations

import asyncio

import pytest

from dispatcher.model import Stream
from dispatcher.testing.case import RuntimeCase
from dispatcher.testing.contract.steps import DEAF, aclose, joined, new_pod, read, script, start, start_ready, stop

pytestmark = pytest.mark.asyncio


async def test_all_of_it_arrives_in_order(case: RuntimeCase) -> None:
    """The output of a process that ended is complete, to the last byte without a newline."""
    async with new_pod(case) as pod:
        container = await start(case, pod, script("seq 1 500; printf end"))
        chunks = await read(case, container)
        assert joined(chunks) == b"".join(b"%d\n" % number for number in range(1, 501)) + b"end"


async def test_positions_and_times_rise(case: RuntimeCase) -> None:
    """`seq` rises from chunk to chunk, and times never go back within a stream."""
    async with new_pod(case) as pod:
        container = await start(case, pod, script("seq 1 50; echo x >&2; sleep 0.1; seq 51 100"))
        chunks = await read(case, container)
        positions = [chunk.seq for chunk in chunks]
        assert positions == sorted(set(positions))
        assert positions[0] > 0
        for stream in Stream:
            times = [chunk.time_ns for chunk in chunks if chunk.stream is stream]
            assert times == sorted(times)
        assert all(chunk.data for chunk in chunks)


async def test_reading_again_from_any_position_gives_the_same_chunks(case: RuntimeCase) -> None:
    """`output(after=seq)` continues right behind `seq`, with equal borders, times and bytes."""
    async with new_pod(case) as pod:
        container = await start(case, pod, script("seq 1 12; echo e >&2; sleep 0.1; printf tail"))
        chunks = await read(case, container)
        assert len(chunks) > 2
        for at, chunk in enumerate(chunks):
            assert await read(case, container, after=chunk.seq) == chunks[at + 1 :]


async def test_large_output_is_whole(case: RuntimeCase) -> None:
    """A megabyte without a single newline."""
    async with new_pod(case) as pod:
        container = await start(case, pod, script("head -c 1048576 /dev/zero"))
        assert joined(await read(case, container)) == bytes(1048576)


async def test_it_follows_what_runs(case: RuntimeCase) -> None:
    """The first words arrive while the process goes on, and the reader ends when the process does."""
    async with new_pod(case) as pod:
        container = await start(case, pod, script(DEAF))
        async with asyncio.timeout(case.deadline_s):
            output = case.runtime.output(container, 0)
            assert (await anext(output)).data == b"ready\n"
            rest = asyncio.create_task(_collect(output))
            await stop(case, container, 0)
            assert await rest == []


async def _collect(output: object) -> list[object]:
    return [chunk async for chunk in output]  # type: ignore[attr-defined]


async def test_a_reader_may_leave_and_come_back(case: RuntimeCase) -> None:
    """Closing the iterator stops it; the next one goes on from wherever it is asked to."""
    async with new_pod(case) as pod:
        container = await start_ready(case, pod, script(DEAF))
        for _ in range(3):
            output = case.runtime.output(container, 0)
            async with asyncio.timeout(case.deadline_s):
                assert (await anext(output)).data == b"ready\n"
            await aclose(output)


async def test_a_container_that_wrote_nothing_has_no_output(case: RuntimeCase) -> None:
    """The reader ends with the process, without a chunk."""
    async with new_pod(case) as pod:
        container = await start(case, pod, script("true"))
        assert await read(case, container) == []


async def test_a_terminal_merges_both_streams(case: RuntimeCase) -> None:
    """With a tty all output is stdout, with the terminal's line ends."""
    async with new_pod(case) as pod:
        container = await start(case, pod, script("echo out; echo err >&2", tty=True))
        chunks = await read(case, container)
        assert joined(chunks) == b"out\r\nerr\r\n"
        assert joined(chunks, Stream.STDERR) == b""
