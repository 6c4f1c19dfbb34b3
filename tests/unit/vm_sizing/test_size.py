"""How large a guest is, and whom it is charged to: the table of cases."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dispatcher.errors import OutOfResources
from dispatcher.model import Resources
from dispatcher_vm_sizing.cgroup import CgroupLimits
from dispatcher_vm_sizing.config import MIB, Charge, SizingConfig
from dispatcher_vm_sizing.size import Ask, decide_size

GIB = 1 << 30
NODE = 16 * GIB
# Overheads in round numbers, so that the cases can be checked in the head: 80 in the guest, 20 beside it.
CONFIG = SizingConfig(guest_overhead_mib=80, vmm_overhead_mib=20)


def limits(memory_mib: float = 0, cpus: float = 0, **changes: Any) -> Resources:
    """CRI resources."""
    return Resources(memory_limit_bytes=round(memory_mib * MIB), cpu_quota_us=round(cpus * 100_000), **changes)


def bounds(memory_mib: float | None = None, cpus: float | None = None) -> CgroupLimits:
    """Limits of the pod's cgroup."""
    return CgroupLimits(
        memory_bytes=None if memory_mib is None else int(memory_mib * MIB),
        cpu_quota_us=None if cpus is None else round(cpus * 100_000),
    )


def ask(**fields: Any) -> Ask:
    """A question, with a node of 16 GiB."""
    return Ask(**{"node_memory_bytes": NODE, **fields})


def test_pod_that_says_nothing_gets_the_default() -> None:
    """1 vCPU and 64 MiB beside the guest's own needs; no limit, and both said."""
    size = decide_size(ask(), CONFIG)
    assert (size.vcpus, size.guest_memory_bytes, size.limit_bytes) == (1, 192 * MIB, None)
    assert (size.cpu_quota_us, size.charge, size.charge_limit_bytes) == (None, "pod", None)
    assert size.notes == (
        "The pod has no CPU limit: its guest has 1 vCPU(s).",
        "The pod has no memory limit: its guest holds 64 MiB and what is left of its class.",
        "The guest's memory was rounded up from 144 MiB to 192 MiB.",
    )


@pytest.mark.parametrize(
    ("fields", "limit_mib", "guest_mib"),
    [
        # CRI says it.
        ({"resources": limits(128)}, 128, 256),
        ({"resources": limits(112)}, 112, 192),
        ({"resources": limits(113)}, 113, 256),
        ({"resources": limits(1)}, 1, 128),
        ({"resources": limits(0.5)}, 0.5, 128),
        ({"resources": limits(1000)}, 1000, 1536),
        ({"resources": limits(1500.25)}, 1500.25, 2048),
        # CRI says nothing, or that there is no limit.
        ({"resources": limits()}, None, 192),
        ({"resources": limits(-1 / MIB)}, None, 192),
        ({"resources": Resources(memory_limit_bytes=9223372036854771712)}, None, 192),
        # The pod's cgroup says it instead, or that there is none.
        ({"cgroup": bounds(300)}, 300, 384),
        ({"resources": limits(), "cgroup": bounds(300)}, 300, 384),
        ({"cgroup": bounds()}, None, 192),
        # Its limit includes what a RuntimeClass declared, which is not the containers'.
        ({"cgroup": bounds(400), "overhead": limits(100)}, 300, 384),
        ({"cgroup": bounds(50), "overhead": limits(100)}, 1 / MIB, 128),
        # CRI wins where both say something.
        ({"resources": limits(128), "cgroup": bounds(228), "overhead": limits(100)}, 128, 256),
        # Some containers have limits, the pod has none: the sum is the least, not the most, that it uses.
        ({"resources": limits(128), "cgroup": bounds()}, None, 384),
        # More than the node has is as much as the node has.
        ({"resources": limits(100 * 1024)}, 100 * 1024, 24576),
    ],
)
def test_memory(fields: dict[str, Any], limit_mib: float | None, guest_mib: int) -> None:
    """The limit is exact; the guest is the smallest class that holds it with kernel and agent."""
    size = decide_size(ask(**fields), CONFIG)
    assert size.limit_bytes == (None if limit_mib is None else int(limit_mib * MIB))
    assert size.guest_memory_bytes == guest_mib * MIB


