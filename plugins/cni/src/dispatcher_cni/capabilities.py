"""Capability arguments: what a pod's own wishes become for the plugins that ask for them. Pure.

Host ports, DNS and the node's pod range come from typed fields of the request. Everything else comes from annotations,
which users write: each kind works only in namespaces that the operator listed, and only in the types below.
"""

from __future__ import annotations

import ipaddress
import json
import re
from collections.abc import Callable, Mapping
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from typing import Any

from dispatcher.errors import InvalidRequest, PolicyRefused
from dispatcher.model import PodSpec, PortMapping
from dispatcher_cni.quantity import parse_quantity

INGRESS_BANDWIDTH = "kubernetes.io/ingress-bandwidth"
EGRESS_BANDWIDTH = "kubernetes.io/egress-bandwidth"
IPS = "cri-dispatcher.io/network-ips"
MAC = "cri-dispatcher.io/network-mac"
IP_RANGES = "cri-dispatcher.io/network-ip-ranges"

_MIN_BITS_PER_S = 1_000
_MAX_BITS_PER_S = 10**15
_BURST_BITS = 2**31 - 1  # as the kubelet's own shaping had it: the plugins refuse 4 GiB and more
_MAX_ENTRIES = 16
_MAC = re.compile(r"[0-9A-Fa-f]{2}(?::[0-9A-Fa-f]{2}){5}")
ALL = "*"


@dataclass(frozen=True, slots=True, kw_only=True)
class AnnotationRules:
    """The namespaces in which each kind of annotation works; "*" stands for all of them."""

    bandwidth: frozenset[str] = frozenset({ALL})
    ips: frozenset[str] = frozenset()
    mac: frozenset[str] = frozenset()
    ip_ranges: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True, kw_only=True)
class Capabilities:
    """Arguments by capability, only those that some plugin declares; `unheard` names wishes that no plugin takes."""

    arguments: Mapping[str, Any]
    unheard: tuple[str, ...] = ()


def make_capabilities(
    pod: PodSpec, *, rules: AnnotationRules, pod_cidrs: tuple[str, ...], declared: AbstractSet[str]
) -> Capabilities:
    """Work out the capability arguments of a pod for a network whose plugins declare `declared`.

    An annotation for an address or a MAC that no plugin would honour is refused, since the pod would run with another
    one. A host port or a bandwidth that no plugin takes is common on clusters where something else serves it: it
    comes back in `unheard`, to be logged.

    Raises:
        InvalidRequest: a value that is not of its type, or an address wish that this network cannot meet.
        PolicyRefused: the annotation is not allowed in this namespace.
    """
    wishes: dict[str, Any] = {}
    for capability, allowed, keys, make in (
        ("bandwidth", rules.bandwidth, (INGRESS_BANDWIDTH, EGRESS_BANDWIDTH), _bandwidth),
        ("ips", rules.ips, (IPS,), _ips),
        ("mac", rules.mac, (MAC,), _mac),
        ("ipRanges", rules.ip_ranges, (IP_RANGES,), _ip_ranges),
    ):
        used = [key for key in keys if key in pod.annotations]
        if used:
            _require_allowed(used[0], pod.metadata.namespace, allowed, capability)
            wishes[capability] = _typed(used, pod.annotations, make)
            if capability != "bandwidth" and capability not in declared:
                raise InvalidRequest(
                    f"The annotation {used[0]} cannot work: no plugin of this node's network has the capability "
                    f"{capability}."
                )
    ports = _port_mappings(pod.port_mappings)
    if ports:
        wishes["portMappings"] = ports
    unheard = tuple(name for name in wishes if name not in declared)
    if pod.dns is not None:
        dns = {"servers": pod.dns.servers, "searches": pod.dns.searches, "options": pod.dns.options}
        wishes["dns"] = {key: list(values) for key, values in dns.items()}
    if pod_cidrs and "ipRanges" not in wishes:
        wishes["ipRanges"] = [[{"subnet": cidr}] for cidr in pod_cidrs]
    if pod.cgroup_parent:
        wishes["cgroupPath"] = pod.cgroup_parent
    wishes["io.kubernetes.cri.pod-annotations"] = dict(pod.annotations)
    return Capabilities(arguments={name: wishes[name] for name in sorted(wishes) if name in declared}, unheard=unheard)


def parse_pod_cidrs(text: str) -> tuple[str, ...]:
    """Read the node's pod ranges, "10.1.0.0/24,fd00::/64".

    Raises:
        ValueError: a part is not a network.
    """
    return tuple(str(ipaddress.ip_network(part.strip(), strict=False)) for part in text.split(",") if part.strip())


