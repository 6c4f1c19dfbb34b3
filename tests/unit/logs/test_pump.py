"""Output reaches the log file exactly once: over rotation, a crash at any byte, and an engine that goes away."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import cast

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dispatcher.api import ContainerRef, PodRef, Runtime
from dispatcher.errors import InvalidRequest, RuntimeDown
from dispatcher.logs.files import find_log, open_log
from dispatcher.logs.pump import LogPump
from dispatcher.logs.records import render
from dispatcher.model import (
    ContainerId,
    ContainerMetadata,
    ContainerSpec,
    ImageConfig,
    ImageId,
    LogCheckpoint,
    OutputChunk,
    PodId,
    PodMetadata,
    PodSpec,
    Stream,
)


class Buffer:
    """A runtime's durable buffer: replays from any position, and can be cut off or go away for a moment."""

    def __init__(self, lines: list[bytes]) -> None:
        self.chunks = [
            OutputChunk(stream=Stream.STDOUT, time_ns=number, seq=number + 1, data=data)
            for number, data in enumerate(lines)
        ]
        self.stop_after: int | None = None  # hang after so many chunks, as a daemon that is about to be killed
        self.fail_once_after: int | None = None
        self.gate: asyncio.Event = asyncio.Event()

    async def output(self, container: ContainerRef, after: int) -> AsyncIterator[OutputChunk]:
        for chunk in self.chunks:
            if chunk.seq <= after:
                continue
            if self.stop_after is not None and chunk.seq > self.stop_after:
                self.gate.set()
                await asyncio.Event().wait()
            if self.fail_once_after is not None and chunk.seq > self.fail_once_after:
                self.fail_once_after = None
                raise RuntimeDown("The engine is restarting.")
            yield chunk


def reference(folder: Path, path: str = "c/0.log") -> ContainerRef:
    pod = PodSpec(metadata=PodMetadata(name="p", namespace="n", uid="u"), log_directory=str(folder))
    spec = ContainerSpec(metadata=ContainerMetadata(name="c"), image_ref="i", log_path=path)
    return ContainerRef(
        id=ContainerId("c" * 64),
        pod=PodRef(id=PodId("p" * 64), spec=pod),
        spec=spec,
        image_id=ImageId("sha256:" + "0" * 64),
        image=ImageConfig(),
    )


class Record:
    """Stands for the container's record: keeps the last committed checkpoint."""

    def __init__(self) -> None:
        self.checkpoint = LogCheckpoint()

    async def commit(self, container_id: ContainerId, checkpoint: LogCheckpoint) -> None:
        self.checkpoint = checkpoint


def pump(buffer: Buffer, folder: Path, record: Record) -> LogPump:
    return LogPump(cast("Runtime", buffer), reference(folder), record.checkpoint, record.commit)


def expected(buffer: Buffer) -> bytes:
    return b"".join(render(chunk) for chunk in buffer.chunks)


async def run_until_gate(buffer: Buffer, current: LogPump) -> None:
    task = asyncio.create_task(current.run())
    await buffer.gate.wait()
    task.cancel()
    await asyncio.wait({task})
    current.close()


async def test_everything_is_written_and_the_end_is_on_record(tmp_path: Path) -> None:
    buffer, record = Buffer([b"a\n", b"b", b"c\n"]), Record()
    await pump(buffer, tmp_path, record).run()
    written = (tmp_path / "c/0.log").read_bytes()
    assert written == expected(buffer)
    assert (record.checkpoint.seq, record.checkpoint.offset) == (3, len(written))


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(
    lines=st.lists(st.binary(min_size=1, max_size=40), min_size=1, max_size=6),
    crash_after=st.integers(min_value=0, max_value=6),
    torn=st.integers(min_value=0, max_value=30),
)
async def test_a_crash_anywhere_loses_and_doubles_nothing(
    tmp_path_factory: pytest.TempPathFactory, lines: list[bytes], crash_after: int, torn: int
) -> None:
    """Also when the last write was torn: the restart completes it."""
    folder = tmp_path_factory.mktemp("log")
    buffer, record = Buffer(lines), Record()
    buffer.stop_after = crash_after
    if crash_after < len(lines):
        await run_until_gate(buffer, pump(buffer, folder, record))
        path = folder / "c/0.log"
        whole = path.read_bytes()
        path.write_bytes(whole[: max(record.checkpoint.offset, len(whole) - torn)])
        buffer.stop_after = None
    await pump(buffer, folder, record).run()
    assert (folder / "c/0.log").read_bytes() == expected(buffer)


