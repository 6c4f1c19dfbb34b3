"""The plan of one attachment: all that ADD runs with, as plain JSON that the core keeps in the pod's record. Pure.

DEL may run months later, under a newer version of this plugin and another configuration of the node: it reads the plan
and nothing else. So a plan carries whole plugin configurations, not a reference to a file.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from dispatcher.errors import NetworkFailed
from dispatcher.model import NetworkPlan
from dispatcher_cni.arguments import Arguments
from dispatcher_cni.conflist import NetworkConfig

PROVIDER = "cni"
SCHEMA = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class AttachmentPlan:
    """One pod, one network, one interface."""

    container_id: str
    interface: str
    netns_path: str
    network: NetworkConfig
    arguments: Arguments
    capabilities: Mapping[str, Any]
    bin_dirs: tuple[str, ...]

    def to_network_plan(self) -> NetworkPlan:
        """Return the form that the core stores."""
        network = self.network
        return NetworkPlan(
            plugin=PROVIDER,
            netns_path=self.netns_path,
            content={
                "schema": SCHEMA,
                "containerId": self.container_id,
                "interface": self.interface,
                "network": {
                    "name": network.name,
                    "cniVersion": network.cni_version,
                    "disableCheck": network.disable_check,
                    "disableGC": network.disable_gc,
                    "source": network.source,
                    "plugins": [dict(plugin) for plugin in network.plugins],
                },
                "arguments": [list(pair) for pair in self.arguments],
                "capabilities": dict(self.capabilities),
                "binDirs": list(self.bin_dirs),
            },
        )

    @classmethod
    def from_network_plan(cls, plan: NetworkPlan) -> AttachmentPlan:
        """Read a stored plan back.

        Raises:
            NetworkFailed: another provider made it, or a newer version of this one.
        """
        content = plan.content
        if plan.plugin != PROVIDER or content.get("schema") != SCHEMA:
            raise NetworkFailed(
                f"The pod was attached by {plan.plugin!r}, schema {content.get('schema')!r}, which this version of the "
                f"provider {PROVIDER!r} cannot read: start the version that attached it to detach it."
            )
        network = content["network"]
        return cls(
            container_id=content["containerId"],
            interface=content["interface"],
            netns_path=plan.netns_path,
            network=NetworkConfig(
                name=network["name"],
                cni_version=network["cniVersion"],
                plugins=tuple(network["plugins"]),
                disable_check=network["disableCheck"],
                disable_gc=network["disableGC"],
                source=network["source"],
            ),
            arguments=tuple((key, value) for key, value in content["arguments"]),
            capabilities=content["capabilities"],
            bin_dirs=tuple(content["binDirs"]),
        )
