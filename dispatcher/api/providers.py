"""What the shared plugins implement: network, images, sizer and streaming. Exactly one of each is active."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from dispatcher.api.runtimes import ExecSpec, Process
from dispatcher.model import (
    Attachment,
    ContainerId,
    ContainerUser,
    Credentials,
    FilesystemUsage,
    GroupsPolicy,
    Image,
    ImageId,
    NetworkPlan,
    PodId,
    PodSpec,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class NetworkStatus:
    """Whether pods can be attached now. `message` says what to do where not."""

    ready: bool
    reason: str = ""
    message: str = ""


class NetworkProvider(Protocol):
    """Attaches a pod's network namespace, which the core owns, to the network. Runtimes never call it."""

    @property
    def name(self) -> str:
        """The provider's name, kept in each plan."""

    async def start(self) -> None:
        """Begin to work: read and watch configuration. A missing configuration is no error here, but not ready."""

    async def aclose(self) -> None:
        """Stop watching. Attached pods stay attached."""

    def status(self) -> NetworkStatus:
        """Answer from memory."""

    def set_pod_cidr(self, cidr: str) -> None:
        """The node's pod range from UpdateRuntimeConfig. May be ignored. Persisting it is the core's matter."""

    def plan(self, pod_id: PodId, pod: PodSpec, netns_path: str) -> NetworkPlan:
        """Decide all that ADD will run with. Pure: no side effect. The core commits the plan before `add`.

        Raises:
            NetworkNotReady: no usable configuration.
            InvalidRequest: an annotation or port that cannot work.
        """

    async def add(self, plan: NetworkPlan) -> Attachment:
        """Attach. On failure or cancellation a part may stand: the core calls `delete` with the same plan.

        Raises:
            NetworkFailed: a plugin failed or hung.
        """

    async def check(self, plan: NetworkPlan, attachment: Attachment) -> tuple[str, ...]:
        """Return what is wrong with an attachment, in sentences; advisory, empty when all is well."""

    async def delete(self, plan: NetworkPlan, attachment: Attachment | None) -> None:
        """Detach, with what ADD ran with. Idempotent; works when ADD never ran, and when the namespace is gone.

        Raises:
            NetworkFailed: something is still attached; call again.
        """

    async def gc(self, plans: tuple[NetworkPlan, ...]) -> None:
        """Free what belongs to no plan in this list. Called at start-up, after recovery. Best effort."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageDisk:
    """Disk use of the store, and of copies elsewhere that were reported to it."""

    image_filesystems: tuple[FilesystemUsage, ...]
    container_filesystems: tuple[FilesystemUsage, ...]


class EngineCopies(Protocol):
    """A runtime that holds copies of images in an engine of its own. Registered with the image provider."""

    async def forget_image(self, image_id: ImageId) -> None:
        """Remove the engine's copy. Idempotent. Called when the image was removed and nothing leases it."""

    async def copies_disk_usage(self) -> tuple[FilesystemUsage, ...]:
        """Report what the copies take."""


class ImageProvider(Protocol):
    """One content-addressed OCI store behind every runtime. Lists and look-ups are answered from memory.

    Leases: an image that a container uses is leased under the container's id. Leases are the core's to persist: they
    are container records, and `start` gets them all. A leased image that is removed is hidden at once and reclaimed
    at its last release.
    """

    @property
    def name(self) -> str:
        """The provider's name."""

    async def start(self, leases: tuple[tuple[str, ImageId], ...]) -> None:
        """Open the store, sweep what a crash left, and take the leases (holder, image) that records imply."""

    async def aclose(self) -> None:
        """Stop pulls and workers."""

    async def pull(self, reference: str, credentials: Credentials | None) -> Image:
        """Pull and return the image. Already complete content is not fetched again; equal pulls join.

        Cancellation stops the pull when nobody else waits for it, and leaves nothing. Raises PullFailed,
        InvalidRequest (a reference that cannot be parsed).
        """

    def list(self) -> tuple[Image, ...]:
        """All visible images, in a stable order."""

    def find(self, reference: str) -> Image | None:
        """Find by id (with or without sha256:, or a unique prefix), tag or digest. Unparsable: None."""

    async def remove(self, reference: str) -> None:
        """Remove the image with all of its tags and digests. Idempotent; concurrent calls all succeed."""

    def get(self, image_id: ImageId) -> Image:
        """The image of a lease, visible or not. Raises NotFound."""

    def lease(self, holder: str, image_id: ImageId) -> None:
        """Keep the image's content for `holder`. Idempotent. Raises NotFound."""

    def release(self, holder: str) -> None:
        """Drop all leases of `holder`. Idempotent."""

    async def disk(self) -> ImageDisk:
        """Measure. The mount points are real host paths."""

    def add_engine(self, copies: EngineCopies) -> None:
        """Register a runtime that keeps copies of its own."""

    async def oci_dir(self, image_id: ImageId) -> Path:
        """An OCI image layout folder with this one image. Valid while leased."""

    async def docker_archive(self, image_id: ImageId, repo_tag: str) -> Path:
        """A tar that `docker load` takes, whose image gets the name `repo_tag`. The caller unlinks it."""

    async def unpacked(self, image_id: ImageId) -> Path:
        """The image's root file system as a folder, never to be written to. Valid while leased; single flight."""

    async def sub_path(self, image_id: ImageId, path: str) -> Path:
        """A path inside the unpacked image, links resolved with the image as root; "" is the root itself.

        Raises InvalidRequest: it does not exist, is absolute or climbs.
        """

    async def erofs(self, image_id: ImageId) -> Path:
        """The image's root file system as one erofs file. Valid while leased; single flight."""

    async def resolve_user(
        self,
        image_id: ImageId,
        *,
        user: str,
        uid: int | None,
        gid: int | None,
        supplemental_groups: tuple[int, ...],
        policy: GroupsPolicy,
    ) -> ContainerUser:
        """Work out the ids of a container's first process from the image's own passwd and group files.

        `user` is a user name or the image's User string ("name", "uid", "uid:gid", "name:group"); `uid` and `gid`
        win over it. Merge adds the image's memberships, Strict does not; the primary gid is always in the result.
        Files are read with bounds; ids are range-checked. Raises InvalidRequest (unknown user, absurd id).
        """


