"""Stats of pods and containers: real figures, from where they say that they are from."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest

from dispatcher.cri import api_pb2 as pb
from tests.cri.conftest import EXTERNAL
from tests.lab.child import wait_until
from tests.lab.client import CriClient, Pod, container_config, pod_namespaces, refused, unique
from tests.lab.engine import Engine

MIB = 1 << 20
LIMITS = pb.LinuxContainerResources(memory_limit_in_bytes=64 * MIB, cpu_period=100_000, cpu_quota=50_000)


@pytest.fixture(autouse=True)
def _need_stats(cri: CriClient) -> None:
    if cri.unimplemented("ListPodSandboxStats"):
        pytest.skip("the endpoint has no ListPodSandboxStats")


@pytest.fixture
def owned(cri: CriClient, engine: Engine) -> Iterator[Pod]:
    """A pod with a cgroup of its own, as a kubelet gives it."""
    if EXTERNAL:
        pytest.skip("the cgroup of an external endpoint's pods is not ours to choose")
    with cri.run_pod(cgroup_parent=f"{engine.cgroup_parent}/{unique('pod')}") as pod:
        yield pod


def pod_stats(cri: CriClient, pod: Pod) -> pb.PodSandboxStats:
    found: pb.PodSandboxStats = cri.rpc("PodSandboxStats", pb.PodSandboxStatsRequest(pod_sandbox_id=pod.id)).stats
    return found


def listed(cri: CriClient, **filters: Any) -> list[str]:
    filter_ = pb.PodSandboxStatsFilter(**filters) if filters else None
    reply = cri.rpc("ListPodSandboxStats", pb.ListPodSandboxStatsRequest(filter=filter_))
    return [entry.attributes.id for entry in reply.stats]


def test_a_pod_is_measured_by_its_cgroup(cri: CriClient, owned: Pod) -> None:
    """More than its containers: what else runs in its cgroup counts, and what they used before they ended."""
    container = owned.run(container_config(resources=LIMITS))
    stats = pod_stats(cri, owned)
    assert stats.attributes.id == owned.id
    assert stats.attributes.metadata == owned.config.metadata
    assert [entry.attributes.id for entry in stats.linux.containers] == [container.id]
    of_container = stats.linux.containers[0]
    before = time.time_ns() - 60 * 10**9
    assert before < stats.linux.cpu.timestamp <= time.time_ns()
    assert stats.linux.cpu.usage_core_nano_seconds.value >= of_container.cpu.usage_core_nano_seconds.value > 0
    assert stats.linux.memory.working_set_bytes.value >= of_container.memory.working_set_bytes.value > 0
    assert stats.linux.process.process_count.value >= 2, "the pause is in the pod's cgroup"
    used = of_container.memory.working_set_bytes.value
    assert of_container.memory.available_bytes.value == 64 * MIB - used
    assert not stats.linux.memory.HasField("available_bytes"), "the pod's cgroup has no limit"

    before_end = stats.linux.cpu.usage_core_nano_seconds.value
    container.stop()
    after = pod_stats(cri, owned)
    assert not after.linux.containers
    assert after.linux.cpu.usage_core_nano_seconds.value >= before_end, "its counter does not fall"


def test_a_pod_without_a_cgroup_is_the_sum_of_its_containers(cri: CriClient) -> None:
    with cri.run_pod() as pod:
        empty = pod_stats(cri, pod).linux
        assert not empty.HasField("cpu"), "nothing is known, so nothing is said"
        assert empty.network.default_interface.name
        for _ in range(2):
            pod.run()
        stats = pod_stats(cri, pod).linux
        parts = [entry.memory.usage_bytes.value for entry in stats.containers]
        assert len(parts) == 2
        assert stats.memory.usage_bytes.value == sum(parts)
        assert stats.process.process_count.value == 2


def test_network_counts_what_the_pod_sent(cri: CriClient, pod: Pod) -> None:
    """From the pod's side, on the interface that leads out; `lo` is not told of."""
    container = pod.run()
    before = pod_stats(cri, pod).linux.network
    assert before.default_interface.name == "eth0"
    assert "lo" not in {interface.name for interface in before.interfaces}
    assert "eth0" not in {interface.name for interface in before.interfaces}
    gateway = container.sh("ip route | sed -n 's/default via \\([^ ]*\\).*/\\1/p'").strip()
    container.exec("ping", "-c", "3", "-s", "1000", "-w", "10", gateway)
    after = pod_stats(cri, pod).linux.network
    assert after.default_interface.tx_bytes.value >= before.default_interface.tx_bytes.value + 3000
    assert after.timestamp > before.timestamp
    assert after.default_interface.HasField("rx_errors")
    assert after.default_interface.HasField("tx_errors")


