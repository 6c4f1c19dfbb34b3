"""Limits that change: what the kubelet does to resize a pod in place, and how it learns what came of it."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest

from dispatcher.cri import api_pb2 as pb
from tests.lab.client import ContainerHandle, CriClient, Pod, refused, unique

MIB = 1 << 20


def update(cri: CriClient, container: ContainerHandle, **limits: Any) -> None:
    """UpdateContainerResources."""
    linux = pb.LinuxContainerResources(**limits)
    cri.rpc("UpdateContainerResources", pb.UpdateContainerResourcesRequest(container_id=container.id, linux=linux))


def told(container: ContainerHandle) -> pb.LinuxContainerResources:
    """The limits that ContainerStatus shows."""
    linux: pb.LinuxContainerResources = container.status().resources.linux
    return linux


def seen(container: ContainerHandle) -> tuple[int, int]:
    """CPU quota and memory limit, as the kernel shows them in the container's own cgroup."""
    script = (
        "if [ -e /sys/fs/cgroup/memory.max ]; then cut -d' ' -f1 /sys/fs/cgroup/cpu.max; cat /sys/fs/cgroup/memory.max;"
        " else cat /sys/fs/cgroup/cpu/cpu.cfs_quota_us /sys/fs/cgroup/memory/memory.limit_in_bytes; fi"
    )
    quota, memory = container.exec("sh", "-c", script).stdout.split()
    return int(quota), int(memory)


@contextmanager
def pod_cgroup(cri: CriClient) -> Iterator[str]:
    """A cgroup parent of the kind that the node's driver has; its folders are gone afterwards."""
    name = unique("crilab").replace("-", "")
    if cri.rpc("RuntimeConfig").linux.cgroup_driver == pb.SYSTEMD:
        yield f"{name}.slice"  # systemd takes an empty slice away
        return
    yield f"/{name}/pod"
    for folder in [Path(at, name) for at, names, _ in os.walk("/sys/fs/cgroup") if name in names]:
        (folder / "pod").rmdir()
        folder.rmdir()


def test_a_resize_step_by_step(cri: CriClient, pod: Pod) -> None:
    """Requests and limits, one resource at a time, up and down; after each step status and kernel agree."""
    first = pb.LinuxContainerResources(
        cpu_period=100_000, cpu_quota=50_000, cpu_shares=512, memory_limit_in_bytes=64 * MIB
    )
    container = pod.run(resources=first)
    assert seen(container) == (50_000, 64 * MIB)
    for quota, shares, memory in ((80_000, 819, 96 * MIB), (20_000, 204, 80 * MIB)):
        update(cri, container, memory_limit_in_bytes=memory)
        assert (told(container).memory_limit_in_bytes, told(container).cpu_quota) == (memory, seen(container)[0])
        update(cri, container, cpu_quota=quota, cpu_period=100_000, cpu_shares=shares)
        linux = told(container)
        assert (linux.cpu_quota, linux.cpu_shares, linux.memory_limit_in_bytes) == (quota, shares, memory)
        assert seen(container) == (quota, memory)
    assert container.status().state == pb.CONTAINER_RUNNING


def test_updates_at_once_lose_nothing(cri: CriClient, pod: Pod) -> None:
    """The CPU manager and a resize may call at the same time: neither undoes the other."""
    container = pod.run(resources=pb.LinuxContainerResources(cpu_quota=90_000, memory_limit_in_bytes=64 * MIB))
    with ThreadPoolExecutor(2) as pool:
        for step in range(1, 6):
            quota, memory = 10_000 * step, (64 + step) * MIB
            calls = [
                pool.submit(update, cri, container, cpu_quota=quota),
                pool.submit(update, cri, container, memory_limit_in_bytes=memory),
            ]
            for call in calls:
                call.result()
            linux = told(container)
            assert (linux.cpu_quota, linux.memory_limit_in_bytes) == (quota, memory)
            assert seen(container) == (quota, memory)


def test_limits_changed_before_the_start_hold_after_it(cri: CriClient, pod: Pod) -> None:
    container = pod.create(resources=pb.LinuxContainerResources(cpu_quota=50_000, memory_limit_in_bytes=64 * MIB))
    update(cri, container, cpu_quota=30_000, memory_limit_in_bytes=96 * MIB)
    assert (told(container).cpu_quota, told(container).memory_limit_in_bytes) == (30_000, 96 * MIB)
    container.start()
    assert seen(container) == (30_000, 96 * MIB)


def test_an_ended_container_has_no_limits_to_change(cri: CriClient, pod: Pod) -> None:
    container = pod.run_to_end("true")
    with refused(grpc.StatusCode.FAILED_PRECONDITION):
        update(cri, container, cpu_quota=30_000)
    with refused(grpc.StatusCode.NOT_FOUND):
        linux = pb.LinuxContainerResources(cpu_quota=30_000)
        cri.rpc("UpdateContainerResources", pb.UpdateContainerResourcesRequest(container_id="0" * 64, linux=linux))


@pytest.mark.parametrize("limits", [{"memory_limit_in_bytes": -5}, {"cpu_quota": -7}, {"cpuset_cpus": "0;1"}])
def test_nonsense_changes_nothing(cri: CriClient, running: ContainerHandle, limits: dict[str, Any]) -> None:
    before = told(running)
    with refused(grpc.StatusCode.INVALID_ARGUMENT):
        update(cri, running, **limits)
    assert told(running) == before


def test_the_limits_of_a_pod(cri: CriClient) -> None:
    """They follow the pod's cgroup, which is the kubelet's; what is on record is shown. Without a cgroup: refused."""
    resources = pb.LinuxContainerResources(memory_limit_in_bytes=96 * MIB)
    overhead = pb.LinuxContainerResources(memory_limit_in_bytes=8 * MIB)
    with pod_cgroup(cri) as parent, cri.run_pod(cgroup_parent=parent) as pod:
        cri.rpc(
            "UpdatePodSandboxResources",
            pb.UpdatePodSandboxResourcesRequest(pod_sandbox_id=pod.id, resources=resources, overhead=overhead),
        )
        request = pb.PodSandboxStatusRequest(pod_sandbox_id=pod.id, verbose=True)
        info = json.loads(cri.rpc("PodSandboxStatus", request).info["dispatcher"])
        assert info["resources"]["memory_limit_bytes"] == 96 * MIB
        assert info["overhead"]["memory_limit_bytes"] == 8 * MIB
    with cri.run_pod() as pod, refused(grpc.StatusCode.FAILED_PRECONDITION) as refusal:
        cri.rpc(
            "UpdatePodSandboxResources",
            pb.UpdatePodSandboxResourcesRequest(pod_sandbox_id=pod.id, resources=resources),
        )
    assert "cgroup" in refusal.details
