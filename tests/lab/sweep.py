"""Takes away what a lab folder's programs left: processes, mounts, a bridge, cgroups. Acts on that folder's name only.

Also for sessions that were killed before their own clean-up: the folder names its owner's pid.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import tempfile
from contextlib import suppress
from pathlib import Path

from tests.lab.child import find_program, wait_until


def sweep(root: Path) -> None:
    """End what a lab folder's engine left (shims and their containers, mounts, cgroups), then remove the folder."""
    mark = str(root)
    leftovers = [pid for pid, argv in _processes() if any(mark in part for part in argv[:12]) and pid != os.getpid()]
    doomed = {pid for pid, _argv in _processes() if _parent(pid) in leftovers} | set(leftovers)
    for pid in doomed:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    with suppress(TimeoutError):
        wait_until(lambda: not any(_alive(pid) for pid in doomed), timeout_s=10, what="leftover processes remain")
    with suppress(subprocess.CalledProcessError):
        subprocess.run([find_program("ip"), "link", "delete", bridge_of(root)], check=True, capture_output=True)
    for point in reversed(_mounts_below(root)):
        subprocess.run(["umount", "-l", point], check=False, capture_output=True)
    # os.walk passes over folders that vanish meanwhile: other engines come and go.
    own = {root.name, slice_of(root)}
    found = [Path(at, name) for at, names, _ in os.walk("/sys/fs/cgroup") for name in own.intersection(names)]
    for folder in found:
        for inner in sorted(folder.glob("**/"), key=lambda path: len(path.parts), reverse=True):
            with suppress(OSError):
                inner.rmdir()
    shutil.rmtree(root, ignore_errors=True)


def sweep_stale() -> list[Path]:
    """Sweep lab folders whose test session is dead (it was killed before its clean-up). Returns what was swept."""
    swept = []
    for owner in Path(lab_folder_parent()).glob("cri-lab-*/owner"):
        with suppress(OSError, ValueError):
            if not _alive(int(owner.read_text())):
                sweep(owner.parent)
                swept.append(owner.parent)
    return swept


def lab_folder_parent() -> str:
    """Where lab folders are made."""
    return tempfile.gettempdir()


def bridge_of(root: Path) -> str:
    """The bridge that belongs to a lab folder, within the kernel's 15 characters."""
    return "crilab" + root.name[-8:].replace("_", "-")


def slice_of(root: Path) -> str:
    """The systemd slice that belongs to a lab folder. A hyphen in its name would make it a child of another slice."""
    return f"{root.name.replace('-', '_')}.slice"


def _alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def _parent(pid: int) -> int:
    with suppress(OSError):
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    return 0


def _processes() -> list[tuple[int, list[str]]]:
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            found.append((int(folder.name), (folder / "cmdline").read_text(errors="replace").split("\0")))
    return found


def _mounts_below(root: Path) -> list[str]:
    lines = Path("/proc/self/mountinfo").read_text().splitlines()
    return [point for line in lines if (point := line.split()[4]).startswith(f"{root}/")]
