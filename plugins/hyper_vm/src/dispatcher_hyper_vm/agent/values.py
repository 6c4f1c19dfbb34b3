"""What is asked of an agent, and what it answers, as typed values. Answers are checked here: the guest is hostile."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from dispatcher_hyper_vm.agent.protocol import RemoteProtocolError, printable

_MOST = (1 << 63) - 1


@dataclass(frozen=True, slots=True, kw_only=True)
class AgentInfo:
    """Who answered: the agent and the kernel under it. `boot_id` changes with every boot, not with a restore."""

    protocol: int
    version: str
    kernel: str
    boot_id: str
    cpus: int
    memory_bytes: int
    features: frozenset[str]


@dataclass(frozen=True, slots=True, kw_only=True)
class Interface:
    """A network interface of the pod. `device` counts the guest's network devices from 0.

    `addresses` are "address/prefix length" of both families. An empty `mac` leaves the device's own, 0 its MTU.
    """

    name: str
    device: int = 0
    mac: str = ""
    mtu: int = 0
    addresses: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Route:
    """A route. Without `via` the destination is on the link. `device` is the name of an interface."""

    to: str
    device: str
    via: str = ""
    source: str = ""
    metric: int = 0
    mtu: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class IdMapping:
    """A range of user or group ids of the pod and where it lies in the guest."""

    container_id: int
    host_id: int
    size: int


@dataclass(frozen=True, slots=True, kw_only=True)
class PodSetup:
    """Everything that makes a booted, or restored, guest this pod's. One message; nothing is started for it.

    Args:
        hostname: also the host name of the containers.
        sysctls: names as `sysctl` writes them; the host has checked them against its list.
        time_ns: the time of day, nanoseconds since the epoch; 0 leaves the clock.
        entropy: fresh random bytes; clones of a template share their generator's state otherwise.
        machine_id: 32 hex digits, or "".
        resources: limits of all containers together, as `linux.resources` of an OCI specification.
        shm_bytes: size of the /dev/shm that the containers share.
        shares_pid_namespace: the containers see each other's processes.
        uid_mappings, gid_mappings: of the pod's user namespace; both empty for none.
    """

    hostname: str = ""
    interfaces: tuple[Interface, ...] = ()
    routes: tuple[Route, ...] = ()
    sysctls: Mapping[str, str] = field(default_factory=dict)
    time_ns: int = 0
    entropy: bytes = b""
    machine_id: str = ""
    resources: Mapping[str, Any] = field(default_factory=dict)
    shm_bytes: int = 64 << 20
    shares_pid_namespace: bool = False
    uid_mappings: tuple[IdMapping, ...] = ()
    gid_mappings: tuple[IdMapping, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class GuestFile:
    """A small file, or with `link` a symbolic link. `path` is relative to the set's folder and has no ".."."""

    path: str
    data: bytes = b""
    mode: int = 0o644
    uid: int = 0
    gid: int = 0
    link: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Owner:
    """Whose a folder is, and its permissions."""

    mode: int
    uid: int
    gid: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Rootfs:
    """A container's root: an erofs image on the disk with serial `lower`, and ext4 on the disk `upper` above it.

    Without `upper` the root is read-only. `folder` is a folder of the agent's own root, in tests of it on a host only.
    """

    lower: str = ""
    upper: str = ""
    folder: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class ContainerSetup:
    """A container to create. `spec` is an OCI runtime specification with all names resolved; `root.path` is ignored.

    `seccomp` is a compiled filter, an array of `struct sock_filter`, or empty. Differences from OCI: `linux.devices`
    may have `serial` (of a disk) in place of major and minor; a namespace's `path` is one of "pod" and
    "container:ID", which joins those of the pod or of another container; there is no network namespace.
    """

    id: str
    spec: Mapping[str, Any]
    rootfs: Rootfs
    seccomp: bytes = b""
    terminal: bool = False
    stdin: bool = False
    stdin_once: bool = False


class Status(StrEnum):
    """Where a container stands."""

    CREATED = "created"
    RUNNING = "running"
    EXITED = "exited"


@dataclass(frozen=True, slots=True, kw_only=True)
class ContainerState:
    """A container as the agent keeps it until it is deleted.

    `exit_code` is the code or 128 + signal; with EXITED it is final, and so is `oom_killed`. `reason` is "StartError"
    where the command could not be executed. Output reaches from `output_start` (trimmed before) to `output_end`.
    """

    id: str
    status: Status
    pid: int
    started_at_ns: int
    finished_at_ns: int
    exit_code: int
    oom_killed: bool
    reason: str
    message: str
    output_start: int
    output_end: int


@dataclass(frozen=True, slots=True, kw_only=True)
class CgroupUsage:
    """Figures of one cgroup of the guest. `memory_peak_bytes` is 0 where the kernel does not tell."""

    cpu_usage_ns: int
    memory_usage_bytes: int
    memory_working_set_bytes: int
    memory_rss_bytes: int
    memory_peak_bytes: int
    page_faults: int
    major_page_faults: int
    swap_usage_bytes: int
    processes: int
    oom_kills: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ContainerFigures:
    """Figures of one container; the writable layer's are 0 where it has none."""

    id: str
    usage: CgroupUsage
    layer_bytes: int
    layer_inodes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class InterfaceFigures:
    """Counters of a network interface."""

    name: str
    rx_bytes: int
    rx_packets: int
    rx_errors: int
    tx_bytes: int
    tx_packets: int
    tx_errors: int


