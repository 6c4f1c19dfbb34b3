"""What a pod asks for: the validated, typed form of CRI's PodSandboxConfig."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum

from dispatcher.model.resources import Resources
from dispatcher.model.security import NamespaceMode, PodSecurity


class Protocol(StrEnum):
    """Transport protocol of a port mapping."""

    TCP = "tcp"
    UDP = "udp"
    SCTP = "sctp"


@dataclass(frozen=True, slots=True, kw_only=True)
class PodMetadata:
    """Kubernetes identity of a sandbox. All strings are as received: never use one as a path or an argument."""

    name: str
    namespace: str
    uid: str
    attempt: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class DnsConfig:
    """Contents of the pod's resolv.conf."""

    servers: tuple[str, ...] = ()
    searches: tuple[str, ...] = ()
    options: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class PortMapping:
    """A declared port. `host_port` 0 means: not published on the host (CRI since Kubernetes 1.33)."""

    container_port: int
    host_port: int = 0
    protocol: Protocol = Protocol.TCP
    host_ip: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class PodSpec:
    """A sandbox as asked for. Labels and annotations are written by users: hostile, kept byte-identical.

    `dns` of None means that the request had no DNS config. `log_directory` is absolute, or "" for no logs.
    `cgroup_parent` is as the kubelet wrote it (a cgroupfs path, or a slice name under the systemd driver).
    """

    metadata: PodMetadata
    hostname: str = ""
    log_directory: str = ""
    dns: DnsConfig | None = None
    port_mappings: tuple[PortMapping, ...] = ()
    labels: Mapping[str, str] = field(default_factory=dict)
    annotations: Mapping[str, str] = field(default_factory=dict)
    has_linux: bool = True
    cgroup_parent: str = ""
    sysctls: Mapping[str, str] = field(default_factory=dict)
    security: PodSecurity = field(default_factory=PodSecurity)
    overhead: Resources | None = None
    resources: Resources | None = None
    runtime_handler: str = ""

    @property
    def uses_host_network(self) -> bool:
        """True where the pod shares the node's network namespace, so that no CNI plugin runs for it."""
        return self.security.namespaces.network is NamespaceMode.NODE
