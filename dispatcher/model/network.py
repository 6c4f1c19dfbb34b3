"""Network facts of a pod: the plan that is recorded before CNI runs, and what came of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True, kw_only=True)
class NetworkPlan:
    """Everything that ADD will run with, so that DEL runs with the same after a crash or a changed config.

    `content` belongs to the network plugin: plain JSON, opaque to the core, stored in the pod's record.
    """

    plugin: str
    netns_path: str
    content: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Route:
    """One route inside the pod. `gateway` is "" for an on-link route; `interface` is "" where it is not known."""

    destination: str
    gateway: str = ""
    interface: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Interface:
    """One interface of the pod's namespace. `addresses` are in CIDR form, both families, in CNI's order."""

    name: str
    mac: str = ""
    mtu: int = 0
    addresses: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Attachment:
    """The result of attaching a pod to its network.

    `ips` are plain addresses, the primary one first. `result` is the plugin's own cached result (plain JSON).
    """

    netns_path: str
    ips: tuple[str, ...] = ()
    interfaces: tuple[Interface, ...] = ()
    routes: tuple[Route, ...] = ()
    dns_servers: tuple[str, ...] = ()
    dns_searches: tuple[str, ...] = ()
    dns_options: tuple[str, ...] = ()
    result: Mapping[str, Any] = field(default_factory=dict)
