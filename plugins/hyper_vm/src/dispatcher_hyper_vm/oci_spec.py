"""From a container to the OCI runtime configuration that the guest's agent carries out. Pure; golden-file tested.

What needs a look at the host or the image was resolved before and arrives in `Resolved`. The configuration is that of
the OCI runtime specification, with these conventions between host and agent:

* a namespace's `path` is a symbol, not a file: "pod", or "container:ID"; one that is absent is the guest's own, which all
  containers of the pod share;
* sources of bind mounts are paths in the guest, made by `guest_paths` and never by a user;
* the network namespace is never named: the guest has one, the pod's;
* bytes that are not UTF-8 travel as lone surrogates (Python's surrogateescape);
* the annotation "dispatcher.privileged" asks for the guest's own /dev, and for /sys and cgroups to be writable.

Pod labels, annotations and image labels play no part here.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Final

from dispatcher.api import ContainerRef, ExecSpec, make_net_sysctls
from dispatcher.api.containers import capability_names, checked_paths, command_line, environment
from dispatcher.errors import InvalidRequest, NotSupported
from dispatcher.model import (
    Capabilities,
    ContainerUser,
    Device,
    NamespaceMode,
    PodSpec,
    ProfileType,
    Resources,
)

PRIVILEGED: Final = "dispatcher.privileged"
_PATH: Final = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
ALL_CAPABILITIES: Final = tuple(
    f"CAP_{name}"
    for name in (
        *("CHOWN", "DAC_OVERRIDE", "DAC_READ_SEARCH", "FOWNER", "FSETID", "KILL", "SETGID", "SETUID", "SETPCAP"),
        *("LINUX_IMMUTABLE", "NET_BIND_SERVICE", "NET_BROADCAST", "NET_ADMIN", "NET_RAW", "IPC_LOCK", "IPC_OWNER"),
        *("SYS_MODULE", "SYS_RAWIO", "SYS_CHROOT", "SYS_PTRACE", "SYS_PACCT", "SYS_ADMIN", "SYS_BOOT", "SYS_NICE"),
        *("SYS_RESOURCE", "SYS_TIME", "SYS_TTY_CONFIG", "MKNOD", "LEASE", "AUDIT_WRITE", "AUDIT_CONTROL", "SETFCAP"),
        *("MAC_OVERRIDE", "MAC_ADMIN", "SYSLOG", "WAKE_ALARM", "BLOCK_SUSPEND", "AUDIT_READ", "PERFMON", "BPF"),
        "CHECKPOINT_RESTORE",
    )
)
_DEFAULT_CAPABILITIES: Final = frozenset(
    f"CAP_{name}"
    for name in (
        *("CHOWN", "DAC_OVERRIDE", "FSETID", "FOWNER", "MKNOD", "NET_RAW", "SETGID", "SETUID", "SETFCAP", "SETPCAP"),
        *("NET_BIND_SERVICE", "SYS_CHROOT", "KILL", "AUDIT_WRITE"),
    )
)
_MASKED: Final = (
    *("/proc/acpi", "/proc/asound", "/proc/interrupts", "/proc/kcore", "/proc/keys", "/proc/latency_stats"),
    *("/proc/scsi", "/proc/sched_debug", "/proc/timer_list", "/proc/timer_stats", "/sys/firmware"),
    "/sys/devices/virtual/powercap",
)
_READ_ONLY: Final = ("/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger")
# Character devices that the guest's kernel has itself: (major, minor).
_GUEST_DEVICES: Final[Mapping[str, tuple[int, int]]] = {
    "/dev/null": (1, 3),
    "/dev/zero": (1, 5),
    "/dev/full": (1, 7),
    "/dev/random": (1, 8),
    "/dev/urandom": (1, 9),
    "/dev/tty": (5, 0),
    "/dev/fuse": (10, 229),
    "/dev/net/tun": (10, 200),
}
# Keys of cgroup v2 that CRI's `unified` may set in the guest, and the form of their values.
_UNIFIED: Final = frozenset(
    (
        *("cpu.idle", "cpu.max", "cpu.max.burst", "cpu.weight", "memory.high", "memory.low", "memory.max"),
        *("memory.min", "memory.oom.group", "memory.swap.high", "memory.swap.max", "pids.max"),
    )
)
_UNIFIED_VALUE: Final = re.compile(r"(max|[0-9]{1,20})( [0-9]{1,20})?")
_IPC_SYSCTLS: Final = frozenset(
    f"kernel.{name}" for name in ("msgmax", "msgmnb", "msgmni", "sem", "shmall", "shmmax", "shmmni", "shm_rmid_forced")
)
_SYSCTL: Final = re.compile(r"[a-z0-9_]+(\.[a-z0-9_]+){1,4}")
_SYSCTL_VALUE: Final = re.compile(r"[0-9]{1,20}([ \t]+[0-9]{1,20}){0,3}")
_HOST_ADVICE: Final = (
    'route such pods to a runtime that shares the node\'s kernel: "runtime: docker" in the policy file'
)


@dataclass(frozen=True, slots=True, kw_only=True)
class GuestMount:
    """A mount of a container as the guest sees it. `source` is a path in the guest, or "" for a `kind` of its own."""

    target: str
    source: str = ""
    kind: str = "bind"
    options: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class GuestDisk:
    """A block device that was plugged in for the container, known in the guest by its serial."""

    path: str
    serial: str
    permissions: str = "rwm"


@dataclass(frozen=True, slots=True, kw_only=True)
class Resolved:
    """What was looked up for one container. `rlimits` are (soft, hard) by name in small letters."""

    user: ContainerUser
    mounts: tuple[GuestMount, ...] = ()
    disks: tuple[GuestDisk, ...] = ()
    rlimits: Mapping[str, tuple[int, int]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Built:
    """The configuration, the limits that it grants, the bounding capabilities, and notes on what was adjusted."""

    spec: dict[str, Any]
    granted: Resources
    capabilities: frozenset[str]
    notes: tuple[str, ...] = ()


def build_container(container: ContainerRef, resolved: Resolved) -> Built:
    """Return the configuration of a container.

    Raises:
        InvalidRequest: a config that cannot work.
        NotSupported: what a virtual machine cannot do honestly; the message names the policy that would help.
    """
    security = container.spec.security
    if security.privileged and not container.pod.spec.security.privileged:
        raise InvalidRequest("a privileged container needs a privileged pod sandbox")
    capabilities = _bounding(security.capabilities, privileged=security.privileged)
    granted, resources, notes = limits(container.spec.resources or Resources())
    devices = [_device(device) for device in container.spec.devices if device.host_path in _GUEST_DEVICES]
    devices += [{"path": disk.path, "type": "b", "serial": disk.serial} for disk in resolved.disks]
    linux: dict[str, Any] = {
        "namespaces": _namespaces(container),
        "resources": resources,
        "devices": devices,
        "rootfsPropagation": "private",
        **_paths(container),
    }
    spec = {
        "ociVersion": "1.1.0",
        "hostname": container.pod.spec.hostname,
        "root": {"readonly": security.readonly_rootfs},
        "process": _process(container, resolved, capabilities, command_line(container), tty=container.spec.tty),
        "mounts": [_mount(mount) for mount in _all_mounts(container, resolved.mounts)],
        "linux": linux,
        "annotations": {PRIVILEGED: "1"} if security.privileged else {},
    }
    return Built(spec=spec, granted=granted, capabilities=capabilities, notes=notes)


def build_exec(container: ContainerRef, user: ContainerUser, spec: ExecSpec) -> dict[str, Any]:
    """Return the OCI process of a command that runs in the container: as its user, with its environment and rights."""
    capabilities = _bounding(container.spec.security.capabilities, privileged=container.spec.security.privileged)
    return _process(container, Resolved(user=user), capabilities, spec.command, tty=spec.tty)


def limits(wanted: Resources) -> tuple[Resources, dict[str, Any], tuple[str, ...]]:
    """Return what is granted, the OCI form of it, and notes. The guest has cgroup v2 and no swap.

    Raises:
        InvalidRequest: a `unified` key or value that is not on the list.
        NotSupported: huge pages, which the guest does not have.
    """
    notes: tuple[str, ...] = ()
    pages = [limit.page_size for limit in wanted.hugepage_limits if limit.limit_bytes]
    if pages:
        raise NotSupported(f"the guest has no huge pages of {pages[0]}; {_HOST_ADVICE}")
    for key, value in wanted.unified.items():
        if key not in _UNIFIED or not _UNIFIED_VALUE.fullmatch(value):
            raise InvalidRequest(f"cgroup setting {key!r} = {value[:64]!r} is not one that can be made in the guest")
    if wanted.cpuset_cpus or wanted.cpuset_mems:
        notes += ("CPUs are chosen for the whole virtual machine: the container may run on any of its vCPUs",)
    memory: dict[str, int] = {}
    if wanted.memory_limit_bytes > 0:
        memory = {"limit": wanted.memory_limit_bytes, "swap": wanted.memory_limit_bytes}
        if wanted.memory_swap_limit_bytes not in (0, wanted.memory_limit_bytes):
            notes += ("the guest has no swap: memory is limited, swap is not granted",)
    cpu = {
        name: value
        for name, value in (
            ("shares", wanted.cpu_shares),
            ("quota", wanted.cpu_quota_us),
            ("period", wanted.cpu_period_us),
        )
        if value
    }
    granted = replace(
        wanted,
        memory_swap_limit_bytes=memory.get("swap", 0),
        cpuset_cpus="",
        cpuset_mems="",
    )
    resources = {"memory": memory, "cpu": cpu, "unified": dict(wanted.unified)}
    return granted, {key: value for key, value in resources.items() if value}, notes


def check_pod(pod: PodSpec) -> None:
    """Refuse a pod that needs the node's own namespaces. Raises NotSupported naming the policy that would help."""
    spaces = pod.security.namespaces
    for asked, name in ((spaces.network, "hostNetwork"), (spaces.pid, "hostPID"), (spaces.ipc, "hostIPC")):
        if asked is NamespaceMode.NODE:
            raise NotSupported(f"{name} cannot be had in a virtual machine; {_HOST_ADVICE}")


