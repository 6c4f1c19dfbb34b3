"""Limits, as the kernel shows them for the container's own cgroup."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from dispatcher.api import find_cgroup_of_process
from dispatcher.errors import DispatcherError, InvalidRequest, NotSupported
from dispatcher.model import HugepageLimit, Resources
from dispatcher_docker_shim import cgroups, host
from dispatcher_docker_shim.limits_in_force import in_force
from tests.docker.kit import World, container_spec, pod_spec, take
from tests.lab.engine import CGROUP_DRIVER

pytestmark = [pytest.mark.lab, pytest.mark.asyncio(loop_scope="session")]
MIB = 1 << 20


def read(pid: int, controller: str, v1: str, v2: str) -> str:
    """A limit of a process's cgroup, by its file name in each version."""
    where = find_cgroup_of_process(pid)
    assert where is not None
    folder = where.folder(controller)
    assert folder is not None
    return (folder / (v1 if where.version == 1 else v2)).read_text().strip()


async def test_limits_are_in_force_and_can_be_changed(world: World, busybox: str) -> None:
    """Memory without swap, CPU and cpuset reach the kernel; an update changes them and tells what holds now."""
    pod = await world.make_pod()
    limits = Resources(
        cpu_period_us=100_000,
        cpu_quota_us=50_000,
        cpu_shares=512,
        memory_limit_bytes=64 * MIB,
        cpuset_cpus="0",
        oom_score_adj=500,
    )
    container = await world.refer(pod, busybox, container_spec("sleep", "1000", resources=limits))
    made = await world.runtime.create_container(container)
    assert made.granted is not None
    assert (made.granted.memory_limit_bytes, made.granted.memory_swap_limit_bytes) == (64 * MIB, 64 * MIB)
    await world.runtime.start_container(container)
    pid = world.engine.inspect(f"cri_{container.id}")["State"]["Pid"]

    assert read(pid, "memory", "memory.limit_in_bytes", "memory.max") == str(64 * MIB)
    assert read(pid, "cpu", "cpu.cfs_quota_us", "cpu.max").split()[0] == "50000"
    assert read(pid, "cpuset", "cpuset.cpus", "cpuset.cpus") == "0"
    assert Path(f"/proc/{pid}/oom_score_adj").read_text().strip() == "500"

    wanted = Resources(cpu_period_us=100_000, cpu_quota_us=20_000, memory_limit_bytes=96 * MIB)
    granted = await world.runtime.update_resources(container, wanted)
    assert (granted.cpu_quota_us, granted.memory_limit_bytes, granted.oom_score_adj) == (20_000, 96 * MIB, 500)
    assert read(pid, "memory", "memory.limit_in_bytes", "memory.max") == str(96 * MIB)
    assert read(pid, "cpu", "cpu.cfs_quota_us", "cpu.max").split()[0] == "20000"
    assert await world.runtime.update_resources(container, Resources(memory_limit_bytes=64 * MIB)) is not None
    await world.remove_pod(pod)


async def test_cgroup_parent_of_the_pod(world: World, busybox: str) -> None:
    """Pause and containers live below the cgroup that the kubelet made for the pod."""
    parent = f"{world.engine.cgroup_parent}/kubepods/pod-x"
    if CGROUP_DRIVER == "systemd":
        top = world.engine.cgroup_parent.removesuffix(".slice")
        parent = f"/{top}.slice/{top}-kubepods.slice/{top}-kubepods-podx.slice"
    pod = await world.make_pod(pod_spec(cgroup_parent=parent))
    container = await world.run(pod, busybox, container_spec("sleep", "1000"))
    for name in (f"cri_{pod.id}", f"cri_{container.id}"):
        pid = world.engine.inspect(name)["State"]["Pid"]
        assert f"{parent}/" in Path(f"/proc/{pid}/cgroup").read_text()
    with pytest.raises(InvalidRequest, match="cgroup parent"):
        await world.make_pod(pod_spec(cgroup_parent="/kubepods/../../escape"))
    await world.remove_pod(pod)


async def test_oom_score_is_clamped_with_a_note(world: World, busybox: str) -> None:
    """A score that the host does not grant is raised, visibly; nothing fails."""
    pod = await world.make_pod()
    spec = container_spec("sleep", "1000", resources=Resources(oom_score_adj=-900))
    made = await world.runtime.create_container(await world.refer(pod, busybox, spec))
    assert made.granted is not None
    floor = host.oom_floor(world.engine.pid)
    if floor is None:
        assert (made.granted.oom_score_adj, made.notes) == (-900, ())
    else:
        assert made.granted.oom_score_adj == floor
        assert any("CAP_SYS_RESOURCE" in note for note in made.notes)
    await world.remove_pod(pod)


async def test_what_this_host_cannot_limit_is_refused(world: World, busybox: str) -> None:
    """Huge pages without the controller, and version 2 keys on version 1, are refused at creation; zero passes."""
    pod = await world.make_pod()
    if not cgroups.has_hugetlb("2MB"):
        pages = (HugepageLimit(page_size="2MB", limit_bytes=2 * MIB),)
        with pytest.raises(NotSupported, match="huge pages"):
            await world.make(pod, busybox, container_spec("true", resources=Resources(hugepage_limits=pages)))
    none = Resources(hugepage_limits=(HugepageLimit(page_size="2MB", limit_bytes=0),))
    assert await world.text(pod, busybox, "echo", "fine", resources=none) == "fine\n"
    bad = Resources(unified={"memory.max/../../x": "1"})
    with pytest.raises((NotSupported, InvalidRequest), match="cgroup"):
        await world.make(pod, busybox, container_spec("true", resources=bad))
    await world.remove_pod(pod)


