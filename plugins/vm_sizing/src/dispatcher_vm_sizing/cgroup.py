"""Limits of a pod's cgroup as the kubelet set them, of either version. Reads, and never writes.

"Unlimited" has many spellings: `max` (v2), -1 (v1 quota), 9223372036854771712 (v1 memory), no file at all.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from dispatcher.api import expand_cgroup_parent

DEFAULT_PERIOD_US = 100_000
# Version 1 shows "unlimited" as the largest number of pages; nobody has an exbibyte of memory.
UNLIMITED_BYTES = 1 << 60


@dataclass(frozen=True, slots=True, kw_only=True)
class CgroupLimits:
    """Limits of one cgroup. None is unlimited."""

    memory_bytes: int | None = None
    cpu_quota_us: int | None = None
    cpu_period_us: int = DEFAULT_PERIOD_US


def read_pod_limits(root: Path, cgroup_parent: str) -> CgroupLimits | None:
    """Read the limits of the cgroup that the kubelet named; None where there is no such cgroup to be read.

    `root` is where the hierarchies are mounted: /sys/fs/cgroup, of version 1, 2, or both.
    """
    relative = expand_cgroup_parent(cgroup_parent)
    if relative is None:
        return None
    unified = root / relative
    if (root / "cgroup.controllers").exists():
        return _read_v2(unified) if unified.is_dir() else None
    memory = _first_folder(root / name / relative for name in ("memory",))
    cpu = _first_folder(root / name / relative for name in ("cpu", "cpu,cpuacct"))
    if memory is None and cpu is None:
        return None
    return _read_v1(memory, cpu)


def _first_folder(folders: Iterable[Path]) -> Path | None:
    return next((folder for folder in folders if folder.is_dir()), None)


def _read_v2(folder: Path) -> CgroupLimits:
    quota, _, period = _text(folder / "cpu.max").partition(" ")
    return CgroupLimits(
        memory_bytes=_limit(_text(folder / "memory.max")),
        cpu_quota_us=_limit(quota),
        cpu_period_us=_limit(period) or DEFAULT_PERIOD_US,
    )


def _read_v1(memory: Path | None, cpu: Path | None) -> CgroupLimits:
    return CgroupLimits(
        memory_bytes=_limit(_text(memory / "memory.limit_in_bytes")) if memory else None,
        cpu_quota_us=_limit(_text(cpu / "cpu.cfs_quota_us")) if cpu else None,
        cpu_period_us=(_limit(_text(cpu / "cpu.cfs_period_us")) if cpu else None) or DEFAULT_PERIOD_US,
    )


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="ascii").strip()
    except (OSError, UnicodeDecodeError):
        return ""


def _limit(text: str) -> int | None:
    """Read a number; whatever is no positive number below the absurd is unlimited."""
    if not text.isdecimal():
        return None
    value = int(text[:20])
    return value if 0 < value < UNLIMITED_BYTES else None
