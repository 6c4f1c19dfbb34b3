"""What this node offers: settings, the built-in network, routes of the kernel, who may run when."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest

from dispatcher.api import Registrar
from dispatcher.model import NetworkRoute
from dispatcher_cni.config import CniConfig, DefaultNetwork
from dispatcher_cni.conflist import parse_list
from dispatcher_cni.default_network import find_collision, make_default_network
from dispatcher_cni.gate import Gate
from dispatcher_cni.namespace import parse_ipv4_routes, parse_ipv6_routes
from dispatcher_cni.plugin import plugin

# ------------------------------------------------------------------------------------------------------------- settings


def test_empty_section_is_a_working_one() -> None:
    """The defaults are the folders that distributions and installers use."""
    config = CniConfig.from_section({})
    assert [str(folder) for folder in config.conf_dirs] == ["/etc/cni/net.d"]
    assert "/usr/lib/cni" in [str(folder) for folder in config.bin_dirs]
    assert not config.default_network.allow
    assert config.annotations.to_rules().ips == frozenset()


@pytest.mark.parametrize(
    ("section", "words"),
    [
        ({"conf_dir": "/etc"}, "conf_dir"),
        ({"conf_dirs": []}, "conf_dirs"),
        ({"bin_dirs": ["bin"]}, "absolute path"),
        ({"bin_dirs": ["/a:/b"]}, "without a colon"),
        ({"interface": "a/b"}, "interface"),
        ({"interface": "x" * 16}, "interface"),
        ({"plugin_timeout_s": 0}, "plugin_timeout_s"),
        ({"environment": {"CNI_PATH": "/x"}}, "'CNI_PATH' cannot be set here"),
        ({"environment": {"A=B": "x"}}, "cannot be set here"),
        ({"default_network": {"subnets": ["10.0.0.1/24"]}}, "host bits"),
        ({"default_network": {"subnets": ["10.0.0.0/30"]}}, "too small"),
        ({"default_network": {"subnets": ["10.0.0.0/24", "10.1.0.0/24"]}}, "at most one range"),
        ({"default_network": {"bridge": "-x"}}, "bridge"),
        ({"annotations": {"dns": {}}}, "dns"),
    ],
)
def test_wrong_section_is_refused_with_the_key(section: dict[str, Any], words: str) -> None:
    """`dispatcher config check` shows what to change."""
    with pytest.raises(ValueError, match=words):
        CniConfig.from_section(section)


def test_plugin_enrols_its_provider_and_its_schema() -> None:
    """The entry point offers one network provider and the check of its section."""
    offers: dict[str, Any] = {}

    class Recorder:
        def network(self, name: str, factory: Any) -> None:
            offers[name] = factory

        def check_section(self, check: Any) -> None:
            offers["check"] = check

    registrar: Registrar = Recorder()  # type: ignore[assignment]
    plugin.register(registrar)
    assert set(offers) == {"cni", "check"}
    offers["check"]({})
    with pytest.raises(ValueError):
        offers["check"]({"typo": 1})


# ---------------------------------------------------------------------------------------------------- built-in network
def test_built_in_network_is_one_that_our_own_reader_takes() -> None:
    """A bridge with masquerade, published ports, and the firewall plugin at the end."""
    network = make_default_network(DefaultNetwork(subnets=("10.5.0.0/16", "fd05::/64"), mtu=1400))
    text = json.dumps({"name": network.name, "cniVersion": network.cni_version, "plugins": network.plugins})
    again = parse_list(text.encode())
    assert again.plugins == network.plugins
    assert network.types == ("bridge", "portmap", "firewall")
    assert network.capabilities == {"portMappings"}
    bridge = network.plugins[0]
    assert bridge["ipam"]["ranges"] == [[{"subnet": "10.5.0.0/16"}], [{"subnet": "fd05::/64"}]]
    assert bridge["ipam"]["routes"] == [{"dst": "0.0.0.0/0"}, {"dst": "::/0"}]
    assert bridge["mtu"] == 1400


def test_built_in_network_may_use_the_nodes_range() -> None:
    """Only where the operator wants it, and only once the node has one."""
    wants = DefaultNetwork(use_pod_cidr=True)
    cidrs = ("10.244.3.0/24",)
    assert make_default_network(wants, cidrs).plugins[0]["ipam"]["ranges"] == [[{"subnet": "10.244.3.0/24"}]]
    for network in (make_default_network(wants), make_default_network(DefaultNetwork(), cidrs)):
        assert network.plugins[0]["ipam"]["ranges"] == [[{"subnet": "10.222.0.0/16"}]]


@pytest.mark.parametrize(
    ("destination", "interface", "collides"),
    [
        ("0.0.0.0/0", "eth0", False),
        ("10.222.0.0/16", "cri0", False),
        ("10.222.0.0/16", "eth0", True),
        ("10.222.7.0/24", "eth0", True),
        ("10.0.0.0/8", "vpn", True),
        ("10.221.0.0/16", "eth0", False),
        ("fd00::/8", "eth0", False),
    ],
)
def test_collision_with_a_host_route(destination: str, interface: str, collides: bool) -> None:
    """Any overlap counts but the default route and the network's own bridge."""
    routes = [NetworkRoute(destination=destination, interface=interface)]
    assert bool(find_collision(make_default_network(DefaultNetwork()), routes)) == collides


