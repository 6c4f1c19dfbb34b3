"""The interfaces of pods' network namespaces: their counters, and which of them is the default one."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from dispatcher.model import Attachment, InterfaceUsage
from dispatcher.netns import read_in_namespaces

LIMIT = 64  # a container that may make interfaces could make thousands
_DEVICES = Path("/proc/thread-self/net/dev")
_DEFAULT_ROUTES = ("0.0.0.0/0", "::/0")


async def read_interfaces(paths: Sequence[Path]) -> list[tuple[InterfaceUsage, ...] | None]:
    """Read all interfaces of these namespaces, in one thread; None for a namespace that is gone."""
    return await read_in_namespaces(paths, lambda: parse_devices(_DEVICES.read_bytes())) if paths else []


def parse_devices(content: bytes) -> tuple[InterfaceUsage, ...]:
    """Read /proc/net/dev. `lo` is left out: what goes over it stays in the pod."""
    found = []
    for line in content.decode("utf-8", "replace").splitlines()[2:]:
        name, _, counters = line.partition(":")
        numbers = [int(word) for word in counters.split()]
        if name.strip() == "lo" or len(numbers) < 16:
            continue
        found.append(
            InterfaceUsage(
                name=name.strip(),
                rx_bytes=numbers[0],
                rx_packets=numbers[1],
                rx_errors=numbers[2],
                rx_dropped=numbers[3],
                tx_bytes=numbers[8],
                tx_packets=numbers[9],
                tx_errors=numbers[10],
                tx_dropped=numbers[11],
            )
        )
    return tuple(found)


def order_interfaces(
    found: Iterable[InterfaceUsage], attachment: Attachment | None, *, attached_only: bool = False
) -> tuple[InterfaceUsage, ...]:
    """Return the interfaces with the default one first, those of the attachment next; at most `LIMIT`.

    `attached_only` leaves out others: beside a virtual machine's interface stands the tap that mirrors it.
    """
    names = [interface.name for interface in attachment.interfaces] if attachment else []
    default = default_interface(attachment)
    ranks = {name: rank for rank, name in enumerate(names, start=1)} | {default: 0}
    wanted = [item for item in found if item.name in ranks or not (attached_only and names)]
    return tuple(sorted(wanted, key=lambda item: (ranks.get(item.name, len(ranks) + 1), item.name))[:LIMIT])


def default_interface(attachment: Attachment | None) -> str:
    """The name of the interface that leads out of the pod: by its routes, else by the pod's first address."""
    if attachment is not None:
        for destination in _DEFAULT_ROUTES:
            for route in attachment.routes:
                if route.destination == destination and route.interface:
                    return route.interface
        for interface in attachment.interfaces:
            if any(address.partition("/")[0] in attachment.ips[:1] for address in interface.addresses):
                return interface.name
        if attachment.interfaces:
            return attachment.interfaces[0].name
    return "eth0"
