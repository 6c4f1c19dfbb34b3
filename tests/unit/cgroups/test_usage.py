"""What cgroups of either version say, on trees as kernels show them."""

from __future__ import annotations

import os
from dataclasses import fields, replace
from pathlib import Path

import pytest

from dispatcher.cgroups import (
    CgroupFolders,
    find_cgroup_of_parent,
    find_cgroup_of_process,
    list_pids,
    read_processes,
    read_usage,
)
from dispatcher.cgroups.usage import parse_pressure
from dispatcher.model import DeviceIo, HugepageUsage, Pressure, Stall, Usage

MIB = 1 << 20
NOW = 1_700_000_000_000_000_000
SOME = "some avg10=1.50 avg60=0.75 avg300=0.20 total=123456\n"
FULL = "full avg10=0.00 avg60=0.00 avg300=0.00 total=7\n"

V1 = {
    "cpuacct/pod/cpuacct.usage": "2500000000\n",
    "cpuacct/pod/cpuacct.stat": "user 150\nsystem 90\n",
    "cpu/pod/cpu.stat": "nr_periods 30\nnr_throttled 4\nthrottled_time 5000000\nnr_bursts 0\nburst_time 0\n",
    "cpu/pod/cpu.cfs_period_us": "100000\n",
    "cpu/pod/cpu.cfs_quota_us": "-1\n",
    "cpu/pod/cpu.shares": "512\n",
    "memory/pod/memory.usage_in_bytes": f"{40 * MIB}\n",
    "memory/pod/memory.kmem.usage_in_bytes": f"{2 * MIB}\n",
    "memory/pod/memory.max_usage_in_bytes": f"{50 * MIB}\n",
    "memory/pod/memory.soft_limit_in_bytes": "9223372036854771712\n",
    "memory/pod/memory.failcnt": "3\n",
    "memory/pod/memory.oom_control": "oom_kill_disable 0\nunder_oom 0\noom_kill 1\n",
    "memory/pod/memory.stat": (
        "cache 1\nrss 2\nmapped_file 3\npgfault 4\nswap 5\ninactive_file 6\n"
        f"hierarchical_memory_limit {64 * MIB}\nhierarchical_memsw_limit {80 * MIB}\n"
        f"total_cache {10 * MIB}\ntotal_rss {20 * MIB}\ntotal_mapped_file {MIB}\ntotal_swap {4 * MIB}\n"
        f"total_pgfault 900\ntotal_pgmajfault 9\ntotal_inactive_file {8 * MIB}\n"
    ),
    "pids/pod/pids.current": "5\n",
    "pids/pod/pids.max": "max\n",
    "blkio/pod/blkio.throttle.io_service_bytes_recursive": (
        "8:0 Read 4096\n8:0 Write 8192\n8:0 Sync 1\n8:0 Async 1\n8:0 Discard 16\n8:0 Total 12304\nTotal 12304\n"
    ),
    "blkio/pod/blkio.throttle.io_serviced_recursive": "8:0 Read 1\n8:0 Write 2\n8:0 Total 3\nTotal 3\n",
    "hugetlb/pod/hugetlb.2MB.usage_in_bytes": f"{2 * MIB}\n",
    "hugetlb/pod/hugetlb.2MB.max_usage_in_bytes": f"{4 * MIB}\n",
    "unified/pod/memory.pressure": SOME + FULL,
}
V2 = {
    "cgroup.controllers": "cpuset cpu io memory pids hugetlb\n",
    "pod/cpu.stat": (
        "usage_usec 2500000\nuser_usec 1500000\nsystem_usec 1000000\nnr_periods 30\nnr_throttled 4\nthrottled_usec 5000\n"
    ),
    "pod/cpu.max": "20000 100000\n",
    "pod/cpu.weight": "20\n",
    "pod/cpu.pressure": SOME,
    "pod/io.pressure": SOME + FULL,
    "pod/io.stat": "254:0 rbytes=4096 wbytes=8192 rios=1 wios=2 dbytes=16 dios=1\n7:0 \n",
    "pod/memory.current": f"{40 * MIB}\n",
    "pod/memory.peak": f"{50 * MIB}\n",
    "pod/memory.max": f"{64 * MIB}\n",
    "pod/memory.low": "0\n",
    "pod/memory.swap.current": f"{4 * MIB}\n",
    "pod/memory.swap.max": "max\n",
    "pod/memory.events": "low 0\nhigh 0\nmax 3\noom 1\noom_kill 1\noom_group_kill 0\n",
    "pod/memory.stat": (
        f"anon {20 * MIB}\nfile {10 * MIB}\nkernel {2 * MIB}\nfile_mapped {MIB}\n"
        f"inactive_file {8 * MIB}\npgfault 900\npgmajfault 9\n"
    ),
    "pod/pids.current": "5\n",
    "pod/pids.max": "100\n",
    "pod/hugetlb.2MB.current": f"{2 * MIB}\n",
    "pod/hugetlb.2MB.max": "max\n",
}


def plant(root: Path, files: dict[str, str]) -> CgroupFolders:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    found = find_cgroup_of_parent("/pod", root)
    assert found is not None
    return found


def read(where: CgroupFolders, *, detailed: bool = False) -> Usage:
    found = read_usage(where, detailed=detailed, now_ns=lambda: NOW)
    assert found is not None
    return found


