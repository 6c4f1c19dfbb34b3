"""The sizer as a service of VM runtimes: reads what the decision needs from the node, and decides."""

from __future__ import annotations

import os

from dispatcher.api import VmSize
from dispatcher.model import PodSpec
from dispatcher_vm_sizing.cgroup import read_pod_limits
from dispatcher_vm_sizing.config import SizingConfig
from dispatcher_vm_sizing.size import Ask, decide_size

NAME = "vm_sizing"


class VmSizer:
    """`dispatcher.api.Sizer` by size classes. Quick: a handful of small reads, so it may run on the loop."""

    def __init__(self, config: SizingConfig) -> None:
        self._config = config
        self._node_memory_bytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")

    @property
    def name(self) -> str:
        """The provider's name."""
        return NAME

    def size(self, pod: PodSpec) -> VmSize:
        """Decide the size of a pod's guest. See `decide_size`."""
        return decide_size(
            Ask(
                resources=pod.resources,
                overhead=pod.overhead,
                cgroup=read_pod_limits(self._config.cgroup_root, pod.cgroup_parent),
                cgroup_parent=pod.cgroup_parent,
                node_memory_bytes=self._node_memory_bytes,
                runtime_handler=pod.runtime_handler,
            ),
            self._config,
        )
