"""From a container to the engine's configuration. Pure; golden-file tested.

What needs a look at the host or the image (users, seccomp files, paths behind symlinks) was resolved before and
arrives in `Resolved`. Pod labels, annotations and image labels play no part here.
"""

from __future__ import annotations

import posixpath
import re
from dataclasses import dataclass, field, replace
from typing import Any

from dispatcher.api import ContainerRef
from dispatcher.api.containers import capability_names, check_command, checked_paths, environment
from dispatcher.errors import InvalidRequest, NotSupported
from dispatcher.model import (
    Capabilities,
    ContainerSecurity,
    ContainerUser,
    Device,
    Mount,
    NamespaceMode,
    ProfileType,
    Propagation,
    Resources,
    SecurityProfile,
)
from dispatcher_docker_shim import naming
from dispatcher_docker_shim.pause_config import cgroup_parent, clamp_oom_score, selinux_options, user_namespace
from dispatcher_docker_shim.traits import EngineTraits

_APPARMOR = re.compile(r"[A-Za-z0-9_./@:-]{1,255}")
_CDI = re.compile(r"[A-Za-z0-9.-]+/[A-Za-z0-9_.-]+=[A-Za-z0-9_.:-]+")
_PROPAGATION = {
    Propagation.PRIVATE: "rprivate",
    Propagation.HOST_TO_CONTAINER: "rslave",
    Propagation.BIDIRECTIONAL: "rshared",
}
# No driver option of the operator's daemon.json may cut, rotate or drop what our log file still has to read.
_LOG_OPTIONS = {"mode": "blocking", "max-size": "9000p", "max-file": "1", "compress": "false"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Resolved:
    """What was looked up for one container.

    `sources` are real host paths, one for each mount in order. `pod_files` are the core's own files of the pod, path
    in the container to host path. `seccomp_json` is the text of a localhost profile. `rlimits` are (soft, hard) by
    name.
    """

    image: str
    user: ContainerUser
    sources: tuple[str, ...] = ()
    pod_files: dict[str, str] = field(default_factory=dict)
    seccomp_json: str = ""
    rlimits: dict[str, tuple[int, int]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Built:
    """The create request, the limits that it grants, and notes on what was adjusted."""

    config: dict[str, Any]
    granted: Resources
    notes: tuple[str, ...] = ()


def build_container(
    container: ContainerRef,
    resolved: Resolved,
    *,
    node_uuid: str,
    traits: EngineTraits,
    log_driver: str = "local",
    oci_runtime: str = "",
) -> Built:
    """Return the create request of a container.

    Raises:
        InvalidRequest: a config that cannot work.
        NotSupported: what this engine or this runtime cannot do honestly.
    """
    spec, security = container.spec, container.spec.security
    check_command(container)
    if security.privileged and not container.pod.spec.security.privileged:
        raise InvalidRequest("a privileged container needs a privileged pod sandbox")
    granted, limits, notes = _resources(spec.resources or Resources(), traits)
    rlimits, rlimit_notes = _rlimits(resolved.rlimits, traits)
    host: dict[str, Any] = {
        **_namespaces(container),
        "Privileged": security.privileged,
        "ReadonlyRootfs": security.readonly_rootfs,
        **_capabilities(security.capabilities),
        "SecurityOpt": _security_options(security, resolved.seccomp_json, traits),
        "GroupAdd": [str(group) for group in resolved.user.supplemental_groups if group != resolved.user.gid],
        "Mounts": [
            *(_mount(mount, source, traits) for mount, source in zip(spec.mounts, resolved.sources, strict=True)),
            *_pod_file_mounts(container, resolved.pod_files),
        ],
        "Devices": [_device(device) for device in spec.devices],
        "DeviceRequests": _cdi(spec.cdi_devices, traits),
        **limits,
        **_paths(security),
        "Ulimits": rlimits,
        "RestartPolicy": {"Name": "no"},
        "LogConfig": {"Type": log_driver, "Config": dict(_LOG_OPTIONS)},
        **cgroup_parent(container.pod.spec.cgroup_parent, traits),
        **user_namespace(traits),
    }
    if oci_runtime:
        host["Runtime"] = oci_runtime
    config: dict[str, Any] = {
        "Image": resolved.image,
        "User": f"{resolved.user.uid}:{resolved.user.gid}",
        "Env": _environment(container),
        "WorkingDir": spec.working_dir or container.image.working_dir or "/",
        "Tty": spec.tty,
        "OpenStdin": spec.stdin,
        "StdinOnce": spec.stdin and spec.stdin_once,
        "Healthcheck": {"Test": ["NONE"]},
        "Labels": naming.labels(node_uuid, naming.CONTAINER_KIND, container.id, container.pod.id),
        "HostConfig": host,
    }
    if spec.command:
        config["Entrypoint"] = list(spec.command)
    if spec.command or spec.args:
        config["Cmd"] = list(spec.args)
    return Built(config=config, granted=granted, notes=notes + rlimit_notes)


def merge_limits(wanted: Resources, traits: EngineTraits) -> tuple[Resources, dict[str, Any]]:
    """The limits of an update: what will be in force, and the SDK's arguments. Raises as `build_container` does."""
    granted, limits, _ = _resources(wanted, traits)
    names = {
        "CpuPeriod": "cpu_period",
        "CpuQuota": "cpu_quota",
        "CpuShares": "cpu_shares",
        "CpusetCpus": "cpuset_cpus",
        "CpusetMems": "cpuset_mems",
        "Memory": "mem_limit",
        "MemorySwap": "memswap_limit",
    }
    return granted, {names[key]: value for key, value in limits.items() if key in names}


def _namespaces(container: ContainerRef) -> dict[str, Any]:
    pod = container.pod
    pause = f"container:{naming.engine_name(pod.id)}"
    spaces = container.spec.security.namespaces
    if spaces.user is not None and spaces.user.mode is NamespaceMode.POD:
        raise NotSupported("the Docker runtime has no user namespaces per pod; set hostUsers: true or route elsewhere")
    host_network = pod.spec.uses_host_network
    if spaces.pid is NamespaceMode.TARGET and not spaces.target_id:
        raise InvalidRequest("a target PID namespace needs the id of the target container")
    pid = {
        NamespaceMode.POD: pause,
        NamespaceMode.CONTAINER: "",
        NamespaceMode.NODE: "host",
        NamespaceMode.TARGET: f"container:{naming.engine_name(spaces.target_id)}",
    }[spaces.pid]
    if spaces.pid is NamespaceMode.POD and pod.spec.security.namespaces.pid is NamespaceMode.NODE:
        pid = "host"  # the pause has no namespace of its own to share
    return {
        "NetworkMode": "host" if host_network else pause,
        "IpcMode": "host" if pod.spec.security.namespaces.ipc is NamespaceMode.NODE else pause,
        "PidMode": pid,
        "UTSMode": "host" if host_network else "",
    }


def _environment(container: ContainerRef) -> list[str]:
    texts = []
    for variable in environment(container):
        try:
            texts.append(f"{variable.key}={variable.value.decode('utf-8')}")
        except UnicodeDecodeError:
            raise NotSupported(
                f"environment variable {variable.key} is not UTF-8, which the Docker Engine cannot carry",
            ) from None
    return texts


def _resources(wanted: Resources, traits: EngineTraits) -> tuple[Resources, dict[str, Any], tuple[str, ...]]:
    """The limits granted, their fields in HostConfig, and notes."""
    oom, notes = clamp_oom_score(wanted.oom_score_adj, traits)
    limits: dict[str, Any] = {"OomScoreAdj": oom}
    fields = {
        "CpuPeriod": wanted.cpu_period_us,
        "CpuQuota": wanted.cpu_quota_us,
        "CpuShares": wanted.cpu_shares,
        "CpusetCpus": wanted.cpuset_cpus,
        "CpusetMems": wanted.cpuset_mems,
        "Memory": wanted.memory_limit_bytes,
    }
    limits.update({key: value for key, value in fields.items() if value})
    swap = 0
    if wanted.memory_limit_bytes > 0:
        # The engine's default would be as much swap again; Kubernetes means none unless it says how much.
        swap = wanted.memory_swap_limit_bytes or wanted.memory_limit_bytes
        if traits.swap_limit:
            limits["MemorySwap"] = swap
        else:
            swap = 0
            notes += ("swap is not limited: this kernel does not account swap to containers",)
    return replace(wanted, oom_score_adj=oom, memory_swap_limit_bytes=swap), limits, notes


def _rlimits(
    wanted: dict[str, tuple[int, int]],
    traits: EngineTraits,
) -> tuple[list[dict[str, Any]], tuple[str, ...]]:
    rows, notes = [], []
    for name, (soft, hard) in sorted(wanted.items()):
        cap = traits.rlimit_caps.get(name, hard)
        if hard > cap:
            notes.append(f"limit {name} is {cap} instead of {hard}: the engine lacks CAP_SYS_RESOURCE")
        rows.append({"Name": name, "Soft": min(soft, cap), "Hard": min(hard, cap)})
    return rows, tuple(notes)


def _capabilities(wanted: Capabilities) -> dict[str, list[str]]:
    if wanted.add_ambient:
        raise NotSupported("the Docker Engine has no ambient capabilities")
    names = capability_names(wanted)
    return {"CapAdd": list(names.add), "CapDrop": list(names.drop)}


def _security_options(security: ContainerSecurity, seccomp_json: str, traits: EngineTraits) -> list[str]:
    options = selinux_options(security.selinux, traits)
    if security.no_new_privs:
        options.append("no-new-privileges")
    if not security.privileged:  # a privileged container has neither filter nor profile, as everywhere else
        options += _seccomp(security.seccomp, seccomp_json, traits)
        options += _apparmor(security.apparmor, traits)
    return options


def _seccomp(profile: SecurityProfile | None, text: str, traits: EngineTraits) -> list[str]:
    if profile is None or profile.type is ProfileType.UNCONFINED:
        return ["seccomp=unconfined"] if traits.seccomp else []
    if not traits.seccomp:
        raise NotSupported("this Docker Engine has no seccomp, so the profile that was asked for cannot be applied")
    if profile.type is ProfileType.RUNTIME_DEFAULT:
        return []
    return [f"seccomp={text}"]


def _apparmor(profile: SecurityProfile | None, traits: EngineTraits) -> list[str]:
    if profile is None or profile.type is ProfileType.RUNTIME_DEFAULT:
        return []
    if profile.type is ProfileType.UNCONFINED:
        return ["apparmor=unconfined"] if traits.apparmor else []
    if not _APPARMOR.fullmatch(profile.localhost_ref):
        raise InvalidRequest(f"{profile.localhost_ref!r} is not the name of an AppArmor profile")
    if not traits.apparmor:
        raise NotSupported(f"AppArmor profile {profile.localhost_ref} cannot be applied: this host has no AppArmor")
    return [f"apparmor={profile.localhost_ref}"]


def _paths(security: ContainerSecurity) -> dict[str, list[str]]:
    """Masked and read-only paths; left out where the engine's own default is meant."""
    if security.privileged:
        return {"MaskedPaths": [], "ReadonlyPaths": []}
    rows = {"MaskedPaths": security.masked_paths, "ReadonlyPaths": security.readonly_paths}
    return {key: list(checked_paths(value)) for key, value in rows.items() if value is not None}


def _pod_file_mounts(container: ContainerRef, files: dict[str, str]) -> list[dict[str, Any]]:
    """The pod's resolv.conf, hosts and hostname, except where the container brings its own.

    They are shared by the pod's containers, and as writable as their root file system.
    """
    own = {posixpath.normpath(mount.container_path) for mount in container.spec.mounts}
    readonly = container.spec.security.readonly_rootfs
    return [
        {"Type": "bind", "Source": source, "Target": target, "ReadOnly": readonly}
        for target, source in files.items()
        if target not in own
    ]


def _mount(mount: Mount, source: str, traits: EngineTraits) -> dict[str, Any]:
    if not mount.container_path.startswith("/"):
        raise InvalidRequest(f"container path {mount.container_path!r} of a mount is not absolute")
    if mount.uid_mappings or mount.gid_mappings:
        raise NotSupported(f"mount {mount.container_path} asks for id mapping, which the Docker Engine cannot do")
    if mount.selinux_relabel and traits.selinux:
        raise NotSupported(f"mount {mount.container_path} asks for SELinux relabelling; label the host path instead")
    if mount.image is not None and not mount.readonly:
        raise InvalidRequest(f"image volume {mount.container_path} must be read-only")
    bind: dict[str, Any] = {"Propagation": _PROPAGATION[mount.propagation]}
    if mount.recursive_readonly:
        if not mount.readonly:
            raise InvalidRequest(f"mount {mount.container_path} is recursively read-only but not read-only")
        if mount.propagation is not Propagation.PRIVATE:
            raise InvalidRequest(f"mount {mount.container_path} is recursively read-only but not private")
        if not traits.recursive_read_only:
            raise NotSupported(
                f"mount {mount.container_path} asks to be recursively read-only: that needs Docker Engine 25 and an "
                "OCI runtime with the mount option rro",
            )
        bind["ReadOnlyForceRecursive"] = True
    elif mount.readonly and traits.api >= (1, 44):
        bind["ReadOnlyNonRecursive"] = True  # newer engines would make it recursive where they can
    return {
        "Type": "bind",
        "Source": source,
        "Target": mount.container_path,
        "ReadOnly": mount.readonly,
        "BindOptions": bind,
    }


def _device(device: Device) -> dict[str, str]:
    if not set(device.permissions) <= set("rwm"):
        raise InvalidRequest(f"permissions {device.permissions!r} of device {device.host_path} are not a subset of rwm")
    return {
        "PathOnHost": device.host_path,
        "PathInContainer": device.container_path or device.host_path,
        "CgroupPermissions": device.permissions or "rwm",
    }


def _cdi(names: tuple[str, ...], traits: EngineTraits) -> list[dict[str, Any]]:
    if not names:
        return []
    for name in names:
        if not _CDI.fullmatch(name):
            raise InvalidRequest(f"{name!r} is not a CDI device name (vendor/class=device)")
    if not traits.cdi:
        raise NotSupported("CDI devices need Docker Engine 25 or newer with CDI enabled")
    return [{"Driver": "cdi", "DeviceIDs": list(names)}]
