"""How large a guest has to be, and whom its memory is charged to. One pure function: values in, a size out.

Theory of operation. Three figures must not be mixed up:

    payload   what the containers of the pod may use together: their exact limit is a cgroup inside the guest
    guest     the guest's memory: the smallest class that holds payload + what kernel and agent take
    need      what the host must grant: payload + kernel and agent + the VMM itself

The guest's class may be far above the need: memory is taken from the host as it is touched, and the cgroup inside
bounds what the containers touch. Only a pod without any limit may touch all of the guest, so its need follows the
class.

The kubelet limits the pod's own cgroup to the sum of its containers' limits plus the overhead that a RuntimeClass
declares. Where that holds the need, the VMM lives inside it. Where it does not, the operator chose what happens; each
choice says so in a note.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from dispatcher.api import VmSize
from dispatcher.errors import OutOfResources
from dispatcher.model import Resources
from dispatcher_vm_sizing import qos
from dispatcher_vm_sizing.cgroup import DEFAULT_PERIOD_US, UNLIMITED_BYTES, CgroupLimits
from dispatcher_vm_sizing.config import MIB, Charge, SizingConfig

INSIDE, BESIDE = "pod", "outside"  # values of VmSize.charge


@dataclass(frozen=True, slots=True, kw_only=True)
class Ask:
    """All that the decision depends on, beside the settings.

    `resources` and `overhead` are CRI's, `cgroup` is the pod's own as the kubelet made it (None: cannot be read).
    """

    resources: Resources | None = None
    overhead: Resources | None = None
    cgroup: CgroupLimits | None = None
    node_memory_bytes: int
    cgroup_parent: str = ""
    runtime_handler: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Memory:
    """A decision on memory, in bytes; `limit` None: the containers have no limit together."""

    payload: int
    limit: int | None
    guest: int
    need: int
    notes: tuple[str, ...]


def decide_size(ask: Ask, config: SizingConfig) -> VmSize:
    """Decide the size of a pod's guest.

    Raises:
        OutOfResources: the need is above the largest class, the node's reserve or, by policy, the pod's own limit.
    """
    vcpus, quota, period, cpu_notes = _cpu(ask, config)
    payload = _payload(ask, config)
    memory = _with_guest(payload, ask, config)
    bound = _pod_bound(ask)
    if bound is None or bound >= memory.need:
        charge, charge_limit = INSIDE, None
    elif config.charge is Charge.SHRINK:
        memory = _shrink(payload, memory, bound, ask, config)
        charge, charge_limit = INSIDE, None
    elif config.charge is Charge.REFUSE:
        raise OutOfResources(
            f"The pod's limit of {_mib(bound)} cannot hold its virtual machine, which needs {_mib(memory.need)}. "
            f"{_advice(memory, ask)}"
        )
    else:
        memory = _beside(memory, bound, ask, config)
        charge, charge_limit = BESIDE, memory.need
    return VmSize(
        vcpus=vcpus,
        guest_memory_bytes=memory.guest,
        limit_bytes=memory.limit,
        cpu_quota_us=quota,
        cpu_period_us=period,
        charge=charge,
        charge_limit_bytes=charge_limit,
        cpu_weight=qos.cpu_weight(qos.read_class(ask.cgroup_parent), ask.resources),
        oom_score_adj=qos.oom_score_adj(qos.read_class(ask.cgroup_parent), memory.payload, ask.node_memory_bytes),
        notes=(*cpu_notes, *memory.notes),
    )


# --------------------------------------------------------------------------------------------------------------- memory
def _payload(ask: Ask, config: SizingConfig) -> _Memory:
    """What the containers may use together, and why it is that much."""
    declared = _positive(ask.resources.memory_limit_bytes if ask.resources else 0, UNLIMITED_BYTES)
    default = config.default_memory_mib * MIB
    if declared is not None and ask.cgroup is not None and ask.cgroup.memory_bytes is None:
        # The sum of the limits that some containers have is not a limit of the pod: the kubelet set none.
        note = f"Not every container has a memory limit: {_mib(default)} are added to the others' {_mib(declared)}."
        return _Memory(payload=declared + default, limit=None, guest=0, need=0, notes=(note,))
    if declared is not None:
        return _Memory(payload=declared, limit=declared, guest=0, need=0, notes=())
    if ask.cgroup is not None and ask.cgroup.memory_bytes is not None:
        limit = max(ask.cgroup.memory_bytes - _declared_overhead(ask), 1)
        note = f"The memory limit of {_mib(limit)} was read from the pod's cgroup."
        return _Memory(payload=limit, limit=limit, guest=0, need=0, notes=(note,))
    note = f"The pod has no memory limit: its guest holds {_mib(default)} and what is left of its class."
    return _Memory(payload=default, limit=None, guest=0, need=0, notes=(note,))


def _with_guest(memory: _Memory, ask: Ask, config: SizingConfig) -> _Memory:
    """Choose the class for a payload, and work out what the host must grant."""
    guest_overhead, vmm_overhead = config.guest_overhead_mib * MIB, config.vmm_overhead_mib * MIB
    notes = memory.notes
    wanted = memory.payload
    if wanted > ask.node_memory_bytes:
        notes += (f"The limit of {_mib(wanted)} is above the node's memory of {_mib(ask.node_memory_bytes)}.",)
        wanted = ask.node_memory_bytes
    wanted += guest_overhead
    guest = next((size * MIB for size in config.memory_classes_mib if size * MIB >= wanted), None)
    if guest is None:
        raise OutOfResources(
            f"The pod needs a guest of {_mib(wanted)}, and the largest is {config.memory_classes_mib[-1]} MiB: "
            f"add a larger one to plugins.vm_sizing.memory_classes_mib."
        )
    if guest != wanted:
        notes += (f"The guest's memory was rounded up from {_mib(wanted)} to {_mib(guest)}.",)
    need = (guest if memory.limit is None else wanted) + vmm_overhead
    return replace(memory, guest=guest, need=need, notes=notes)


def _pod_bound(ask: Ask) -> int | None:
    """The memory limit of the pod's own cgroup, None for none."""
    if ask.cgroup is not None:
        return ask.cgroup.memory_bytes
    declared = _positive(ask.resources.memory_limit_bytes if ask.resources else 0, UNLIMITED_BYTES)
    return None if declared is None else declared + _declared_overhead(ask)


