"""Short ways to do what the contract's tests do often. Every wait has the case's deadline."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any, TypeVar, cast

import pytest

from dispatcher.api import ContainerRef, PodRef, Process
from dispatcher.model import ContainerSpec, Liveness, ObservedContainer, OutputChunk, PodSpec, Snapshot, Stream
from dispatcher.testing.case import RuntimeCase, container_spec, pod_spec

A = TypeVar("A")

# Runs until it is told to stop, and says when it is ready for signals. The short sleep is the shell's chance to see one.
UNTIL_TERM = "trap 'echo term; exit 7' TERM; echo ready; while :; do sleep 0.05; done"
DEAF = "trap '' TERM; echo ready; while :; do sleep 0.05; done"
COUNTS_TERM = "trap 'echo term' TERM; echo ready; while :; do sleep 0.05; done"


def script(text: str, **fields: Any) -> ContainerSpec:
    """A container that runs a script."""
    return container_spec("sh", "-c", text, **fields)


def ability(case: RuntimeCase, kind: Callable[..., A]) -> A:
    """The runtime as something with an ability; the test is skipped where it lacks it."""
    if not isinstance(case.runtime, cast("type", kind)):
        pytest.skip(f"the runtime has no {cast('type', kind).__name__}")
    return cast("A", case.runtime)


@asynccontextmanager
async def new_pod(case: RuntimeCase, spec: PodSpec | None = None) -> AsyncIterator[PodRef]:
    """A running pod, which is removed in the end whatever happens to it."""
    pod = await case.make_pod(spec or pod_spec())
    try:
        async with asyncio.timeout(case.deadline_s):
            made = await case.runtime.create_pod(pod)
        yield replace(pod, facts=made.facts)
    finally:
        await remove_pod(case, pod)


async def remove_pod(case: RuntimeCase, pod: PodRef) -> None:
    """As the core removes a pod."""
    async with asyncio.timeout(case.deadline_s):
        await case.runtime.stop_pod(pod)
        await case.runtime.remove_pod(pod)
    await case.release_pod(pod)


async def create(case: RuntimeCase, pod: PodRef, spec: ContainerSpec) -> ContainerRef:
    """A container that was made and not started."""
    container = await case.make_container(pod, spec)
    async with asyncio.timeout(case.deadline_s):
        made = await case.runtime.create_container(container)
    return replace(container, facts=made.facts)


async def start(case: RuntimeCase, pod: PodRef, spec: ContainerSpec) -> ContainerRef:
    """A container that was started."""
    container = await create(case, pod, spec)
    async with asyncio.timeout(case.deadline_s):
        fact = await case.runtime.start_container(container)
    assert fact.id == container.id
    assert fact.liveness in (Liveness.RUNNING, Liveness.EXITED), fact
    return container


async def start_ready(case: RuntimeCase, pod: PodRef, spec: ContainerSpec) -> ContainerRef:
    """A container that was started and has said its first word."""
    container = await start(case, pod, spec)
    async with asyncio.timeout(case.deadline_s):
        output = case.runtime.output(container, 0)
        try:
            await anext(output)
        finally:
            await aclose(output)
    return container


async def aclose(iterator: AsyncIterator[object]) -> None:
    """Close an async generator."""
    await iterator.aclose()  # type: ignore[attr-defined]


async def stop(case: RuntimeCase, container: ContainerRef, grace_s: float) -> ObservedContainer:
    """Stop a container."""
    async with asyncio.timeout(case.deadline_s + grace_s):
        return await case.runtime.stop_container(container, grace_s)


async def look(case: RuntimeCase, container: ContainerRef) -> ObservedContainer:
    """What the runtime knows of a container; what it does not mention is ABSENT."""
    async with asyncio.timeout(case.deadline_s):
        snapshot = await case.runtime.inspect((), (container,))
    return container_in(snapshot, container) or ObservedContainer(id=container.id, liveness=Liveness.ABSENT)


async def look_at_pod(case: RuntimeCase, pod: PodRef) -> Liveness:
    """What the runtime knows of a pod."""
    async with asyncio.timeout(case.deadline_s):
        snapshot = await case.runtime.inspect((pod,), ())
    return next((fact.liveness for fact in snapshot.pods if fact.id == pod.id), Liveness.ABSENT)


def container_in(snapshot: Snapshot, container: ContainerRef) -> ObservedContainer | None:
    """A container's fact in a snapshot."""
    return next((fact for fact in snapshot.containers if fact.id == container.id), None)


async def until_exited(case: RuntimeCase, container: ContainerRef) -> ObservedContainer:
    """Wait for the end as the core does, by the runtime's facts, and return them."""
    async with asyncio.timeout(case.deadline_s):
        watching = case.runtime.watch()
        try:
            async for item in watching:
                fact = container_in(item, container) if isinstance(item, Snapshot) else item.container
                if fact is not None and fact.id == container.id and fact.liveness is Liveness.EXITED:
                    return fact
        finally:
            await aclose(watching)
    raise AssertionError("watch ended")


async def read(case: RuntimeCase, container: ContainerRef, after: int = 0) -> list[OutputChunk]:
    """All output behind a position, of a container that ends by itself."""
    async with asyncio.timeout(case.deadline_s):
        return [chunk async for chunk in case.runtime.output(container, after)]


def joined(chunks: list[OutputChunk], stream: Stream = Stream.STDOUT) -> bytes:
    """The bytes of one stream."""
    return b"".join(chunk.data for chunk in chunks if chunk.stream is stream)


async def drain(case: RuntimeCase, process: Process) -> tuple[bytes, bytes, int]:
    """All that a process writes on both streams, and its exit code."""
    found = {"stdout": b"", "stderr": b""}
    async with asyncio.timeout(case.deadline_s):
        async for stream, data in process.output():
            found[stream] += bytes(data)
        code = await process.wait()
        await process.aclose()
    return found["stdout"], found["stderr"], code


async def read_until(case: RuntimeCase, process: Process, wanted: bytes) -> bytes:
    """Read a process's output until it holds `wanted`."""
    found = b""
    async with asyncio.timeout(case.deadline_s):
        async for _stream, data in process.output():
            found += bytes(data)
            if wanted in found:
                return found
    raise AssertionError(f"ended with {found[-200:]!r}")