async def test_usage(world: World, busybox: str) -> None:
    """Usage is the kernel's, taken without asking the engine per container."""
    pod = await world.make_pod()
    container = await world.run(pod, busybox, container_spec("sh", "-c", "while :; do :; done"))
    first = (await world.runtime.stats((container,)))[0].usage
    while (second := (await world.runtime.stats((container,)))[0].usage).cpu_usage_ns == first.cpu_usage_ns:
        pass
    assert first.cpu_usage_ns is not None
    assert second.cpu_usage_ns is not None
    assert second.cpu_usage_ns > first.cpu_usage_ns
    assert second.memory_working_set_bytes is not None
    assert 0 < second.memory_working_set_bytes < 64 * MIB
    assert second.process_count is None, "what metrics alone show is read for them alone"
    await world.runtime.stop_container(container, 0)
    assert await world.runtime.stats((container,)) == ()
    await world.remove_pod(pod)


async def test_an_update_before_the_start_holds_after_it(world: World, busybox: str) -> None:
    """Limits that change between creation and start are those that the container starts with."""
    pod = await world.make_pod()
    first = Resources(cpu_shares=512, memory_limit_bytes=64 * MIB)
    container = await world.make(pod, busybox, container_spec("sleep", "1000", resources=first))
    granted = await world.runtime.update_resources(container, Resources(cpu_shares=256, memory_limit_bytes=96 * MIB))
    await world.runtime.start_container(replace(container, granted=granted))
    pid = world.engine.inspect(f"cri_{container.id}")["State"]["Pid"]
    assert (granted.cpu_shares, granted.memory_limit_bytes) == (256, 96 * MIB)
    assert read(pid, "memory", "memory.limit_in_bytes", "memory.max") == str(96 * MIB)
    await world.remove_pod(pod)


async def test_what_is_told_is_what_the_kernel_holds(world: World, busybox: str) -> None:
    """Rounding is told as asked, no limit as none, and a limit that somebody else changed as it really is."""
    pod = await world.make_pod()
    limits = Resources(cpu_period_us=100_000, cpu_quota_us=50_000, memory_limit_bytes=64 * MIB + 5, cpuset_cpus="0-0")
    container = await world.run(pod, busybox, container_spec("sleep", "1000", resources=limits))
    granted = await world.runtime.update_resources(container, limits)
    assert (granted.memory_limit_bytes, granted.cpuset_cpus) == (64 * MIB + 5, "0-0")

    unlimited = await world.runtime.update_resources(container, replace(limits, cpu_quota_us=-1))
    pid = world.engine.inspect(f"cri_{container.id}")["State"]["Pid"]
    assert unlimited.cpu_quota_us == -1
    assert read(pid, "cpu", "cpu.cfs_quota_us", "cpu.max").split()[0] in {"-1", "max"}

    where = find_cgroup_of_process(pid)
    assert where is not None
    folder = where.folder("memory")
    assert folder is not None
    (folder / ("memory.limit_in_bytes" if where.version == 1 else "memory.max")).write_text(str(48 * MIB))
    assert in_force(where, granted).memory_limit_bytes == 48 * MIB
    await world.remove_pod(pod)


async def test_an_update_that_the_kernel_refuses_changes_nothing(world: World, busybox: str) -> None:
    """Memory in use cannot be limited away under version 1: the update fails as a whole, and the old limits hold."""
    pod = await world.make_pod()
    limits = Resources(cpu_period_us=100_000, cpu_quota_us=50_000, memory_limit_bytes=96 * MIB)
    script = "dd if=/dev/zero of=/dev/shm/held bs=1M count=32 2>/dev/null; echo held; exec sleep 1000"
    container = await world.run(pod, busybox, container_spec("sh", "-c", script, resources=limits))
    await take(world.runtime.output(container, 0), 1)
    pid = world.engine.inspect(f"cri_{container.id}")["State"]["Pid"]
    where = find_cgroup_of_process(pid)
    assert where is not None
    if where.version == 2:
        await world.remove_pod(pod)
        pytest.skip("version 2 reclaims or kills instead of refusing")
    with pytest.raises(DispatcherError):
        await world.runtime.update_resources(container, replace(limits, memory_limit_bytes=8 * MIB, cpu_quota_us=9000))
    assert read(pid, "memory", "memory.limit_in_bytes", "memory.max") == str(96 * MIB)
    assert read(pid, "cpu", "cpu.cfs_quota_us", "cpu.max") == "50000"
    await world.remove_pod(pod)


async def test_limits_of_the_pod_need_a_cgroup_of_the_pod(world: World) -> None:
    """The pod's cgroup is its owner's; without one there is nothing that could hold limits of the whole pod."""
    wanted = Resources(memory_limit_bytes=64 * MIB)
    parent = f"{world.engine.cgroup_parent}/kubepods/pod-y"
    pod = await world.make_pod(pod_spec(cgroup_parent=parent))
    await world.runtime.update_pod_resources(pod, None, wanted)
    bare = await world.make_pod()
    with pytest.raises(NotSupported, match="no cgroup of its own"):
        await world.runtime.update_pod_resources(bare, None, wanted)
    await world.remove_pod(pod)
    await world.remove_pod(bare)
