"""The section `plugins.cni` of dispatcher.yaml."""

from __future__ import annotations

import ipaddress
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, field_validator, model_validator

from dispatcher_cni.capabilities import ALL, AnnotationRules


def _absolute(path: Path) -> Path:
    if not path.is_absolute() or ":" in str(path):
        raise ValueError("must be an absolute path without a colon")
    return path


AbsolutePath = Annotated[Path, AfterValidator(_absolute)]


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class DefaultNetwork(_Section):
    """The bridge network for a node that has no network configuration. Off unless allowed here."""

    allow: bool = False
    name: str = Field(default="dispatcher", pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,62}$")
    bridge: str = Field(default="cri0", pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,14}$")
    subnets: tuple[str, ...] = Field(default=("10.222.0.0/16",), min_length=1, max_length=2)
    use_pod_cidr: bool = False
    mtu: int = Field(default=0, ge=0, le=65535)

    @field_validator("subnets")
    @classmethod
    def _one_per_family(cls, subnets: tuple[str, ...]) -> tuple[str, ...]:
        networks = [ipaddress.ip_network(subnet) for subnet in subnets]
        for network in networks:
            if network.num_addresses < 8:
                raise ValueError(f"{network} is too small for pods")
        if len({network.version for network in networks}) != len(networks):
            raise ValueError("give at most one range for IPv4 and one for IPv6")
        return tuple(str(network) for network in networks)


class AnnotationNamespaces(_Section):
    """The namespaces whose pods may use an annotation; "*" allows all of them."""

    namespaces: tuple[str, ...] = ()


class Annotations(_Section):
    """Which annotations of pods reach the network plugins."""

    bandwidth: AnnotationNamespaces = AnnotationNamespaces(namespaces=(ALL,))
    ips: AnnotationNamespaces = AnnotationNamespaces()
    mac: AnnotationNamespaces = AnnotationNamespaces()
    ip_ranges: AnnotationNamespaces = AnnotationNamespaces()

    def to_rules(self) -> AnnotationRules:
        """Return the form that decisions are made with."""
        return AnnotationRules(
            bandwidth=frozenset(self.bandwidth.namespaces),
            ips=frozenset(self.ips.namespaces),
            mac=frozenset(self.mac.namespaces),
            ip_ranges=frozenset(self.ip_ranges.namespaces),
        )


class CniConfig(_Section):
    """The whole section."""

    conf_dirs: tuple[AbsolutePath, ...] = Field(default=(Path("/etc/cni/net.d"),), min_length=1)
    bin_dirs: tuple[AbsolutePath, ...] = Field(default=(Path("/opt/cni/bin"), Path("/usr/lib/cni")), min_length=1)
    interface: str = Field(default="eth0", pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,14}$")
    plugin_timeout_s: float = Field(default=60.0, gt=0, le=600)
    stray_patience_s: float = Field(default=10.0, ge=0, le=600)
    rescan_s: float = Field(default=2.0, ge=0.05, le=600)
    status_s: float = Field(default=15.0, ge=0.05, le=3600)
    collect_garbage: bool = True
    skip_missing_plugins_on_delete: bool = False
    path: str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
    environment: Mapping[str, str] = Field(default_factory=dict)
    default_network: DefaultNetwork = DefaultNetwork()
    annotations: Annotations = Annotations()

    @model_validator(mode="after")
    def _own_variables(self) -> CniConfig:
        for name in self.environment:
            if name.startswith("CNI_") or name == "PATH" or not name.isidentifier():
                raise ValueError(f"environment: {name!r} cannot be set here")
        return self

    @classmethod
    def from_section(cls, section: Mapping[str, Any]) -> CniConfig:
        """Check a section. Raises pydantic's ValidationError, which is a ValueError."""
        return cls.model_validate(dict(section))