def test_a_pod_of_the_nodes_network_has_no_network_of_its_own(cri: CriClient) -> None:
    security = pb.LinuxSandboxSecurityContext(namespace_options=pod_namespaces(network=pb.NODE))
    with cri.run_pod(security=security, hostname="") as pod:
        assert not pod_stats(cri, pod).linux.HasField("network")


def test_pods_are_listed_by_id_and_labels(cri: CriClient) -> None:
    mark = unique("mark")
    with (
        cri.run_pod(labels={"mark": mark, "n": "1"}) as one,
        cri.run_pod(labels={"mark": mark, "n": "2"}) as two,
    ):
        assert {one.id, two.id} <= set(listed(cri))
        assert set(listed(cri, label_selector={"mark": mark})) == {one.id, two.id}
        assert listed(cri, label_selector={"mark": mark, "n": "2"}) == [two.id]
        assert listed(cri, id=one.id) == [one.id]
        assert listed(cri, id=one.id[:13]) == [one.id]
        assert listed(cri, id="0" * 64) == []
        assert listed(cri, id=one.id, label_selector={"n": "2"}) == []
        two.stop()
        assert set(listed(cri, label_selector={"mark": mark})) == {one.id}, "what ended uses nothing"


def test_what_cannot_be_measured_is_an_error_by_itself(cri: CriClient) -> None:
    with refused(grpc.StatusCode.NOT_FOUND):
        cri.rpc("PodSandboxStats", pb.PodSandboxStatsRequest(pod_sandbox_id="0" * 64))
    with cri.run_pod() as pod:
        pod.stop()
        with refused(grpc.StatusCode.FAILED_PRECONDITION):
            pod_stats(cri, pod)


def test_a_busy_container_has_a_rate(cri: CriClient, owned: Pod) -> None:
    """About half a core, which is its limit, as soon as two questions are a second apart."""
    config = container_config(command=["sh", "-c", "while :; do :; done"], resources=LIMITS)
    container = owned.run(config)

    def rates() -> tuple[int, int]:
        found = pod_stats(cri, owned).linux
        return found.cpu.usage_nano_cores.value, found.containers[0].cpu.usage_nano_cores.value

    wait_until(lambda: all(rates()), timeout_s=30, what="there is no rate")
    assert all(rate < 700_000_000 for rate in rates())
    request = pb.ContainerStatsRequest(container_id=container.id)
    assert cri.rpc("ContainerStats", request).stats.cpu.usage_nano_cores.value > 0


def test_a_writable_layer_is_measured(cri: CriClient, pod: Pod) -> None:
    """What was written before the first question is in the first figure that there is."""
    container = pod.run()
    container.sh("dd if=/dev/zero of=/big bs=1M count=5 2>/dev/null; for i in 1 2 3; do touch /f$i; done")
    request = pb.ContainerStatsRequest(container_id=container.id)

    def layer() -> pb.FilesystemUsage:
        found: pb.FilesystemUsage = cri.rpc("ContainerStats", request).stats.writable_layer
        return found

    wait_until(lambda: layer().used_bytes.value >= 5 * MIB, timeout_s=90, what="the layer is not measured")
    found = layer()
    assert found.used_bytes.value < 8 * MIB
    assert found.timestamp > 0
    assert Path(found.fs_id.mountpoint).is_dir()
    if found.HasField("inodes_used"):
        assert 4 <= found.inodes_used.value < 100
    reply = cri.rpc("ImageFsInfo")
    disks = {entry.fs_id.mountpoint: entry for entry in reply.container_filesystems}
    assert disks[found.fs_id.mountpoint].used_bytes.value >= found.used_bytes.value


