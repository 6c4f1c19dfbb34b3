"""The metrics of ListMetricDescriptors and ListPodSandboxMetrics: names, words, labels, and where each value is from.

They stand for what cAdvisor shows on a kubelet's /metrics/cadvisor, under the same names and labels, so that dashboards
go on working. CRI carries whole numbers: a metric in seconds is rounded down. A series without a value is left out.
The timestamp is 0 for what was read just now, as CRI says, and the time of the measurement for what was kept.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from dispatcher.cri import api_pb2 as pb
from dispatcher.model import FilesystemUsage, InterfaceUsage, Pressure, Usage
from dispatcher.stats import ContainerFigures, Filesystem, PodFigures

BASE_LABELS = ("container", "id", "image", "name", "namespace", "pod")
_SECOND = 1_000_000_000

Labels = tuple[str, ...]
Samples = Iterable[tuple[Labels, int | None]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Subject:
    """What series are about: a container, or a pod as a whole. `labels` are the values of `BASE_LABELS`."""

    labels: Labels
    usage: Usage | None
    started_at_ns: int
    now_ns: int
    layer: FilesystemUsage | None = None
    filesystem: Filesystem | None = None
    interfaces: tuple[InterfaceUsage, ...] = ()
    device_name: Callable[[int, int], str] = lambda major, minor: f"{major}:{minor}"


@dataclass(frozen=True, slots=True, kw_only=True)
class MetricRow:
    """One metric: `keys` are its labels besides the base, `read` yields their values with the sample's."""

    name: str
    help: str
    read: Callable[[Subject], Samples]
    keys: Labels = ()
    counter: bool = False
    kept: bool = False  # from a measurement that may be a while ago


# ------------------------------------------------------------------------------------------------------------- readers
def _of_usage(field: str, divisor: int = 1, labels: Labels = ()) -> Callable[[Subject], Samples]:
    def read(subject: Subject) -> Iterator[tuple[Labels, int | None]]:
        value = getattr(subject.usage, field) if subject.usage is not None else None
        yield labels, None if value is None else value // divisor

    return read


def _limit(field: str) -> Callable[[Subject], Samples]:
    """A limit, 0 for none."""

    def read(subject: Subject) -> Iterator[tuple[Labels, int | None]]:
        if subject.usage is not None and subject.usage.memory_usage_bytes is not None:
            yield (), getattr(subject.usage, field) or 0

    return read


def _swap_limit(subject: Subject) -> Iterator[tuple[Labels, int | None]]:
    """Memory and swap together, as CRI counts; 0 for no limit."""
    usage = subject.usage
    if usage is not None and usage.memory_usage_bytes is not None:
        limited = usage.memory_limit_bytes is not None and usage.swap_limit_bytes is not None
        yield (), (usage.memory_limit_bytes or 0) + (usage.swap_limit_bytes or 0) if limited else 0


def _thread_limit(subject: Subject) -> Iterator[tuple[Labels, int | None]]:
    if subject.usage is not None and subject.usage.thread_count is not None:
        yield (), subject.usage.thread_limit or 0


def _soft_limit(subject: Subject) -> Iterator[tuple[Labels, int | None]]:
    limit = subject.usage.soft_file_limit if subject.usage is not None else None
    if limit is not None and limit >= 0:  # CRI has no number for "unlimited"
        yield ("max_open_files",), limit


def _page_faults(subject: Subject) -> Iterator[tuple[Labels, int | None]]:
    if subject.usage is not None:
        yield ("pgfault", "hierarchy"), subject.usage.memory_page_faults
        yield ("pgmajfault", "hierarchy"), subject.usage.memory_major_page_faults


def _of_devices(field: str) -> Callable[[Subject], Samples]:
    def read(subject: Subject) -> Iterator[tuple[Labels, int | None]]:
        for io in subject.usage.device_io if subject.usage is not None else ():
            yield (subject.device_name(io.major, io.minor),), getattr(io, field)

    return read


def _device_usage(subject: Subject) -> Iterator[tuple[Labels, int | None]]:
    for io in subject.usage.device_io if subject.usage is not None else ():
        device = (subject.device_name(io.major, io.minor), str(io.major), str(io.minor))
        yield (*device, "Read"), io.read_bytes
        yield (*device, "Write"), io.written_bytes
        yield (*device, "Discard"), io.discarded_bytes


def _of_hugepages(field: str) -> Callable[[Subject], Samples]:
    def read(subject: Subject) -> Iterator[tuple[Labels, int | None]]:
        for pages in subject.usage.hugepages if subject.usage is not None else ():
            yield (pages.page_size,), getattr(pages, field)

    return read


def _of_filesystem(field: str) -> Callable[[Subject], Samples]:
    def read(subject: Subject) -> Iterator[tuple[Labels, int | None]]:
        if subject.filesystem is not None:
            yield (subject.filesystem.device,), getattr(subject.filesystem, field)

    return read


def _layer_bytes(subject: Subject) -> Iterator[tuple[Labels, int | None]]:
    if subject.layer is not None and subject.filesystem is not None:
        yield (subject.filesystem.device,), subject.layer.used_bytes