@dataclass(frozen=True, slots=True, kw_only=True)
class VmSize:
    """How large a guest has to be for a pod, and where its memory is charged.

    `notes` say what was rounded, defaulted or moved: nothing is adjusted silently.
    """

    vcpus: int
    guest_memory_bytes: int
    limit_bytes: int | None  # the pod's exact limit inside the guest, None for unlimited
    cpu_quota_us: int | None
    cpu_period_us: int
    charge: str  # "pod" (a leaf of the pod's cgroup) | "outside" (a sibling, charged to the node reserve)
    charge_limit_bytes: int | None
    cpu_weight: int | None = None  # of cgroup v2, 1 to 10000; None: as the kernel has it
    oom_score_adj: int = 0  # of the machine monitor
    notes: tuple[str, ...] = ()


class Sizer(Protocol):
    """Works out the size of a virtual machine from the pod's resources or its cgroup. A service of VM runtimes."""

    @property
    def name(self) -> str:
        """The provider's name."""

    def size(self, pod: PodSpec) -> VmSize:
        """Decide, and say what was rounded. Reads the pod's cgroup where CRI says nothing.

        Raises:
            OutOfResources: the need is above the limit and the policy is to refuse; names the RuntimeClass to add.
        """


@dataclass(frozen=True, slots=True, kw_only=True)
class StreamTarget:
    """What a streaming session reaches: filled by the core, so that the provider knows no runtime."""

    exec: Callable[[ContainerId, ExecSpec], Awaitable[Process]]
    attach: Callable[[ContainerId, bool, bool, bool, bool], Awaitable[Process]]  # tty, stdin, stdout, stderr
    connect: Callable[[PodId, int], Awaitable[Process]]


@dataclass(frozen=True, slots=True, kw_only=True)
class ExecStream:
    """One Exec or Attach request that was granted a URL. `command` is empty for Attach."""

    container_id: ContainerId
    command: tuple[str, ...] = ()
    tty: bool = False
    stdin: bool = False
    stdout: bool = False
    stderr: bool = False


class StreamingProvider(Protocol):
    """Serves exec, attach and port-forward on loopback, with one-time URLs."""

    @property
    def name(self) -> str:
        """The provider's name."""

    async def start(self, target: StreamTarget) -> None:
        """Listen."""

    async def aclose(self) -> None:
        """End all sessions and stop listening."""

    def exec_url(self, request: ExecStream) -> str:
        """An absolute URL for one exec session. Raises OutOfResources when too many are unused."""

    def attach_url(self, request: ExecStream) -> str:
        """An absolute URL for one attach session."""

    def port_forward_url(self, pod_id: PodId, ports: tuple[int, ...]) -> str:
        """An absolute URL for one port-forward session; `ports` is empty over SPDY."""


Observe = Callable[[str, float, Mapping[str, str]], None]
"""Takes a measurement: `(what, value, labels)`. Known to the core's metrics, others are ignored: "cni.step" (seconds;
plugin, command, outcome: "ok" or "failed"), "image.bytes" (bytes of a pulled image). Costs microseconds, never raises."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Services:
    """What a plugin's factory is given beside its section: narrow, and nothing else.

    `state_dir` is the plugin's own folder (0700). `node_uuid` identifies this node instance: an engine object with
    another one is not ours. `images`, `sizer` and `network` are the active providers, usable from `start` on.
    """

    state_dir: Path
    run_dir: Path
    node_uuid: str
    now_ns: Callable[[], int]
    images: ImageProvider | None = None
    sizer: Sizer | None = None
    notify: Callable[[str, str], None] = field(default=lambda _reason, _message: None)  # a condition for operators
    observe: Observe = field(default=lambda _what, _value, _labels: None)  # a measurement, see `Observe`
