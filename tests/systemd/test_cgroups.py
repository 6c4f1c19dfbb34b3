"""Cgroup version 2 as the kernel has it: limits of pods, limits and usage of containers, kills for lack of memory."""

from __future__ import annotations

import os
import re
import signal
import subprocess
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from dispatcher.api import CgroupFolders, RuntimeHealth, find_cgroup_of_process
from dispatcher.cgroup_driver import choose_cgroup_driver
from dispatcher.cri import api_pb2 as pb
from dispatcher_docker_shim import oom
from dispatcher_vm_sizing.cgroup import CgroupLimits, read_pod_limits
from tests.lab.child import wait_until
from tests.lab.client import CriClient, Pod, unique
from tests.lab.engine import CGROUP_DRIVER, Engine
from tests.lab.images import TestImages

pytestmark = pytest.mark.lab
ROOT = Path("/sys/fs/cgroup")
MIB = 1 << 20


@pytest.fixture
def pod_cgroup() -> Iterator[str]:
    """A pod's cgroup as a kubelet makes it with the driver under test: 96 MiB, half a CPU. Yields the CRI's name of it."""
    name = f"labpods{os.getpid()}"
    if CGROUP_DRIVER == "systemd":
        # As the kubelet asks systemd: the slice of a class, and a slice of the pod in it.
        unit = f"{name}-pod1.slice"
        subprocess.run(["systemctl", "start", unit], check=True)
        properties = [f"MemoryMax={96 * MIB}", "CPUQuota=50%"]
        subprocess.run(["systemctl", "set-property", "--runtime", unit, *properties], check=True)
        yield f"/{name}.slice/{unit}"
        subprocess.run(["systemctl", "stop", f"{name}.slice"], check=False)
        return
    folder = ROOT / name / "pod1"
    folder.mkdir(parents=True)
    (ROOT / name / "cgroup.subtree_control").write_text("+cpu +memory +pids +cpuset")
    (folder / "memory.max").write_text(str(96 * MIB))
    (folder / "cpu.max").write_text("50000 100000")
    yield f"/{name}/pod1"
    for path in (*folder.glob("*/"), folder, folder.parent):
        with suppress(OSError):
            path.rmdir()


@pytest.fixture(scope="module")
def cri(request: pytest.FixtureRequest, test_images: TestImages) -> Iterator[CriClient]:
    node = request.getfixturevalue("node")(config={"cgroup_driver": "auto"})
    with CriClient(node.socket) as client:
        yield client
        client.remove_all_pods()


def cgroup_of(engine: Engine, container_id: str) -> CgroupFolders:
    """The cgroup of a container's first process, by what we use for usage and limits."""
    found = engine.inspect(f"cri_{container_id}")
    where = find_cgroup_of_process(found["State"]["Pid"], owner=found["Id"])
    assert where is not None
    return where


def test_driver_is_the_engines_and_else_systemd(cri: CriClient) -> None:
    """Left alone, a node has its engine's driver, and where no engine has one, that of the machine's PID 1."""
    told = cri.rpc("RuntimeConfig").linux.cgroup_driver
    assert told == (pb.SYSTEMD if CGROUP_DRIVER == "systemd" else pb.CGROUPFS)
    assert choose_cgroup_driver("auto", {"vm": RuntimeHealth(ready=True)}, ["vm"]) == "systemd"


def test_sizing_reads_the_limits_of_a_pods_cgroup(pod_cgroup: str) -> None:
    """What a kubelet wrote is what a virtual machine is sized by; also by the bare name of a slice."""
    expected = CgroupLimits(memory_bytes=96 * MIB, cpu_quota_us=50_000, cpu_period_us=100_000)
    assert read_pod_limits(ROOT, pod_cgroup) == expected
    if CGROUP_DRIVER == "systemd":
        assert read_pod_limits(ROOT, pod_cgroup.rpartition("/")[2]) == expected
    assert read_pod_limits(ROOT, pod_cgroup + "-none") is None
    assert read_pod_limits(ROOT, "/init.scope") == CgroupLimits()


