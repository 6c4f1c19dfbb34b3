"""Whether pods can be attached, and what to do where not: every reason that the NetworkReady condition can have."""

from __future__ import annotations

import shutil
from collections.abc import Iterable

from dispatcher.api import NetworkStatus
from dispatcher.model import NetworkRoute
from dispatcher_cni.chain import Chain
from dispatcher_cni.config import CniConfig
from dispatcher_cni.conflist import NetworkConfig
from dispatcher_cni.default_network import SOURCE, find_collision
from dispatcher_cni.errors import PluginFailed, PluginMissing
from dispatcher_cni.runner import PluginRunner

NOT_LOOKED = NetworkStatus(ready=False, reason="Starting", message="The network configuration is being read.")


def no_network(config: CniConfig, problems: tuple[str, ...]) -> NetworkStatus:
    """The condition of a node without a usable configuration."""
    folders = ", ".join(str(folder) for folder in config.conf_dirs)
    if problems:
        message = " ".join((*problems, "Mend the file, or remove it."))
        return NetworkStatus(ready=False, reason="BadNetworkConfig", message=message)
    return NetworkStatus(
        ready=False,
        reason="NoNetworkConfig",
        message=(
            f"There is no network configuration in {folders}: install a CNI network there, or allow the built-in one "
            f"with plugins.cni.default_network.allow."
        ),
    )


def find_missing(network: NetworkConfig, runner: PluginRunner) -> NetworkStatus | None:
    """The condition of a network some of whose executables are not there; None where all are."""
    missing = []
    for name in network.executables:
        try:
            runner.find(name)
        except PluginMissing:
            missing.append(name)
    if not missing:
        return None
    return NetworkStatus(
        ready=False,
        reason="PluginMissing",
        message=(
            f"The network {network.name} ({network.source}) needs {', '.join(missing)}, not found in "
            f"{', '.join(runner.bin_dirs)}: install the plugins (Debian: containernetworking-plugins), or correct "
            f"plugins.cni.bin_dirs."
        ),
    )


def find_default_network_fault(
    network: NetworkConfig, config: CniConfig, routes: Iterable[NetworkRoute]
) -> NetworkStatus | None:
    """What keeps the built-in network from working on this host; None for any other network."""
    if network.source != SOURCE:
        return None
    if shutil.which("iptables", path=config.path) is None:
        return NetworkStatus(
            ready=False,
            reason="ToolMissing",
            message=f"The built-in network needs iptables, which is not in {config.path}: install it.",
        )
    collision = find_collision(network, routes)
    if collision:
        return NetworkStatus(
            ready=False,
            reason="SubnetCollision",
            message=f"{collision} Choose another range in plugins.cni.default_network.subnets.",
        )
    return None


async def examine(
    network: NetworkConfig, *, config: CniConfig, runner: PluginRunner, chain: Chain, routes: Iterable[NetworkRoute]
) -> NetworkStatus:
    """Find out whether a network can be used: its executables, their versions, the host, and STATUS."""
    fault = find_missing(network, runner) or find_default_network_fault(network, config, routes)
    if fault is not None:
        return fault
    try:
        for name in network.types:
            speaks = await runner.versions(name)
            if network.cni_version not in speaks:
                return NetworkStatus(
                    ready=False,
                    reason="PluginVersion",
                    message=(
                        f"The network {network.name} ({network.source}) asks for CNI {network.cni_version}, but the "
                        f"plugin {name} speaks {', '.join(speaks)}: change cniVersion, or install another version."
                    ),
                )
        refusal = await chain.status(network)
    except (PluginFailed, PluginMissing) as error:
        return NetworkStatus(ready=False, reason="PluginFailed", message=error.message)
    if refusal is not None:
        return NetworkStatus(ready=False, reason="PluginNotReady", message=refusal.message)
    return NetworkStatus(ready=True, message=f"Pods get the network {network.name} ({network.source}).")
