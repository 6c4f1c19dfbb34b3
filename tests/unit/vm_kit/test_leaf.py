"""Leaves on copies of cgroup trees, of both versions; the real version 1 is in tests/vm_kit."""

from __future__ import annotations

from pathlib import Path

import pytest

from dispatcher.api import read_usage
from dispatcher.errors import InvalidRequest
from dispatcher_vm_kit.leaf import (
    LeafLimits,
    find_leaf,
    make_leaf,
    remove_leaf,
    scope_argv,
    set_limits,
)

ID = "ab" * 32
POD = "/kubepods/burstable/pod1234"
LIMITS = LeafLimits(memory_bytes=256 << 20, cpu_quota_us=150_000, cpu_weight=79, pids=300)


def write(folder: Path, **files: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name.replace("__", ".")).write_text(text)


@pytest.fixture
def v2(tmp_path: Path) -> Path:
    """A unified tree as a kubelet with the driver cgroupfs leaves it, with the files that a kernel gives a new folder."""
    write(tmp_path, cgroup__controllers="cpuset cpu io memory hugetlb pids rdma misc\n")
    pod = tmp_path / POD.lstrip("/")
    write(pod, cgroup__controllers="cpuset cpu io memory pids\n", cgroup__subtree_control="memory\n")
    write(
        pod / f"cri-{ID}",
        memory__max="max\n",
        cpu__max="max 100000\n",
        cpu__weight="100\n",
        pids__max="max\n",
        cgroup__procs="",
        memory__current="41943040\n",
        memory__stat="anon 1\ninactive_file 1048576\n",
        cpu__stat="usage_usec 2500\nuser_usec 1\n",
        memory__events="low 0\noom 2\noom_kill 1\n",
    )
    return tmp_path


@pytest.fixture
def v1(tmp_path: Path) -> Path:
    """Separate hierarchies, cpu and cpuacct mounted together, one of them without this pod."""
    for name in ("cpu,cpuacct", "cpuset", "memory", "pids", "systemd"):
        write(tmp_path / name, cgroup__procs="")
    for name in ("cpu", "cpuacct"):
        (tmp_path / name).symlink_to("cpu,cpuacct")
    leaf = POD.lstrip("/") + f"/cri-{ID}"
    write(
        tmp_path / "cpu" / leaf,
        cpu__cfs_quota_us="-1",
        cpu__cfs_period_us="50000",
        cpu__shares="1024",
        cpuacct__usage="77",
    )
    stat = "cache 3\ntotal_inactive_file 4096\n"
    write(tmp_path / "memory" / leaf, memory__limit_in_bytes="9223372036854771712", memory__usage_in_bytes="8192")
    write(
        tmp_path / "memory" / leaf,
        memory__stat=stat,
        memory__oom_control="oom_kill_disable 0\nunder_oom 0\noom_kill 3\n",
    )
    write(tmp_path / "pids" / leaf, pids__max="max")
    write(tmp_path / "cpuset", cpuset__cpus="0-3\n", cpuset__mems="0\n")
    for folder in ("kubepods", "kubepods/burstable", POD.lstrip("/"), leaf):
        write(tmp_path / "cpuset" / folder, cpuset__cpus="\n", cpuset__mems="\n")
    write(tmp_path / "cpuset" / "kubepods", cpuset__cpus="1-2\n", cpuset__mems="0\n")
    return tmp_path


def test_v2_leaf_gets_its_controllers_and_limits(v2: Path) -> None:
    """What the pod's cgroup has and does not pass on is passed on; the leaf carries the limits."""
    leaf = find_leaf(POD, ID, root=v2)
    make_leaf(leaf, LIMITS)
    folder = v2 / POD.lstrip("/") / f"cri-{ID}"
    assert leaf.cgroup.version == 2
    assert leaf.cgroup.folder("memory") == folder
    assert (folder / "memory.max").read_text().startswith("268435456")
    assert (folder / "cpu.max").read_text().startswith("150000 100000")
    assert (folder / "cpu.weight").read_text().startswith("79")
    assert (folder / "pids.max").read_text().startswith("300")
    # A file of a copy holds the last write; a kernel adds each of them.
    assert (folder.parent / "cgroup.subtree_control").read_text().startswith("+")


def test_v2_usage(v2: Path) -> None:
    """Nanoseconds, bytes, and the kernel's kills."""
    usage = read_usage(find_leaf(POD, ID, root=v2).cgroup, detailed=True)
    assert usage is not None
    assert (usage.cpu_usage_ns, usage.memory_usage_bytes, usage.oom_kills) == (2_500_000, 40 << 20, 1)
    assert usage.memory_working_set_bytes == 39 << 20


