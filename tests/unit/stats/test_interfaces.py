"""Interfaces of a pod: counters, order, and the default one."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from dispatcher.model import Attachment, Interface, InterfaceUsage, NetworkRoute
from dispatcher.netns import ensure_namespace, remove_namespace
from dispatcher.stats.interfaces import LIMIT, default_interface, order_interfaces, parse_devices, read_interfaces

DEVICES = b"""Inter-|   Receive                                                |  Transmit
 face |bytes    packets errs drop fifo frame compressed multicast|bytes    packets errs drop fifo colls carrier compressed
    lo:     100       1    0    0    0     0          0         0      100       1    0    0    0     0       0          0
  eth0:    2000      20    3    4    0     0          0         0     5000      50    6    7    0     0       0          0
t\xff0:12345678901 1 0 0 0 0 0 0 0 0 0 0 0 0 0 0
"""


def test_counters() -> None:
    """`lo` is left out; a long counter touches the name; a name that is no UTF-8 is shown all the same."""
    assert parse_devices(DEVICES) == (
        InterfaceUsage(
            name="eth0",
            rx_bytes=2000,
            rx_packets=20,
            rx_errors=3,
            rx_dropped=4,
            tx_bytes=5000,
            tx_packets=50,
            tx_errors=6,
            tx_dropped=7,
        ),
        InterfaceUsage(name="t�0", rx_bytes=12345678901, rx_packets=1),
    )


def attachment(*names: str, routes: tuple[NetworkRoute, ...] = (), ips: tuple[str, ...] = ()) -> Attachment:
    interfaces = tuple(Interface(name=name, addresses=(f"10.0.{number}.2/24",)) for number, name in enumerate(names))
    return Attachment(netns_path="/n", interfaces=interfaces, routes=routes, ips=ips)


@pytest.mark.parametrize(
    ("attached", "name"),
    [
        (None, "eth0"),
        (attachment(), "eth0"),
        (attachment("net1", "net2"), "net1"),
        (attachment("net1", "net2", ips=("10.0.1.2",)), "net2"),
        (attachment("a", "b", ips=("10.0.0.2",), routes=(NetworkRoute(destination="::/0", interface="b"),)), "b"),
        (
            attachment(
                "a",
                "b",
                routes=(
                    NetworkRoute(destination="::/0", interface="b"),
                    NetworkRoute(destination="0.0.0.0/0", interface="a"),
                ),
            ),
            "a",
        ),
    ],
)
def test_the_default_interface_leads_out_of_the_pod(attached: Attachment | None, name: str) -> None:
    assert default_interface(attached) == name


def test_the_default_comes_first_then_the_attached_ones() -> None:
    found = [InterfaceUsage(name=name) for name in ("tap0", "a0", "net2", "net1")]
    names = [item.name for item in order_interfaces(found, attachment("net1", "net2"))]
    assert names == ["net1", "net2", "a0", "tap0"]
    attached = order_interfaces(found, attachment("net1", "net2"), attached_only=True)
    assert [item.name for item in attached] == ["net1", "net2"]


def test_a_pod_cannot_make_a_reply_long() -> None:
    found = [InterfaceUsage(name=f"dummy{number}") for number in range(1000)] + [InterfaceUsage(name="eth0")]
    kept = order_interfaces(found, attachment("eth0"))
    assert len(kept) == LIMIT
    assert kept[0].name == "eth0"


@pytest.mark.skipif(os.geteuid() != 0, reason="making network namespaces needs root")
async def test_many_namespaces_are_read_in_one_thread(tmp_path: Path) -> None:
    """Each is its own; one that is gone is None and harms no other."""
    paths = [tmp_path / f"ns{number}" for number in range(3)]
    own = os.stat("/proc/thread-self/ns/net").st_ino
    try:
        for path in (paths[0], paths[2]):
            await ensure_namespace(path)
        found = await read_interfaces(paths)
        assert found[1] is None
        for names in (found[0], found[2]):
            assert names is not None, "a new namespace has no interface but lo (and what the kernel adds to each)"
            assert "eth0" not in {item.name for item in names}
        assert os.stat("/proc/thread-self/ns/net").st_ino == own
    finally:
        for path in paths:
            await remove_namespace(path)
