"""Programs that building a guest needs: the compiler, and apt. The only place of the guest build that starts any."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
from collections.abc import Sequence
from pathlib import Path

from dispatcher.api import effect
from dispatcher.errors import DispatcherError

SOURCES = Path(__file__).resolve().parent.parent / "agent" / "src"
WARNINGS = ("-std=c11", "-D_GNU_SOURCE", "-Wall", "-Wextra", "-Werror", "-Wno-format-truncation")
# Nothing of the place where it was built may stay in the binary: equal sources give equal bytes.
SMALL = ("-Os", "-static", "-s", "-ffunction-sections", "-fdata-sections", "-Wl,--gc-sections", "-Wl,--build-id=none")
CHECKED = ("-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-fno-omit-frame-pointer")
_COMPILE_S = 300.0


class BuildFailed(DispatcherError):
    """A guest could not be built; the message holds the program's last words."""


def compile_agent(target: Path, *, checked: bool = False, compiler: str = "gcc") -> None:
    """Compile the agent. `checked` gives a dynamic one with sanitizers, for tests.

    Raises:
        BuildFailed: there is no compiler, or it refused.
    """
    sources = sorted(str(path.relative_to(SOURCES)) for path in SOURCES.glob("*.c"))
    run([compiler, *WARNINGS, *(CHECKED if checked else SMALL), "-o", str(target), *sources], folder=SOURCES)


@effect("guest.run")
def run(
    arguments: Sequence[str], *, folder: Path | None = None, deadline_s: float = _COMPILE_S, quiet: bool = True
) -> str:
    """Run a program to its end and return what it printed. It goes, with its children, when time is over.

    Raises:
        BuildFailed: it is not there, failed, or took longer than `deadline_s` seconds.
    """
    try:
        process = subprocess.Popen(
            arguments,
            cwd=folder,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT if quiet else None,
            text=True,
            errors="replace",
            env={**os.environ, "LC_ALL": "C", "DEBIAN_FRONTEND": "noninteractive"},
            start_new_session=True,
        )
    except OSError as error:
        raise BuildFailed(f"{arguments[0]} cannot be started; is its package installed?") from error
    try:
        output, _ = process.communicate(timeout=deadline_s)
    except BaseException as error:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        if isinstance(error, subprocess.TimeoutExpired):
            raise BuildFailed(f"{arguments[0]} took longer than {deadline_s:.0f} s.") from error
        raise
    if process.returncode:
        raise BuildFailed(f"{arguments[0]} failed: {output.strip()[-1500:]}")
    return output
