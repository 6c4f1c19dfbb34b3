"""What the store keeps: one record per pod and per container. Immutable; a change makes a new version."""

from __future__ import annotations

from dataclasses import dataclass, field

from dispatcher.model.container import ContainerSpec
from dispatcher.model.ids import ContainerId, ImageId, PodId
from dispatcher.model.network import Attachment, NetworkPlan
from dispatcher.model.observed import Facts
from dispatcher.model.pod import PodSpec
from dispatcher.model.resources import Resources
from dispatcher.model.route import Route
from dispatcher.model.security import ContainerUser
from dispatcher.transitions import ContainerState, PodState

RECORD_SCHEMA = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class PluginStamp:
    """Which plugin made the facts of a record, at which version, in which schema of its own."""

    name: str
    version: str
    facts_schema: int


@dataclass(frozen=True, slots=True, kw_only=True)
class PodRecord:
    """A sandbox on record. Committed as CREATING before anything of it exists.

    `version` rises with each commit. `plan` is committed before the network is touched, `facts` come from the
    runtime. `fingerprint` is the digest of the request, so that a retry is told from another pod of the same name.
    """

    id: PodId
    spec: PodSpec
    route: Route
    stamp: PluginStamp
    created_at_ns: int
    fingerprint: str
    schema: int = RECORD_SCHEMA
    version: int = 0
    state: PodState = PodState.CREATING
    plan: NetworkPlan | None = None
    attachment: Attachment | None = None
    facts: Facts = field(default_factory=dict)
    ips: tuple[str, ...] = ()
    stopped_at_ns: int = 0
    reason: str = ""
    message: str = ""
    notes: tuple[str, ...] = ()
    resources: Resources | None = None
    overhead: Resources | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class LogCheckpoint:
    """Where the log of a container stands: what lies after `seq` in the runtime's buffer begins at `offset` of `inode`.

    What the file holds behind `offset` was written from chunks behind `seq`, so a restart replays and skips it.
    """

    seq: int = 0
    inode: int = 0
    offset: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class ContainerRecord:
    """A container on record. Committed as CREATING before anything of it exists.

    `granted` is what the runtime really applied. `exit_code` stays None until the runtime knows it.
    `stop_deadline_ns` is the earliest moment at which a stop was promised to kill (0: none asked).
    """

    id: ContainerId
    pod_id: PodId
    spec: ContainerSpec
    image_id: str
    created_at_ns: int
    fingerprint: str
    image_ref: str = ""
    image_name: str = ""
    schema: int = RECORD_SCHEMA
    version: int = 0
    state: ContainerState = ContainerState.CREATING
    facts: Facts = field(default_factory=dict)
    started_at_ns: int = 0
    finished_at_ns: int = 0
    exit_code: int | None = None
    reason: str = ""
    message: str = ""
    stop_signal: str = ""
    stop_deadline_ns: int = 0
    granted: Resources | None = None
    user: ContainerUser | None = None
    notes: tuple[str, ...] = ()
    log: LogCheckpoint = field(default_factory=LogCheckpoint)

    @property
    def leased_images(self) -> frozenset[ImageId]:
        """The images that must stay while the container is on record: its own, and those mounted as volumes."""
        volumes = (mount.image.image_id for mount in self.spec.mounts if mount.image is not None)
        return frozenset(ImageId(image_id) for image_id in (self.image_id, *volumes) if image_id)
