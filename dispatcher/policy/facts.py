"""What a policy can ask about a pod and a container: flat, normalised values. Pure.

Labels and annotations are what users wrote; everything else comes from the kubelet. `PodFacts.without_user_input`
answers how a pod would look if its author had written nothing there.
"""

from __future__ import annotations

import posixpath
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import NewType

from dispatcher.model import ContainerSpec, Image, NamespaceMode, PodSpec, ProfileType

HostPath = NewType("HostPath", str)

_DEFAULT_REGISTRY = "docker.io"
_NO_SHARES = 2  # what the kubelet writes for "no CPU request"


@dataclass(frozen=True, slots=True, kw_only=True)
class PodFacts:
    """A pod as the sandbox phase knows it. Limits of None mean: unlimited. `qos` is "" where it cannot be told."""

    namespace: str = "default"
    name: str = "pod"
    uid: str = ""
    labels: Mapping[str, str] = field(default_factory=dict)
    annotations: Mapping[str, str] = field(default_factory=dict)
    handler: str = ""
    privileged: bool = False
    host_network: bool = False
    host_pid: bool = False
    host_ipc: bool = False
    userns: bool = False
    sysctls: tuple[str, ...] = ()
    qos: str = ""
    cpu_millis: int | None = None
    memory_bytes: int | None = None

    @property
    def host_namespaces(self) -> tuple[str, ...]:
        """The namespaces that the pod shares with the node, as Kubernetes spells them."""
        asked = (("hostNetwork", self.host_network), ("hostPID", self.host_pid), ("hostIPC", self.host_ipc))
        return tuple(name for name, is_shared in asked if is_shared)

    def without_user_input(self) -> PodFacts:
        """The same pod with no labels and no annotations."""
        return replace(self, labels={}, annotations={})


@dataclass(frozen=True, slots=True, kw_only=True)
class ContainerFacts:
    """A container as the container phase knows it, beside its pod.

    `images` are all names of its image, each with registry and tag or digest. `host_mounts` and `devices` hold each
    path as asked for and with links resolved. A privileged container has the capability "ALL".
    """

    images: tuple[str, ...] = ()
    privileged: bool = False
    capabilities: tuple[str, ...] = ()
    devices: tuple[HostPath | str, ...] = ()
    host_mounts: tuple[HostPath, ...] = ()
    seccomp_unconfined: bool = False
    runtime: str = ""


def facts_of_pod(pod: PodSpec) -> PodFacts:
    """Flatten a pod."""
    namespaces = pod.security.namespaces
    resources = pod.resources
    cpu = None
    if resources is not None and resources.cpu_quota_us > 0 and resources.cpu_period_us > 0:
        cpu = resources.cpu_quota_us * 1000 // resources.cpu_period_us
    memory = None
    if resources is not None and resources.memory_limit_bytes > 0:
        memory = resources.memory_limit_bytes
    return PodFacts(
        namespace=pod.metadata.namespace,
        name=pod.metadata.name,
        uid=pod.metadata.uid,
        labels=pod.labels,
        annotations=pod.annotations,
        handler=pod.runtime_handler,
        privileged=pod.security.privileged,
        host_network=namespaces.network is NamespaceMode.NODE,
        host_pid=namespaces.pid is NamespaceMode.NODE,
        host_ipc=namespaces.ipc is NamespaceMode.NODE,
        userns=namespaces.user is not None and namespaces.user.mode is NamespaceMode.POD,
        sysctls=tuple(sorted(pod.sysctls)),
        qos=_qos(pod, cpu, memory),
        cpu_millis=cpu,
        memory_bytes=memory,
    )


def _qos(pod: PodSpec, cpu: int | None, memory: int | None) -> str:
    """The kubelet tells the class by the name of the pod's cgroup only; without one, only "no limits" is telling."""
    parent = pod.cgroup_parent
    if "besteffort" in parent:
        return "besteffort"
    if "burstable" in parent:
        return "burstable"
    if "kubepods" in parent:
        return "guaranteed"
    resources = pod.resources
    if resources is not None and cpu is None and memory is None and resources.cpu_shares <= _NO_SHARES:
        return "besteffort"
    return ""


def facts_of_container(
    container: ContainerSpec, image: Image, runtime: str, resolve: Callable[[str], str] = posixpath.normpath
) -> ContainerFacts:
    """Flatten a container. `resolve` follows the links of a host path; the default only tidies it."""
    security = container.security
    # The name that the user wrote counts; beside it, all names under which the same bytes are known here.
    named = [container.user_image, *image.repo_tags, *image.repo_digests]
    added = ("ALL",) if security.privileged else tuple(map(_capability, security.capabilities.add))
    return ContainerFacts(
        images=tuple(dict.fromkeys(normal_image(name) for name in named if name)),
        privileged=security.privileged,
        capabilities=added + tuple(map(_capability, security.capabilities.add_ambient)),
        devices=(*_paths((device.host_path for device in container.devices), resolve), *container.cdi_devices),
        host_mounts=_paths((mount.host_path for mount in container.mounts if mount.image is None), resolve),
        seccomp_unconfined=security.privileged
        or security.seccomp is None
        or security.seccomp.type is ProfileType.UNCONFINED,
        runtime=runtime,
    )


def _capability(name: str) -> str:
    return name.upper().removeprefix("CAP_")


def _paths(paths: Iterable[str], resolve: Callable[[str], str]) -> tuple[HostPath, ...]:
    found = [tidy_path(form) for path in paths for form in (path, resolve(path))]
    return tuple(dict.fromkeys(found))


def tidy_path(path: str) -> HostPath:
    """Normalise a path. normpath alone keeps two slashes at the beginning, and //etc would be no /etc."""
    return HostPath(posixpath.normpath("/" + path.lstrip("/")))


def normal_image(reference: str) -> str:
    """Spell an image reference in full, such as `docker.io/library/busybox:latest`.

    Docker's defaults are what every runtime fills in: registry docker.io, there `library/`, and the tag latest.
    """
    name, at, digest = reference.partition("@")
    head, slash, rest = name.partition("/")
    has_registry = bool(slash) and ("." in head or ":" in head or head == "localhost")
    registry, path = (head, rest) if has_registry else (_DEFAULT_REGISTRY, name)
    if registry == "index.docker.io":
        registry = _DEFAULT_REGISTRY
    if registry == _DEFAULT_REGISTRY and "/" not in path:
        path = f"library/{path}"
    if ":" not in path.rpartition("/")[2] and not at:
        path += ":latest"
    return f"{registry}/{path}{at}{digest}"
