"""Security context of pods and containers, as typed values. Absence (None) is kept apart from a default value."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum


class NamespaceMode(StrEnum):
    """Whose namespace is shared (CRI NamespaceMode)."""

    POD = "pod"
    CONTAINER = "container"
    NODE = "node"
    TARGET = "target"


class ProfileType(StrEnum):
    """Kind of a seccomp or AppArmor profile (CRI SecurityProfile.ProfileType)."""

    RUNTIME_DEFAULT = "runtime-default"
    UNCONFINED = "unconfined"
    LOCALHOST = "localhost"


class GroupsPolicy(StrEnum):
    """How supplemental groups are made (CRI SupplementalGroupsPolicy)."""

    MERGE = "merge"
    STRICT = "strict"


@dataclass(frozen=True, slots=True, kw_only=True)
class SecurityProfile:
    """A seccomp or AppArmor profile; `localhost_ref` is a host path (seccomp) or a profile name (AppArmor)."""

    type: ProfileType
    localhost_ref: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class IdMapping:
    """One range of a user namespace mapping."""

    host_id: int
    container_id: int
    length: int


@dataclass(frozen=True, slots=True, kw_only=True)
class UserNamespace:
    """A requested user namespace. `mode` is POD or NODE; others were refused on the way in."""

    mode: NamespaceMode
    uids: tuple[IdMapping, ...] = ()
    gids: tuple[IdMapping, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class NamespaceOptions:
    """Namespace modes of a pod or container. `target_id` is a container id, set only with pid == TARGET."""

    network: NamespaceMode = NamespaceMode.POD
    pid: NamespaceMode = NamespaceMode.POD
    ipc: NamespaceMode = NamespaceMode.POD
    target_id: str = ""
    user: UserNamespace | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class SelinuxOptions:
    """SELinux label parts."""

    user: str = ""
    role: str = ""
    type: str = ""
    level: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Capabilities:
    """Capability changes, names without CAP_; "ALL" is allowed in `add` and `drop`."""

    add: tuple[str, ...] = ()
    drop: tuple[str, ...] = ()
    add_ambient: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class PodSecurity:
    """Security context of a sandbox (CRI LinuxSandboxSecurityContext)."""

    namespaces: NamespaceOptions = field(default_factory=NamespaceOptions)
    selinux: SelinuxOptions | None = None
    run_as_user: int | None = None
    run_as_group: int | None = None
    supplemental_groups: tuple[int, ...] = ()
    groups_policy: GroupsPolicy = GroupsPolicy.MERGE
    readonly_rootfs: bool = False
    privileged: bool = False
    seccomp: SecurityProfile | None = None
    apparmor: SecurityProfile | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ContainerSecurity:
    """Security context of a container (CRI LinuxContainerSecurityContext).

    `masked_paths` and `readonly_paths` of None mean "the runtime's default"; an empty tuple means none.
    CRI cannot tell the two apart on the wire, so conversion yields a tuple; None is for callers inside.
    """

    namespaces: NamespaceOptions = field(default_factory=NamespaceOptions)
    selinux: SelinuxOptions | None = None
    run_as_user: int | None = None
    run_as_username: str = ""
    run_as_group: int | None = None
    supplemental_groups: tuple[int, ...] = ()
    groups_policy: GroupsPolicy = GroupsPolicy.MERGE
    capabilities: Capabilities = field(default_factory=Capabilities)
    privileged: bool = False
    readonly_rootfs: bool = False
    no_new_privs: bool = False
    masked_paths: tuple[str, ...] | None = None
    readonly_paths: tuple[str, ...] | None = None
    seccomp: SecurityProfile | None = None
    apparmor: SecurityProfile | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ContainerUser:
    """The identity that the first process of a container really runs with."""

    uid: int
    gid: int
    supplemental_groups: tuple[int, ...] = ()
