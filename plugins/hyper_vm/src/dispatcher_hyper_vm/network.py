"""The pod's network as its guest sees it: interfaces and routes from the attachment. Pure."""

from __future__ import annotations

import ipaddress

from dispatcher.model import Attachment
from dispatcher.model.network import Route as PodRoute
from dispatcher_hyper_vm.agent.values import Interface, Route
from dispatcher_vm_kit.tap import tap_name


def guest_interfaces(attachment: Attachment | None) -> tuple[Interface, ...]:
    """The guest's interfaces, in the order of its network devices: same name, MAC, MTU and addresses as the pod's.

    What network plugins did not make is left out: the loopback, and the taps of the machine itself, which may be up
    already when the pod's namespace is looked at.
    """
    if attachment is None:
        return ()
    own = {"lo", *(tap_name(number) for number in range(len(attachment.interfaces)))}
    made = [item for item in attachment.interfaces if item.name not in own]
    return tuple(
        Interface(name=item.name, device=number, mac=item.mac, mtu=item.mtu, addresses=item.addresses)
        for number, item in enumerate(made)
    )


def guest_routes(attachment: Attachment | None) -> tuple[Route, ...]:
    """The guest's routes. One that names no interface goes to that in whose network its gateway is, else to the first."""
    interfaces = guest_interfaces(attachment)
    if attachment is None or not interfaces:
        return ()
    return tuple(
        Route(to=route.destination, via=route.gateway, device=route.interface or _towards(route, interfaces))
        for route in attachment.routes
    )


def _towards(route: PodRoute, interfaces: tuple[Interface, ...]) -> str:
    if route.gateway:
        gateway = ipaddress.ip_address(route.gateway)
        for item in interfaces:
            if any(gateway in ipaddress.ip_interface(address).network for address in item.addresses):
                return item.name
    return interfaces[0].name