def test_v1_leaf_is_in_every_hierarchy(v1: Path) -> None:
    """Each wanted hierarchy once, limits in their old names, and a cpuset that is not empty."""
    leaf = find_leaf(POD, ID, root=v1)
    make_leaf(leaf, LIMITS)
    assert leaf.cgroup.version == 1
    assert [name for name, _ in leaf.folders] == ["cpu", "cpuacct", "cpuset", "memory", "pids"]
    cpu, memory = leaf.cgroup.folder("cpu"), leaf.cgroup.folder("memory")
    assert cpu is not None
    assert memory is not None
    assert (cpu / "cpu.cfs_quota_us").read_text().startswith("150000")
    assert (cpu / "cpu.cfs_period_us").read_text().startswith("100000")
    assert (cpu / "cpu.shares").read_text().startswith("2047")
    assert (memory / "memory.limit_in_bytes").read_text().startswith("268435456")
    cpuset = leaf.cgroup.folder("cpuset")
    assert cpuset is not None
    assert (cpuset / "cpuset.cpus").read_text() == "1-2"
    assert (cpuset.parent / "cpuset.cpus").read_text() == "1-2"
    assert leaf.cgroup.folder("blkio") is None


def test_v1_usage(v1: Path) -> None:
    """The old files tell the same things."""
    usage = read_usage(find_leaf(POD, ID, root=v1).cgroup, detailed=True)
    assert usage is not None
    assert (usage.cpu_usage_ns, usage.memory_usage_bytes, usage.oom_kills) == (77, 8192, 3)
    assert usage.memory_working_set_bytes == 4096


async def test_limits_change(v2: Path) -> None:
    """A later limit replaces the first; what is None stays."""
    leaf = find_leaf(POD, ID, root=v2)
    await set_limits(leaf, LeafLimits(pids=7))
    folder = leaf.folders[0][1]
    assert (folder / "pids.max").read_text()[0] == "7"
    assert (folder / "memory.max").read_text() == "max\n"


async def test_removing_what_is_not_there(tmp_path: Path) -> None:
    """Undo is idempotent."""
    write(tmp_path, cgroup__controllers="memory\n")
    await remove_leaf(find_leaf(POD, ID, root=tmp_path))
    assert not find_leaf(POD, ID, root=tmp_path).exists()


@pytest.mark.parametrize("parent", ["/kubepods/../../etc", "/a b", "/x\n", "/a/./b", "//", "/" + "x" * 300])
def test_odd_parents_are_refused(parent: str, tmp_path: Path) -> None:
    """A parent is a path of plain names."""
    with pytest.raises(InvalidRequest):
        find_leaf(parent, ID, root=tmp_path)


@pytest.mark.parametrize("machine_id", ["", "..", "abc/def", "AB" * 32, "a" * 65])
def test_odd_ids_are_refused(machine_id: str, tmp_path: Path) -> None:
    """An id is hex."""
    with pytest.raises(InvalidRequest):
        find_leaf(POD, machine_id, root=tmp_path)


@pytest.mark.parametrize("parent", ["x", "/kubepods", "a b.slice", "-.slice", ".slice"])
def test_odd_slices_are_refused(parent: str, tmp_path: Path) -> None:
    """Under systemd a parent is a slice."""
    with pytest.raises(InvalidRequest):
        find_leaf(parent, ID, driver="systemd", root=tmp_path)


def test_scope(tmp_path: Path) -> None:
    """With systemd the leaf is a scope with delegation below the pod's slice, started around the launcher."""
    write(tmp_path, cgroup__controllers="memory\n")
    leaf = find_leaf("kubepods-podx.slice", ID, driver="systemd", root=tmp_path)
    assert leaf.folders == (("", tmp_path / "kubepods.slice" / "kubepods-podx.slice" / f"cri-{ID}.scope"),)
    assert scope_argv(leaf, LIMITS) == [
        *("systemd-run", "--scope", "--quiet", "--collect", f"--unit=cri-{ID}.scope", "--slice=kubepods-podx.slice"),
        *("--property=Delegate=yes", "--property=MemoryMax=268435456", "--property=CPUQuota=150.00%"),
        *("--property=CPUWeight=79", "--property=TasksMax=300", "--"),
    ]
    assert scope_argv(find_leaf(POD, ID, root=tmp_path), LIMITS) == []
