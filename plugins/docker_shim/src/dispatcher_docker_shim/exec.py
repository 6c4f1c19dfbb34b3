"""The only place that starts a process: the compiler of the pause binary."""

from __future__ import annotations

import asyncio
import shutil
from pathlib import Path

from dispatcher.api import effect
from dispatcher.errors import NotSupported

FLAGS = (
    *("-std=c11", "-O2", "-static", "-nostdlib", "-ffreestanding", "-fno-stack-protector"),
    *("-fno-asynchronous-unwind-tables", "-fno-pie", "-no-pie", "-s", "-Wl,--build-id=none", "-Wl,-z,noexecstack"),
)
_DEADLINE_S = 60.0


def find_compiler(names: tuple[str, ...]) -> str | None:
    """The path of the first of these compilers that is installed."""
    return next((path for name in names if (path := shutil.which(name))), None)


@effect("docker.compile_pause")
async def compile_pause(compiler: str, source: Path, target: Path) -> None:
    """Compile and link the pause binary.

    Raises:
        NotSupported: the compiler failed; its own words are in the message.
    """
    process = await asyncio.create_subprocess_exec(
        compiler,
        *FLAGS,
        "-o",
        str(target),
        str(source),
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    try:
        async with asyncio.timeout(_DEADLINE_S):
            output, _ = await process.communicate()
    except BaseException:
        if process.returncode is None:
            process.kill()
            await process.wait()
        raise
    if process.returncode != 0:
        words = output.decode("utf-8", "replace").strip()[-500:]
        raise NotSupported(f"the pause binary could not be compiled with {compiler}: {words}")
