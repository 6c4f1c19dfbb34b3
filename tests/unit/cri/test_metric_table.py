"""The table of metrics: complete, described, and with values under the labels that the descriptors promise."""

from __future__ import annotations

from dispatcher.cri import api_pb2 as pb
from dispatcher.cri.metric_table import BASE_LABELS, METRICS, Subject, _samples, descriptors
from dispatcher.model import (
    DeviceIo,
    FilesystemUsage,
    HugepageUsage,
    InterfaceUsage,
    Pressure,
    Stall,
    Usage,
)
from dispatcher.stats import Filesystem
from tests.cri.metric_names import EXPECTED

STALL = Stall(avg10=0, avg60=0, avg300=0, total_us=3_500_000)
PRESSURE = Pressure(some=STALL, full=STALL)
FULL = Usage(
    timestamp_ns=1,
    cgroup="/kubepods/p/c",
    cpu_usage_ns=2_900_000_000,
    memory_usage_bytes=1,
    memory_working_set_bytes=1,
    memory_rss_bytes=1,
    memory_page_faults=1,
    memory_major_page_faults=1,
    memory_limit_bytes=100,
    swap_usage_bytes=1,
    swap_limit_bytes=20,
    thread_count=1,
    cpu_pressure=PRESSURE,
    memory_pressure=PRESSURE,
    io_pressure=PRESSURE,
    cpu_user_ns=1,
    cpu_system_ns=1,
    cpu_periods=1,
    cpu_throttled_periods=1,
    cpu_throttled_ns=1,
    cpu_period_us=1,
    cpu_quota_us=1,
    cpu_shares=1,
    memory_cache_bytes=1,
    memory_mapped_file_bytes=1,
    memory_kernel_bytes=1,
    memory_max_usage_bytes=1,
    memory_limit_hits=1,
    memory_reservation_bytes=1,
    oom_kills=1,
    device_io=(DeviceIo(major=8, minor=0, read_bytes=1),),
    hugepages=(HugepageUsage(page_size="2MB", usage_bytes=1, max_usage_bytes=1),),
    process_count=1,
    file_descriptors=1,
    sockets=1,
    soft_file_limit=1024,
)


def subject(usage: Usage | None) -> Subject:
    return Subject(
        labels=tuple(BASE_LABELS),
        usage=usage,
        started_at_ns=7_000_000_000,
        now_ns=9_000_000_000,
        layer=FilesystemUsage(timestamp_ns=4, mountpoint="/d", used_bytes=1, inodes_used=1),
        filesystem=Filesystem(device="/dev/sda1", size_bytes=1, inodes=1, inodes_free=1),
        interfaces=(InterfaceUsage(name="eth0"), InterfaceUsage(name="net1")),
    )


def by_name(usage: Usage | None) -> dict[str, list[pb.Metric]]:
    found: dict[str, list[pb.Metric]] = {}
    for metric in _samples(subject(usage)):
        found.setdefault(metric.name, []).append(metric)
    return found


def test_names_are_those_that_are_expected() -> None:
    assert {row.name for row in METRICS} == EXPECTED
    assert len(METRICS) == len(EXPECTED)


def test_every_metric_has_a_value_per_label() -> None:
    found = by_name(FULL)
    assert set(found) == EXPECTED
    for descriptor in descriptors():
        assert descriptor.help
        for metric in found[descriptor.name]:
            assert len(metric.label_values) == len(descriptor.label_keys), descriptor.name
        series = [tuple(metric.label_values) for metric in found[descriptor.name]]
        assert len(series) == len(set(series)), "a scraper refuses a series that comes twice"


def test_values() -> None:
    found = by_name(FULL)
    assert [m.value.value for m in found["container_cpu_usage_seconds_total"]] == [2], "whole seconds, rounded down"
    assert [m.value.value for m in found["container_spec_memory_swap_limit_bytes"]] == [120]
    assert [m.value.value for m in found["container_pressure_io_waiting_seconds_total"]] == [3]
    assert [m.value.value for m in found["container_last_seen"]] == [9]
    assert [m.label_values[-1] for m in found["container_network_receive_bytes_total"]] == ["eth0", "net1"]
    assert [m.timestamp for m in found["container_fs_usage_bytes"]] == [4], "of the walk"
    assert [m.timestamp for m in found["container_memory_rss"]] == [0], "read just now"
    assert found["container_oom_events_total"][0].metric_type == pb.COUNTER
    assert found["container_processes"][0].metric_type == pb.GAUGE


def test_what_is_not_known_is_absent() -> None:
    """Nothing is made up where a runtime or kernel does not tell."""
    found = by_name(Usage(timestamp_ns=1, cpu_usage_ns=0))
    usual = {"container_last_seen", "container_start_time_seconds", "container_cpu_usage_seconds_total"}
    rest = {name for name in found if not name.startswith(("container_fs_", "container_network_"))}
    assert rest == usual
    unlimited = by_name(Usage(timestamp_ns=1, memory_usage_bytes=5, thread_count=2))
    for name in ("spec_memory_limit_bytes", "spec_memory_swap_limit_bytes", "threads_max"):
        assert [m.value.value for m in unlimited[f"container_{name}"]] == [0]
