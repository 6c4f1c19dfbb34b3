"""Limits that the kubelet asks for, in the units of CRI's LinuxContainerResources. Zero and "" mean: not specified."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True, kw_only=True)
class HugepageLimit:
    """One huge page size (as CRI writes it, such as "2MB") and its limit in bytes."""

    page_size: str
    limit_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Resources:
    """Linux resource limits of a container, or of all containers of a pod together.

    `memory_swap_limit_bytes` is memory plus swap (cgroup v1 meaning). `unified` holds raw cgroup v2 keys.
    """

    cpu_period_us: int = 0
    cpu_quota_us: int = 0
    cpu_shares: int = 0
    memory_limit_bytes: int = 0
    memory_swap_limit_bytes: int = 0
    oom_score_adj: int = 0
    cpuset_cpus: str = ""
    cpuset_mems: str = ""
    hugepage_limits: tuple[HugepageLimit, ...] = ()
    unified: Mapping[str, str] = field(default_factory=dict)
