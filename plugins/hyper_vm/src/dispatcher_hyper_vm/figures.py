"""The guest's figures as the core reports them."""

from __future__ import annotations

from dispatcher.api import ContainerUsage
from dispatcher.model import ContainerId, FilesystemUsage, Usage
from dispatcher_hyper_vm.agent.values import CgroupUsage, ContainerFigures
from dispatcher_hyper_vm.disks import usage as disk_usage
from dispatcher_hyper_vm.machine import Machine


def container_usage(figures: ContainerFigures, machine: Machine, now_ns: int) -> ContainerUsage:
    """Usage of one container: its cgroup in the guest, and what its layer takes of the node's disk.

    The time is the host's, since the guest's clock is the guest's.
    """
    layer = FilesystemUsage(
        timestamp_ns=now_ns,
        mountpoint=str(machine.folder),
        used_bytes=disk_usage(machine.layer(ContainerId(figures.id))),
        inodes_used=figures.layer_inodes,
    )
    return ContainerUsage(id=ContainerId(figures.id), usage=cgroup_usage(figures.usage, now_ns), writable_layer=layer)


def cgroup_usage(figures: CgroupUsage, now_ns: int) -> Usage:
    """One cgroup of the guest. Pure."""
    return Usage(
        timestamp_ns=now_ns,
        cpu_usage_ns=figures.cpu_usage_ns,
        memory_usage_bytes=figures.memory_usage_bytes,
        memory_working_set_bytes=figures.memory_working_set_bytes,
        memory_rss_bytes=figures.memory_rss_bytes,
        memory_page_faults=figures.page_faults,
        memory_major_page_faults=figures.major_page_faults,
        swap_usage_bytes=figures.swap_usage_bytes,
        memory_max_usage_bytes=figures.memory_peak_bytes or None,
        process_count=figures.processes,
        oom_kills=figures.oom_kills,
    )
