"""ExecSync: a command's whole output in one reply, bounded in time and size."""

from __future__ import annotations

import asyncio

from dispatcher.api import CanExec, ExecSpec, Process
from dispatcher.cri import api_pb2 as pb
from dispatcher.cri import validate
from dispatcher.cri.handlers.lookup import get_container, require_running
from dispatcher.deps import Deps
from dispatcher.errors import InvalidRequest, TimedOut

# The client takes 16 MiB for the whole message (cri-client): both streams share what is left beside the framing.
OUTPUT_BUDGET = 16 * 1024 * 1024 - 64 * 1024
# A background child may hold the pipes open for ever (CVE-2026-53495): after the exit, its output gets this long.
DRAIN_S = 2.0


async def handle(request: pb.ExecSyncRequest, deps: Deps) -> pb.ExecSyncResponse:
    """Run a command in a running container. A non-zero exit code is no error; a missed deadline is, and kills it."""
    if request.timeout < 0:
        raise InvalidRequest("The timeout of ExecSync is below zero.")
    words = validate.command(request.cmd)
    record = require_running(get_container(request.container_id, deps))
    pod = deps.store.get_pod(record.pod_id)

    runtime = deps.registry.ability(pod.route.runtime, CanExec)
    process = await runtime.exec(deps.container_ref(record, pod), ExecSpec(command=words))
    return await _collect(process, request.timeout or None)


async def _collect(process: Process, timeout_s: float | None) -> pb.ExecSyncResponse:
    streams = {"stdout": bytearray(), "stderr": bytearray()}

    async def read() -> None:
        async for stream, data in process.output():
            room = OUTPUT_BUDGET - len(streams["stdout"]) - len(streams["stderr"])
            streams[stream] += data[: max(0, room)]  # the rest is read and dropped: the command must not block

    reading = asyncio.create_task(read())
    finished = False
    try:
        async with asyncio.timeout(timeout_s):
            exit_code = await process.wait()
        finished = True
        await asyncio.wait({reading}, timeout=DRAIN_S)
    except TimeoutError:
        raise TimedOut(f"The command did not finish within {timeout_s} s and was killed.") from None
    finally:
        if not finished:
            await asyncio.shield(asyncio.ensure_future(process.kill()))
        reading.cancel()
        await asyncio.wait({reading})
        await process.aclose()
    if reading.done() and not reading.cancelled() and (error := reading.exception()) is not None:
        raise error
    return pb.ExecSyncResponse(stdout=bytes(streams["stdout"]), stderr=bytes(streams["stderr"]), exit_code=exit_code)
