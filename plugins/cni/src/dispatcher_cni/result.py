"""Reading what plugins answer: results of every specification version, errors, versions. Pure.

A plugin's answer is checked before anything believes it: addresses must be addresses, indexes must point somewhere.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from dispatcher.errors import NetworkFailed
from dispatcher.model import Attachment, Interface, NetworkRoute
from dispatcher_cni.strict_json import load_object
from dispatcher_cni.versions import OLDEST, version_key

_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f]")
_QUOTE_LIMIT = 1000


@dataclass(frozen=True, slots=True, kw_only=True)
class PluginError:
    """What a plugin said of its failure. Codes below 100 are the specification's; 0 stands for none given."""

    code: int
    text: str


def parse_success(stdout: bytes, *, cni_version: str) -> dict[str, Any]:
    """Return the answer to ADD as it is to be handed to the next plugin and kept.

    Raises:
        ValueError: not a JSON object.
    """
    answer = load_object(stdout)
    answer.setdefault("cniVersion", cni_version)
    return answer


def parse_error(exit_code: int, stdout: bytes, stderr: bytes) -> PluginError:
    """Make the best of a failed plugin's output: its JSON error, else whatever it printed, else its exit code."""
    try:
        answer = load_object(stdout)
        code, parts = answer.get("code", 0), [answer.get("msg"), answer.get("details")]
        text = "; ".join(part for part in parts if isinstance(part, str) and part)
        if text:
            return PluginError(code=code if isinstance(code, int) else 0, text=quote(text))
    except ValueError:
        pass
    printed = quote((stderr.strip() or stdout.strip()).decode("utf-8", "replace"))
    return PluginError(code=0, text=printed or f"no message, exit status {exit_code}")


def parse_versions(stdout: bytes) -> tuple[str, ...]:
    """Return the versions that a plugin supports, oldest first; unreadable ones are left out.

    Raises:
        ValueError: not an answer to VERSION.
    """
    try:
        found = load_object(stdout)["supportedVersions"]
        readable = [version for version in found if isinstance(version, str) and _is_version(version)]
    except (KeyError, TypeError) as error:
        raise ValueError("not an answer to VERSION") from error
    return tuple(sorted(set(readable), key=version_key)) or (OLDEST,)


def quote(text: str) -> str:
    """Make foreign text fit for one log line and one gRPC message."""
    clean = _CONTROL.sub(" ", text).replace("\n", " ").strip()
    return clean if len(clean) <= _QUOTE_LIMIT else clean[:_QUOTE_LIMIT] + "..."


def _is_version(version: str) -> bool:
    try:
        version_key(version)
    except ValueError:
        return False
    return True


@dataclass(frozen=True, slots=True, kw_only=True)
class Link:
    """One interface as the kernel shows it inside the namespace."""

    name: str
    mac: str
    mtu: int
    is_up: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class NamespaceFacts:
    """Links (without `lo`) and routes of a namespace, as they really are."""

    links: tuple[Link, ...] = ()
    routes: tuple[NetworkRoute, ...] = ()


def make_attachment(
    result: Mapping[str, Any], *, netns_path: str, interface: str, facts: NamespaceFacts = NamespaceFacts()
) -> Attachment:
    """Turn the last result of a chain into an attachment.

    Addresses come from the result, in its order; only those on `interface` become the pod's own, unless it has none.
    MAC, MTU and routes come from the namespace where `facts` has them: not every plugin reports what it set.

    Raises:
        NetworkFailed: the result makes no sense, or has no address.
    """
    try:
        interfaces, host_side = _interfaces(result, interface)
        for address, name in _addresses(result, interface, host_side):
            entry = interfaces.setdefault(name, Interface(name=name))
            interfaces[name] = replace(entry, addresses=(*entry.addresses, address))
        declared_routes = _routes(result)
        dns = {key: _texts(result.get("dns"), key) for key in ("nameservers", "search", "options")}
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise NetworkFailed(f"The result of the network's plugins makes no sense: {str(error)[:200]}.") from error
    for link in facts.links:
        if link.name in interfaces or link.is_up:
            entry = interfaces.get(link.name) or Interface(name=link.name)
            interfaces[link.name] = replace(entry, mac=link.mac or entry.mac, mtu=link.mtu or entry.mtu)
    primary = interfaces.get(interface)
    own = primary.addresses if primary else ()
    everywhere = tuple(address for entry in interfaces.values() for address in entry.addresses)
    ips = tuple(address.partition("/")[0] for address in own or everywhere)
    if not ips:
        raise NetworkFailed("The network's plugins gave the pod no address.")
    return Attachment(
        netns_path=netns_path,
        ips=ips,
        interfaces=tuple(interfaces.values()),
        routes=_without_connected(facts.routes, everywhere) or declared_routes,
        dns_servers=dns["nameservers"],
        dns_searches=dns["search"],
        dns_options=dns["options"],
        result=dict(result),
    )


