"""Facts that runtimes report. Each one is complete in itself, so that applying it twice changes nothing."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from dispatcher.model.ids import ContainerId, PodId
from dispatcher.model.resources import Resources
from dispatcher.model.security import ContainerUser

Facts = Mapping[str, Any]  # plain JSON of the runtime's own (engine ids, pids, socket paths), kept in the record


class Liveness(StrEnum):
    """What is known of a sandbox or container in its engine. ABSENT means: proven not to exist there."""

    CREATED = "created"
    RUNNING = "running"
    EXITED = "exited"
    ABSENT = "absent"
    UNKNOWN = "unknown"


class Stream(StrEnum):
    """Which output a chunk belongs to."""

    STDOUT = "stdout"
    STDERR = "stderr"


@dataclass(frozen=True, slots=True, kw_only=True)
class ObservedPod:
    """A sandbox as its runtime sees it. `reason` says why it is not running ("EngineRestarted", "VmDied")."""

    id: PodId
    liveness: Liveness
    reason: str = ""
    message: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class ObservedContainer:
    """A container as its runtime sees it.

    Times are nanoseconds since the epoch, 0 for "not yet". `exit_code` is None unless the engine knows it: it is
    never invented. With EXITED, `oom_killed` is final. `granted` and `user` are what was really applied, if known.
    """

    id: ContainerId
    liveness: Liveness
    started_at_ns: int = 0
    finished_at_ns: int = 0
    exit_code: int | None = None
    oom_killed: bool = False
    reason: str = ""
    message: str = ""
    granted: Resources | None = None
    user: ContainerUser | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Snapshot:
    """All that a runtime holds of ours. What is on record but not in here is ABSENT."""

    pods: tuple[ObservedPod, ...] = ()
    containers: tuple[ObservedContainer, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """One fact after a snapshot. `sequence` rises per subscription; a gap means that a snapshot follows."""

    sequence: int
    pod: ObservedPod | None = None
    container: ObservedContainer | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class OutputChunk:
    """Bytes that a container wrote, with the time at which they were read from it.

    `seq` is the position *after* this chunk in the runtime's durable buffer: it rises, survives restarts of the
    daemon and of the engine, and `output(after=seq)` continues right behind it with equal chunk borders.
    """

    stream: Stream
    time_ns: int
    seq: int
    data: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class CreatedPod:
    """What `create_pod` made: facts for the record, and the pod's addresses where the runtime chose them."""

    facts: Facts = field(default_factory=dict)
    ips: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class CreatedContainer:
    """What `create_container` made, with the limits and the user that were really applied."""

    facts: Facts = field(default_factory=dict)
    granted: Resources | None = None
    user: ContainerUser | None = None
    notes: tuple[str, ...] = ()  # adjusted limits and the like, shown in verbose status: nothing is silent
