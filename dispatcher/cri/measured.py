"""From measured figures to CRI's stats messages. Pure. A wrapper that is absent means "not known"; zero is a figure."""

from __future__ import annotations

from dispatcher.cri import api_pb2 as pb
from dispatcher.cri import convert
from dispatcher.model import FilesystemUsage, InterfaceUsage, Pressure, Stall, Usage
from dispatcher.stats import ContainerFigures, PodFigures


def container_stats(figures: ContainerFigures) -> pb.ContainerStats:
    """The stats of one container."""
    record, usage = figures.record, figures.measured.usage
    stats = pb.ContainerStats(
        attributes=pb.ContainerAttributes(
            id=record.id,
            metadata=convert.container_metadata(record),
            labels=record.spec.labels,
            annotations=record.spec.annotations,
        ),
        cpu=_cpu(usage, figures.cpu_rate),
        memory=_memory(usage),
        io=_io(usage),
    )
    if usage.swap_usage_bytes is not None:
        stats.swap.timestamp = usage.timestamp_ns
        stats.swap.swap_usage_bytes.value = usage.swap_usage_bytes
        if usage.swap_limit_bytes is not None:
            stats.swap.swap_available_bytes.value = max(0, usage.swap_limit_bytes - usage.swap_usage_bytes)
    if figures.measured.writable_layer is not None:
        stats.writable_layer.CopyFrom(layer(figures.measured.writable_layer))
    return stats


def pod_stats(figures: PodFigures) -> pb.PodSandboxStats:
    """The stats of one pod with its containers."""
    record, usage = figures.record, figures.usage
    stats = pb.PodSandboxStats(
        attributes=pb.PodSandboxAttributes(
            id=record.id,
            metadata=convert.pod_metadata(record),
            labels=record.spec.labels,
            annotations=record.spec.annotations,
        )
    )
    linux = stats.linux
    linux.SetInParent()
    if usage is not None:
        linux.cpu.CopyFrom(_cpu(usage, figures.cpu_rate))
        linux.memory.CopyFrom(_memory(usage))
        if (io := _io(usage)) is not None:
            linux.io.CopyFrom(io)
        if usage.thread_count is not None:
            linux.process.timestamp = usage.timestamp_ns
            linux.process.process_count.value = usage.thread_count
    if figures.interfaces:  # a client reads the default interface of whatever network it is told of
        default, *others = figures.interfaces
        linux.network.timestamp = figures.timestamp_ns
        linux.network.default_interface.CopyFrom(_interface(default))
        linux.network.interfaces.extend(_interface(other) for other in others)
    linux.containers.extend(container_stats(container) for container in figures.containers)
    return stats


def layer(value: FilesystemUsage) -> pb.FilesystemUsage:
    """A writable layer. It always has an inode, so 0 means that nobody counted them."""
    message = convert.filesystem(value)
    if not value.inodes_used:
        message.ClearField("inodes_used")
    return message


def _cpu(usage: Usage, rate: int | None) -> pb.CpuUsage:
    return pb.CpuUsage(
        timestamp=usage.timestamp_ns,
        usage_core_nano_seconds=_wrap(usage.cpu_usage_ns),
        usage_nano_cores=_wrap(rate),
        psi=_psi(usage.cpu_pressure),
    )


def _memory(usage: Usage) -> pb.MemoryUsage:
    available = None
    if usage.memory_limit_bytes is not None and usage.memory_working_set_bytes is not None:
        available = max(0, usage.memory_limit_bytes - usage.memory_working_set_bytes)
    return pb.MemoryUsage(
        timestamp=usage.timestamp_ns,
        working_set_bytes=_wrap(usage.memory_working_set_bytes),
        available_bytes=_wrap(available),
        usage_bytes=_wrap(usage.memory_usage_bytes),
        rss_bytes=_wrap(usage.memory_rss_bytes),
        page_faults=_wrap(usage.memory_page_faults),
        major_page_faults=_wrap(usage.memory_major_page_faults),
        psi=_psi(usage.memory_pressure),
    )


def _io(usage: Usage) -> pb.IoUsage | None:
    if usage.io_pressure is None:
        return None
    return pb.IoUsage(timestamp=usage.timestamp_ns, psi=_psi(usage.io_pressure))


def _psi(pressure: Pressure | None) -> pb.PsiStats | None:
    if pressure is None:
        return None
    return pb.PsiStats(Full=_stall(pressure.full), Some=_stall(pressure.some))


def _stall(stall: Stall | None) -> pb.PsiData | None:
    if stall is None:
        return None
    return pb.PsiData(Total=stall.total_us, Avg10=stall.avg10, Avg60=stall.avg60, Avg300=stall.avg300)


def _interface(value: InterfaceUsage) -> pb.NetworkInterfaceUsage:
    return pb.NetworkInterfaceUsage(
        name=value.name,
        rx_bytes=_wrap(value.rx_bytes),
        rx_errors=_wrap(value.rx_errors),
        tx_bytes=_wrap(value.tx_bytes),
        tx_errors=_wrap(value.tx_errors),
    )


def _wrap(value: int | None) -> pb.UInt64Value | None:
    return None if value is None else pb.UInt64Value(value=value)
