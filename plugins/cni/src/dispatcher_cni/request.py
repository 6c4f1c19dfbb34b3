"""What a plugin gets on its standard input and in its environment. Pure."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from dispatcher_cni.arguments import join_arguments
from dispatcher_cni.conflist import NetworkConfig, declared_capabilities
from dispatcher_cni.plan import AttachmentPlan


def make_input(
    network: NetworkConfig,
    plugin: Mapping[str, Any],
    *,
    capabilities: Mapping[str, Any] | None = None,
    previous: Mapping[str, Any] | None = None,
) -> bytes:
    """Derive the request for one plugin of a network: its own configuration, completed as the specification says.

    `capabilities` are cut down to what this plugin declares. `previous` is a result, None at the first ADD of a chain.
    """
    request = {key: value for key, value in plugin.items() if key not in {"prevResult", "runtimeConfig"}}
    request |= {"name": network.name, "cniVersion": network.cni_version}
    given = capabilities or {}
    wanted = {name: given[name] for name in declared_capabilities(plugin) if name in given}
    if wanted:
        request["runtimeConfig"] = wanted
    if previous is not None:
        request["prevResult"] = previous
    return _to_bytes(request)


def make_gc_input(network: NetworkConfig, plugin: Mapping[str, Any], valid: Sequence[tuple[str, str]]) -> bytes:
    """Derive the request for GC: `valid` are the (container id, interface) pairs that are to stay."""
    attachments = [{"containerID": container, "ifname": interface} for container, interface in valid]
    # The specification and libcni differ in the key's name; plugins read either.
    request = {"cni.dev/valid-attachments": attachments, "cni.dev/attachments": attachments}
    return _to_bytes({**plugin, **request, "name": network.name, "cniVersion": network.cni_version})


def make_version_input(version: str) -> bytes:
    """Derive the request for VERSION."""
    return _to_bytes({"cniVersion": version})


def make_environment(
    command: str, *, bin_dirs: Sequence[str], plan: AttachmentPlan | None = None, netns_path: str | None = None
) -> dict[str, str]:
    """Return the CNI_ variables of one call. `netns_path` overrides the plan's; "" says that the namespace is gone."""
    environment = {"CNI_COMMAND": command, "CNI_PATH": ":".join(bin_dirs)}
    if plan is not None:
        environment |= {
            "CNI_CONTAINERID": plan.container_id,
            "CNI_NETNS": plan.netns_path if netns_path is None else netns_path,
            "CNI_IFNAME": plan.interface,
            "CNI_ARGS": join_arguments(plan.arguments),
        }
    return environment


def _to_bytes(request: Mapping[str, Any]) -> bytes:
    return json.dumps(request, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode("utf-8")
