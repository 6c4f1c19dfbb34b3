"""The NetworkReady condition: what it says, that it follows the folders, and what plugins of CNI 1.1 add to it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from dispatcher.errors import NetworkNotReady
from dispatcher.model import PodId
from dispatcher_cni.provider import CniNetwork
from tests.cni.net import (
    BRIDGE,
    DEBIAN_PLUGINS,
    FIREWALL,
    World,
    attach_pod,
    detach_pod,
    eventually,
    make_spec,
    plan_pod,
    require_plugins,
)
from tests.lab.own_host import own_host, run

POD = PodId("a" * 64)


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(root=tmp_path, settings={"rescan_s": 0.05, "status_s": 0.05})


def show(network: CniNetwork) -> tuple[bool, str]:
    """The condition, without its message."""
    status = network.status()
    return status.ready, status.reason


async def test_empty_folder_says_where_to_put_a_network(world: World) -> None:
    """Without any configuration the node is not ready, and a pod is refused with the same sentence."""
    async with world.network() as network:
        status = network.status()
        assert (status.ready, status.reason) == (False, "NoNetworkConfig")
        assert str(world.conf_dir) in status.message
        assert "default_network.allow" in status.message
        with pytest.raises(NetworkNotReady) as refusal:
            network.plan(POD, make_spec(), "/nowhere")
        assert refusal.value.message == status.message


async def test_missing_plugins_are_named_with_the_folders(world: World) -> None:
    """Plugins, and the ones they ask for addresses, are looked for before a pod needs them."""
    world.settings["bin_dirs"] = [str(world.bin_dir)]
    world.add_plugin("bridge", 'echo \'{"cniVersion": "1.0.0", "supportedVersions": ["1.0.0"]}\'')
    world.configure(BRIDGE, FIREWALL)
    async with world.network() as network:
        status = network.status()
        assert (status.ready, status.reason) == (False, "PluginMissing")
        assert "needs host-local, firewall" in status.message
        assert str(world.bin_dir) in status.message
        with pytest.raises(NetworkNotReady, match="needs host-local, firewall"):
            network.plan(POD, make_spec(), "/nowhere")
        for name in ("host-local", "firewall"):
            world.add_plugin(name, 'echo \'{"cniVersion": "1.0.0", "supportedVersions": ["1.0.0"]}\'')
        await eventually(lambda: network.status().ready, what="installed plugins are noticed")


async def test_version_that_a_plugin_does_not_speak_is_told(world: World) -> None:
    """A configuration for a newer CNI than the plugin's says so before any pod fails."""
    world.add_plugin("old", 'echo \'{"cniVersion": "1.1.0", "supportedVersions": ["0.4.0", "1.0.0"]}\'')
    world.configure({"type": "old"}, version="1.1.0")
    async with world.network() as network:
        assert show(network) == (False, "PluginVersion")
        assert "asks for CNI 1.1.0, but the plugin old speaks 0.4.0, 1.0.0" in network.status().message
    world.add_plugin("ancient", "echo unknown command >&2; exit 1")
    world.configure({"type": "ancient"}, version="0.1.0")
    async with world.network() as network:
        assert network.status().ready, network.status().message


async def test_hanging_version_does_not_keep_the_daemon_from_starting(world: World) -> None:
    """A plugin that hangs when asked for its version makes the network not ready, nothing more."""
    world.add_plugin("stuck", "sleep 1000")
    world.configure({"type": "stuck"})
    world.settings["plugin_timeout_s"] = 0.3
    async with world.network() as network:
        assert show(network) == (False, "PluginFailed")
        assert "stuck failed at VERSION: it did not end within 0.3 s and was killed" in network.status().message


async def test_condition_follows_the_folder(world: World) -> None:
    """Configurations that come, break, are mended, replaced and removed are noticed; operators are notified."""
    world.add_plugin("fine", 'echo \'{"cniVersion": "1.0.0", "supportedVersions": ["1.0.0"]}\'')
    async with world.network() as network:
        assert show(network) == (False, "NoNetworkConfig")
        file = world.configure({"type": "fine"}, name="first")
        await eventually(lambda: "first" in network.status().message, what="the new file is used")
        good = file.read_text()
        file.write_text(good[:20])
        await eventually(lambda: "last good content" in network.status().message, what="the broken file is told")
        assert network.status().ready
        assert network.plan(POD, make_spec(), "/nowhere").content["network"]["name"] == "first"
        assert "last good content" in world.notices[-1][1]
        file.write_text(good.replace("first", "second"))
        await eventually(lambda: "second" in network.status().message, what="the mended file is used")
        assert world.notices[-1] == ("", "")
        file.unlink()
        await eventually(lambda: show(network) == (False, "NoNetworkConfig"), what="the removal is noticed")
        assert world.notices[-1] == ("NoNetworkConfig", network.status().message)


async def test_pod_right_after_a_change_gets_the_new_network(world: World) -> None:
    """A plan looks for itself: it never runs on what the folder held before."""
    world.settings["rescan_s"] = 600
    world.add_plugin("fine", 'echo \'{"cniVersion": "1.0.0", "supportedVersions": ["1.0.0"]}\'')
    world.configure({"type": "fine"}, name="first")
    async with world.network() as network:
        world.configure({"type": "fine"}, name="second")
        assert network.plan(POD, make_spec(), "/nowhere").content["network"]["name"] == "second"