def _shrink(payload: _Memory, memory: _Memory, bound: int, ask: Ask, config: SizingConfig) -> _Memory:
    """Give the containers what the pod's limit leaves beside the virtual machine."""
    left = bound - (config.guest_overhead_mib + config.vmm_overhead_mib) * MIB
    if left < config.min_shrunk_mib * MIB:
        raise OutOfResources(
            f"The pod's limit of {_mib(bound)} leaves {_mib(max(left, 0))} beside its virtual machine, less than "
            f"{config.min_shrunk_mib} MiB. {_advice(memory, ask)}"
        )
    note = (
        f"The containers get {_mib(left)} instead of {_mib(payload.payload)}: the rest of the pod's limit is taken by "
        f"its virtual machine. {_advice(memory, ask)}"
    )
    return _with_guest(replace(payload, payload=left, limit=left, notes=(*payload.notes, note)), ask, config)


def _beside(memory: _Memory, bound: int, ask: Ask, config: SizingConfig) -> _Memory:
    """Charge the virtual machine to the node's reserve, beside the pod's cgroup."""
    reserve = config.node_reserve_mib
    if reserve is not None and memory.need > reserve * MIB:
        raise OutOfResources(
            f"The pod's limit of {_mib(bound)} cannot hold its virtual machine, and its {_mib(memory.need)} are above "
            f"plugins.vm_sizing.node_reserve_mib, {reserve} MiB. {_advice(memory, ask)}"
        )
    note = (
        f"The virtual machine is charged {_mib(memory.need)} outside the pod, whose limit of {_mib(bound)} cannot hold "
        f"it. {_advice(memory, ask)}"
    )
    return replace(memory, notes=(*memory.notes, note))


