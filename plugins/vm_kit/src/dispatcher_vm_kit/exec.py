"""The only module here that starts processes: the compiler, the machine monitors, and small tools that end at once."""

from __future__ import annotations

import asyncio
import os
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from dispatcher.api import effect
from dispatcher.errors import NotSupported

_COMPILE_S = 120.0


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolOutput:
    """How a tool ended and what it printed."""

    exit_code: int
    stdout: bytes
    stderr: bytes


@effect("vm.compile")
async def compile_c(compiler: str, flags: Sequence[str], source: Path, target: Path) -> None:
    """Compile and link one C file into a static program.

    Raises:
        NotSupported: the compiler failed; its own words are in the message.
    """
    output = await run_tool([compiler, *flags, "-o", str(target), str(source)], timeout_s=_COMPILE_S)
    if output.exit_code != 0:
        words = output.stderr.decode("utf-8", "replace").strip()[-500:]
        raise NotSupported(f"{source.name} could not be compiled with {compiler}: {words}")


@effect("vm.run_tool")
async def run_tool(argv: Sequence[str], *, timeout_s: float) -> ToolOutput:
    """Run a short program of our own or of the system to its end. Killed at the deadline and on cancellation.

    Raises:
        TimeoutError: it did not end in its time.
        OSError: it cannot be started.
    """
    process = await asyncio.create_subprocess_exec(
        *argv,
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    try:
        async with asyncio.timeout(timeout_s):
            stdout, stderr = await process.communicate()
    except BaseException:
        if process.returncode is None:
            process.kill()
            await process.wait()
        raise
    return ToolOutput(exit_code=process.returncode or 0, stdout=stdout, stderr=stderr)


class Child:
    """A process that we started and that may outlive us."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        self.pid = process.pid
        self._exit_code: int | None = None
        # Python would complain of a child that is let go while it runs, which is what these are for.
        process.returncode = 0

    def reap(self) -> int:
        """Its exit code, negative for a signal; call it once its pidfd is readable. Idempotent."""
        if self._exit_code is None:
            self._exit_code = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        return self._exit_code


@effect("vm.spawn")
def spawn(argv: Sequence[str], *, pass_fds: Sequence[int], output_fd: int) -> Child:
    """Start a process that outlives us, in a session of its own; stdout and stderr go to `output_fd`.

    Raises:
        OSError: it cannot be started.
    """
    return Child(
        subprocess.Popen(
            list(argv),
            stdin=subprocess.DEVNULL,
            stdout=output_fd,
            stderr=output_fd,
            cwd="/",
            close_fds=True,
            pass_fds=tuple(pass_fds),
            start_new_session=True,
        )
    )