def guest_sysctls(sysctls: Mapping[str, str]) -> dict[str, str]:
    """The pod's sysctls that the guest's kernel keeps per namespace; `net.*` among them, since the stack is there.

    Whether a pod may set an unsafe one was the kubelet's decision.

    Raises:
        InvalidRequest: a name or value that cannot be one.
        NotSupported: one that is not a namespace's.
    """
    chosen = {item.name: item.value for item in make_net_sysctls(sysctls)}
    for name, value in sysctls.items():
        if name in chosen or name.startswith(("net.", "net/")):
            continue
        if not (name in _IPC_SYSCTLS or name.startswith("fs.mqueue.")) or not _SYSCTL.fullmatch(name):
            raise NotSupported(f"the sysctl {name[:100]!r} is not one that a pod has for itself")
        if not _SYSCTL_VALUE.fullmatch(value):
            raise InvalidRequest(f"{value[:100]!r} is not a value for the sysctl {name}")
        chosen[name] = value
    return chosen


# ---------------------------------------------------------------------------------------------------------- namespaces
def _namespaces(container: ContainerRef) -> list[dict[str, str]]:
    check_pod(container.pod.spec)
    spaces = container.spec.security.namespaces
    pid: dict[str, str] = {"type": "pid"}
    if spaces.pid is NamespaceMode.NODE:
        raise NotSupported(f"hostPID cannot be had in a virtual machine; {_HOST_ADVICE}")
    if spaces.pid is NamespaceMode.POD:
        pid["path"] = "pod"
    elif spaces.pid is NamespaceMode.TARGET:
        if not re.fullmatch(r"[0-9a-f]{64}", spaces.target_id):
            raise InvalidRequest("a target PID namespace needs the id of the target container")
        pid["path"] = f"container:{spaces.target_id}"
    # A user namespace belongs to the pod, in the guest, and owns what its containers share.
    own = ("user", "ipc", "uts") if has_user_namespace(container.pod.spec) else ()
    return [pid, {"type": "mount"}, {"type": "cgroup"}, *({"type": kind, "path": "pod"} for kind in own)]


