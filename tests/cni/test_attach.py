"""Attaching and detaching with the reference plugins, on a host of its own: what a pod gets, and what is left."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from dispatcher.api import run_in_namespace
from dispatcher.errors import InvalidRequest, PolicyRefused
from dispatcher.model import PodId, PortMapping, Protocol
from dispatcher.netns import ensure_namespace, remove_namespace
from dispatcher_cni.capabilities import EGRESS_BANDWIDTH, IPS, MAC
from tests.cni.net import (
    BRIDGE,
    FIREWALL,
    PORTMAP,
    World,
    attach_pod,
    detach_pod,
    make_spec,
    require_plugins,
)
from tests.lab.own_host import own_host, run, take_census

pytestmark = pytest.mark.lab

LEASES = Path("/var/lib/cni")
PUBLISHED = make_spec(port_mappings=(PortMapping(container_port=80, host_port=8080),))


@pytest.fixture
def world(tmp_path: Path) -> World:
    require_plugins("bridge", "host-local", "portmap", "firewall", "tuning")
    return World(root=tmp_path)


async def listen_in(netns: Path, port: int = 80) -> socket.socket:
    """Listen inside a pod; the socket stays the pod's, wherever it is used."""

    def make() -> socket.socket:
        return socket.create_server(("0.0.0.0", port))

    return await run_in_namespace(netns, make)


async def say_hello(listener: socket.socket) -> asyncio.Server:
    """Greet everybody who connects."""

    async def greet(_reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"hello")
        writer.close()

    return await asyncio.start_server(greet, sock=listener)


async def hear_on(connection: socket.socket) -> bytes:
    """Read a first answer from a connection that was made elsewhere."""
    connection.setblocking(False)
    with connection:
        return await asyncio.wait_for(asyncio.get_running_loop().sock_recv(connection, 10), 10)


async def hear(address: str, port: int) -> bytes:
    """Connect from this host and read to the end."""
    reader, writer = await asyncio.wait_for(asyncio.open_connection(address, port), 10)
    try:
        return await asyncio.wait_for(reader.read(), 10)
    finally:
        writer.close()


@own_host
async def test_pod_gets_what_its_namespace_shows(world: World) -> None:
    """An attachment holds addresses of both families, MAC, MTU and routes, as the kernel has them."""
    world.configure({**BRIDGE, "mtu": 1400}, PORTMAP, FIREWALL)
    async with world.network() as network:
        assert network.status().ready, network.status().message

        pod = await attach_pod(world, network)

        assert pod.attachment is not None
        (interface,) = pod.attachment.interfaces
        shown = run("ip -o addr show dev eth0", netns=pod.netns)
        assert [address in shown for address in interface.addresses] == [True, True]
        assert pod.attachment.ips == tuple(address.partition("/")[0] for address in interface.addresses)
        assert interface.mac in run("ip link show dev eth0", netns=pod.netns)
        assert interface.mtu == 1400
        assert {(route.destination, route.gateway) for route in pod.attachment.routes} == {
            ("0.0.0.0/0", "10.77.0.1"),
            ("::/0", "fd77::1"),
        }
        await detach_pod(network, pod)
        assert world.leases() == {}


@own_host
async def test_host_port_answers_on_loopback_and_on_the_hosts_address(world: World) -> None:
    """A published port is reached through 127.0.0.1 of the host and from another machine."""
    world.configure(BRIDGE, PORTMAP, FIREWALL)
    other = world.root / "other"
    await ensure_namespace(other)
    run(f"ip link add wire type veth peer name wire netns {other}")
    for address, netns in (("192.0.2.1/24", None), ("192.0.2.2/24", other)):
        run(f"ip address add {address} dev wire", netns=netns)
        run("ip link set wire up", netns=netns)
    async with world.network() as network:
        pod = await attach_pod(world, network, PUBLISHED)
        async with await say_hello(await listen_in(pod.netns)):
            assert await hear("127.0.0.1", 8080) == b"hello"

            def connect() -> socket.socket:
                return socket.create_connection(("192.0.2.1", 8080), timeout=10)

            assert await hear_on(await run_in_namespace(other, connect)) == b"hello"
        await detach_pod(network, pod)
        with pytest.raises(OSError):
            await hear("127.0.0.1", 8080)
    await remove_namespace(other)


@own_host
async def test_pods_reach_each_other_where_the_host_drops_forwarded_packets(world: World) -> None:
    """Docker sets the FORWARD policy to DROP; the firewall plugin at the end of the chain keeps pods connected."""
    world.configure(BRIDGE, PORTMAP, FIREWALL)
    run("iptables -P FORWARD DROP")
    async with world.network() as network:
        server, client = await attach_pod(world, network), await attach_pod(world, network)
        assert server.attachment is not None
        address = server.attachment.ips[0]
        async with await say_hello(await listen_in(server.netns)):

            def connect() -> socket.socket:
                return socket.create_connection((address, 80), timeout=10)

            assert await hear_on(await run_in_namespace(client.netns, connect)) == b"hello"
        await detach_pod(network, server)
        await detach_pod(network, client)


