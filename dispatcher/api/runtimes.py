"""What a runtime plugin implements: the core protocol `Runtime` and the optional abilities beside it.

Rules that hold for every method here:

* The core calls with ids and facts from its record; a runtime keeps no durable state of its own. After a crash between
  the act and the record, a method may be called with empty facts: it must find what it made by the id alone.
* `stop_*` and `remove_*` are idempotent, and succeed for what never existed.
* Each call has a deadline from `dispatcher.yaml`; expiry cancels it and counts as "runtime down". A cancelled method
  leaves behind only what `remove_pod` or `remove_container` with the same id removes.
* Raise the classes of `dispatcher.errors`: RuntimeDown when the engine is away, InvalidRequest for a config that can
  not work (from `create_*`, never as late as `start_container`), NotSupported for what this runtime cannot do
  honestly. Anything else counts as a bug of the plugin and becomes INTERNAL.
* Calls for different pods run concurrently; for one pod, create and remove never overlap, stop may overlap both.
* An ability that a runtime lacks is absent as a method: the core asks by `isinstance`, in one place.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

from dispatcher.model import (
    Attachment,
    Change,
    ContainerId,
    ContainerSpec,
    CreatedContainer,
    CreatedPod,
    Facts,
    FilesystemUsage,
    ImageConfig,
    ImageId,
    InterfaceUsage,
    Isolation,
    ObservedContainer,
    OutputChunk,
    PodId,
    PodSpec,
    Resources,
    Snapshot,
    Usage,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class RuntimeFeatures:
    """What a runtime can do, as the kubelet's Status call publishes it per handler."""

    recursive_read_only_mounts: bool = False
    user_namespaces: bool = False
    user_namespaces_host_network: bool = False
    supplemental_groups_policy: bool = False
    mount_options: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class RuntimeHealth:
    """Answer of `probe`. `reason` is CamelCase, `message` says what to do; `notes` are shown, never an error.

    `cgroup_driver` is "cgroupfs" or "systemd" where the engine has one of its own, else "".
    """

    ready: bool
    reason: str = ""
    message: str = ""
    engine: str = ""  # such as "Docker Engine 20.10.24, API 1.41"
    cgroup_driver: str = ""
    features: RuntimeFeatures = field(default_factory=RuntimeFeatures)
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class PodRef:
    """A pod as the core names it to its runtime. `facts` are what `create_pod` returned, or empty."""

    id: PodId
    spec: PodSpec
    facts: Facts = field(default_factory=dict)
    attachment: Attachment | None = None
    netns_path: str = ""  # the pod's network namespace, which exists from `prepare_pod` on; "": the host's network
    options: Mapping[str, Any] = field(default_factory=dict)  # the `with:` values of the rule that chose this runtime
    state_dir: str = ""  # this pod's folder, 0700, made by the core, removed by it after `remove_pod`


@dataclass(frozen=True, slots=True, kw_only=True)
class ContainerRef:
    """A container as the core names it to its runtime, with its pod.

    `spec` is what was asked at creation. `granted` is what the runtime answered last to a request for limits, which for
    a container that is updated before its start is not what `spec` says; None before creation.
    """

    id: ContainerId
    pod: PodRef
    spec: ContainerSpec
    image_id: ImageId
    image: ImageConfig
    facts: Facts = field(default_factory=dict)
    granted: Resources | None = None


