"""The network of a node without a network configuration: one bridge, from the plugins that every distribution ships.

Used only where the operator allowed it. The chain ends in `firewall`, without which pods cannot reach each other on a
host that drops forwarded packets (every Docker host), even on one bridge.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable
from typing import Any

from dispatcher.model import NetworkRoute
from dispatcher_cni.config import DefaultNetwork
from dispatcher_cni.conflist import NetworkConfig

SOURCE = "the built-in default network"
_EVERYWHERE = {4: "0.0.0.0/0", 6: "::/0"}


def make_default_network(settings: DefaultNetwork, pod_cidrs: tuple[str, ...] = ()) -> NetworkConfig:
    """Build the network; with `use_pod_cidr` the node's own ranges take the place of the configured ones."""
    subnets = pod_cidrs if settings.use_pod_cidr and pod_cidrs else settings.subnets
    families = sorted({ipaddress.ip_network(subnet).version for subnet in subnets})
    bridge: dict[str, Any] = {
        "type": "bridge",
        "bridge": settings.bridge,
        "isGateway": True,
        "ipMasq": True,
        "hairpinMode": True,  # a pod reaches itself through its own host port or service
        "ipam": {
            "type": "host-local",
            "ranges": [[{"subnet": subnet}] for subnet in subnets],
            "routes": [{"dst": _EVERYWHERE[family]} for family in families],
        },
    }
    if settings.mtu:
        bridge["mtu"] = settings.mtu
    return NetworkConfig(
        name=settings.name,
        cni_version="1.0.0",
        plugins=(
            bridge,
            {"type": "portmap", "capabilities": {"portMappings": True}, "snat": True},
            {"type": "firewall"},
        ),
        source=SOURCE,
    )


def find_collision(network: NetworkConfig, routes: Iterable[NetworkRoute]) -> str:
    """Return a sentence on a host route that overlaps the network's ranges, or "".

    Routes over the network's own bridge are its own. The default route covers everything and counts for nothing.
    """
    bridge, *_ = network.plugins
    ranges = [ipaddress.ip_network(item["subnet"]) for group in bridge["ipam"]["ranges"] for item in group]
    for route in routes:
        taken = ipaddress.ip_network(route.destination)
        if taken.prefixlen == 0 or route.interface == bridge["bridge"]:
            continue
        for subnet in ranges:
            if subnet.version == taken.version and subnet.overlaps(taken):
                return f"The range {subnet} of the default network overlaps the host's route to {taken} ({route.interface})."
    return ""
