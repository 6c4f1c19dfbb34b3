"""Output: every byte once, at stable positions, whatever restarts; and a buffer that can be freed."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator

import pytest
import pytest_asyncio

from dispatcher.model import Stream
from tests.docker.kit import World, container_spec, take, texts
from tests.lab.child import patient
from tests.lab.engine import Engine
from tests.lab.images import TestImages
from tests.lab.registry import Registry

pytestmark = [pytest.mark.lab, pytest.mark.asyncio(loop_scope="session")]


@pytest_asyncio.fixture(scope="session", loop_scope="session", params=["local", "json-file"])
async def logging_world(
    request: pytest.FixtureRequest,
    engine: Engine,
    registry: Registry,
    test_images: TestImages,
    tmp_path_factory: pytest.TempPathFactory,
) -> AsyncIterator[World]:
    """A runtime for each of the engine's log formats that we can read."""
    world = await World.open(engine, registry, tmp_path_factory.mktemp("logs"), log_driver=request.param)
    yield world
    await world.close()


async def test_positions_continue_exactly(logging_world: World, busybox: str) -> None:
    """From any position, reading goes on right behind it with equal chunks, streams and times."""
    world = logging_world
    pod = await world.make_pod()
    script = "echo one; echo two >&2; echo; printf 'ä%.0s' 1 2 3; echo; printf end"
    container = await world.run(pod, busybox, container_spec("sh", "-c", script))
    chunks = await world.output(container)
    assert b"".join(chunk.data for chunk in chunks if chunk.stream is Stream.STDOUT) == "one\n\näää\nend".encode()
    assert b"".join(chunk.data for chunk in chunks if chunk.stream is Stream.STDERR) == b"two\n"
    assert [chunk.seq for chunk in chunks] == sorted({chunk.seq for chunk in chunks})
    for index, chunk in enumerate(chunks):
        assert await world.output(container, chunk.seq) == chunks[index + 1 :]
    await world.remove_pod(pod)


async def test_long_lines_come_in_pieces(logging_world: World, busybox: str) -> None:
    """A line longer than the engine's buffer arrives whole, in pieces of which only the last ends the line."""
    world = logging_world
    pod = await world.make_pod()
    script = "head -c 50000 /dev/zero | tr '\\0' x; echo"
    container = await world.run(pod, busybox, container_spec("sh", "-c", script))
    pieces = [chunk.data for chunk in await world.output(container)]
    assert b"".join(pieces) == b"x" * 50000 + b"\n"
    assert len(pieces) > 1
    assert not any(piece.endswith(b"\n") for piece in pieces[:-1])
    await world.remove_pod(pod)


async def test_every_byte_survives(world: World, busybox: str) -> None:
    """The default format keeps bytes that are no text, and characters that the engine's buffer cuts."""
    pod = await world.make_pod()
    script = "printf 'a\\377\\000b\\n'; i=0; while [ $i -lt 6000 ]; do printf '€€'; i=$((i+1)); done; echo"
    container = await world.run(pod, busybox, container_spec("sh", "-c", script))
    assert (
        b"".join(chunk.data for chunk in await world.output(container)) == b"a\xff\0b\n" + "€".encode() * 12000 + b"\n"
    )
    await world.remove_pod(pod)


async def test_following_while_it_runs(logging_world: World, busybox: str) -> None:
    """A reader that came before the start gets lines as they are written, and ends with the container."""
    world = logging_world
    pod = await world.make_pod()
    container = await world.make(pod, busybox, container_spec("sh", "-c", "echo a; read line; echo $line", stdin=True))
    stream = world.runtime.output(container, 0)
    first = asyncio.ensure_future(anext(stream))
    await asyncio.sleep(0)
    await world.runtime.start_container(container)
    async with asyncio.timeout(patient(20)):
        assert (await first).data == b"a\n"
        process = await world.runtime.attach(container, stdin=True, stdout=False, stderr=False)
        await process.write_stdin(b"typed\n")
        assert (await anext(stream)).data == b"typed\n"
        with pytest.raises(StopAsyncIteration):
            await anext(stream)
    await process.aclose()
    await world.remove_pod(pod)


async def test_terminal_output_is_one_stream(logging_world: World, busybox: str) -> None:
    """With a terminal everything is standard output."""
    world = logging_world
    pod = await world.make_pod()
    container = await world.run(pod, busybox, container_spec("sh", "-c", "echo a; echo b >&2", tty=True))
    chunks = await world.output(container)
    assert {chunk.stream for chunk in chunks} == {Stream.STDOUT}
    assert b"".join(chunk.data for chunk in chunks) == b"a\r\nb\r\n"
    await world.remove_pod(pod)


async def test_buffer_is_freed_behind_a_position(logging_world: World, busybox: str) -> None:
    """Freeing gives blocks back to the disk and changes no position; what comes later is still read."""
    world = logging_world
    pod = await world.make_pod()
    script = "yes 0123456789012345678901234567890123456789 | head -n 100000; read x; echo last"
    container = await world.run(pod, busybox, container_spec("sh", "-c", script, stdin=True))
    chunks = await take(world.runtime.output(container, 0), 100_000)
    path = container.facts["log"]
    before = os.stat(path)
    middle = chunks[70_000]
    await world.runtime.trim_output(container, chunks[10].seq)
    assert os.stat(path).st_blocks == before.st_blocks  # too little to be worth it
    await world.runtime.trim_output(container, middle.seq)
    after = os.stat(path)
    assert after.st_size == before.st_size
    assert after.st_blocks < before.st_blocks * 0.4
    assert await take(world.runtime.output(container, middle.seq), 29_999) == chunks[70_001:]
    process = await world.runtime.attach(container, stdin=True, stdout=False, stderr=False)
    await process.write_stdin(b"\n")
    assert texts(await world.output(container, chunks[-1].seq)) == ["last\n"]
    # A position that was lost can only go on with what is still there, at a whole line.
    rest = await world.output(container)
    assert rest[-1].data == b"last\n"
    assert {len(chunk.data) for chunk in rest[:-1]} == {41}
    await process.aclose()
    await world.remove_pod(pod)


async def test_output_of_a_removed_container_ends(world: World, busybox: str) -> None:
    """A reader of a container that goes away ends instead of waiting for ever."""
    pod = await world.make_pod()
    container = await world.run(pod, busybox, container_spec("sleep", "1000"))
    reading = asyncio.create_task(world.output(container))
    await asyncio.sleep(0)
    await world.runtime.remove_container(container)
    assert await reading == []
    await world.remove_pod(pod)
