"""Starting worker processes: the only place of this plugin that runs a program.

A worker is killed with its whole process group when its call is cancelled or takes too long, and by the kernel when
the daemon dies.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from typing import Any

from dispatcher.api import effect
from dispatcher.errors import Internal, InvalidRequest, OutOfResources
from dispatcher_images.hostile import BadImage

_MAX_REPLY = 16 << 20


class Workers:
    """A bounded number of worker processes. Jobs beyond it wait their turn."""

    def __init__(self, count: int, deadline_s: float) -> None:
        self._slots = asyncio.Semaphore(count)
        self._deadline_s = deadline_s

    async def run(self, job: Mapping[str, Any]) -> dict[str, Any]:
        """Run one job of `dispatcher_images.worker` and return its reply.

        Cancellation kills the worker and returns once it is gone; files that it wrote are the caller's to remove.

        Raises:
            BadImage: the image is wrong or hostile.
            OutOfResources: the disk is full, or the deadline passed.
            Internal: the worker died without a reply.
        """
        async with self._slots:
            return await _run_worker(job, self._deadline_s)


@effect("images.run_worker")
async def _run_worker(job: Mapping[str, Any], deadline_s: float) -> dict[str, Any]:
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-I",
        "-X",
        "utf8",
        "-m",
        "dispatcher_images.worker",
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        limit=_MAX_REPLY,
        start_new_session=True,
        env={"PATH": os.environ.get("PATH", os.defpath), "LC_ALL": "C.UTF-8"},
    )
    try:
        async with asyncio.timeout(deadline_s):
            out, err = await process.communicate(json.dumps({**job, "parent": os.getpid()}).encode())
    except TimeoutError:
        raise OutOfResources(f"Unpacking took longer than {deadline_s:.0f} s: raise `worker_deadline_s`.") from None
    finally:
        await _reap(process)
    return _reply(job, process.returncode, out, err)


async def _reap(process: asyncio.subprocess.Process) -> None:
    """Kill what is left of a worker. Shielded by its shortness: SIGKILL needs no cooperation."""
    if process.returncode is None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        await asyncio.shield(process.wait())


def _reply(job: Mapping[str, Any], code: int | None, out: bytes, err: bytes) -> dict[str, Any]:
    words = err.decode("utf-8", "replace").strip()[-500:]
    if job["job"] == "program":
        if code != 0:
            raise OutOfResources(f"{os.path.basename(job['program'])} failed with code {code}.", words=words)
        return {}
    if code in {-signal.SIGXCPU, -signal.SIGKILL}:
        raise BadImage("the image took more than the allowed processor time to read")
    if code != 0 or not out:
        raise Internal(f"An image worker died with code {code}.", words=words)
    reply: dict[str, Any] = json.loads(out)
    match reply.get("error"):
        case None:
            return reply
        case "bad-image":
            raise BadImage(reply["message"])
        case "no-space":
            raise OutOfResources(f"No room to unpack the image: {reply['message']}.")
        case _:
            raise Internal(f"An image worker failed: {reply['message']}.")


def refuse(image: str, error: BadImage) -> InvalidRequest:
    """The error for the caller: nothing but another image helps."""
    return InvalidRequest(f"The image {image} cannot be unpacked: {error}.", image=image)