# --------------------------------------------------------------------------------------------------------------- routes
def test_kernel_tables_of_routes() -> None:
    """Taken from a pod: default by gateway, an on-link one, an unreachable one that is no route."""
    table = (
        "Iface\tDestination\tGateway \tFlags\tRefCnt\tUse\tMetric\tMask\t\tMTU\tWindow\tIRTT\n"
        "eth0\t00000000\t0102010A\t0003\t0\t0\t0\t00000000\t0\t0\t0\n"
        "eth0\t0002010A\t00000000\t0001\t0\t0\t0\t00FFFFFF\t0\t0\t0\n"
        "*\t0000640A\t00000000\t0201\t0\t0\t0\t0000FFFF\t0\t0\t0\n"
        "garbage\n"
    )
    assert list(parse_ipv4_routes(table)) == [
        NetworkRoute(destination="0.0.0.0/0", gateway="10.1.2.1", interface="eth0"),
        NetworkRoute(destination="10.1.2.0/24", interface="eth0"),
    ]
    zero = "0" * 32
    fields = "00 {} 00000000 00000001 00000000 {} {}\n"
    table6 = (
        f"{zero} 00 {zero} "
        + fields.format("fd77" + "0" * 27 + "1", "00000003", "eth0")
        + f"fd77{'0' * 28} 40 {zero} "
        + fields.format(zero, "00000001", "eth0")
        + f"fe80{'0' * 28} 40 {zero} "
        + fields.format(zero, "00000001", "eth0")
        + f"ff00{'0' * 28} 08 {zero} "
        + fields.format(zero, "00000001", "eth0")
        + f"fd77{'0' * 27}3 80 {zero} "
        + fields.format(zero, "80200001", "eth0")
        + f"{zero} 00 {zero} "
        + fields.format(zero, "00200200", "lo")
    )
    assert list(parse_ipv6_routes(table6)) == [
        NetworkRoute(destination="::/0", gateway="fd77::1", interface="eth0"),
        NetworkRoute(destination="fd77::/64", interface="eth0"),
    ]


# ----------------------------------------------------------------------------------------------------------------- gate
async def test_one_call_at_a_time_per_attachment_and_none_beside_garbage_collection() -> None:
    """Others go on side by side; GC waits for those at work and holds newcomers back."""
    gate, log, release = Gate(), list[str](), asyncio.Event()

    async def work(key: str, name: str, *, wait: bool = False) -> None:
        async with gate.shared(key):
            log.append(f"{name} begins")
            if wait:
                await release.wait()
            log.append(f"{name} ends")

    async def collect() -> None:
        async with gate.exclusive():
            log.append("gc")

    async with asyncio.TaskGroup() as group:
        group.create_task(work("a", "a1", wait=True))
        group.create_task(work("a", "a2"))
        group.create_task(work("b", "b1"))
        while "b1 ends" not in log:
            await asyncio.sleep(0)
        assert "a2 begins" not in log
        group.create_task(collect())
        await asyncio.sleep(0)
        group.create_task(work("c", "c1"))
        for _ in range(5):
            await asyncio.sleep(0)
        assert log == ["a1 begins", "b1 begins", "b1 ends"]
        release.set()
    assert log.index("a1 ends") < log.index("gc") < log.index("c1 begins")
    assert "a2 ends" in log


async def test_cancelled_waiter_leaves_the_gate_as_it_was() -> None:
    """Giving up while waiting blocks nobody."""
    gate = Gate()
    async with gate.shared("a"):
        waiters = [asyncio.create_task(_pass(gate)), asyncio.create_task(_collect(gate))]
        await asyncio.sleep(0)
        for waiter in waiters:
            waiter.cancel()
        await asyncio.gather(*waiters, return_exceptions=True)
    async with asyncio.timeout(5), gate.exclusive():
        pass
    async with asyncio.timeout(5), gate.shared("a"):
        pass


async def _pass(gate: Gate) -> None:
    async with gate.shared("a"):
        pass


async def _collect(gate: Gate) -> None:
    async with gate.exclusive():
        pass