@pytest.mark.parametrize(
    ("fields", "vcpus", "quota", "period"),
    [
        ({"resources": limits(cpus=1)}, 1, 100_000, 100_000),
        ({"resources": limits(cpus=0.5)}, 1, 50_000, 100_000),
        ({"resources": limits(cpus=0.01)}, 1, 1000, 100_000),
        ({"resources": limits(cpus=1.001)}, 2, 100_100, 100_000),
        ({"resources": limits(cpus=2.5)}, 4, 250_000, 100_000),
        ({"resources": limits(cpus=3)}, 4, 300_000, 100_000),
        ({"resources": limits(cpus=500)}, 32, 50_000_000, 100_000),
        ({"resources": Resources(cpu_quota_us=30_000, cpu_period_us=10_000)}, 4, 30_000, 10_000),
        ({"resources": limits()}, 1, None, 100_000),
        ({"resources": limits(cpus=-1 / 100_000)}, 1, None, 100_000),
        ({"resources": limits(cpus=-1 / 100_000), "cgroup": bounds(cpus=2)}, 1, None, 100_000),
        ({"cgroup": bounds(cpus=1.5)}, 2, 150_000, 100_000),
        ({"cgroup": CgroupLimits(cpu_quota_us=5000, cpu_period_us=10_000)}, 1, 5000, 10_000),
        ({"cgroup": bounds()}, 1, None, 100_000),
        # A declared overhead is the machine's: it counts for the quota and not for vCPUs.
        ({"resources": limits(cpus=1), "overhead": limits(cpus=0.25)}, 1, 125_000, 100_000),
        ({"cgroup": bounds(cpus=1.25), "overhead": limits(cpus=0.25)}, 1, 125_000, 100_000),
        ({"cgroup": bounds(cpus=0.1), "overhead": limits(cpus=0.25)}, 1, 25_001, 100_000),
        # Some containers have limits, the pod has none.
        ({"resources": limits(cpus=1.5), "cgroup": bounds()}, 4, None, 100_000),
    ],
)
def test_cpu(fields: dict[str, Any], vcpus: int, quota: int | None, period: int) -> None:
    """vCPUs are rounded up to a class, the quota keeps the exact limit."""
    size = decide_size(ask(**fields), CONFIG)
    assert (size.vcpus, size.cpu_quota_us, size.cpu_period_us) == (vcpus, quota, period)


def test_declared_overhead_keeps_the_machine_inside_the_pod() -> None:
    """Limit and overhead hold the need exactly: nothing is charged elsewhere, nothing shrinks."""
    for charge in Charge:
        config = CONFIG.model_copy(update={"charge": charge})
        fields = {"resources": limits(128), "overhead": limits(100)}
        for cgroup in (bounds(228), None):
            size = decide_size(ask(**fields, cgroup=cgroup), config)
            assert (size.charge, size.limit_bytes, size.charge_limit_bytes) == ("pod", 128 * MIB, None)


def test_without_overhead_the_default_is_to_charge_the_node() -> None:
    """The pod keeps its exact limit; the machine is capped beside it, and the note says what to declare."""
    size = decide_size(ask(resources=limits(128), cgroup=bounds(128), runtime_handler="vm"), CONFIG)
    assert (size.charge, size.charge_limit_bytes, size.limit_bytes) == ("outside", 228 * MIB, 128 * MIB)
    assert size.notes[-1] == (
        "The virtual machine is charged 228 MiB outside the pod, whose limit of 128 MiB cannot hold it. "
        "Declare overhead.podFixed.memory of 100Mi in the RuntimeClass of handler 'vm'."
    )
    declared = ask(resources=limits(128), overhead=limits(100), cgroup=bounds(228))
    assert decide_size(declared, CONFIG).charge == "pod"


def test_too_little_overhead_is_no_overhead() -> None:
    """A declaration below the need changes what is missing, not the outcome."""
    size = decide_size(ask(resources=limits(128), overhead=limits(99), cgroup=bounds(227)), CONFIG)
    assert size.charge == "outside"
    assert "memory of 100Mi in a RuntimeClass" in size.notes[-1]


def test_node_reserve_bounds_what_is_charged_outside() -> None:
    """Above the reserve the pod is refused with what to do; within it, or inside the pod, it is not asked."""
    config = CONFIG.model_copy(update={"node_reserve_mib": 228})
    assert decide_size(ask(resources=limits(128)), config).charge == "outside"
    with pytest.raises(OutOfResources, match=r"above plugins\.vm_sizing\.node_reserve_mib, 228 MiB\. Declare"):
        decide_size(ask(resources=limits(129)), config)
    assert decide_size(ask(resources=limits(4096), overhead=limits(100)), config).charge == "pod"
    assert decide_size(ask(), config).charge == "pod"


