"""What pods and containers use, as values. None means everywhere: not known; zero is a figure.

Counters only rise for as long as their cgroup (or guest) lives. `timestamp_ns` is the moment of the reading, since 1970.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Stall:
    """One line of a pressure file: shares in percent over 10, 60 and 300 s, and the total in microseconds."""

    avg10: float
    avg60: float
    avg300: float
    total_us: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Pressure:
    """Pressure stall information of one resource: `some` tasks were waiting, or all of them (`full`) were."""

    some: Stall | None = None
    full: Stall | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceIo:
    """Input and output on one block device, by the kernel's numbers of it. `discarded_bytes` is 0 where not counted."""

    major: int
    minor: int
    read_bytes: int = 0
    written_bytes: int = 0
    discarded_bytes: int = 0
    reads: int = 0
    writes: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class HugepageUsage:
    """Huge pages of one size (as CRI writes it, such as "2MB") in use."""

    page_size: str
    usage_bytes: int
    max_usage_bytes: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class InterfaceUsage:
    """Counters of one network interface, as seen from inside the pod."""

    name: str
    rx_bytes: int = 0
    rx_packets: int = 0
    rx_errors: int = 0
    rx_dropped: int = 0
    tx_bytes: int = 0
    tx_packets: int = 0
    tx_errors: int = 0
    tx_dropped: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Usage:
    """One reading of a cgroup, or of what stands for it in a guest.

    The first part is read for every question. The second part, from `cpu_user_ns` on, is read for metrics only. Limits
    of None with `memory_usage_bytes` present mean unlimited.
    """

    timestamp_ns: int
    cgroup: str = ""  # its path below the hierarchy's root, where it has one
    cpu_usage_ns: int | None = None
    memory_usage_bytes: int | None = None
    memory_working_set_bytes: int | None = None
    memory_rss_bytes: int | None = None
    memory_page_faults: int | None = None
    memory_major_page_faults: int | None = None
    memory_limit_bytes: int | None = None
    swap_usage_bytes: int | None = None
    swap_limit_bytes: int | None = None  # of swap alone
    thread_count: int | None = None
    cpu_pressure: Pressure | None = None
    memory_pressure: Pressure | None = None
    io_pressure: Pressure | None = None

    cpu_user_ns: int | None = None
    cpu_system_ns: int | None = None
    cpu_periods: int | None = None
    cpu_throttled_periods: int | None = None
    cpu_throttled_ns: int | None = None
    cpu_period_us: int | None = None
    cpu_quota_us: int | None = None
    cpu_shares: int | None = None
    memory_cache_bytes: int | None = None
    memory_mapped_file_bytes: int | None = None
    memory_kernel_bytes: int | None = None
    memory_max_usage_bytes: int | None = None
    memory_limit_hits: int | None = None
    memory_reservation_bytes: int | None = None
    oom_kills: int | None = None
    device_io: tuple[DeviceIo, ...] = ()
    hugepages: tuple[HugepageUsage, ...] = ()
    thread_limit: int | None = None
    process_count: int | None = None
    file_descriptors: int | None = None
    sockets: int | None = None
    soft_file_limit: int | None = None  # of the first process; -1 is unlimited
