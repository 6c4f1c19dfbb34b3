"""The limits of a container as the kernel's files tell them, in both versions of cgroups."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from dispatcher.api import CgroupFolders
from dispatcher.errors import NotSupported
from dispatcher.model import Resources
from dispatcher_docker_shim import cgroups
from dispatcher_docker_shim.limits_in_force import curved_weight_of_shares, in_force, members, weight_of_shares

MIB = 1 << 20
GRANTED = Resources(
    cpu_period_us=100_000,
    cpu_quota_us=50_000,
    cpu_shares=512,
    memory_limit_bytes=64 * MIB,
    memory_swap_limit_bytes=64 * MIB,
    cpuset_cpus="0-1",
)
V1 = {
    "cpu.cfs_period_us": "100000",
    "cpu.cfs_quota_us": "50000",
    "cpu.shares": "512",
    "memory.limit_in_bytes": str(64 * MIB),
    "memory.memsw.limit_in_bytes": str(64 * MIB),
    "cpuset.cpus": "0-1",
    "cpuset.mems": "0",
}
V2 = {
    "cpu.max": "50000 100000",
    "cpu.weight": "20",
    "memory.max": str(64 * MIB),
    "memory.swap.max": "0",
    "cpuset.cpus": "0-1",
    "cpuset.mems": "",
}


def hierarchy(version: int, folder: Path, files: dict[str, str]) -> CgroupFolders:
    """A cgroup in a folder; one folder stands for all controllers of version 1."""
    for name, text in files.items():
        (folder / name).write_text(text + "\n")
    if version == 2:
        return CgroupFolders(version=2, paths={}, unified=folder)
    return CgroupFolders(version=1, paths=dict.fromkeys(("cpu", "memory", "cpuset"), folder), unified=None)


@pytest.mark.parametrize(("version", "files"), [(1, V1), (2, V2)])
def test_what_agrees_is_told_as_it_was_granted(tmp_path: Path, version: int, files: dict[str, str]) -> None:
    where = hierarchy(version, tmp_path, files)
    assert in_force(where, GRANTED) == GRANTED
    # The kernel keeps whole pages, and writes a list of CPUs in its own way.
    odd = replace(GRANTED, memory_limit_bytes=64 * MIB + 5, memory_swap_limit_bytes=64 * MIB + 5, cpuset_cpus="1,0")
    assert in_force(where, odd) == odd


@pytest.mark.parametrize(
    ("version", "files", "field", "told"),
    [
        (1, {**V1, "memory.limit_in_bytes": str(32 * MIB)}, "memory_limit_bytes", 32 * MIB),
        (1, {**V1, "memory.limit_in_bytes": "9223372036854771712"}, "memory_limit_bytes", -1),
        (1, {**V1, "cpu.cfs_quota_us": "-1"}, "cpu_quota_us", -1),
        (1, {**V1, "cpu.shares": "2"}, "cpu_shares", 2),
        (1, {**V1, "cpuset.cpus": "0"}, "cpuset_cpus", "0"),
        (2, {**V2, "memory.max": "max"}, "memory_limit_bytes", -1),
        (2, {**V2, "memory.swap.max": str(MIB)}, "memory_swap_limit_bytes", 65 * MIB),
        (2, {**V2, "cpu.max": "max 100000"}, "cpu_quota_us", -1),
        (2, {**V2, "cpu.weight": "1"}, "cpu_shares", 2),
    ],
)
def test_what_differs_is_told_as_the_kernel_has_it(
    tmp_path: Path, version: int, files: dict[str, str], field: str, told: object
) -> None:
    assert getattr(in_force(hierarchy(version, tmp_path, files), GRANTED), field) == told


@pytest.mark.parametrize("version", [1, 2])
def test_what_cannot_be_read_or_was_not_asked_stays(tmp_path: Path, version: int) -> None:
    assert in_force(hierarchy(version, tmp_path, {}), GRANTED) == GRANTED
    assert in_force(hierarchy(version, tmp_path, V1 if version == 1 else V2), Resources()) == Resources()


@pytest.mark.parametrize("shares", [2, 10, 102, 512, 1024, 262144])
def test_both_ways_from_shares_to_a_weight_are_known(tmp_path: Path, shares: int) -> None:
    for weight in (weight_of_shares(shares), curved_weight_of_shares(shares)):
        assert 1 <= weight <= 10000
        where = hierarchy(2, tmp_path, {"cpu.weight": str(weight)})
        assert in_force(where, Resources(cpu_shares=shares)).cpu_shares == shares
    assert curved_weight_of_shares(1024) == 100


def test_members_of_a_list() -> None:
    assert members("0-2,5") == {0, 1, 2, 5}
    assert members("") == set()


def test_what_was_written_is_put_back_when_the_rest_fails(tmp_path: Path) -> None:
    where = hierarchy(2, tmp_path, {"memory.high": "max", "cpu.idle": "0"})
    unified = {"memory.high": "1000000", "cpu.idle": "1"}

    def failing() -> None:
        with cgroups.extra_kept_if_done(where, (), unified):
            assert (tmp_path / "memory.high").read_text() == "1000000"
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        failing()
    assert (tmp_path / "memory.high").read_text() == "max"
    assert (tmp_path / "cpu.idle").read_text() == "0"
    (tmp_path / "cpu.idle").unlink()
    (tmp_path / "cpu.idle").mkdir()
    with pytest.raises(NotSupported, match=r"cpu\.idle"), cgroups.extra_kept_if_done(where, (), unified):
        raise AssertionError("the block ran after a refusal")
    assert (tmp_path / "memory.high").read_text() == "max"
    (tmp_path / "cpu.idle").rmdir()
    with cgroups.extra_kept_if_done(where, (), unified):
        pass
    assert (tmp_path / "memory.high").read_text() == "1000000"
