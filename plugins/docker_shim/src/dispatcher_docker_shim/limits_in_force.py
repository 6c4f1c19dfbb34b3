"""The limits that the kernel holds for a running container, told in the terms in which they were asked for.

The kernel rounds: memory to pages, CPU shares to weights under cgroup version 2. What is equal but for that is told as
it was asked; a caller that compares (the kubelet does, and asks again until they agree) would never be content else.
What really differs is told as the kernel has it.
"""

from __future__ import annotations

import math
import resource
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from dispatcher.api import CgroupFolders
from dispatcher.model import Resources

_PAGE = resource.getpagesize()
_UNLIMITED_V1 = 1 << 60  # version 1 writes "no limit" as the largest number of whole pages


def in_force(where: CgroupFolders, granted: Resources) -> Resources:
    """Return `granted` with every limit that the kernel holds otherwise replaced by the kernel's.

    A file that cannot be read (the container just ended, or the controller is absent) leaves its limit as granted.
    """
    changes: dict[str, int | str] = {}
    read = _v2(where) if where.version == 2 else _v1(where)
    for field, (value, equal) in read.items():
        asked = getattr(granted, field)
        if asked and not equal(asked):
            changes[field] = value
    return replace(granted, **changes)  # type: ignore[arg-type]


class _Number:
    """Equal to a limit that is the same, or within `slack` of it; below zero both mean "none"."""

    def __init__(self, value: int, *, slack: int = 0) -> None:
        self._value = value
        self._slack = slack

    def __call__(self, asked: int) -> bool:
        if asked < 0 or self._value < 0:
            return asked < 0 and self._value < 0
        return 0 <= asked - self._value <= self._slack


class _Weight:
    """Equal to CPU shares that an OCI runtime turns into this weight: by the old line or by the newer curve."""

    def __init__(self, weight: int) -> None:
        self._weight = weight

    def __call__(self, shares: int) -> bool:
        return self._weight in {weight_of_shares(shares), curved_weight_of_shares(shares)}


class _Cpus:
    """Equal to the same set of CPUs or memory nodes, however it is written."""

    def __init__(self, text: str) -> None:
        self._members = members(text)

    def __call__(self, asked: str) -> bool:
        return members(asked) == self._members


_Read = Mapping[str, tuple[int | str, "_Number | _Weight | _Cpus"]]


def _v1(where: CgroupFolders) -> _Read:
    read: dict[str, tuple[int | str, _Number | _Weight | _Cpus]] = {}
    names = {
        "cpu_period_us": ("cpu", "cpu.cfs_period_us"),
        "cpu_quota_us": ("cpu", "cpu.cfs_quota_us"),
        "cpu_shares": ("cpu", "cpu.shares"),
        "memory_limit_bytes": ("memory", "memory.limit_in_bytes"),
        "memory_swap_limit_bytes": ("memory", "memory.memsw.limit_in_bytes"),
    }
    for field, (controller, file) in names.items():
        with suppress(OSError, ValueError):
            value = int(_text(where, controller, file))
            value = -1 if value >= _UNLIMITED_V1 else value
            read[field] = (value, _Number(value, slack=_PAGE - 1 if controller == "memory" else 0))
    return {**read, **_cpuset(where)}


def _v2(where: CgroupFolders) -> _Read:
    read: dict[str, tuple[int | str, _Number | _Weight | _Cpus]] = {}
    with suppress(OSError, ValueError):
        quota, period = _text(where, "cpu", "cpu.max").split()
        value = -1 if quota == "max" else int(quota)
        read["cpu_quota_us"] = (value, _Number(value))
        read["cpu_period_us"] = (int(period), _Number(int(period)))
    with suppress(OSError, ValueError):
        weight = int(_text(where, "cpu", "cpu.weight"))
        read["cpu_shares"] = (shares_of_weight(weight), _Weight(weight))
    with suppress(OSError, ValueError):
        memory = _limit(_text(where, "memory", "memory.max"))
        read["memory_limit_bytes"] = (memory, _Number(memory, slack=_PAGE - 1))
        swap = _limit(_text(where, "memory", "memory.swap.max"))
        both = -1 if memory < 0 or swap < 0 else memory + swap
        read["memory_swap_limit_bytes"] = (both, _Number(both, slack=2 * (_PAGE - 1)))
    return {**read, **_cpuset(where)}


def _cpuset(where: CgroupFolders) -> _Read:
    read: dict[str, tuple[int | str, _Number | _Weight | _Cpus]] = {}
    for field in ("cpuset_cpus", "cpuset_mems"):
        with suppress(OSError, ValueError):
            if text := _text(where, "cpuset", field.replace("_", ".")):
                read[field] = (text, _Cpus(text))
    return read


def _text(where: CgroupFolders, controller: str, file: str) -> str:
    folder = where.folder(controller)
    if folder is None:
        raise FileNotFoundError(controller)
    return Path(folder / file).read_text(encoding="ascii").strip()


def _limit(text: str) -> int:
    return -1 if text == "max" else int(text)


def weight_of_shares(shares: int) -> int:
    """The weight for CPU shares on a straight line from 2..262144 to 1..10000 (OCI runtimes until 2025)."""
    return 1 + (min(max(shares, 2), 262144) - 2) * 9999 // 262142


def curved_weight_of_shares(shares: int) -> int:
    """The weight on the curve of newer OCI runtimes, which takes 1024 shares to the kernel's own default of 100."""
    if shares <= 2:
        return 1
    if shares >= 262144:
        return 10000
    log = math.log2(shares)
    return math.ceil(10 ** ((log * log + 125 * log) / 612 - 7 / 34))


def shares_of_weight(weight: int) -> int:
    """Shares that a weight stands for, back along the straight line."""
    return 2 + (min(max(weight, 1), 10000) - 1) * 262142 // 9999


def members(text: str) -> frozenset[int]:
    """The numbers in a list such as "0-2,5". Raises ValueError for another text."""
    found: set[int] = set()
    for part in filter(None, text.split(",")):
        first, _, last = part.partition("-")
        found.update(range(int(first), int(last or first) + 1))
    return frozenset(found)
