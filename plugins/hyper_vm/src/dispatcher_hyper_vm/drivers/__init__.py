"""What the runtime knows of a machine monitor: a driver that starts, adopts and removes machines, and the machines.

Phases are types: a `VmSpec` is a machine to be, a `RunningVm` has a process. A driver's own record of a machine is its
folder, `<run folder>/<id>`: whatever died in between, `adopt` and `remove` find by the id alone what `start` made.
Nothing here knows containers or the guest's agent; the driver only tells where the agent's socket is.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any, Literal, Protocol

from dispatcher_vm_kit.leaf import Leaf, LeafLimits


@dataclass(frozen=True, slots=True, kw_only=True)
class GuestImage:
    """A guest to boot: an uncompressed kernel with a PVH entry, an initramfs with the agent, and what names both.

    `digest` changes with any byte of either. `words` are an operator's additions to the kernel's command line.
    """

    kernel: Path
    initrd: Path
    digest: str
    words: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class SizeClass:
    """How large a guest is: all the RAM and all the CPUs that a pod in it can ever get.

    Room that is not used costs nearly nothing: a clone of 2 GiB and 4 CPUs holds as much memory as one of 256 MiB and
    1 CPU (measured: 21.3 MB private each), so classes are generous and pods are bound by cgroups in the guest.
    """

    memory_bytes: int
    vcpus: int


@dataclass(frozen=True, slots=True, kw_only=True)
class NicSpec:
    """A network card on a tap that exists. `tap_fd` is open, from `vm_kit.tap.make_tap`, and stays the caller's.

    The MAC is what a cold guest sees; the agent sets the pod's own in any case, since clones start with the template's.
    """

    tap_fd: int
    mac: str = "02:00:00:00:00:01"


@dataclass(frozen=True, slots=True, kw_only=True)
class LaunchSpec:
    """Where and as whom the monitor runs.

    Attributes:
        leaf: its cgroup, or None to stay in the daemon's. The driver makes and removes it.
        leaf_limits: bounds of that cgroup.
        netns_path: the pod's network namespace; None gives it an empty one of its own.
        oom_score_adj: clamped to what the daemon may set.
    """

    leaf: Leaf | None = None
    leaf_limits: LeafLimits = field(default_factory=LeafLimits)
    netns_path: Path | None = None
    oom_score_adj: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class TemplateScope:
    """Who may share a template: "node" all, "namespace" those with the same `domain`, "off" nobody (cold boots)."""

    kind: Literal["node", "namespace", "off"] = "node"
    domain: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class VmSpec:
    """A machine to start.

    Attributes:
        id: the pod's id, hex. Names everything that is made.
        guest, size: what boots, and how large.
        nics: network cards in the guest's order.
        share: an empty folder of the pod that the guest may mount by the tag "share"; host folders are bound into it
            later. None leaves it out (another template).
        share_owner: the monitor may act for the owners of shared files (else: what its own user may).
        launch, templates: where it runs, and from whose template.
    """

    id: str
    guest: GuestImage
    size: SizeClass
    nics: tuple[NicSpec, ...] = ()
    share: Path | None = None
    share_owner: bool = False
    launch: LaunchSpec = field(default_factory=LaunchSpec)
    templates: TemplateScope = field(default_factory=TemplateScope)


@dataclass(frozen=True, slots=True, kw_only=True)
class Disk:
    """A disk to plug in. The guest finds it by `serial` ([a-z0-9-], up to 36), in /sys/block/*/device/vpd_pg80.

    `path` is a raw image or a block device of the host. Read-only ones may be shared by many machines.
    """

    serial: str
    path: Path
    read_only: bool


class VmState(Enum):
    """What the monitor says of its machine."""

    RUNNING = "running"
    PAUSED = "paused"


@dataclass(frozen=True, slots=True, kw_only=True)
class VmEnd:
    """How a machine ended.

    `reason` is one of "PoweredOff" (the guest did), "GuestPanic" (it panicked, or reset itself, which a panic does),
    "Stopped" (we asked), "OutOfMemory" (the host killed the monitor in its cgroup), "Killed" (a signal) or "Failed"
    (the monitor gave up; `message` holds its last words). `exit_code` is the monitor's, where it was our child.
    """

    reason: str
    message: str = ""
    exit_code: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class VmmFeatures:
    """What the machines of a driver can do while they run."""

    templates: bool
    hotplug_disk: bool
    hotplug_memory: bool
    hotplug_vcpu: bool
    balloon: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class VmmHealth:
    """Answer of `probe`: whether machines can be started, how they run, and what is worth knowing.

    `acceleration` is "kvm" or "tcg"; `reason` and `message` say why not ready; `notes` are shown, never an error.
    """

    ready: bool
    engine: str = ""
    acceleration: str = ""
    reason: str = ""
    message: str = ""
    notes: tuple[str, ...] = ()


class RunningVm(Protocol):
    """A machine that has a process. One object per machine; calls for one machine may run at the same time."""

    @property
    def id(self) -> str:
        """The machine's id."""

    @property
    def facts(self) -> Mapping[str, Any]:
        """JSON-able: pid, start_ticks, uid, boot ("template" or "cold"), boot_reason (why cold), template, engine,
        acceleration, memory_bytes, vcpus, started_at_ns, start_seconds, folder.
        """

    @property
    def agent_socket(self) -> Path:
        """The monitor's listening socket whose other end is the agent's port; one client at a time."""

    @property
    def console_log(self) -> Path:
        """What the guest printed, kept to about a megabyte; older text in the same name with ".1"."""

    @property
    def console_socket(self) -> Path:
        """The monitor's listening socket of the serial console."""

    @property
    def leaf(self) -> Leaf | None:
        """The monitor's cgroup, for its usage and limits."""

    async def attach_disk(self, disk: Disk) -> None:
        """Plug a disk in. Idempotent by serial. Returns when the machine has it; the guest sees it moments later.

        Raises:
            OutOfResources: all slots are taken.
            RuntimeDown: the machine is gone, the file cannot be opened, or the monitor refuses.
        """

    async def detach_disk(self, serial: str) -> None:
        """Unplug a disk that the guest does not use any more, and close its file. Idempotent.

        Raises:
            RuntimeDown: the guest does not let go in time.
        """

    async def disks(self) -> tuple[str, ...]:
        """The serials that are plugged in."""

    async def set_balloon(self, target_bytes: int) -> None:
        """Ask the guest to give memory back until it has this much; more than its RAM gives all back.

        Returns at once; the guest follows as it can. Never ask for less than what its working set needs.
        """

    async def balloon_bytes(self) -> int:
        """How much memory the guest has now."""

    async def state(self) -> VmState:
        """Ask the monitor. Raises RuntimeDown when it does not answer."""

    async def pause(self) -> None:
        """Halt the CPUs. Idempotent."""

    async def resume(self) -> None:
        """Let them run. Idempotent."""

    async def wait(self) -> VmEnd:
        """Wait for the end, proven by the process. May be called by many, also after the end."""

    async def power_off(self, grace_s: float) -> VmEnd:
        """End the machine: wait `grace_s` for a guest that was told to power off, then stop it, then kill it.

        Returns when the process is proven gone. Idempotent; a later call with a shorter grace ends it sooner.
        """

    async def kill(self) -> VmEnd:
        """End it at once. Idempotent."""

    async def aclose(self) -> None:
        """Let go of the machine, which runs on and can be adopted."""


class GuestGate(Protocol):
    """How a driver that makes templates talks with a fresh guest, without knowing the agent's protocol."""

    async def settle(self, agent_socket: Path) -> None:
        """Wait until the agent answers, and bring the guest into the state that clones start from: one CPU online.

        Leaves no connection behind. The driver sets the deadline.
        """

    async def timer_rate(self, agent_socket: Path) -> float:
        """How many local timer interrupts per second an idle guest has, over about a second of its own time.

        Leaves no connection behind.
        """


class Vmm(Protocol):
    """A driver. Calls for different machines run at the same time; for one machine, start and remove never overlap."""

    @property
    def name(self) -> str:
        """Such as "qemu"."""

    @property
    def features(self) -> VmmFeatures:
        """What its machines can do."""

    async def probe(self) -> VmmHealth:
        """Say whether machines can be started. Never raises; slow only at the first call after a boot of the host."""

    async def start(self, spec: VmSpec) -> RunningVm:
        """Start a machine: from a template, or cold with the reason in its facts.

        Returns when its CPUs run; a cold guest's agent is not up by then. On an error or a cancellation everything of
        it is removed again, as far as `remove` can.

        Raises:
            AlreadyExists: a machine with this id lives.
            NotSupported: no machine can be started on this node; the message says what is missing.
            RuntimeDown: the monitor did not start; its own words are in the message.
        """

    async def adopt(self, machine_id: str) -> RunningVm | None:
        """Take over a machine of an earlier daemon, or None where none lives. It is never stopped by this.

        Raises:
            RuntimeDown: it lives, but its monitor does not answer.
        """

    async def remove(self, machine_id: str, *, leaf: Leaf | None = None) -> None:
        """Kill what lives of a machine and remove its folder and its cgroup leaf. Idempotent, also for unknown ids.

        `leaf` is for a machine whose start was cut short before its folder could tell.

        Raises:
            RuntimeDown: something of it is not proven gone.
        """

    async def recover(self) -> None:
        """Remove what an earlier daemon left half-made that is no pod's. Called once, before the first start."""

    def machine_ids(self) -> tuple[str, ...]:
        """The ids of all machines of pods that have a folder, alive or left by a crash."""

    def report(self) -> Mapping[str, Any]:
        """JSON-able: templates with their key, size, bytes, clones, age and failures, for `vm list` and status."""

    async def aclose(self) -> None:
        """Let go of everything; machines run on. Templates go."""
