"""Cgroups of the host, read only: where they are (`folders`), and what they say (`usage`, `processes`).

Nothing here makes, changes or removes a cgroup, and nothing here knows pods, runtimes or CRI.
"""

from dispatcher.cgroups.folders import (
    CgroupFolders,
    expand_cgroup_parent,
    find_cgroup_of_parent,
    find_cgroup_of_process,
    parse_membership,
)
from dispatcher.cgroups.processes import list_pids, read_processes
from dispatcher.cgroups.usage import read_usage

__all__ = [
    "CgroupFolders",
    "expand_cgroup_parent",
    "find_cgroup_of_parent",
    "find_cgroup_of_process",
    "list_pids",
    "parse_membership",
    "read_processes",
    "read_usage",
]