def modern_plugin(log: Path, refuse: Path) -> str:
    """A plugin of CNI 1.1 that logs each command with its input, and refuses STATUS while a file exists."""
    return f"""
    input=$(cat)
    printf '%s %s\\n' "$CNI_COMMAND" "$input" >> {log}
    case $CNI_COMMAND in
    VERSION) echo '{{"cniVersion": "1.1.0", "supportedVersions": ["1.0.0", "1.1.0"]}}' ;;
    STATUS) if [ -e {refuse} ]; then echo '{{"code": 50, "msg": "pool is empty"}}'; exit 1; fi ;;
    ADD) echo '{{"cniVersion": "1.1.0", "ips": [{{"address": "10.9.0.5/24"}}]}}' ;;
    esac
    """


async def test_status_of_plugins_counts(world: World) -> None:
    """A plugin that cannot take pods makes the node not ready in its own words, and ready again."""
    log, refuse = world.root / "log", world.root / "refuse"
    world.add_plugin("modern", modern_plugin(log, refuse))
    world.configure({"type": "modern"}, version="1.1.0")
    async with world.network() as network:
        assert network.status().ready
        refuse.touch()
        await eventually(lambda: show(network) == (False, "PluginNotReady"), what="the refusal is noticed")
        assert "pool is empty" in network.status().message
        refuse.unlink()
        await eventually(lambda: network.status().ready, what="the plugin is asked again")


@own_host
async def test_garbage_collection_tells_plugins_what_is_valid(world: World) -> None:
    """GC goes to plugins that speak it, with exactly the attachments on record; not where the network forbids it."""
    log = world.root / "log"
    world.add_plugin("modern", modern_plugin(log, world.root / "refuse"))
    world.configure({"type": "modern"}, version="1.1.0")
    async with world.network() as network:
        pod = await attach_pod(world, network)
        await network.gc((pod.plan,))
        (line,) = [line for line in log.read_text().splitlines() if line.startswith("GC ")]
        request = json.loads(line.removeprefix("GC "))
        assert request["cni.dev/valid-attachments"] == [{"containerID": pod.id, "ifname": "eth0"}]
        assert request["name"] == "test"
        await detach_pod(network, pod)
    world.settings["collect_garbage"] = False
    async with world.network() as network:
        await network.gc(())
    assert log.read_text().count("GC ") == 1


# ------------------------------------------------------------------------------------------------ the default network
@pytest.mark.lab
@own_host
async def test_default_network_serves_a_node_without_configuration(world: World) -> None:
    """Where the operator allows it, pods get a bridge network, and a real configuration takes over at once."""
    require_plugins("bridge", "host-local", "portmap", "firewall")
    world.settings["default_network"] = {"allow": True, "subnets": ["10.222.0.0/16", "fd22::/64"], "mtu": 1450}
    async with world.network() as network:
        assert network.status().ready, network.status().message
        assert "built-in default network" in network.status().message
        pod = await attach_pod(world, network)
        assert pod.attachment is not None
        assert pod.attachment.ips == ("10.222.0.2", "fd22::2")
        assert pod.attachment.interfaces[0].mtu == 1450
        assert "cri0" in run("ip link show type bridge")
        world.configure(BRIDGE, FIREWALL)
        other = await attach_pod(world, network)
        assert other.attachment is not None
        assert other.attachment.ips[0].startswith("10.77.")
        await detach_pod(network, pod)
        await detach_pod(network, other)
        assert world.leases("dispatcher") == {}


@pytest.mark.lab
@own_host
async def test_default_network_keeps_off_the_hosts_routes(world: World) -> None:
    """A range that the host already routes elsewhere is refused, with the route and what to change."""
    require_plugins("bridge", "host-local", "portmap", "firewall")
    world.settings["default_network"] = {"allow": True}
    run("ip link add vpn type veth peer name vpn-far")
    run("ip link set vpn up")
    run("ip route add 10.0.0.0/8 dev vpn")
    async with world.network() as network:
        status = network.status()
        assert (status.ready, status.reason) == (False, "SubnetCollision")
        assert "10.222.0.0/16" in status.message
        assert "10.0.0.0/8 (vpn)" in status.message
        with pytest.raises(NetworkNotReady, match=r"default_network\.subnets"):
            await plan_pod(world, network)
        run("ip route delete 10.0.0.0/8 dev vpn")
        await eventually(lambda: network.status().ready, what="the route's end is noticed")


@pytest.mark.lab
@own_host
async def test_default_network_is_not_used_beside_a_broken_configuration(world: World) -> None:
    """Somebody meant to have another network: the broken file is told instead."""
    require_plugins("bridge")
    world.settings["default_network"] = {"allow": True}
    world.conf_dir.mkdir()
    (world.conf_dir / "10-mine.conflist").write_text('{"name": "mine", "plugins": [}')
    async with world.network() as network:
        assert show(network) == (False, "BadNetworkConfig")
        assert "10-mine.conflist: Line 1, column 30 is not JSON" in network.status().message


async def test_default_network_needs_iptables(world: World) -> None:
    """The tool that its plugins call is named before a pod fails for want of it."""
    if not (DEBIAN_PLUGINS / "bridge").exists():
        pytest.skip("needs the reference plugins")
    tools = world.root / "tools"
    tools.mkdir()
    (tools / "sh").symlink_to(shutil.which("sh") or "/bin/sh")
    world.settings |= {"default_network": {"allow": True}, "path": str(tools)}
    async with world.network() as network:
        assert show(network) == (False, "ToolMissing")
        assert "iptables" in network.status().message