def test_swap_and_faults_are_told(cri: CriClient, pod: Pod) -> None:
    container = pod.run()
    stats = cri.rpc("ContainerStats", pb.ContainerStatsRequest(container_id=container.id)).stats
    assert stats.memory.page_faults.value > 0
    assert stats.memory.HasField("major_page_faults")
    assert stats.memory.rss_bytes.value > 0
    assert stats.swap.HasField("swap_usage_bytes")


def kernel_keeps_pressure() -> bool:
    """True where the containers of this host have pressure files."""
    return any(Path(root, "cpu.pressure").exists() for root in ("/sys/fs/cgroup/unified", "/sys/fs/cgroup"))


@pytest.mark.skipif(not kernel_keeps_pressure(), reason="the kernel keeps no pressure per cgroup")
def test_pressure_rises_with_the_waiting(cri: CriClient, owned: Pod) -> None:
    """Two loops on less than a core wait for each other."""
    one = pb.LinuxContainerResources(cpu_period=100_000, cpu_quota=10_000)
    script = "(while :; do :; done) & while :; do :; done"
    container = owned.run(container_config(command=["sh", "-c", script], resources=one))
    request = pb.ContainerStatsRequest(container_id=container.id)
    if not cri.rpc("ContainerStats", request).stats.cpu.HasField("psi"):
        pytest.skip("the engine puts its containers into no cgroup with pressure")

    def waited() -> int:
        return int(cri.rpc("ContainerStats", request).stats.cpu.psi.Some.Total)

    first = waited()
    wait_until(lambda: waited() > first, timeout_s=30, what="the pressure does not rise")
    stats = cri.rpc("ContainerStats", request).stats
    assert stats.memory.HasField("psi")
    assert stats.io.HasField("psi")


def test_streams_hold_what_the_lists_hold(cri: CriClient) -> None:
    with cri.run_pod() as pod:
        pod.run()
        stats = [
            e.attributes.id for m in cri.stream("StreamPodSandboxStats", timeout_s=30) for e in m.pod_sandbox_stats
        ]
        assert stats == listed(cri)
        assert pod.id in stats
        request = pb.StreamPodSandboxStatsRequest(filter=pb.PodSandboxStatsFilter(id="0" * 64))
        assert list(cri.stream("StreamPodSandboxStats", request, timeout_s=30)) == []
        metrics = [e for m in cri.stream("StreamPodSandboxMetrics", timeout_s=30) for e in m.pod_sandbox_metrics]
        assert [entry.pod_sandbox_id for entry in metrics] == stats
        assert all(entry.metrics for entry in metrics)


def test_metrics_say_what_stats_say(cri: CriClient, owned: Pod) -> None:
    """The same figures under the labels that dashboards look for."""
    container = owned.run(container_config(resources=LIMITS))
    keys = {d.name: list(d.label_keys) for d in cri.rpc("ListMetricDescriptors").descriptors}
    [entry] = [e for e in cri.rpc("ListPodSandboxMetrics").pod_metrics if e.pod_sandbox_id == owned.id]
    [part] = entry.container_metrics
    assert part.container_id == container.id
    found = {metric.name: metric for metric in part.metrics}

    def labels(metric: pb.Metric) -> dict[str, str]:
        return dict(zip(keys[metric.name], metric.label_values, strict=True))

    metadata = owned.config.metadata
    memory = found["container_memory_working_set_bytes"]
    assert memory.metric_type == pb.GAUGE
    assert labels(memory)["pod"] == metadata.name
    assert labels(memory)["namespace"] == metadata.namespace
    assert labels(memory)["name"] == container.id
    assert labels(memory)["container"] == container.status().metadata.name
    assert labels(memory)["id"].startswith(owned.config.linux.cgroup_parent)
    assert 0 < memory.value.value < 64 * MIB
    assert found["container_spec_memory_limit_bytes"].value.value == 64 * MIB
    assert found["container_spec_cpu_quota"].value.value == 50_000
    assert found["container_processes"].value.value == 1
    assert found["container_file_descriptors"].value.value >= 3
    assert labels(found["container_cpu_usage_seconds_total"])["cpu"] == "total"
    of_pod = {metric.name: metric for metric in entry.metrics}
    assert labels(of_pod["container_network_receive_bytes_total"])["interface"] == "eth0"
    assert labels(of_pod["container_memory_working_set_bytes"])["container"] == ""
    assert labels(of_pod["container_memory_working_set_bytes"])["id"] == owned.config.linux.cgroup_parent