def test_shrink_takes_the_machine_from_the_containers() -> None:
    """The pod stays inside its own limit; its containers get the rest, and that is said."""
    config = CONFIG.model_copy(update={"charge": Charge.SHRINK})
    size = decide_size(ask(resources=limits(256), cgroup=bounds(256)), config)
    assert (size.charge, size.limit_bytes, size.guest_memory_bytes) == ("pod", 156 * MIB, 256 * MIB)
    assert "The containers get 156 MiB instead of 256 MiB" in size.notes[1]
    assert "The guest's memory was rounded up from 236 MiB to 256 MiB." in size.notes
    with pytest.raises(OutOfResources, match="leaves 15 MiB beside its virtual machine, less than 16 MiB"):
        decide_size(ask(resources=limits(115)), config)
    with pytest.raises(OutOfResources, match="leaves 0 MiB"):
        decide_size(ask(resources=limits(10)), config)


def test_refuse_names_the_class_to_change() -> None:
    """The pod does not start, and the sentence says what would make it."""
    config = CONFIG.model_copy(update={"charge": Charge.REFUSE})
    with pytest.raises(
        OutOfResources,
        match=r"limit of 128 MiB cannot hold its virtual machine, which needs 228 MiB\. "
        r"Declare overhead\.podFixed\.memory of 100Mi in the RuntimeClass of handler 'vm'",
    ):
        decide_size(ask(resources=limits(128), runtime_handler="vm"), config)
    assert decide_size(ask(), config).charge == "pod"


def test_need_above_the_largest_class_is_refused() -> None:
    """Memory cannot be rounded down."""
    config = CONFIG.model_copy(update={"memory_classes_mib": (128, 256)})
    with pytest.raises(OutOfResources, match="largest is 256 MiB: add a larger one"):
        decide_size(ask(resources=limits(200)), config)


def test_promise_of_the_design_holds() -> None:
    """A pod limited to 128 MiB may use all of it beside the kernel: the guest is larger than limit and overhead."""
    config = SizingConfig()
    size = decide_size(ask(resources=limits(128)), config)
    assert size.limit_bytes == 128 * MIB
    assert size.guest_memory_bytes >= (128 + 72) * MIB


amounts = st.one_of(st.just(0), st.just(-1), st.integers(1, 1 << 62), st.integers(1, 64 * GIB))
quotas = st.one_of(st.just(0), st.just(-1), st.integers(1, 10**9))
resources = st.none() | st.builds(
    Resources, memory_limit_bytes=amounts, cpu_quota_us=quotas, cpu_period_us=st.integers(0, 10**6)
)
cgroups = st.none() | st.builds(
    CgroupLimits,
    memory_bytes=st.none() | st.integers(1, 64 * GIB),
    cpu_quota_us=st.none() | st.integers(1, 10**9),
    cpu_period_us=st.integers(1, 10**6),
)


@given(resources, resources, cgroups, st.sampled_from(Charge))
def test_any_answer_is_consistent(
    wanted: Resources | None, overhead: Resources | None, cgroup: CgroupLimits | None, charge: Charge
) -> None:
    """Whatever is asked: a refusal, or a size whose figures fit each other; the same question, the same answer."""
    config = CONFIG.model_copy(update={"charge": charge})
    question = Ask(resources=wanted, overhead=overhead, cgroup=cgroup, node_memory_bytes=NODE)
    try:
        size = decide_size(question, config)
    except OutOfResources:
        assert charge is not Charge.OUTSIDE
        return
    assert decide_size(question, config) == size
    assert size.vcpus in config.vcpu_classes
    assert size.guest_memory_bytes // MIB in config.memory_classes_mib
    assert size.cpu_period_us > 0
    assert size.cpu_quota_us is None or size.cpu_quota_us > 0
    if size.limit_bytes is not None:
        assert size.limit_bytes > 0
        assert size.guest_memory_bytes >= min(size.limit_bytes, NODE) + 80 * MIB
    if size.charge == "outside":
        assert charge is Charge.OUTSIDE
        assert size.charge_limit_bytes is not None
        assert any("outside the pod" in note for note in size.notes)
    elif cgroup is not None and cgroup.memory_bytes is not None:
        assert size.limit_bytes is not None
        assert min(size.limit_bytes, NODE) + 100 * MIB <= cgroup.memory_bytes
