"""Joining a machine's tap with the interface that a network plugin made: whatever enters one leaves by the other.

Traffic control does it at the ingress of both, so there is no bridge, no learning, no filter of the host in between,
and the plugin's interface keeps its name, MAC and host end. The namespace's own stack must not answer in the guest's
place: it loses its addresses on that interface. The filter is u32, or matchall where the kernel lacks u32.
"""

from __future__ import annotations

import contextlib
import errno
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dispatcher.api import effect, run_in_namespace
from dispatcher.errors import RuntimeDown
from dispatcher_vm_kit.tap import silence_ipv6

_INGRESS = 0xFFFF0000
_ALL_PROTOCOLS = 3  # ETH_P_ALL
_ABSENT = {errno.ENOENT, errno.EINVAL, errno.ENODEV}


@dataclass(frozen=True, slots=True, kw_only=True)
class Joint:
    """A tap and the interface whose traffic it carries, by name, in one namespace."""

    tap: str
    interface: str


@effect("vm.redirect")
async def join_interfaces(netns_path: Path, joints: Sequence[Joint]) -> None:
    """Redirect both ways between each tap and its interface, and take the interface's addresses away.

    The tap gets the interface's MTU. Idempotent. Undone by `part_interfaces`; a tap that is closed takes its own half
    along.

    Raises:
        NotFound: no namespace is mounted there.
        RuntimeDown: an interface is missing, or the kernel refuses; the cause says what.
    """

    def join(link: Any) -> None:
        for joint in joints:
            _join(link, joint)

    await _in_namespace(netns_path, join)


@effect("vm.part")
async def part_interfaces(netns_path: Path, interfaces: Sequence[str]) -> None:
    """Take the redirection off these interfaces of plugins. Idempotent; their addresses are the plugin's to restore."""

    def part(link: Any) -> None:
        for name in interfaces:
            if found := link.link_lookup(ifname=name):
                _drop_ingress(link, found[0])
                silence_ipv6(name, silent=False)

    await _in_namespace(netns_path, part)


async def _in_namespace(netns_path: Path, work: Callable[[Any], None]) -> None:
    def inside() -> None:
        from pyroute2 import IPRoute  # 14 MB, and only nodes with virtual machines need it
        from pyroute2.netlink.exceptions import NetlinkError

        try:
            with IPRoute() as link:
                work(link)
        except NetlinkError as error:
            raise RuntimeDown(f"the network of {netns_path} cannot be redirected: {error}") from error

    await run_in_namespace(netns_path, inside)


def _join(link: Any, joint: Joint) -> None:
    tap, interface = (_index(link, name) for name in (joint.tap, joint.interface))
    mtu = link.get_links(interface)[0].get_attr("IFLA_MTU")
    link.link("set", index=tap, mtu=mtu, state="up")
    link.flush_addr(index=interface)
    silence_ipv6(joint.interface)
    link.link("set", index=interface, state="up")
    for here, there in ((interface, tap), (tap, interface)):
        _drop_ingress(link, here)
        link.tc("add", "ingress", here)
        _add_filter(link, here, there)


def _index(link: Any, name: str) -> int:
    found = link.link_lookup(ifname=name)
    if not found:
        raise RuntimeDown(f"there is no interface {name} in the pod's network namespace")
    return int(found[0])


def _drop_ingress(link: Any, index: int) -> None:
    from pyroute2.netlink.exceptions import NetlinkError

    try:
        link.tc("del", "ingress", index)
    except NetlinkError as error:
        if error.code not in _ABSENT:
            raise


def _add_filter(link: Any, here: int, there: int) -> None:
    from pyroute2.netlink.exceptions import NetlinkError

    action = {"kind": "mirred", "direction": "egress", "action": "redirect", "ifindex": there}
    place: dict[str, Any] = {"parent": _INGRESS, "protocol": _ALL_PROTOCOLS, "prio": 1}
    try:
        link.tc("add-filter", "u32", here, **place, target=0x10001, keys=["0x0/0x0+0"], action=action)
    except NetlinkError as first:
        with contextlib.suppress(NetlinkError):
            link.tc("add-filter", "matchall", here, **place, action=action)
            return
        raise first from None