ALIKE = {
    "timestamp_ns": NOW,
    "cgroup": "/pod",
    "cpu_usage_ns": 2_500_000_000,
    "memory_usage_bytes": 40 * MIB,
    "memory_working_set_bytes": 32 * MIB,
    "memory_rss_bytes": 20 * MIB,
    "memory_page_faults": 900,
    "memory_major_page_faults": 9,
    "memory_limit_bytes": 64 * MIB,
    "swap_usage_bytes": 4 * MIB,
    "thread_count": 5,
}
MORE_ALIKE = {
    "cpu_periods": 30,
    "cpu_throttled_periods": 4,
    "cpu_throttled_ns": 5_000_000,
    "cpu_period_us": 100_000,
    "memory_cache_bytes": 10 * MIB,
    "memory_mapped_file_bytes": MIB,
    "memory_kernel_bytes": 2 * MIB,
    "memory_max_usage_bytes": 50 * MIB,
    "memory_limit_hits": 3,
    "oom_kills": 1,
}
STALL = Stall(avg10=1.5, avg60=0.75, avg300=0.2, total_us=123456)
IO = {"read_bytes": 4096, "written_bytes": 8192, "discarded_bytes": 16, "reads": 1, "writes": 2}


def test_version_1(tmp_path: Path) -> None:
    """Figures of the whole tree below (`total_`), limits of the whole tree above; pressure from beside."""
    where = plant(tmp_path, V1)
    pressure = Pressure(some=STALL, full=Stall(avg10=0, avg60=0, avg300=0, total_us=7))
    first = Usage(**ALIKE, swap_limit_bytes=16 * MIB, memory_pressure=pressure)  # type: ignore[arg-type]
    assert read(where) == first
    ticks = 1_000_000_000 // os.sysconf("SC_CLK_TCK")
    assert read(where, detailed=True) == Usage(
        **ALIKE,  # type: ignore[arg-type]
        **MORE_ALIKE,  # type: ignore[arg-type]
        swap_limit_bytes=16 * MIB,
        memory_pressure=pressure,
        cpu_user_ns=150 * ticks,
        cpu_system_ns=90 * ticks,
        cpu_shares=512,
        device_io=(DeviceIo(major=8, minor=0, **IO),),
        hugepages=(HugepageUsage(page_size="2MB", usage_bytes=2 * MIB, max_usage_bytes=4 * MIB),),
    )


def test_version_2(tmp_path: Path) -> None:
    where = plant(tmp_path, V2)
    pressures = {
        "cpu_pressure": Pressure(some=STALL),
        "io_pressure": Pressure(some=STALL, full=Stall(avg10=0, avg60=0, avg300=0, total_us=7)),
    }
    assert read(where) == Usage(**ALIKE, **pressures)  # type: ignore[arg-type]
    assert read(where, detailed=True) == Usage(
        **ALIKE,  # type: ignore[arg-type]
        **MORE_ALIKE,  # type: ignore[arg-type]
        **pressures,  # type: ignore[arg-type]
        cpu_user_ns=1_500_000_000,
        cpu_system_ns=1_000_000_000,
        cpu_quota_us=20_000,
        cpu_shares=500,
        memory_reservation_bytes=0,
        thread_limit=100,
        device_io=(DeviceIo(major=254, minor=0, **IO),),
        hugepages=(HugepageUsage(page_size="2MB", usage_bytes=2 * MIB),),
    )


@pytest.mark.parametrize("files", [V1, V2], ids=["v1", "v2"])
def test_a_kernel_that_lacks_a_file_lacks_a_figure(tmp_path: Path, files: dict[str, str]) -> None:
    """Each file but those of memory and CPU time may be missing, and takes nothing but its own figures along."""
    needed = ("cpuacct.usage", "cpu.stat", "memory.usage_in_bytes", "memory.stat", "memory.current", "controllers")
    where = plant(tmp_path, files)
    whole = read(where, detailed=True)
    for name, text in files.items():
        if name.endswith(needed):
            continue
        (tmp_path / name).unlink()
        found = read(where, detailed=True)
        lost = [field.name for field in fields(Usage) if getattr(found, field.name) != getattr(whole, field.name)]
        assert len(lost) <= 2, name
        assert all(getattr(found, field) in (None, ()) or name.startswith(("blkio", "hugetlb")) for field in lost)
        (tmp_path / name).write_text(text)


def test_no_limit_is_none(tmp_path: Path) -> None:
    """Version 1 spells it as the largest number of pages."""
    unlimited = V1["memory/pod/memory.stat"].replace(str(64 * MIB), "9223372036854771712")
    usage = read(plant(tmp_path, V1 | {"memory/pod/memory.stat": unlimited}))
    assert (usage.memory_limit_bytes, usage.swap_limit_bytes) == (None, None)


@pytest.mark.parametrize("files", [V1, V2], ids=["v1", "v2"])
def test_a_cgroup_that_goes_away_is_not_measured(tmp_path: Path, files: dict[str, str]) -> None:
    where = plant(tmp_path, files)
    for name in files:
        (tmp_path / name).unlink()
    assert read_usage(where, detailed=True) is None


def test_a_name_that_is_no_text_can_be_told(tmp_path: Path) -> None:
    """A container that may make cgroups chooses their names, and no client can be told a lone surrogate."""
    where = replace(plant(tmp_path, V2), name="/pod/\udcff")
    assert read(where).cgroup == "/pod/?"


def test_pressure_that_is_switched_off_is_none() -> None:
    assert parse_pressure("") is None


def test_this_very_process_is_measured() -> None:
    """The running kernel's files are understood, whichever version it has."""
    where = find_cgroup_of_process(os.getpid())
    if where is None or (where.version == 2 and where.name == "/"):
        pytest.skip("this process is in no cgroup that could be measured")
    usage = read(where, detailed=True)
    assert usage.memory_usage_bytes
    assert usage.cpu_usage_ns
    with_processes = read_processes(where, usage, first_pid=os.getpid())
    assert os.getpid() in list_pids(where)
    assert with_processes.file_descriptors
    assert with_processes.soft_file_limit