class Runtime(Protocol):
    """A runtime. See the rules at the top of this module."""

    @property
    def name(self) -> str:
        """The name that policy files and records use, such as "docker"."""

    @property
    def isolation(self) -> Isolation:
        """How strongly it separates a pod from the node."""

    @property
    def version(self) -> str:
        """The plugin's version, kept in each record."""

    @property
    def facts_schema(self) -> int:
        """The schema of the facts it returns. It must read the schema before its own; records of a newer one stop it."""

    @property
    def option_keys(self) -> frozenset[str]:
        """The `with:` keys that it understands in a routing rule; the policy loader refuses others."""

    async def start(self) -> None:
        """Begin to work. Called once, before any other method but the properties. An engine that is away is no error:
        start, report not ready from `probe`, and recover by itself.
        """

    async def aclose(self) -> None:
        """Let go of connections and tasks. Pods go on running."""

    async def probe(self) -> RuntimeHealth:
        """Say whether pods can be made now. Called every few seconds; must return fast, and never raises."""

    async def create_pod(self, pod: PodRef) -> CreatedPod:
        """Make the sandbox run in the namespace of `pod.attachment` (None: the host's network). All or nothing is
        wanted but not needed: on an error the core calls `remove_pod`.
        """

    async def stop_pod(self, pod: PodRef) -> None:
        """Stop the sandbox and all of its containers, at once. Returns when their processes are proven gone.

        Raises:
            RuntimeDown: that could not be proven. The core keeps the pod as STOPPING and keeps its addresses.
        """

    async def remove_pod(self, pod: PodRef) -> None:
        """Remove all that this runtime ever made for the pod and its containers."""

    async def create_container(self, container: ContainerRef) -> CreatedContainer:
        """Make the container, not running. All that can be refused is refused here."""

    async def start_container(self, container: ContainerRef) -> ObservedContainer:
        """Start it. Returns when its first process runs, or ran: EXITED at once is a successful start.

        A command that cannot be executed returns EXITED with exit code 128 and reason "StartError"; the core turns
        that into an error for the caller and keeps the container as EXITED.
        """

    async def stop_container(self, container: ContainerRef, grace_s: float) -> ObservedContainer:
        """Send the stop signal once, wait up to `grace_s` seconds, then kill. Returns the final facts.

        May be called again while the first call waits: the earlier deadline wins, and no second signal is sent. 0
        kills at once. The signal is `spec.stop_signal`, else the image's, else SIGTERM.
        """

    async def remove_container(self, container: ContainerRef) -> None:
        """Remove the container with its writable layer, killing it if it runs."""

    async def inspect(self, pods: tuple[PodRef, ...], containers: tuple[ContainerRef, ...]) -> Snapshot:
        """Report facts on exactly these (all that is not found is ABSENT), in few engine calls.

        Raises:
            RuntimeDown: the engine is away: nothing can be said.
        """

    def output(self, container: ContainerRef, after: int) -> AsyncIterator[OutputChunk]:
        """Yield what the container wrote, from the position `after` (0: from the first byte), following while it runs.

        Ends when the container has exited and all was yielded. Raises RuntimeDown when the engine goes away for
        good; a short absence is waited out. One reader at a time per container; closing the iterator stops it.
        """

    def watch(self) -> AsyncIterator[Snapshot | Change]:
        """Yield facts as they happen: first a Snapshot of all that is ours, then Changes, for ever.

        After a gap (the engine was away) another Snapshot comes. While the engine is away nothing is yielded. The
        core has one watcher per runtime.
        """


class Process(Protocol):
    """A process that runs beside or as a container's first process, with its streams."""

    def output(self) -> AsyncIterator[tuple[str, bytes]]:
        """Yield ("stdout" | "stderr", bytes) until both are closed. Not reading stops the process by back-pressure."""

    async def write_stdin(self, data: bytes) -> None:
        """Write all of `data`, waiting while the process does not read. Raises BrokenPipeError when it closed stdin."""

    async def close_stdin(self) -> None:
        """Half-close: the process reads end of file. Idempotent."""

    async def resize(self, width: int, height: int) -> None:
        """Set the terminal's size in characters. Ignored without a terminal or after the exit."""

    async def wait(self) -> int:
        """Wait for the exit and return its code, 128+signal for a death by signal."""

    async def kill(self) -> None:
        """Kill the process and its children at once. Idempotent. For an attachment: only detach."""

    async def aclose(self) -> None:
        """Let go of the streams. Does not kill."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ExecSpec:
    """A command to run in a running container, as the container's user, with its environment and working directory."""

    command: tuple[str, ...]
    tty: bool = False
    stdin: bool = False
    stdout: bool = True
    stderr: bool = True


@runtime_checkable
class CanExec(Protocol):
    """A runtime that runs commands in its containers."""

    async def exec(self, container: ContainerRef, spec: ExecSpec) -> Process:
        """Start a command. Raises InvalidRequest where it cannot be executed (no such file)."""


@runtime_checkable
class CanAttach(Protocol):
    """A runtime that attaches to the streams of a container's first process."""

    async def attach(self, container: ContainerRef, *, stdin: bool, stdout: bool, stderr: bool) -> Process:
        """Attach from now on, without history. Several attachments at once each get all output."""