def _advice(memory: _Memory, ask: Ask) -> str:
    """What makes the pod's own limit hold it."""
    missing = memory.need - memory.payload
    where = f"the RuntimeClass of handler {ask.runtime_handler!r}" if ask.runtime_handler else "a RuntimeClass"
    return f"Declare overhead.podFixed.memory of {math.ceil(missing / MIB)}Mi in {where}."


def _declared_overhead(ask: Ask) -> int:
    return _positive(ask.overhead.memory_limit_bytes if ask.overhead else 0, UNLIMITED_BYTES) or 0


# ------------------------------------------------------------------------------------------------------------------ CPU
def _cpu(ask: Ask, config: SizingConfig) -> tuple[int, int | None, int, tuple[str, ...]]:
    """Return vCPUs, quota and period of the VMM's cgroup, and notes."""
    quota, period = _cpu_limit(ask)
    notes: tuple[str, ...] = ()
    if quota is not None and ask.cgroup is not None and ask.cgroup.cpu_quota_us is None:
        # As with memory: the kubelet limits the pod only where each of its containers has a limit.
        wanted = math.ceil(quota / period) + config.default_vcpus
        notes += (f"Not every container has a CPU limit: {config.default_vcpus} vCPU(s) are added to the others'.",)
        quota = None
    elif quota is None:
        wanted = config.default_vcpus
        notes += (f"The pod has no CPU limit: its guest has {wanted} vCPU(s).",)
    else:
        wanted = max(1, math.ceil(quota / period))
        overhead = ask.overhead
        if overhead is not None and overhead.cpu_quota_us > 0:
            # The RuntimeClass grants the machine a share of its own; vCPUs are for the containers.
            quota += overhead.cpu_quota_us * period // (overhead.cpu_period_us or DEFAULT_PERIOD_US)
    vcpus = next((count for count in config.vcpu_classes if count >= wanted), None)
    if vcpus is None:
        vcpus = config.vcpu_classes[-1]
        notes += (f"The pod may use {wanted} CPUs; its guest has {vcpus}, the most of plugins.vm_sizing.vcpu_classes.",)
    elif vcpus != wanted:
        notes += (f"The number of vCPUs was rounded up from {wanted} to {vcpus}; the limit is kept by quota.",)
    return vcpus, quota, period, notes


def _cpu_limit(ask: Ask) -> tuple[int | None, int]:
    """The containers' quota and period: CRI's word, else the pod's cgroup, which holds the declared overhead, too."""
    asked = ask.resources
    if asked is not None and asked.cpu_quota_us > 0:
        return asked.cpu_quota_us, asked.cpu_period_us if asked.cpu_period_us > 0 else DEFAULT_PERIOD_US
    if (asked is None or asked.cpu_quota_us == 0) and ask.cgroup is not None and ask.cgroup.cpu_quota_us is not None:
        quota, period = ask.cgroup.cpu_quota_us, ask.cgroup.cpu_period_us
        overhead = ask.overhead
        if overhead is not None and overhead.cpu_quota_us > 0:
            quota -= overhead.cpu_quota_us * period // (overhead.cpu_period_us or DEFAULT_PERIOD_US)
        return max(quota, 1), period
    return None, DEFAULT_PERIOD_US


def _positive(value: int, bound: int) -> int | None:
    """A limit in bytes; 0 (not said), -1 and the absurd (v1's spelling of unlimited) are none."""
    return value if 0 < value < bound else None


def _mib(size: int) -> str:
    """Write an amount for a person."""
    if size % MIB == 0 or size >= 100 * MIB:
        return f"{round(size / MIB)} MiB"
    return f"{size / MIB:.1f} MiB" if size >= MIB else f"{size} bytes"