def _of_interfaces(field: str) -> Callable[[Subject], Samples]:
    def read(subject: Subject) -> Iterator[tuple[Labels, int | None]]:
        for interface in subject.interfaces:
            yield (interface.name,), getattr(interface, field)

    return read


def _pressure(resource: str, kind: str) -> Callable[[Subject], Samples]:
    def read(subject: Subject) -> Iterator[tuple[Labels, int | None]]:
        pressure: Pressure | None = getattr(subject.usage, f"{resource}_pressure", None)
        stall = getattr(pressure, kind, None)
        yield (), None if stall is None else stall.total_us // 1_000_000

    return read


def _last_seen(subject: Subject) -> Samples:
    return [((), subject.now_ns // _SECOND)]


def _start_time(subject: Subject) -> Samples:
    return [((), subject.started_at_ns // _SECOND if subject.started_at_ns else None)]


# --------------------------------------------------------------------------------------------------------------- table
def _gauge(name: str, words: str, read: Callable[[Subject], Samples], *keys: str, kept: bool = False) -> MetricRow:
    return MetricRow(name=f"container_{name}", help=words, read=read, keys=keys, kept=kept)


def _counter(name: str, words: str, read: Callable[[Subject], Samples], *keys: str) -> MetricRow:
    return MetricRow(name=f"container_{name}", help=words, read=read, keys=keys, counter=True)


METRICS: tuple[MetricRow, ...] = (
    _counter("cpu_usage_seconds_total", "CPU time used.", _of_usage("cpu_usage_ns", _SECOND, ("total",)), "cpu"),
    _counter("cpu_user_seconds_total", "CPU time used in user mode.", _of_usage("cpu_user_ns", _SECOND)),
    _counter("cpu_system_seconds_total", "CPU time used in kernel mode.", _of_usage("cpu_system_ns", _SECOND)),
    _counter("cpu_cfs_periods_total", "Periods of the CPU limit that passed.", _of_usage("cpu_periods")),
    _counter(
        "cpu_cfs_throttled_periods_total", "Periods in which it was throttled.", _of_usage("cpu_throttled_periods")
    ),
    _counter(
        "cpu_cfs_throttled_seconds_total", "Time for which it was throttled.", _of_usage("cpu_throttled_ns", _SECOND)
    ),
    _gauge("spec_cpu_period", "Period of the CPU limit, in microseconds.", _of_usage("cpu_period_us")),
    _gauge("spec_cpu_quota", "CPU time per period, in microseconds; absent for no limit.", _of_usage("cpu_quota_us")),
    _gauge("spec_cpu_shares", "Share of the CPU among others.", _of_usage("cpu_shares")),
    _gauge("memory_usage_bytes", "Memory in use, with the page cache.", _of_usage("memory_usage_bytes")),
    _gauge(
        "memory_working_set_bytes",
        "Memory in use without the inactive page cache.",
        _of_usage("memory_working_set_bytes"),
    ),
    _gauge("memory_rss", "Anonymous memory, in bytes.", _of_usage("memory_rss_bytes")),
    _gauge("memory_cache", "Page cache, in bytes.", _of_usage("memory_cache_bytes")),
    _gauge("memory_mapped_file", "Mapped files, in bytes.", _of_usage("memory_mapped_file_bytes")),
    _gauge("memory_kernel_usage", "Kernel memory, in bytes.", _of_usage("memory_kernel_bytes")),
    _gauge("memory_swap", "Swap in use, in bytes.", _of_usage("swap_usage_bytes")),
    _gauge("memory_max_usage_bytes", "The most memory that was ever in use.", _of_usage("memory_max_usage_bytes")),
    _counter("memory_failcnt", "Times that the memory limit was hit.", _of_usage("memory_limit_hits")),
    _counter("memory_failures_total", "Page faults.", _page_faults, "failure_type", "scope"),
    _counter("oom_events_total", "Processes that the OOM killer ended.", _of_usage("oom_kills")),
    _gauge("spec_memory_limit_bytes", "Memory limit; 0 for none.", _limit("memory_limit_bytes")),
    _gauge(
        "spec_memory_reservation_limit_bytes", "Memory reservation; 0 for none.", _limit("memory_reservation_bytes")
    ),
    _gauge("spec_memory_swap_limit_bytes", "Limit of memory and swap together; 0 for none.", _swap_limit),
    _gauge("hugetlb_usage_bytes", "Huge pages in use.", _of_hugepages("usage_bytes"), "pagesize"),
    _gauge("hugetlb_max_usage_bytes", "The most huge pages ever in use.", _of_hugepages("max_usage_bytes"), "pagesize"),
    _counter(
        "blkio_device_usage_total",
        "Bytes read, written and discarded.",
        _device_usage,
        "device",
        "major",
        "minor",
        "operation",
    ),
    _counter("fs_reads_total", "Reads from a device.", _of_devices("reads"), "device"),
    _counter("fs_reads_bytes_total", "Bytes read from a device.", _of_devices("read_bytes"), "device"),
    _counter("fs_writes_total", "Writes to a device.", _of_devices("writes"), "device"),
    _counter("fs_writes_bytes_total", "Bytes written to a device.", _of_devices("written_bytes"), "device"),
    _gauge("fs_usage_bytes", "Size of the writable layer.", _layer_bytes, "device", kept=True),
    _gauge("fs_limit_bytes", "Size of the writable layer's file system.", _of_filesystem("size_bytes"), "device"),
    _gauge("fs_inodes_total", "Inodes of the writable layer's file system.", _of_filesystem("inodes"), "device"),
    _gauge("fs_inodes_free", "Free inodes of it.", _of_filesystem("inodes_free"), "device"),
    _counter("network_receive_bytes_total", "Bytes received.", _of_interfaces("rx_bytes"), "interface"),
    _counter("network_receive_packets_total", "Packets received.", _of_interfaces("rx_packets"), "interface"),
    _counter(
        "network_receive_packets_dropped_total",
        "Packets dropped on receipt.",
        _of_interfaces("rx_dropped"),
        "interface",
    ),
    _counter("network_receive_errors_total", "Errors on receipt.", _of_interfaces("rx_errors"), "interface"),
    _counter("network_transmit_bytes_total", "Bytes sent.", _of_interfaces("tx_bytes"), "interface"),
    _counter("network_transmit_packets_total", "Packets sent.", _of_interfaces("tx_packets"), "interface"),
    _counter(
        "network_transmit_packets_dropped_total",
        "Packets dropped instead of being sent.",
        _of_interfaces("tx_dropped"),
        "interface",
    ),
    _counter("network_transmit_errors_total", "Errors in sending.", _of_interfaces("tx_errors"), "interface"),
    _gauge("processes", "Processes.", _of_usage("process_count")),
    _gauge("threads", "Threads.", _of_usage("thread_count")),
    _gauge("threads_max", "The most threads allowed; 0 for no limit.", _thread_limit),
    _gauge("file_descriptors", "Open files of all processes.", _of_usage("file_descriptors")),
    _gauge("sockets", "Open sockets of all processes.", _of_usage("sockets")),
    _gauge("ulimits_soft", "Soft limits of the first process.", _soft_limit, "ulimit"),
    _gauge("start_time_seconds", "When it started, in seconds since 1970.", _start_time),
    _gauge("last_seen", "When it was last measured, in seconds since 1970.", _last_seen),
    *(
        _counter(f"pressure_{resource}_{word}_seconds_total", words.format(resource), _pressure(resource, kind))
        for resource in ("cpu", "memory", "io")
        for word, kind, words in (
            ("waiting", "some", "Time for which some tasks waited for {}."),
            ("stalled", "full", "Time for which all tasks waited for {}."),
        )
    ),
)


def descriptors() -> list[pb.MetricDescriptor]:
    """What can be listed. Constant: a client reads it once."""
    return [pb.MetricDescriptor(name=row.name, help=row.help, label_keys=(*BASE_LABELS, *row.keys)) for row in METRICS]


def pod_metrics(figures: PodFigures, device_name: Callable[[int, int], str]) -> pb.PodSandboxMetrics:
    """All series of one pod: its own, then those of its containers."""
    record = figures.record
    metadata = record.spec.metadata
    usage = figures.usage
    pod = Subject(
        labels=("", usage.cgroup if usage else "", "", "", metadata.namespace, metadata.name),
        usage=usage,
        started_at_ns=record.created_at_ns,
        now_ns=figures.timestamp_ns,
        interfaces=figures.interfaces or (),
        device_name=device_name,
    )
    message = pb.PodSandboxMetrics(pod_sandbox_id=record.id, metrics=_samples(pod))
    for container in figures.containers:
        subject = _container_subject(container, metadata.namespace, metadata.name, figures.timestamp_ns, device_name)
        message.container_metrics.add(container_id=container.record.id, metrics=_samples(subject))
    return message


def _container_subject(
    figures: ContainerFigures, namespace: str, pod: str, now_ns: int, device_name: Callable[[int, int], str]
) -> Subject:
    record, usage = figures.record, figures.measured.usage
    image = record.spec.user_image or record.image_name or record.image_id
    return Subject(
        labels=(record.spec.metadata.name, usage.cgroup or record.id, image, record.id, namespace, pod),
        usage=usage,
        started_at_ns=record.started_at_ns,
        now_ns=now_ns,
        layer=figures.measured.writable_layer,
        filesystem=figures.filesystem,
        device_name=device_name,
    )


def _samples(subject: Subject) -> list[pb.Metric]:
    found = []
    for row in METRICS:
        timestamp = subject.layer.timestamp_ns if row.kept and subject.layer is not None else 0
        kind = pb.COUNTER if row.counter else pb.GAUGE
        for labels, value in row.read(subject):
            if value is not None and value >= 0:
                found.append(
                    pb.Metric(
                        name=row.name,
                        timestamp=timestamp,
                        metric_type=kind,
                        label_values=(*subject.labels, *labels),
                        value=pb.UInt64Value(value=value),
                    )
                )
    return found