@runtime_checkable
class CanConnect(Protocol):
    """A runtime that opens byte streams to ports of a pod (port-forward)."""

    async def connect(self, pod: PodRef, port: int) -> Process:
        """Connect to localhost:`port` inside the pod, IPv4 then IPv6. The result's "stdout" is the stream.

        Raises InvalidRequest where nothing listens.
        """


@runtime_checkable
class CanUpdateResources(Protocol):
    """A runtime that changes limits of running containers."""

    async def update_resources(self, container: ContainerRef, wanted: Resources) -> Resources:
        """Apply `wanted` (already merged with what stood) and return what is now really in force. All or nothing."""


@runtime_checkable
class CanUpdatePod(Protocol):
    """A runtime that follows a resize of the pod's own limits."""

    async def update_pod_resources(self, pod: PodRef, overhead: Resources | None, wanted: Resources | None) -> None:
        """Best effort, after the kubelet resized the pod's cgroup. Raises NotSupported where it cannot follow."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ContainerUsage:
    """Usage of one container, and of its writable layer where that was measured (0 inodes: not counted)."""

    id: ContainerId
    usage: Usage
    writable_layer: FilesystemUsage | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class PodUsage:
    """Usage of one pod as its runtime tells it. `interfaces` of None: those of the pod's network namespace count."""

    id: PodId
    usage: Usage
    interfaces: tuple[InterfaceUsage, ...] | None = None


@runtime_checkable
class CanStats(Protocol):
    """A runtime that measures its containers."""

    async def stats(self, containers: tuple[ContainerRef, ...]) -> tuple[ContainerUsage, ...]:
        """Measure these in one pass. What cannot be measured (it does not run) is left out.

        Asked every few seconds for all containers of a node: the first part of `Usage` is wanted, in milliseconds. A
        layer that takes long to measure is measured at other times, and reported with the time of that.

        Raises:
            RuntimeDown: nothing can be measured now.
        """


@runtime_checkable
class CanDetailedStats(Protocol):
    """A runtime that also knows the figures that only metrics show."""

    async def detailed_stats(self, containers: tuple[ContainerRef, ...]) -> tuple[ContainerUsage, ...]:
        """As `stats`, with both parts of `Usage`. May look at each process, and take a hundred times as long."""


@runtime_checkable
class CanPodStats(Protocol):
    """A runtime whose pods' figures are not those of the pods' cgroups, such as one that runs virtual machines.

    Without this ability the core measures a pod by the cgroup that the kubelet named, and by the interfaces of the
    pod's network namespace, whichever runtime it has.
    """

    async def pod_stats(self, pods: tuple[PodRef, ...], *, detailed: bool) -> tuple[PodUsage, ...]:
        """Measure these in one pass, with the second part of `Usage` where `detailed`.

        For a pod that is left out, the core's own figures stand. Raises RuntimeDown where nothing can be measured now.
        """


@runtime_checkable
class CanPrepare(Protocol):
    """A runtime that can begin to make a pod while its network is still being attached."""

    async def prepare_pod(self, pod: PodRef) -> Facts:
        """Begin, without an attachment. `create_pod` gets these facts; the undo is `remove_pod`."""


@runtime_checkable
class CanTrimOutput(Protocol):
    """A runtime whose buffer of output can be freed behind a position."""

    async def trim_output(self, container: ContainerRef, seq: int) -> None:
        """Everything up to `seq` is on record elsewhere and may be freed. Best effort."""


@runtime_checkable
class CanReportFootprint(Protocol):
    """A runtime that keeps copies of images or layers of its own on disk."""

    async def disk_usage(self) -> Mapping[str, tuple[int, int]]:
        """Return (bytes, inodes) per mount point of writable layers and other container data."""


__all__ = [
    "CanAttach",
    "CanConnect",
    "CanDetailedStats",
    "CanExec",
    "CanPodStats",
    "CanPrepare",
    "CanReportFootprint",
    "CanStats",
    "CanTrimOutput",
    "CanUpdatePod",
    "CanUpdateResources",
    "ContainerRef",
    "ContainerUsage",
    "ExecSpec",
    "PodRef",
    "PodUsage",
    "Process",
    "Runtime",
    "RuntimeFeatures",
    "RuntimeHealth",
]