async def test_an_engine_that_goes_away_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dispatcher.logs.pump._RETRY_S", 0)
    buffer, record = Buffer([b"a\n", b"b\n"]), Record()
    buffer.fail_once_after = 1
    await pump(buffer, tmp_path, record).run()
    assert (tmp_path / "c/0.log").read_bytes() == expected(buffer)


async def test_rotation_splits_between_records(tmp_path: Path) -> None:
    """After reopen the old file grows no more; both files together hold everything once."""
    buffer, record = Buffer([b"a\n", b"b\n"]), Record()
    buffer.stop_after = 1
    current = pump(buffer, tmp_path, record)
    task = asyncio.create_task(current.run())
    await buffer.gate.wait()
    path = tmp_path / "c/0.log"
    path.rename(tmp_path / "c/0.log.20260101-000000")
    await current.reopen()
    assert path.read_bytes() == b""
    task.cancel()
    await asyncio.wait({task})
    current.close()

    buffer.stop_after = None
    await pump(buffer, tmp_path, record).run()
    assert (tmp_path / "c/0.log.20260101-000000").read_bytes() == render(buffer.chunks[0])
    assert path.read_bytes() == render(buffer.chunks[1])


async def test_crash_between_rename_and_reopen_goes_on_in_the_renamed_file(tmp_path: Path) -> None:
    buffer, record = Buffer([b"a\n", b"b\n"]), Record()
    buffer.stop_after = 1
    await run_until_gate(buffer, pump(buffer, tmp_path, record))
    rotated = tmp_path / "c/0.log.20260101-000000"
    (tmp_path / "c/0.log").rename(rotated)
    buffer.stop_after = None
    await pump(buffer, tmp_path, record).run()
    assert rotated.read_bytes() == expected(buffer)


async def test_a_buffer_is_freed_also_where_no_log_was_asked_for(tmp_path: Path) -> None:
    """A small buffer would fill up, and block the container, although nobody wants to read what it holds."""

    class Small(Buffer):
        freed = 0

        async def trim_output(self, container: ContainerRef, seq: int) -> None:
            self.freed = seq

    chunks = [OutputChunk(stream=Stream.STDOUT, time_ns=0, seq=(number + 1) << 18, data=b"") for number in range(9)]
    buffer, record = Small([]), Record()
    buffer.chunks = chunks
    nameless = reference(tmp_path, path="")
    await LogPump(cast("Runtime", buffer), nameless, record.checkpoint, record.commit).run()
    assert buffer.freed == record.checkpoint.seq == 8 << 18
    assert list(tmp_path.iterdir()) == []


def test_a_link_in_the_place_of_the_log_is_refused(tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_text("untouched")
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs/0.log").symlink_to(victim)
    with pytest.raises(InvalidRequest):
        open_log(str(tmp_path / "logs"), "0.log")
    assert victim.read_text() == "untouched"


def test_a_linked_folder_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "logs").mkdir()
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "logs/c").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(InvalidRequest):
        open_log(str(tmp_path / "logs"), "c/0.log")
    assert list((tmp_path / "elsewhere").iterdir()) == []


def test_a_fifo_does_not_block(tmp_path: Path) -> None:
    import os

    os.mkfifo(tmp_path / "0.log")
    with pytest.raises(InvalidRequest):
        open_log(str(tmp_path), "0.log")


def test_find_log_knows_a_renamed_file_by_its_inode(tmp_path: Path) -> None:
    made = open_log(str(tmp_path), "0.log")
    (tmp_path / "0.log").rename(tmp_path / "0.log.1")
    found = find_log(str(tmp_path), "0.log", made.inode)
    assert found is not None
    found.close()
    made.close()
    assert find_log(str(tmp_path), "0.log", 1) is None
