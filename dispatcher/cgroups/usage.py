"""What a cgroup uses, in both versions.

Theory of operation. A file costs some ten microseconds, and a node has hundreds of cgroups, so the files for every
question (`_FIRST` of each version) are few, and those for metrics are read when asked. What a kernel does not have is
None. A cgroup that is gone is None as a whole: its memory and CPU files are what every container has. Paths are put
together as strings here: that costs a tenth of what path objects do, which was half of a reading.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from dispatcher.cgroups.folders import CgroupFolders
from dispatcher.model import DeviceIo, HugepageUsage, Pressure, Stall, Usage

_READ_BYTES = 1 << 18  # more than any file of a cgroup that is read here
_UNLIMITED_BYTES = 1 << 60  # version 1 shows "unlimited" as the largest number of pages
_NS_PER_TICK = 1_000_000_000 // os.sysconf("SC_CLK_TCK")
_HUGEPAGES = re.compile(r"hugetlb\.([0-9]+[KMG]B)\.(usage_in_bytes|current)")


def read_usage(
    where: CgroupFolders, *, detailed: bool = False, now_ns: Callable[[], int] = time.time_ns
) -> Usage | None:
    """Read a cgroup once; the second part of `Usage` where `detailed`. Blocks for some files: call it in a thread.

    Returns None where the cgroup is gone. Process figures are not part of it: see `processes`.
    """
    try:
        figures = _read_v2(where, detailed) if where.version == 2 else _read_v1(where, detailed)
    except (OSError, ValueError, IndexError):
        return None
    # A container that may make cgroups may give them names that are no text.
    return Usage(timestamp_ns=now_ns(), cgroup=where.name.encode("utf-8", "replace").decode(), **figures)


# ----------------------------------------------------------------------------------------------------------- version 1
def _read_v1(where: CgroupFolders, detailed: bool) -> dict[str, Any]:
    figures: dict[str, Any] = {}
    if (accounting := where.paths.get("cpuacct")) is not None:
        figures["cpu_usage_ns"] = int(_text(f"{accounting}/cpuacct.usage"))
    if (memory := where.paths.get("memory")) is not None:
        figures.update(_memory_v1(memory, detailed))
    if (pids := where.paths.get("pids")) is not None:
        figures["thread_count"] = _number(f"{pids}/pids.current")
    if where.unified is not None:
        figures.update(_pressures(where.unified))
    if detailed:
        figures.update(_more_v1(where))
    return figures


def _memory_v1(folder: Path, detailed: bool) -> dict[str, Any]:
    used = int(_text(f"{folder}/memory.usage_in_bytes"))
    stat = _pairs(_text(f"{folder}/memory.stat"))
    limit = _limit(stat.get("hierarchical_memory_limit"))
    figures: dict[str, Any] = {
        "memory_usage_bytes": used,
        "memory_working_set_bytes": max(0, used - stat.get("total_inactive_file", 0)),
        "memory_rss_bytes": stat.get("total_rss"),
        "memory_page_faults": stat.get("total_pgfault"),
        "memory_major_page_faults": stat.get("total_pgmajfault"),
        "memory_limit_bytes": limit,
        "swap_usage_bytes": stat.get("total_swap"),
        "swap_limit_bytes": _swap_limit(limit, _limit(stat.get("hierarchical_memsw_limit"))),
    }
    if detailed:
        figures |= {
            "memory_cache_bytes": stat.get("total_cache"),
            "memory_mapped_file_bytes": stat.get("total_mapped_file"),
            "memory_kernel_bytes": _number(f"{folder}/memory.kmem.usage_in_bytes"),
            "memory_max_usage_bytes": _number(f"{folder}/memory.max_usage_in_bytes"),
            "memory_limit_hits": _number(f"{folder}/memory.failcnt"),
            "memory_reservation_bytes": _limit(_number(f"{folder}/memory.soft_limit_in_bytes")),
            "oom_kills": _pairs(_find_text(f"{folder}/memory.oom_control")).get("oom_kill"),
        }
    return figures


def _swap_limit(memory: int | None, both: int | None) -> int | None:
    """Version 1 limits memory and swap together."""
    return None if both is None or memory is None else max(0, both - memory)


def _more_v1(where: CgroupFolders) -> dict[str, Any]:
    figures: dict[str, Any] = {}
    if (accounting := where.paths.get("cpuacct")) is not None:
        ticks = _pairs(_find_text(f"{accounting}/cpuacct.stat"))
        figures["cpu_user_ns"] = _times(ticks.get("user"), _NS_PER_TICK)
        figures["cpu_system_ns"] = _times(ticks.get("system"), _NS_PER_TICK)
    if (cpu := where.paths.get("cpu")) is not None:
        stat = _pairs(_find_text(f"{cpu}/cpu.stat"))
        figures |= {
            "cpu_periods": stat.get("nr_periods"),
            "cpu_throttled_periods": stat.get("nr_throttled"),
            "cpu_throttled_ns": stat.get("throttled_time"),
            "cpu_period_us": _number(f"{cpu}/cpu.cfs_period_us"),
            "cpu_quota_us": _positive(_number(f"{cpu}/cpu.cfs_quota_us")),
            "cpu_shares": _number(f"{cpu}/cpu.shares"),
        }
    if (pids := where.paths.get("pids")) is not None:
        figures["thread_limit"] = _number(f"{pids}/pids.max")
    if (blkio := where.paths.get("blkio")) is not None:
        figures["device_io"] = _device_io_v1(
            _find_text(f"{blkio}/blkio.throttle.io_service_bytes_recursive"),
            _find_text(f"{blkio}/blkio.throttle.io_serviced_recursive"),
        )
    if (hugetlb := where.paths.get("hugetlb")) is not None:
        figures["hugepages"] = _hugepages(hugetlb)
    return figures


def _device_io_v1(service_bytes: str, serviced: str) -> tuple[DeviceIo, ...]:
    """Lines such as `8:0 Read 4096`; the total at the end has no device."""
    rows: dict[tuple[int, int], dict[str, int]] = {}
    names = (
        (service_bytes, {"Read": "read_bytes", "Write": "written_bytes", "Discard": "discarded_bytes"}),
        (serviced, {"Read": "reads", "Write": "writes"}),
    )
    for text, fields in names:
        for line in text.splitlines():
            parts = line.split()
            if len(parts) == 3 and parts[1] in fields:
                rows.setdefault(_device(parts[0]), {})[fields[parts[1]]] = int(parts[2])
    return tuple(DeviceIo(major=major, minor=minor, **figures) for (major, minor), figures in sorted(rows.items()))


# ----------------------------------------------------------------------------------------------------------- version 2
def _read_v2(where: CgroupFolders, detailed: bool) -> dict[str, Any]:
    folder = where.unified
    assert folder is not None
    cpu = _pairs(_text(f"{folder}/cpu.stat"))
    used = _number(f"{folder}/memory.current")
    figures: dict[str, Any] = {
        "cpu_usage_ns": _times(cpu.get("usage_usec"), 1000),
        "thread_count": _number(f"{folder}/pids.current"),
        **_pressures(folder),
    }
    stat: dict[str, int] = {}
    if used is not None:  # the root's cgroup, and one without the controller, do not have it
        stat = _pairs(_text(f"{folder}/memory.stat"))
        figures |= {
            "memory_usage_bytes": used,
            "memory_working_set_bytes": max(0, used - stat.get("inactive_file", 0)),
            "memory_rss_bytes": stat.get("anon"),
            "memory_page_faults": stat.get("pgfault"),
            "memory_major_page_faults": stat.get("pgmajfault"),
            "memory_limit_bytes": _limit(_number(f"{folder}/memory.max")),
            "swap_usage_bytes": _number(f"{folder}/memory.swap.current"),
            "swap_limit_bytes": _limit(_number(f"{folder}/memory.swap.max")),
        }
    if detailed:
        figures |= _more_v2(folder, cpu, stat)
    return figures


def _more_v2(folder: Path, cpu: dict[str, int], stat: dict[str, int]) -> dict[str, Any]:
    events = _pairs(_find_text(f"{folder}/memory.events"))
    quota, _, period = _find_text(f"{folder}/cpu.max").strip().partition(" ")
    return {
        "cpu_user_ns": _times(cpu.get("user_usec"), 1000),
        "cpu_system_ns": _times(cpu.get("system_usec"), 1000),
        "cpu_periods": cpu.get("nr_periods"),
        "cpu_throttled_periods": cpu.get("nr_throttled"),
        "cpu_throttled_ns": _times(cpu.get("throttled_usec"), 1000),
        "cpu_period_us": int(period) if period.isdecimal() else None,
        "cpu_quota_us": int(quota) if quota.isdecimal() else None,
        "cpu_shares": _shares_of_weight(_number(f"{folder}/cpu.weight")),
        "memory_cache_bytes": stat.get("file"),
        "memory_mapped_file_bytes": stat.get("file_mapped"),
        "memory_kernel_bytes": stat.get("kernel"),
        "memory_max_usage_bytes": _number(f"{folder}/memory.peak"),
        "memory_limit_hits": events.get("max"),
        "memory_reservation_bytes": _number(f"{folder}/memory.low"),
        "oom_kills": events.get("oom_kill"),
        "thread_limit": _number(f"{folder}/pids.max"),
        "device_io": _device_io_v2(_find_text(f"{folder}/io.stat")),
        "hugepages": _hugepages(folder),
    }


def _shares_of_weight(weight: int | None) -> int | None:
    """The inverse of how runtimes turn shares (2 to 262144) into a weight (1 to 10000), rounded."""
    return None if weight is None else 2 + ((weight - 1) * 262142) // 9999


def _device_io_v2(text: str) -> tuple[DeviceIo, ...]:
    """Lines such as `8:0 rbytes=4096 wbytes=0 rios=1 wios=0 dbytes=0 dios=0`."""
    rows = []
    for line in text.splitlines():
        device, *parts = line.split()
        values = {key: int(value) for key, _, value in (part.partition("=") for part in parts) if value.isdecimal()}
        if not values or ":" not in device:
            continue
        major, minor = _device(device)
        rows.append(
            DeviceIo(
                major=major,
                minor=minor,
                read_bytes=values.get("rbytes", 0),
                written_bytes=values.get("wbytes", 0),
                discarded_bytes=values.get("dbytes", 0),
                reads=values.get("rios", 0),
                writes=values.get("wios", 0),
            )
        )
    return tuple(sorted(rows, key=lambda row: (row.major, row.minor)))


# ---------------------------------------------------------------------------------------------------------------- both
def _pressures(folder: Path) -> dict[str, Pressure | None]:
    """Pressure where the kernel keeps it; it is kept in version 2 hierarchies only."""
    return {
        f"{name}_pressure": parse_pressure(_find_text(f"{folder}/{name}.pressure")) for name in ("cpu", "memory", "io")
    }


def parse_pressure(text: str) -> Pressure | None:
    """Read a pressure file, such as `some avg10=0.00 avg60=0.00 avg300=0.00 total=0`; None for an empty text."""
    stalls: dict[str, Stall] = {}
    for line in text.splitlines():
        kind, *parts = line.split()
        values = dict(part.split("=", 1) for part in parts)
        if kind in {"some", "full"}:
            stalls[kind] = Stall(
                avg10=float(values["avg10"]),
                avg60=float(values["avg60"]),
                avg300=float(values["avg300"]),
                total_us=int(values["total"]),
            )
    return Pressure(**stalls) if stalls else None


def _hugepages(folder: Path) -> tuple[HugepageUsage, ...]:
    """Both versions name their files alike; version 2 keeps no peak."""
    found = []
    for name in sorted(_names(folder)):
        match = _HUGEPAGES.fullmatch(name)
        used = _number(f"{folder}/{name}") if match else None
        if match and used is not None:
            peak = _number(f"{folder}/hugetlb.{match[1]}.max_usage_in_bytes")
            found.append(HugepageUsage(page_size=match[1], usage_bytes=used, max_usage_bytes=peak))
    return tuple(found)


def _names(folder: Path) -> Iterable[str]:
    try:
        return os.listdir(folder)
    except OSError:
        return ()


def _text(path: str) -> str:
    """The whole file. Raises OSError."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        return os.read(fd, _READ_BYTES).decode("ascii", "replace")
    finally:
        os.close(fd)


def _find_text(path: str) -> str:
    """The whole file, "" where it does not exist or says nothing (pressure may be switched off)."""
    try:
        return _text(path)
    except OSError:
        return ""


def _number(path: str) -> int | None:
    """The number in a file; None for "max" and for no file."""
    text = _find_text(path).strip()
    return int(text) if text.removeprefix("-").isdecimal() else None


def _pairs(text: str) -> dict[str, int]:
    """Lines of a name and a number."""
    parts = text.split()
    return {name: int(value) for name, value in zip(parts[::2], parts[1::2], strict=False)}


def _limit(value: int | None) -> int | None:
    return value if value is not None and 0 <= value < _UNLIMITED_BYTES else None


def _positive(value: int | None) -> int | None:
    return value if value is not None and value > 0 else None


def _times(value: int | None, factor: int) -> int | None:
    return None if value is None else value * factor


def _device(text: str) -> tuple[int, int]:
    major, _, minor = text.partition(":")
    return int(major), int(minor)