def has_user_namespace(pod: PodSpec) -> bool:
    """True where the pod's containers run in a user namespace of their own."""
    wanted = pod.security.namespaces.user
    return wanted is not None and wanted.mode is NamespaceMode.POD


# ------------------------------------------------------------------------------------------------------------- process
def _process(
    container: ContainerRef,
    resolved: Resolved,
    capabilities: frozenset[str],
    args: Sequence[str],
    *,
    tty: bool,
) -> dict[str, Any]:
    security = container.spec.security
    user = resolved.user
    ordered = [name for name in ALL_CAPABILITIES if name in capabilities]
    ambient = [
        name
        for name in ALL_CAPABILITIES
        if name.removeprefix("CAP_") in capability_names(security.capabilities).add_ambient
    ]
    return {
        "terminal": tty,
        "user": {
            "uid": user.uid,
            "gid": user.gid,
            "additionalGids": [group for group in user.supplemental_groups if group != user.gid],
        },
        "args": list(args),
        "env": _environment(container, user, tty=tty),
        "cwd": _working_dir(container),
        "capabilities": {
            "bounding": ordered,
            "effective": ordered,
            "permitted": ordered,
            "inheritable": ambient,
            "ambient": ambient,
        },
        "rlimits": [
            {"type": f"RLIMIT_{name.upper()}", "soft": soft, "hard": hard}
            for name, (soft, hard) in sorted(resolved.rlimits.items())
        ],
        "noNewPrivileges": security.no_new_privs,
        "oomScoreAdj": max(-999, min(1000, (container.spec.resources or Resources()).oom_score_adj)),
    }


