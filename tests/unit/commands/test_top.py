"""`dispatcher top`: what two looks say together, and what they cannot know."""

from __future__ import annotations

from typing import Any

from dispatcher.commands.top import Sample, compare, size
from dispatcher.cri import api_pb2 as pb

SECOND = 10**9


def container(name: str, *, at_s: float, cpu_s: float | None = None, memory: int | None = None) -> Any:
    stats = pb.ContainerStats(attributes=pb.ContainerAttributes(id=name, metadata=pb.ContainerMetadata(name=name)))
    stats.cpu.timestamp = int(at_s * SECOND)
    if cpu_s is not None:
        stats.cpu.usage_core_nano_seconds.value = int(cpu_s * SECOND)
    if memory is not None:
        stats.memory.working_set_bytes.value = memory
    return stats


def pod_stats(*, at_s: float, cpu_s: float, received: int, sent: int) -> Any:
    stats = pb.PodSandboxStats(attributes=pb.PodSandboxAttributes(id="p"))
    stats.linux.cpu.timestamp = stats.linux.network.timestamp = int(at_s * SECOND)
    stats.linux.cpu.usage_core_nano_seconds.value = int(cpu_s * SECOND)
    stats.linux.memory.working_set_bytes.value = 777
    stats.linux.network.default_interface.name = "eth0"
    stats.linux.network.default_interface.rx_bytes.value = received
    stats.linux.network.default_interface.tx_bytes.value = sent
    stats.linux.network.interfaces.add(name="eth1").rx_bytes.value = received
    return stats


def sample(*containers: Any, pod: Any = None) -> Sample:
    return Sample(
        pods=[pb.PodSandbox(id="p", metadata=pb.PodSandboxMetadata(name="web", namespace="shop"))],
        containers={item.attributes.id: item for item in containers},
        container_pods={item.attributes.id: "p" for item in containers},
        pod_stats={} if pod is None else {"p": pod},
    )


def test_cpu_is_what_was_used_between_two_looks() -> None:
    before = sample(container("a", at_s=10, cpu_s=5), container("b", at_s=10, cpu_s=1))
    now = sample(container("a", at_s=12, cpu_s=6, memory=100), container("b", at_s=14, cpu_s=1.2, memory=50))
    (row,) = compare(before, now, sort="memory")
    assert [(c["name"], c["cpu_millicores"], c["memory_bytes"]) for c in row["containers"]] == [
        ("a", 500.0, 100),
        ("b", 50.0, 50),
    ]
    assert (row["cpu_millicores"], row["memory_bytes"]) == (550.0, 150)
    assert "network_received_bytes" not in row


def test_what_is_not_known_is_absent_and_never_zero() -> None:
    """A new container has no rate yet; one that was restarted counts from the beginning; one without figures is listed."""
    before = sample(container("restarted", at_s=10, cpu_s=5))
    now = sample(
        container("restarted", at_s=12, cpu_s=1), container("new", at_s=12, cpu_s=3), container("mute", at_s=12)
    )
    (row,) = compare(before, now)
    assert [c["name"] for c in row["containers"]] == ["mute", "new", "restarted"]
    assert all("cpu_millicores" not in c and "memory_bytes" not in c for c in row["containers"])
    assert "cpu_millicores" not in row


def test_a_pod_that_is_measured_itself_shows_its_own_figures() -> None:
    before = sample(container("a", at_s=10, cpu_s=5), pod=pod_stats(at_s=10, cpu_s=10, received=1000, sent=10))
    now = sample(container("a", at_s=12, cpu_s=6), pod=pod_stats(at_s=12, cpu_s=12, received=3000, sent=30))
    (row,) = compare(before, now)
    assert (row["cpu_millicores"], row["memory_bytes"]) == (1000.0, 777)
    assert (row["network_received_bytes"], row["network_sent_bytes"]) == (6000, 30)
    assert (row["network_received_bytes_per_s"], row["network_sent_bytes_per_s"]) == (2000, 10)


def test_sizes() -> None:
    shown = [size(n) for n in (None, 0, 1023, 1024, 12 * 1024**2 + 512 * 1024, 500 * 1024**2, 3 * 1024**4)]
    assert shown == ["", "0", "1023", "1.0Ki", "12.5Mi", "500Mi", "3.0Ti"]
