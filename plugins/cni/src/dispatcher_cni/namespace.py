"""A pod's namespace as the kernel shows it, and putting back what DEL needs to find there.

Reading takes a socket and two files of /proc: a netlink library would bring the same facts for 14 MB of memory and
several milliseconds per pod (measured with pyroute2 0.9). It is loaded only where a link has to be made.
"""

from __future__ import annotations

import fcntl
import ipaddress
import socket
import struct
from collections.abc import Iterable
from pathlib import Path

from dispatcher.api import effect, ensure_namespace, run_in_namespace
from dispatcher.model import NetworkRoute
from dispatcher_cni.result import Link, NamespaceFacts

_NET = Path("/proc/thread-self/net")  # the calling thread's namespace; /proc/net is the main thread's
_SIOCGIFFLAGS, _SIOCGIFMTU, _SIOCGIFHWADDR = 0x8913, 0x8921, 0x8927
_IFF_UP = 1
_RTF_UP, _RTF_GATEWAY, _RTF_REJECT = 0x1, 0x2, 0x200
_V6_RTF_LOCAL_ANYCAST = 0x80000000 | 0x100000


async def read_facts(netns_path: Path) -> NamespaceFacts:
    """Read links and routes inside the namespace. Raises NotFound where there is none."""
    return await run_in_namespace(netns_path, lambda: NamespaceFacts(links=_links(), routes=read_routes()))


def _links() -> tuple[Link, ...]:
    found = []
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as control:
        for _, name in socket.if_nameindex():
            if name == "lo":
                continue
            request = struct.pack("16s24x", name.encode())
            try:
                (flags,) = struct.unpack_from("16xH", fcntl.ioctl(control, _SIOCGIFFLAGS, request))
                (mtu,) = struct.unpack_from("16xi", fcntl.ioctl(control, _SIOCGIFMTU, request))
                (address,) = struct.unpack_from("18x6s", fcntl.ioctl(control, _SIOCGIFHWADDR, request))
            except OSError:  # gone since the list was made
                continue
            found.append(Link(name=name, mac=address.hex(":"), mtu=mtu, is_up=bool(flags & _IFF_UP)))
    return tuple(found)


def parse_ipv4_routes(table: str) -> Iterable[NetworkRoute]:
    """Read /proc/net/route, which holds the main table; rejecting routes are left out."""
    for line in table.splitlines()[1:]:
        fields = line.split()
        if len(fields) < 8 or not int(fields[3], 16) & _RTF_UP or int(fields[3], 16) & _RTF_REJECT:
            continue
        mask = int.from_bytes(bytes.fromhex(fields[7])[::-1], "big")
        destination = ipaddress.ip_network((_ipv4(fields[1]), mask.bit_count()), strict=False)
        gateway = str(_ipv4(fields[2])) if int(fields[3], 16) & _RTF_GATEWAY else ""
        yield NetworkRoute(destination=str(destination), gateway=gateway, interface=fields[0])


def _ipv4(field: str) -> ipaddress.IPv4Address:
    return ipaddress.IPv4Address(bytes.fromhex(field)[::-1])


def parse_ipv6_routes(table: str) -> Iterable[NetworkRoute]:
    """Read /proc/net/ipv6_route; rejecting, local, link-local and multicast routes are left out."""
    for line in table.splitlines():
        fields = line.split()
        if len(fields) < 10 or fields[9] == "lo":
            continue
        flags = int(fields[8], 16)
        if not flags & _RTF_UP or flags & (_RTF_REJECT | _V6_RTF_LOCAL_ANYCAST):
            continue
        destination = ipaddress.IPv6Network((bytes.fromhex(fields[0]), int(fields[1], 16)), strict=False)
        if destination.is_link_local or destination.is_multicast:
            continue
        gateway = str(ipaddress.IPv6Address(bytes.fromhex(fields[4]))) if flags & _RTF_GATEWAY else ""
        yield NetworkRoute(destination=str(destination), gateway=gateway, interface=fields[9])


def read_routes() -> tuple[NetworkRoute, ...]:
    """Read the routes of the calling thread's namespace: on the loop, those of the host."""
    found = list(parse_ipv4_routes((_NET / "route").read_text()))
    if (_NET / "ipv6_route").exists():  # absent where the kernel has no IPv6
        found += parse_ipv6_routes((_NET / "ipv6_route").read_text())
    return tuple(found)


@effect("cni.restore_interface")
async def restore_interface(netns_path: Path, *, interface: str, addresses: tuple[str, ...], may_make: bool) -> bool:
    """Give the pod's interface its addresses back where they are missing, so that DEL finds what ADD left.

    The reference plugins learn from the interface which masquerading rules to remove: a namespace that was unmounted,
    an interface whose addresses a virtual machine took over, or a DEL that was interrupted behind the removal of the
    interface would leave those rules for ever. With `may_make` a missing interface is replaced by an unconnected one
    (and a missing namespace by an empty one). Idempotent. Returns whether something was put back.
    """
    if may_make:
        await ensure_namespace(netns_path)
    names, present = await run_in_namespace(netns_path, _present)
    wanted = [address for address in addresses if ipaddress.ip_interface(address).ip not in present]
    if not wanted or (interface not in names and not may_make):
        return False

    def put_back() -> None:
        from pyroute2 import IPRoute

        with IPRoute() as netlink:
            if interface not in names:
                netlink.link("add", ifname=interface, kind="veth", peer={"ifname": f"{interface[:11]}-del"})
            (index,) = netlink.link_lookup(ifname=interface)
            for address in wanted:
                entry = ipaddress.ip_interface(address)
                netlink.addr("add", index=index, address=str(entry.ip), prefixlen=entry.network.prefixlen)

    await run_in_namespace(netns_path, put_back)
    return True


def _present() -> tuple[set[str], set[ipaddress.IPv4Address | ipaddress.IPv6Address]]:
    """Names of all links, and all addresses, of the calling thread's namespace."""
    addresses: set[ipaddress.IPv4Address | ipaddress.IPv6Address] = set()
    for line in (_NET / "fib_trie").read_text().splitlines():  # the only list of IPv4 addresses that is a file
        text = line.strip()
        if text.startswith("|-- "):
            candidate = text[4:]
        elif text.startswith("/32 host LOCAL"):
            addresses.add(ipaddress.IPv4Address(candidate))
    if (_NET / "if_inet6").exists():
        for line in (_NET / "if_inet6").read_text().splitlines():
            addresses.add(ipaddress.IPv6Address(bytes.fromhex(line.split()[0])))
    return {name for _, name in socket.if_nameindex()}, addresses