def _require_allowed(key: str, namespace: str, allowed: frozenset[str], capability: str) -> None:
    if ALL not in allowed and namespace not in allowed:
        setting = {"ipRanges": "ip_ranges"}.get(capability, capability)
        raise PolicyRefused(
            f"The annotation {key} is not allowed in the namespace {namespace}; the operator lists namespaces in "
            f"plugins.cni.annotations.{setting}.",
            annotation=key,
        )


def _typed(keys: list[str], annotations: Mapping[str, str], make: Callable[[Mapping[str, str]], Any]) -> Any:
    try:
        return make({key: annotations[key] for key in keys})
    except (ValueError, TypeError, RecursionError) as error:
        raise InvalidRequest(f"The annotation {' or '.join(keys)} is wrong: {str(error)[:200]}.") from error


def _port_mappings(mappings: tuple[PortMapping, ...]) -> list[dict[str, Any]]:
    result: list[dict[str, Any]] = []
    for mapping in mappings:
        if not mapping.host_port:
            continue
        if not (0 < mapping.host_port < 65536 and 0 < mapping.container_port < 65536):
            raise InvalidRequest(f"Port {mapping.host_port} to {mapping.container_port} is not a mapping of ports.")
        entry: dict[str, Any] = {
            "hostPort": mapping.host_port,
            "containerPort": mapping.container_port,
            "protocol": mapping.protocol.value,
        }
        if mapping.host_ip:
            try:
                entry["hostIP"] = _address(mapping.host_ip)
            except ValueError as error:
                raise InvalidRequest(f"{mapping.host_ip[:80]!r} is not an address to publish a port on.") from error
        if entry not in result:
            result.append(entry)
    return result


def _bandwidth(values: Mapping[str, str]) -> dict[str, int]:
    result: dict[str, int] = {}
    for key, direction in ((INGRESS_BANDWIDTH, "ingress"), (EGRESS_BANDWIDTH, "egress")):
        if key in values:
            rate = parse_quantity(values[key])
            if not _MIN_BITS_PER_S <= rate <= _MAX_BITS_PER_S:
                raise ValueError(f"{values[key][:40]} is not between 1k and 1P bits a second")
            result |= {f"{direction}Rate": rate, f"{direction}Burst": _BURST_BITS}
    return result


def _ips(values: Mapping[str, str]) -> list[str]:
    parts = [part.strip() for part in values[IPS].split(",")]
    if len(parts) > _MAX_ENTRIES:
        raise ValueError(f"more than {_MAX_ENTRIES} addresses")
    return [str(ipaddress.ip_interface(_no_zone(part))) if "/" in part else _address(part) for part in parts]


def _no_zone(text: str) -> str:
    """An address with a zone ("fe80::1%eth0") is the only form with free text in it."""
    if "%" in text:
        raise ValueError(f"{text[:60]!r} has a zone")
    return text


def _address(text: str) -> str:
    return str(ipaddress.ip_address(_no_zone(text)))


def _mac(values: Mapping[str, str]) -> str:
    mac = values[MAC].lower()
    if not _MAC.fullmatch(mac) or int(mac[:2], 16) & 1 or mac == "00:00:00:00:00:00":
        raise ValueError(f"{mac[:40]!r} is not the address of one interface")
    return mac


def _ip_ranges(values: Mapping[str, str]) -> list[list[dict[str, str]]]:
    sets = json.loads(values[IP_RANGES])
    if not isinstance(sets, list) or not 0 < len(sets) <= _MAX_ENTRIES:
        raise ValueError("not a list of lists of ranges")
    result = []
    for ranges in sets:
        if not isinstance(ranges, list) or not 0 < len(ranges) <= _MAX_ENTRIES:
            raise ValueError("not a list of lists of ranges")
        result.append([_ip_range(item) for item in ranges])
    return result


def _ip_range(item: Any) -> dict[str, str]:
    known = {"subnet", "rangeStart", "rangeEnd", "gateway"}
    if not isinstance(item, dict) or not item.keys() <= known or "subnet" not in item:
        raise ValueError("a range has a subnet and may have rangeStart, rangeEnd and gateway")
    if not all(isinstance(value, str) for value in item.values()):
        raise ValueError("the values of a range are texts")
    subnet = ipaddress.ip_network(_no_zone(item["subnet"]))
    result = {"subnet": str(subnet)}
    for key in ("rangeStart", "rangeEnd", "gateway"):
        if key in item:
            address = ipaddress.ip_address(_no_zone(item[key]))
            if address not in subnet:
                raise ValueError(f"{key} {address} is not in {subnet}")
            result[key] = str(address)
    return result