def _environment(container: ContainerRef, user: ContainerUser, *, tty: bool) -> list[str]:
    """The image's variables, then the request's over them; and what every process may count on."""
    values: dict[str, str] = {"PATH": _PATH, "HOSTNAME": container.pod.spec.hostname}
    if tty:
        values["TERM"] = "xterm"
    for text in container.image.env:
        name, equals, value = text.partition("=")
        if name and equals and "\0" not in text:
            values[name] = value
    for variable in environment(container):
        values[variable.key] = variable.value.decode("utf-8", "surrogateescape")
    values.setdefault("HOME", "/root" if user.uid == 0 else "/")
    return [f"{name}={value}" for name, value in values.items() if value or name != "HOSTNAME"]


def _working_dir(container: ContainerRef) -> str:
    path = container.spec.working_dir or container.image.working_dir or "/"
    if not path.startswith("/") or "\0" in path:
        raise InvalidRequest(f"working directory {path[:200]!r} is not absolute")
    return path


def _bounding(wanted: Capabilities, *, privileged: bool) -> frozenset[str]:
    names = capability_names(wanted)
    unknown = [n for n in (*names.add, *names.drop) if n != "ALL" and f"CAP_{n}" not in ALL_CAPABILITIES]
    if unknown:
        raise InvalidRequest(f"{unknown[0]!r} is not a capability of the guest's kernel")
    if privileged:
        return frozenset(ALL_CAPABILITIES)
    chosen = set(ALL_CAPABILITIES if "ALL" in names.add else _DEFAULT_CAPABILITIES)
    if "ALL" in names.drop:
        chosen = set() if "ALL" not in names.add else chosen
    chosen |= {f"CAP_{name}" for name in (*names.add, *names.add_ambient) if name != "ALL"}
    return frozenset(chosen - {f"CAP_{name}" for name in names.drop})


# ---------------------------------------------------------------------------------------------------- mounts and paths
def _all_mounts(container: ContainerRef, own: tuple[GuestMount, ...]) -> list[GuestMount]:
    """The mounts that every container has, but where it brings its own; then its own, parents before children."""
    security = container.spec.security
    access = ("rw",) if security.privileged else ("ro",)
    quiet = ("nosuid", "noexec", "nodev")
    dev = (
        GuestMount(target="/dev", kind="devtmpfs", options=("nosuid", "noexec"))
        if security.privileged
        else GuestMount(target="/dev", kind="tmpfs", options=("nosuid", "strictatime", "mode=755", "size=65536k"))
    )
    standard = (
        GuestMount(target="/proc", kind="proc", options=quiet),
        dev,
        GuestMount(target="/dev/pts", kind="devpts", options=("nosuid", "noexec", "newinstance", "ptmxmode=0666")),
        GuestMount(target="/dev/mqueue", kind="mqueue", options=quiet),
        GuestMount(target="/dev/shm", source="/run/pod/shm", options=("rbind", "rw", *quiet)),  # noqa: S108 - the guest's
        GuestMount(target="/sys", kind="sysfs", options=(*quiet, *access)),
        GuestMount(target="/sys/fs/cgroup", kind="cgroup", options=(*quiet, *access)),
    )
    taken = {mount.target for mount in own}
    ordered = sorted(own, key=lambda mount: mount.target.rstrip("/").count("/"))
    return [*(mount for mount in standard if mount.target not in taken), *ordered]


def _mount(mount: GuestMount) -> dict[str, Any]:
    row: dict[str, Any] = {"destination": mount.target, "type": mount.kind, "options": list(mount.options)}
    if mount.source:
        row["source"] = mount.source
    return row


def _paths(container: ContainerRef) -> dict[str, list[str]]:
    security = container.spec.security
    if security.privileged:
        return {"maskedPaths": [], "readonlyPaths": []}
    masked = _MASKED if security.masked_paths is None else checked_paths(security.masked_paths)
    readonly = _READ_ONLY if security.readonly_paths is None else checked_paths(security.readonly_paths)
    return {"maskedPaths": list(masked), "readonlyPaths": list(readonly)}


def is_guest_device(device: Device) -> bool:
    """True for a character device that the guest's kernel has itself."""
    return device.host_path in _GUEST_DEVICES


def _device(device: Device) -> dict[str, Any]:
    if not set(device.permissions) <= set("rwm"):
        raise InvalidRequest(f"permissions {device.permissions!r} of device {device.host_path} are not a subset of rwm")
    major, minor = _GUEST_DEVICES[device.host_path]
    path = device.container_path or device.host_path
    if not path.startswith("/") or ".." in path.split("/"):
        raise InvalidRequest(f"device path {path!r} is not an absolute path without '..'")
    return {"path": path, "type": "c", "major": major, "minor": minor, "fileMode": 0o666}


def wants_seccomp(container: ContainerRef) -> ProfileType | None:
    """Which kind of filter the container gets: None for a privileged one, or where it asks for none."""
    profile = container.spec.security.seccomp
    if container.spec.security.privileged or profile is None or profile.type is ProfileType.UNCONFINED:
        return None
    return profile.type
