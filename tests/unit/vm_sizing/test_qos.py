"""The machine monitor stands where the kubelet would have put the pod's containers."""

from __future__ import annotations

import pytest

from dispatcher.model import Resources
from dispatcher_vm_sizing.qos import QosClass, cpu_weight, oom_score_adj, read_class

GIB = 1 << 30


@pytest.mark.parametrize(
    ("parent", "qos"),
    [
        ("", QosClass.UNKNOWN),
        ("/machine/x", QosClass.UNKNOWN),
        ("/kubepods/pod0a", QosClass.GUARANTEED),
        ("/kubepods/burstable/pod0a", QosClass.BURSTABLE),
        ("/kubepods/besteffort/pod0a", QosClass.BEST_EFFORT),
        ("/kubelet/kubepods/besteffort/pod0a", QosClass.BEST_EFFORT),
        ("kubepods-pod0a.slice", QosClass.GUARANTEED),
        ("kubepods-burstable-pod0a_1.slice", QosClass.BURSTABLE),
        ("kubelet-kubepods-besteffort-pod0a.slice", QosClass.BEST_EFFORT),
    ],
)
def test_the_class_is_read_off_the_cgroup(parent: str, qos: QosClass) -> None:
    assert read_class(parent) is qos


@pytest.mark.parametrize(
    ("qos", "shares", "weight"),
    [
        (QosClass.BEST_EFFORT, 0, 1),
        (QosClass.BEST_EFFORT, 4096, 1),
        (QosClass.BURSTABLE, 0, None),
        (QosClass.BURSTABLE, 2, 1),
        (QosClass.BURSTABLE, 1024, 39),
        (QosClass.GUARANTEED, 262144, 10000),
        (QosClass.GUARANTEED, 1 << 40, 10000),
    ],
)
def test_the_weight_follows_the_shares(qos: QosClass, shares: int, weight: int | None) -> None:
    assert cpu_weight(qos, Resources(cpu_shares=shares)) == weight


@pytest.mark.parametrize(
    ("qos", "memory", "score"),
    [
        (QosClass.GUARANTEED, GIB, -997),
        (QosClass.BEST_EFFORT, GIB, 1000),
        (QosClass.UNKNOWN, GIB, 0),
        (QosClass.BURSTABLE, GIB, 900),
        (QosClass.BURSTABLE, 1, 999),
        (QosClass.BURSTABLE, 100 * GIB, 3),
    ],
)
def test_the_node_ends_the_largest_guests_of_the_lowest_class_first(qos: QosClass, memory: int, score: int) -> None:
    assert oom_score_adj(qos, memory, 10 * GIB) == score