def test_containers_live_in_the_pods_cgroup(cri: CriClient, engine: Engine, pod_cgroup: str) -> None:
    """Pause and container are below the pod's cgroup, which keeps its limits, and which is empty in the end."""
    with cri.run_pod(cgroup_parent=pod_cgroup) as pod:
        container = pod.run()
        for name in (pod.id, container.id):
            folder = cgroup_of(engine, name).unified
            assert folder is not None
            assert folder.parent == ROOT / pod_cgroup.lstrip("/")
            engine_id = engine.inspect(f"cri_{name}")["Id"]
            assert folder.name == (f"docker-{engine_id}.scope" if CGROUP_DRIVER == "systemd" else engine_id)
        assert (ROOT / pod_cgroup.lstrip("/") / "memory.max").read_text().strip() == str(96 * MIB)
    assert [path for path in (ROOT / pod_cgroup.lstrip("/")).glob("*/") if path.name.startswith("docker")] == []


def test_kernel_holds_every_limit_and_usage_is_its(cri: CriClient, engine: Engine) -> None:
    """All limits that version 2 knows, raw keys among them, are in the container's cgroup; an update changes them."""
    resources = pb.LinuxContainerResources(
        cpu_period=100_000,
        cpu_quota=40_000,
        cpu_shares=512,
        memory_limit_in_bytes=64 * MIB,
        cpuset_cpus="0",
        unified={"memory.high": str(48 * MIB), "pids.max": "77"},
    )
    with cri.run_pod() as pod:
        container = pod.run(resources=resources)
        folder = cgroup_of(engine, container.id).unified
        assert folder is not None

        def read(name: str) -> str:
            return (folder / name).read_text().strip()

        assert (read("memory.max"), read("memory.swap.max")) == (str(64 * MIB), "0")
        assert (read("cpu.max"), read("cpuset.cpus")) == ("40000 100000", "0")
        assert (read("memory.high"), read("pids.max")) == (str(48 * MIB), "77")
        assert 1 < int(read("cpu.weight")) < 100  # 512 of 1024 shares

        update = pb.LinuxContainerResources(memory_limit_in_bytes=96 * MIB, cpu_quota=20_000, cpu_period=100_000)
        cri.rpc("UpdateContainerResources", pb.UpdateContainerResourcesRequest(container_id=container.id, linux=update))
        assert (read("memory.max"), read("cpu.max")) == (str(96 * MIB), "20000 100000")

        container.sh("dd if=/dev/urandom of=/dev/null bs=64k count=64")
        stats = cri.rpc("ContainerStats", pb.ContainerStatsRequest(container_id=container.id)).stats
        current = int(read("memory.current"))
        spent = re.search(r"usage_usec (\d+)", read("cpu.stat"))
        assert spent is not None
        assert 0 < stats.cpu.usage_core_nano_seconds.value <= int(spent[1]) * 1000
        assert 0 < stats.memory.working_set_bytes.value <= 96 * MIB
        assert abs(stats.memory.usage_bytes.value - current) < 32 * MIB


def test_kill_for_lack_of_memory_is_told(cri: CriClient) -> None:
    """The container whose first process the kernel killed has the reason OOMKilled, each time, and its neighbour not."""
    limit = pb.LinuxContainerResources(memory_limit_in_bytes=24 * MIB)
    with cri.run_pod() as pod:
        neighbour = pod.run(resources=limit)
        for _ in range(3):
            ended = pod.run_to_end("sh", "-c", "dd if=/dev/zero of=/dev/null bs=40M", resources=limit).status()
            assert (ended.exit_code, ended.reason) == (137, "OOMKilled")
        killed = pod.run(resources=limit)
        neighbour.stop()
        assert neighbour.status().reason != "OOMKilled"
        assert killed.status().state == pb.CONTAINER_RUNNING