@dataclass(frozen=True, slots=True, kw_only=True)
class VolumeFigures:
    """A mounted volume's space."""

    name: str
    capacity_bytes: int
    used_bytes: int
    inodes: int
    used_inodes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class GuestFigures:
    """Everything that is measured in one pass in a guest, at `time_ns` of its clock.

    `timer_interrupts` counts those of all processors since the boot: an idle guest has few of them, or ticks.
    """

    time_ns: int
    memory_total_bytes: int
    memory_available_bytes: int
    agent_rss_bytes: int
    timer_interrupts: int
    pod: CgroupUsage
    containers: tuple[ContainerFigures, ...]
    interfaces: tuple[InterfaceFigures, ...]
    volumes: tuple[VolumeFigures, ...]


# -------------------------------------------------------------------------------------------------------------- checks
class Answer:
    """A JSON object from a guest, read field by field. Each reader raises RemoteProtocolError for a wrong value."""

    def __init__(self, body: object) -> None:
        if not isinstance(body, dict):
            raise RemoteProtocolError("The guest answered something that is not an object.")
        self._body: dict[str, Any] = body

    def number(self, key: str, most: int = _MOST) -> int:
        """A whole number from 0 to `most`."""
        value = self._body.get(key)
        if type(value) is not int or not 0 <= value <= most:
            raise RemoteProtocolError(f"The guest answered no valid number as {key!r}.")
        return value

    def flag(self, key: str) -> bool:
        """True or false."""
        value = self._body.get(key)
        if type(value) is not bool:
            raise RemoteProtocolError(f"The guest answered neither true nor false as {key!r}.")
        return value

    def text(self, key: str, limit: int = 500) -> str:
        """A string, made fit to be shown."""
        value = self._body.get(key)
        if not isinstance(value, str):
            raise RemoteProtocolError(f"The guest answered no text as {key!r}.")
        return printable(value, limit)

    def object(self, key: str) -> Answer:
        """An object within."""
        return Answer(self._body.get(key))

    def objects(self, key: str, most: int = 10_000) -> list[Answer]:
        """A list of objects."""
        value = self._body.get(key)
        if not isinstance(value, list) or len(value) > most:
            raise RemoteProtocolError(f"The guest answered no valid list as {key!r}.")
        return [Answer(item) for item in value]

    def texts(self, key: str, most: int = 1000) -> list[str]:
        """A list of strings."""
        value = self._body.get(key)
        if not isinstance(value, list) or len(value) > most or not all(isinstance(item, str) for item in value):
            raise RemoteProtocolError(f"The guest answered no valid list as {key!r}.")
        return [printable(item) for item in value]

    def has(self, key: str) -> bool:
        """Whether there is such a field."""
        return key in self._body


def read_info(protocol: int, answer: Answer) -> AgentInfo:
    """Read a greeting."""
    return AgentInfo(
        protocol=protocol,
        version=answer.text("version", 100),
        kernel=answer.text("kernel", 100),
        boot_id=answer.text("boot_id", 64),
        cpus=answer.number("cpus", 4096),
        memory_bytes=answer.number("memory"),
        features=frozenset(answer.texts("features")),
    )


def read_state(answer: Answer) -> ContainerState:
    """Read a container's state."""
    try:
        status = Status(answer.text("status", 20))
    except ValueError as error:
        raise RemoteProtocolError("The guest answered an unknown status.") from error
    return ContainerState(
        id=answer.text("id", 128),
        status=status,
        pid=answer.number("pid", 1 << 22),
        started_at_ns=answer.number("started_ns"),
        finished_at_ns=answer.number("finished_ns"),
        exit_code=answer.number("exit_code", 255),
        oom_killed=answer.flag("oom_killed"),
        reason=answer.text("reason", 100),
        message=answer.text("message"),
        output_start=answer.number("output_start"),
        output_end=answer.number("output_end"),
    )


def _read_usage(answer: Answer) -> CgroupUsage:
    return CgroupUsage(
        cpu_usage_ns=answer.number("cpu_ns"),
        memory_usage_bytes=answer.number("memory"),
        memory_working_set_bytes=answer.number("working_set"),
        memory_rss_bytes=answer.number("rss"),
        memory_peak_bytes=answer.number("peak"),
        page_faults=answer.number("faults"),
        major_page_faults=answer.number("major_faults"),
        swap_usage_bytes=answer.number("swap"),
        processes=answer.number("pids"),
        oom_kills=answer.number("oom_kills"),
    )


def read_figures(answer: Answer) -> GuestFigures:
    """Read what `stats` answers."""
    return GuestFigures(
        time_ns=answer.number("time_ns"),
        memory_total_bytes=answer.number("memory_total"),
        memory_available_bytes=answer.number("memory_available"),
        agent_rss_bytes=answer.number("agent_rss"),
        timer_interrupts=answer.number("timer_interrupts"),
        pod=_read_usage(answer.object("pod")),
        containers=tuple(
            ContainerFigures(
                id=item.text("id", 128),
                usage=_read_usage(item.object("usage")),
                layer_bytes=item.number("layer_bytes"),
                layer_inodes=item.number("layer_inodes"),
            )
            for item in answer.objects("containers")
        ),
        interfaces=tuple(
            InterfaceFigures(
                name=item.text("name", 15),
                rx_bytes=item.number("rx_bytes"),
                rx_packets=item.number("rx_packets"),
                rx_errors=item.number("rx_errors"),
                tx_bytes=item.number("tx_bytes"),
                tx_packets=item.number("tx_packets"),
                tx_errors=item.number("tx_errors"),
            )
            for item in answer.objects("interfaces")
        ),
        volumes=tuple(
            VolumeFigures(
                name=item.text("name", 64),
                capacity_bytes=item.number("capacity"),
                used_bytes=item.number("used"),
                inodes=item.number("inodes"),
                used_inodes=item.number("used_inodes"),
            )
            for item in answer.objects("volumes")
        ),
    )
