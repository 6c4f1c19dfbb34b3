"""The pod's quality of service, and what follows from it for its machine monitor. Pure.

CRI does not name the class, but the kubelet puts a pod's cgroup below one folder, or slice, per class. The monitor is
the pod's only process on the node, so it stands where the kubelet would have put the pod's containers: with the OOM
score that the kubelet gives to containers of the class, and with the pod's share of the CPU.
"""

from __future__ import annotations

import re
from enum import StrEnum

from dispatcher.model import Resources

_MIN_SHARES, _MAX_SHARES = 2, 262144  # cgroup v1's cpu.shares
_MAX_WEIGHT = 10000  # cgroup v2's cpu.weight
# The kubelet's own scores: containers of a guaranteed pod, the edges of a burstable one, and best effort.
_GUARANTEED_SCORE, _BURSTABLE_FIRST, _BURSTABLE_LAST, _BEST_EFFORT_SCORE = -997, 3, 999, 1000


class QosClass(StrEnum):
    """The class of a pod; UNKNOWN where its cgroup was not made by a kubelet."""

    GUARANTEED = "guaranteed"
    BURSTABLE = "burstable"
    BEST_EFFORT = "besteffort"
    UNKNOWN = "unknown"


def read_class(cgroup_parent: str) -> QosClass:
    """Read the class off the pod's cgroup, in the form of either driver.

    Example:
        "/kubepods/burstable/podX", "kubepods-besteffort-podX.slice", "/kubepods/podX" (guaranteed)
    """
    words = re.split(r"[/.-]", cgroup_parent)
    if "kubepods" not in words:
        return QosClass.UNKNOWN
    return next(
        (each for each in (QosClass.BURSTABLE, QosClass.BEST_EFFORT) if each.value in words), QosClass.GUARANTEED
    )


def cpu_weight(qos: QosClass, resources: Resources | None) -> int | None:
    """The monitor's weight on cgroup v2's scale, from the pod's CPU shares; None leaves the kernel's.

    The scales are mapped end to end, as the kubelet maps them (KEP-2254).
    """
    if qos is QosClass.BEST_EFFORT:
        return 1
    if resources is None or resources.cpu_shares <= 0:
        return None
    shares = min(max(resources.cpu_shares, _MIN_SHARES), _MAX_SHARES)
    return 1 + (shares - _MIN_SHARES) * (_MAX_WEIGHT - 1) // (_MAX_SHARES - _MIN_SHARES)


def oom_score_adj(qos: QosClass, memory_bytes: int, node_memory_bytes: int) -> int:
    """The monitor's OOM score: how soon the node ends it when memory is short. 0 where the class is not known."""
    if qos is QosClass.GUARANTEED:
        return _GUARANTEED_SCORE
    if qos is QosClass.BEST_EFFORT:
        return _BEST_EFFORT_SCORE
    if qos is QosClass.UNKNOWN:
        return 0
    share = 1000 * memory_bytes // max(1, node_memory_bytes)
    return min(max(1000 - share, _BURSTABLE_FIRST), _BURSTABLE_LAST)