@own_host
async def test_many_pods_at_once_leave_nothing(world: World) -> None:
    """Twelve pods, attached and detached side by side, leave the host as one attached pod before them left it."""
    world.configure(BRIDGE, PORTMAP, FIREWALL)
    async with world.network() as network:
        await detach_pod(network, await attach_pod(world, network, PUBLISHED))
        before = take_census(world.root, LEASES)

        async def live(number: int) -> str:
            ports = (PortMapping(container_port=80, host_port=9000 + number, protocol=Protocol.UDP),)
            pod = await attach_pod(world, network, make_spec(port_mappings=ports))
            await detach_pod(network, pod)
            assert pod.attachment is not None
            return pod.attachment.ips[0]

        addresses = await asyncio.gather(*(live(number) for number in range(12)))

        assert len(set(addresses)) == 12
        assert take_census(world.root, LEASES) == before


@own_host
async def test_delete_succeeds_for_what_was_never_added_and_again(world: World) -> None:
    """DEL is idempotent, and needs no ADD before it."""
    world.configure(BRIDGE, PORTMAP, FIREWALL)
    async with world.network() as network:
        pod = await attach_pod(world, network, PUBLISHED)
        for _ in range(2):
            await network.delete(pod.plan, pod.attachment)
        await detach_pod(network, pod)
        await network.delete(pod.plan, pod.attachment)
        assert not pod.netns.exists()
        await network.delete(network.plan(PodId("f" * 64), PUBLISHED, str(world.netns_dir / "never")), None)


@pytest.mark.parametrize("version", ["0.2.0", "0.3.1", "0.4.0", "1.0.0"])
@own_host
async def test_every_version_of_the_specification_attaches(world: World, version: str) -> None:
    """Results of old versions become the same attachment."""
    chain: list[Mapping[str, Any]] = [{**BRIDGE, "ipam": {**BRIDGE["ipam"], "ranges": [[{"subnet": "10.77.0.0/24"}]]}}]
    if version not in {"0.2.0", "0.3.1"}:  # what the firewall plugin does not speak
        chain.append(FIREWALL)
    world.configure(*chain, version=version)
    async with world.network() as network:
        assert network.status().ready, network.status().message
        pod = await attach_pod(world, network)
        assert pod.attachment is not None
        assert pod.attachment.ips == ("10.77.0.2",)
        assert pod.attachment.interfaces[0].mac in run("ip link show dev eth0", netns=pod.netns)
        assert await network.check(pod.plan, pod.attachment) == ()
        await detach_pod(network, pod)
        assert world.leases() == {}


@own_host
async def test_check_tells_what_is_wrong_and_asks_every_plugin(world: World) -> None:
    """CHECK is advice: it names the plugin, and one complaint does not hide the next."""
    world.configure(BRIDGE, PORTMAP, FIREWALL)
    async with world.network() as network:
        pod = await attach_pod(world, network)
        assert pod.attachment is not None
        assert await network.check(pod.plan, pod.attachment) == ()
        run("ip address flush dev eth0", netns=pod.netns)
        run("iptables -F CNI-FORWARD")
        complaints = await network.check(pod.plan, pod.attachment)
        assert len(complaints) == 2
        assert "bridge failed at CHECK" in complaints[0]
        assert "firewall failed at CHECK" in complaints[1]
        await detach_pod(network, pod)


@own_host
async def test_bandwidth_annotation_shapes_the_pod(world: World) -> None:
    """Kubernetes' own annotation reaches the bandwidth plugin, without any permission."""
    require_plugins("bandwidth")
    world.configure(BRIDGE, {"type": "bandwidth", "capabilities": {"bandwidth": True}})
    async with world.network() as network:
        pod = await attach_pod(world, network, make_spec(annotations={EGRESS_BANDWIDTH: "8M"}))
        assert "rate 8Mbit" in run("tc qdisc show")
        await detach_pod(network, pod)
        assert "rate 8Mbit" not in run("tc qdisc show")


@own_host
async def test_annotations_choose_address_and_mac_only_where_allowed(world: World) -> None:
    """An allowed annotation is honoured to the letter; in any other namespace it is refused, not ignored."""
    bridge = {**BRIDGE, "capabilities": {"ips": True, "mac": True}}
    world.configure(bridge, FIREWALL)
    wish = {IPS: "10.77.0.99, fd77::99", MAC: "02:00:00:AA:bb:01"}
    async with world.network() as network:
        with pytest.raises(PolicyRefused, match="not allowed in the namespace default"):
            network.plan(PodId("a" * 64), make_spec(annotations=wish), "/nowhere")
    world.settings["annotations"] = {"ips": {"namespaces": ["default"]}, "mac": {"namespaces": ["*"]}}
    async with world.network() as network:
        pod = await attach_pod(world, network, make_spec(annotations=wish))
        assert pod.attachment is not None
        assert pod.attachment.ips == ("10.77.0.99", "fd77::99")
        assert pod.attachment.interfaces[0].mac == "02:00:00:aa:bb:01"
        await detach_pod(network, pod)
        world.configure(BRIDGE, FIREWALL)
        with pytest.raises(InvalidRequest, match="no plugin of this node's network has the capability ips"):
            network.plan(PodId("a" * 64), make_spec(annotations=wish), "/nowhere")