def _interfaces(result: Mapping[str, Any], interface: str) -> tuple[dict[str, Interface], dict[int, str | None]]:
    """Return the pod's interfaces by name, and for each index of the result its name there, None on the host."""
    pod_side: dict[str, Interface] = {}
    by_index: dict[int, str | None] = {}
    for index, item in enumerate(result.get("interfaces") or ()):
        name, mac, mtu = item["name"], item.get("mac") or "", item.get("mtu") or 0
        if not (isinstance(name, str) and isinstance(mac, str) and isinstance(mtu, int)):
            raise TypeError("an interface's name, mac or mtu has the wrong type")
        inside = bool(item.get("sandbox"))
        by_index[index] = name if inside else None
        if inside:
            pod_side.setdefault(name, Interface(name=name, mac=mac.lower(), mtu=mtu))
    if interface in pod_side:  # first, so that it is the pod's primary one wherever only one can be shown
        pod_side = {interface: pod_side.pop(interface), **pod_side}
    return pod_side, by_index


def _addresses(result: Mapping[str, Any], interface: str, by_index: Mapping[int, str | None]) -> list[tuple[str, str]]:
    """Return (address in CIDR form, interface name) of the pod's side, from any version of a result."""
    found = []
    for item in result.get("ips") or ():
        address = str(ipaddress.ip_interface(item["address"]))
        index = item.get("interface")
        if index is not None and not isinstance(index, int):
            raise TypeError("an address's interface is not a number")
        if index is not None and index >= 0 and by_index:
            if index not in by_index:
                raise ValueError(f"an address is on interface {index}, which is not in the result")
            name = by_index[index]
            if name is None:
                continue
        else:
            name = interface
        found.append((address, name))
    old = [result[key]["ip"] for key in ("ip4", "ip6") if result.get(key)]  # versions 0.1.0 and 0.2.0
    return found + [(str(ipaddress.ip_interface(address)), interface) for address in old]


def _routes(result: Mapping[str, Any]) -> tuple[NetworkRoute, ...]:
    """Return the routes that a result declares; one without a gateway goes through that of its family's address."""
    gateways: dict[int, str] = {}
    for item in result.get("ips") or ():
        if item.get("gateway"):
            gateway = ipaddress.ip_address(item["gateway"])
            gateways.setdefault(gateway.version, str(gateway))
    routes = list(result.get("routes") or ())
    for key in ("ip4", "ip6"):
        old = result.get(key) or {}
        routes += old.get("routes") or ()
        if old.get("gateway"):
            gateway = ipaddress.ip_address(old["gateway"])
            gateways.setdefault(gateway.version, str(gateway))
    found = []
    for item in routes:
        destination = ipaddress.ip_network(item["dst"], strict=False)
        gateway_text = (
            str(ipaddress.ip_address(item["gw"])) if item.get("gw") else gateways.get(destination.version, "")
        )
        found.append(NetworkRoute(destination=str(destination), gateway=gateway_text))
    return tuple(found)


def _without_connected(routes: Sequence[NetworkRoute], addresses: Sequence[str]) -> tuple[NetworkRoute, ...]:
    """Leave out the routes that the kernel makes by itself for each address."""
    connected = {str(ipaddress.ip_interface(address).network) for address in addresses}
    return tuple(route for route in routes if route.gateway or route.destination not in connected)


def _texts(mapping: Any, key: str) -> tuple[str, ...]:
    values: Sequence[Any] = (mapping or {}).get(key) or ()
    if isinstance(values, str) or not all(isinstance(value, str) for value in values):
        raise TypeError(f"dns.{key} is not a list of texts")
    return tuple(values)
