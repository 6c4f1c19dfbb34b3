"""From a pod to the engine's configuration of its pause container. Pure; golden-file tested."""

from __future__ import annotations

import re
from typing import Any

from dispatcher.api import PodRef
from dispatcher.errors import InvalidRequest, NotSupported
from dispatcher.model import NamespaceMode, SelinuxOptions
from dispatcher_docker_shim import naming
from dispatcher_docker_shim.traits import EngineTraits

NETNS_TARGET = "/netns"
PAUSE_OOM_SCORE = -998
PAUSE_CPU_SHARES = 2

# What the pause needs to enter a namespace and to become nobody; it drops all of them before it waits.
_CAPABILITIES = ("SETGID", "SETPCAP", "SETUID", "SYS_ADMIN")
_IPC_SYSCTL = re.compile(r"kernel\.(sem|msg[a-z_]+|shm[a-z_]+)|fs\.mqueue\.[a-z_]+")
_SELINUX_PART = re.compile(r"[A-Za-z0-9_.:,-]{1,128}")
_SLICE = re.compile(r"[A-Za-z0-9:_.\\@-]+\.slice")


def build_pause(
    pod: PodRef,
    *,
    image: str,
    node_uuid: str,
    traits: EngineTraits,
    oci_runtime: str = "",
    shm_bytes: int = 64 * 1024 * 1024,
) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Return the create request of a pod's pause container, and notes on what was adjusted.

    Raises:
        InvalidRequest: a sysctl that is neither the network's (set by the core in its namespace) nor the IPC
            namespace's, or a cgroup parent that the engine's driver cannot use.
        NotSupported: a user namespace of the pod's own.
    """
    spec = pod.spec
    spaces = spec.security.namespaces
    if spaces.user is not None and spaces.user.mode is NamespaceMode.POD:
        raise NotSupported("the Docker runtime has no user namespaces per pod; set hostUsers: true or route elsewhere")
    oom, notes = clamp_oom_score(PAUSE_OOM_SCORE, traits)
    host_network = spec.uses_host_network
    host: dict[str, Any] = {
        "NetworkMode": "host" if host_network else "none",
        "IpcMode": "host" if spaces.ipc is NamespaceMode.NODE else "shareable",
        "PidMode": "host" if spaces.pid is NamespaceMode.NODE else "",
        "UTSMode": "host" if host_network else "",
        "ReadonlyRootfs": True,
        "CapDrop": ["ALL"],
        "CapAdd": list(_CAPABILITIES),
        "SecurityOpt": selinux_options(spec.security.selinux, traits),
        "OomScoreAdj": oom,
        "CpuShares": PAUSE_CPU_SHARES,
        "RestartPolicy": {"Name": "no"},
        "LogConfig": {"Type": "none", "Config": {}},
        "Mounts": [],
        "Sysctls": _ipc_sysctls(pod),
        **cgroup_parent(spec.cgroup_parent, traits),
        **user_namespace(traits),
    }
    if spaces.ipc is not NamespaceMode.NODE:
        host["ShmSize"] = shm_bytes
    if oci_runtime:
        host["Runtime"] = oci_runtime
    command: list[str] = []
    if not host_network:
        if pod.attachment is None:
            raise InvalidRequest(f"pod {pod.id} has neither a network namespace nor the host's network")
        source = pod.attachment.netns_path
        host["Mounts"] = [{"Type": "bind", "Source": source, "Target": NETNS_TARGET, "ReadOnly": True}]
        command = [NETNS_TARGET]
    config = {
        "Image": image,
        "Hostname": "" if host_network else spec.hostname,
        "User": "0:0",
        "Entrypoint": ["/pause"],
        "Cmd": command,
        "Env": [],
        "WorkingDir": "/",
        "Healthcheck": {"Test": ["NONE"]},
        "NetworkDisabled": False,
        "Labels": naming.labels(node_uuid, naming.POD_KIND, pod.id, pod.id),
        "HostConfig": host,
    }
    return config, notes


def clamp_oom_score(wanted: int, traits: EngineTraits) -> tuple[int, tuple[str, ...]]:
    """The oom_score_adj that the engine can really set, with a note when it is another one."""
    if traits.oom_floor is None or wanted >= traits.oom_floor:
        return wanted, ()
    floor = traits.oom_floor
    return floor, (f"oom_score_adj is {floor} instead of {wanted}: the engine lacks CAP_SYS_RESOURCE",)


def cgroup_parent(path: str, traits: EngineTraits) -> dict[str, str]:
    """The engine's CgroupParent: a path with cgroupfs, the last slice of the path with systemd."""
    if not path:
        return {}
    if "\0" in path or ".." in path.split("/"):
        raise InvalidRequest(f"cgroup parent {path!r} is not a plain path")
    if traits.cgroup_driver != "systemd":
        if path.rstrip("/").endswith(".slice") and not path.startswith("/"):
            raise InvalidRequest(f"cgroup parent {path!r} is a systemd slice, but the engine's driver is cgroupfs")
        return {"CgroupParent": path}
    last = path.rstrip("/").rpartition("/")[2]
    if not _SLICE.fullmatch(last):
        raise InvalidRequest(f"cgroup parent {path!r} does not end in a systemd slice, as the engine's driver wants")
    return {"CgroupParent": last}


def user_namespace(traits: EngineTraits) -> dict[str, str]:
    """Leave a remapped engine's user namespace: it could not enter namespaces that the host owns."""
    return {"UsernsMode": "host"} if traits.userns_remap else {}


def selinux_options(options: SelinuxOptions | None, traits: EngineTraits) -> list[str]:
    """The label options for SELinux, in the engine's order. Nothing without SELinux on the host."""
    if options is None or not traits.selinux:
        return []
    parts = {"user": options.user, "role": options.role, "type": options.type, "level": options.level}
    for key, value in parts.items():
        if value and not _SELINUX_PART.fullmatch(value):
            raise InvalidRequest(f"SELinux {key} {value!r} is not a label part")
    return [f"label={key}:{value}" for key, value in parts.items() if value]


def _ipc_sysctls(pod: PodRef) -> dict[str, str]:
    """Sysctls of the IPC namespace; the network's are set elsewhere, others have no namespace of the pod."""
    chosen = {}
    for raw, value in pod.spec.sysctls.items():
        name = raw.replace("/", ".")
        if name.startswith("net."):
            if pod.spec.uses_host_network:
                raise InvalidRequest(f"sysctl {raw} would change the host's network, which this pod shares")
            continue
        if not _IPC_SYSCTL.fullmatch(name):
            raise InvalidRequest(f"sysctl {raw} does not belong to a namespace of the pod")
        if pod.spec.security.namespaces.ipc is NamespaceMode.NODE:
            raise InvalidRequest(f"sysctl {raw} would change the host's IPC namespace, which this pod shares")
        if not value.isprintable() or len(value) > 256:
            raise InvalidRequest(f"sysctl {raw} has a value that is not a short printable text")
        chosen[name] = value
    return chosen