def test_kill_in_the_pods_cgroup_is_told(cri: CriClient, pod_cgroup: str) -> None:
    """A container without a limit that exceeds its pod's is killed by the pod's limit, and says so."""
    with cri.run_pod(cgroup_parent=pod_cgroup) as pod:
        ended = pod.run_to_end("sh", "-c", "dd if=/dev/zero of=/dev/null bs=140M").status()
        assert (ended.exit_code, ended.reason) == (137, "OOMKilled")


def test_kernel_log_names_the_victims_cgroup(cri: CriClient, engine: Engine) -> None:
    """What we read out of the kernel's log is what this kernel writes, with this driver's names of cgroups."""
    limit = pb.LinuxContainerResources(memory_limit_in_bytes=24 * MIB)
    log = oom.KernelLog()
    log.read()
    with cri.run_pod() as pod:
        container = pod.run_to_end("sh", "-c", "dd if=/dev/zero of=/dev/null bs=40M", resources=limit)
        engine_id = engine.inspect(f"cri_{container.id}")["Id"]
        assert engine_id in oom.find_victims(log.read())
    log.close()


def test_process_in_an_inner_cgroup_counts(cri: CriClient, engine: Engine) -> None:
    """A container may divide its cgroup (an init system does): usage is the whole container's all the same."""
    privileged = pb.LinuxSandboxSecurityContext(privileged=True)
    with cri.run_pod(security=privileged) as pod:
        script = (
            "mkdir /sys/fs/cgroup/inner && for p in $(cat /sys/fs/cgroup/cgroup.procs); do"
            " echo $p > /sys/fs/cgroup/inner/cgroup.procs; done; echo moved; exec sleep 10000"
        )
        container = pod.run(command=("sh", "-c", script), security=pb.LinuxContainerSecurityContext(privileged=True))
        container.wait_log(lambda text: "moved" in text)
        pid = engine.inspect(f"cri_{container.id}")["State"]["Pid"]
        wait_until(lambda: "/inner" in Path(f"/proc/{pid}/cgroup").read_text(), timeout_s=10, what="it did not move")
        inner = Path(f"/proc/{pid}/cgroup").read_text().strip().partition("::")[2]
        outer = (ROOT / inner.lstrip("/")).parent
        (outer / "memory.max").write_text(str(80 * MIB))

        stats = cri.rpc("ContainerStats", pb.ContainerStatsRequest(container_id=container.id)).stats
        assert stats.memory.usage_bytes.value > 0
        update = pb.LinuxContainerResources(memory_limit_in_bytes=72 * MIB)
        cri.rpc("UpdateContainerResources", pb.UpdateContainerResourcesRequest(container_id=container.id, linux=update))
        assert (outer / "memory.max").read_text().strip() == str(72 * MIB)


def test_many_containers_end_without_a_trace(cri: CriClient, engine: Engine) -> None:
    """Killed, stopped and exited containers leave no cgroup, and with systemd no unit."""
    with cri.run_pod(name=unique("traces")) as pod:
        names = _end_in_every_way(pod, engine)
    left = [path for path in ROOT.glob("**/") if any(name in path.name for name in names)]
    assert left == []
    if CGROUP_DRIVER == "systemd":
        listed = subprocess.run(
            ["systemctl", "list-units", "--all", "--plain"], capture_output=True, text=True, check=True
        )
        assert [line for line in listed.stdout.splitlines() if any(name in line for name in names)] == []


def _end_in_every_way(pod: Pod, engine: Engine) -> list[str]:
    exited = pod.run_to_end("true")
    stopped = pod.run()
    killed = pod.run()
    names = [engine.inspect(f"cri_{found.id}")["Id"] for found in (exited, stopped, killed)]
    os.kill(engine.inspect(f"cri_{killed.id}")["State"]["Pid"], signal.SIGKILL)
    killed.wait_exited()
    stopped.stop()
    for container in (exited, stopped, killed):
        container.remove()
    return names
