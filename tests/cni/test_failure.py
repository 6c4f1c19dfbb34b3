"""When things go wrong: plugins that fail, hang or vanish, namespaces that are gone, configurations that change."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from pathlib import Path

import pytest

from dispatcher.errors import NetworkFailed
from dispatcher.model import PortMapping
from dispatcher.netns import remove_namespace
from tests.cni.net import (
    BRIDGE,
    FIREWALL,
    PORTMAP,
    World,
    attach_pod,
    detach_pod,
    eventually,
    is_running,
    make_spec,
    plan_pod,
    require_plugins,
)
from tests.lab.own_host import own_host, run, take_census

pytestmark = pytest.mark.lab

LEASES = Path("/var/lib/cni")
PUBLISHED = make_spec(port_mappings=(PortMapping(container_port=80, host_port=8080),))
# A chained plugin that does nothing and passes the result on, as a shell script. {add} runs at ADD, {rest} otherwise.
PASS_ON = "sed -e 's/.*\"prevResult\"://' -e 's/}$//'"


@pytest.fixture
def world(tmp_path: Path) -> World:
    require_plugins("bridge", "host-local", "portmap", "firewall")
    return World(root=tmp_path)


async def warm_up(world: World) -> None:
    """Attach and detach one pod with a plain chain, so that what is made once per node is there already."""
    world.configure(BRIDGE, PORTMAP, FIREWALL)
    async with world.network() as network:
        await detach_pod(network, await attach_pod(world, network, PUBLISHED))


@own_host
async def test_failing_plugin_is_named_and_what_ran_before_it_is_undone(world: World) -> None:
    """The second plugin fails: the error has its words, and DEL without any attachment leaves nothing behind."""
    await warm_up(world)
    world.add_plugin(
        "broken",
        'if [ "$CNI_COMMAND" = ADD ]; then echo \'{"code": 111, "msg": "no luck", "details": "today"}\'; exit 1; fi\n',
    )
    world.configure(BRIDGE, {"type": "broken"}, PORTMAP, FIREWALL)
    before = take_census(world.netns_dir, LEASES)
    async with world.network() as network:
        pod = await plan_pod(world, network, PUBLISHED)
        with pytest.raises(NetworkFailed, match="plugin broken failed at ADD: no luck; today"):
            await network.add(pod.plan)
        steps = [(step["plugin"], step["outcome"]) for step in world.steps if step["command"] == "ADD"]
        assert steps[-2:] == [("bridge", "ok"), ("broken", "failed")]
        assert len(world.leases()) == 2
        await detach_pod(network, pod)
    assert take_census(world.netns_dir, LEASES) == before


@own_host
async def test_hanging_plugin_is_killed_with_its_children(world: World) -> None:
    """At the deadline the plugin and what it started are dead, the error says so, and DEL cleans up."""
    await warm_up(world)
    pids = world.root / "pids"
    world.add_plugin(
        "stuck",
        f'[ "$CNI_COMMAND" = ADD ] || exit 0\nsleep 1000 & echo $$ $! > {pids}.new; mv {pids}.new {pids}; wait\n',
    )
    world.configure(BRIDGE, {"type": "stuck"}, FIREWALL)
    world.settings["plugin_timeout_s"] = 3
    before = take_census(world.netns_dir, LEASES)
    async with world.network() as network:
        pod = await plan_pod(world, network)
        with pytest.raises(NetworkFailed, match="stuck failed at ADD: it did not end within 3 s and was killed"):
            await network.add(pod.plan)
        plugin, child = (int(pid) for pid in pids.read_text().split())
        assert not is_running(plugin)
        # Both got the same signal, but only the plugin is ours to wait for.
        await eventually(lambda: not is_running(child), what="what the plugin started is gone")
        await detach_pod(network, pod)
    assert take_census(world.netns_dir, LEASES) == before


@own_host
async def test_cancelled_add_leaves_no_process_and_can_be_deleted(world: World) -> None:
    """A caller that gives up kills the plugin; the addresses that were taken are known to DEL."""
    await warm_up(world)
    pids = world.root / "pids"
    world.add_plugin(
        "stuck", f'[ "$CNI_COMMAND" = ADD ] || exit 0\necho $$ > {pids}.new; mv {pids}.new {pids}; sleep 99\n'
    )
    world.configure(BRIDGE, FIREWALL, {"type": "stuck"})
    before = take_census(world.netns_dir, LEASES)
    async with world.network() as network:
        pod = await plan_pod(world, network)
        adding = asyncio.create_task(network.add(pod.plan))
        await eventually(pids.exists, what="the plugin runs")
        adding.cancel()
        with pytest.raises(asyncio.CancelledError):
            await adding
        assert not is_running(int(pids.read_text()))
        await detach_pod(network, pod)
    assert take_census(world.netns_dir, LEASES) == before


@own_host
async def test_endless_output_and_nonsense_are_failures(world: World) -> None:
    """What a plugin prints is bounded, and must be a result."""
    world.add_plugin("chatty", '[ "$CNI_COMMAND" = ADD ] || exit 0\nexec yes\n')
    world.add_plugin("poet", '[ "$CNI_COMMAND" = ADD ] || exit 0\necho O wild west wind\n')
    world.add_plugin("mute", '[ "$CNI_COMMAND" = ADD ] || exit 0\nkill -9 $$\n')
    world.add_plugin("empty", '[ "$CNI_COMMAND" = ADD ] || exit 0\necho "{}"\n')
    async with world.network() as network:
        for name, words in (
            ("chatty", "it printed more than any answer holds and was killed"),
            ("poet", "its answer is not a result"),
            ("mute", "no message, exit status -9"),
            ("empty", "gave the pod no address"),
        ):
            world.configure({"type": name})
            pod = await plan_pod(world, network)
            with pytest.raises(NetworkFailed, match=words):
                await network.add(pod.plan)
            await detach_pod(network, pod)


@own_host
async def test_plugin_that_leaves_a_daemon_has_answered(world: World) -> None:
    """A background process that keeps the plugin's output open neither blocks ADD or DEL nor is killed."""
    pid_file = world.root / "pid"
    world.add_plugin("parent", f'[ "$CNI_COMMAND" = ADD ] && {{ sleep 60 & echo $! > {pid_file}; }}\n{PASS_ON}\n')
    world.configure(BRIDGE, {"type": "parent"})
    async with world.network() as network:
        pod = await attach_pod(world, network)
        began = time.monotonic()
        await detach_pod(network, pod)
        assert time.monotonic() - began < 9, "DEL waited for the daemon, as it would for a plugin"
    daemon = int(pid_file.read_text())
    assert is_running(daemon)
    os.kill(daemon, signal.SIGKILL)


@own_host
async def test_delete_that_fails_keeps_the_address_and_succeeds_later(world: World) -> None:
    """A plugin that refuses DEL stops the chain: the address stays reserved until DEL has gone through."""
    await warm_up(world)
    refuse = world.root / "refuse"
    world.add_plugin(
        "guard", f'if [ "$CNI_COMMAND" = DEL ] && [ -e {refuse} ]; then echo busy >&2; exit 1; fi\n{PASS_ON}\n'
    )
    world.configure(BRIDGE, FIREWALL, {"type": "guard"})
    before = take_census(world.netns_dir, LEASES)
    async with world.network() as network:
        pod = await attach_pod(world, network)
        refuse.touch()
        with pytest.raises(NetworkFailed, match="guard failed at DEL: busy"):
            await network.delete(pod.plan, pod.attachment)
        assert len(world.leases()) == 2
        refuse.unlink()
        await detach_pod(network, pod)
    assert take_census(world.netns_dir, LEASES) == before


@own_host
async def test_delete_runs_with_the_configuration_that_add_ran_with(world: World) -> None:
    """The network was replaced by another one meanwhile, and its file is gone: DEL still frees the first."""
    await warm_up(world)
    before = take_census(world.netns_dir, LEASES)
    async with world.network() as network:
        old = await attach_pod(world, network, PUBLISHED)
        world.configure({**BRIDGE, "bridge": "br-other"}, FIREWALL, name="other")
        new = await attach_pod(world, network)
        assert set(world.leases("other").values()) == {new.id}
        await detach_pod(network, old)
        assert world.leases() == {}
        await detach_pod(network, new)
    run("ip link delete br-other")
    after = take_census(world.netns_dir, LEASES)
    assert after["iptables"] == before["iptables"]
    assert after["links"] == before["links"]


@own_host
async def test_delete_cleans_up_where_the_namespace_is_gone(world: World) -> None:
    """Somebody unmounted the namespace: addresses, rules and masquerading chains go all the same."""
    await warm_up(world)
    before = take_census(world.netns_dir, LEASES)
    async with world.network() as network:
        pod = await attach_pod(world, network, PUBLISHED)
        await remove_namespace(pod.netns)
        await network.delete(pod.plan, pod.attachment)
        await network.delete(pod.plan, pod.attachment)
    assert take_census(world.netns_dir, LEASES) == before


@own_host
async def test_delete_cleans_up_where_a_virtual_machine_took_the_addresses(world: World) -> None:
    """An interface without its addresses is what a VM pod has; the reference plugins need them back at DEL."""
    await warm_up(world)
    before = take_census(world.netns_dir, LEASES)
    async with world.network() as network:
        pod = await attach_pod(world, network, PUBLISHED)
        run("ip address flush dev eth0", netns=pod.netns)
        await detach_pod(network, pod)
    assert take_census(world.netns_dir, LEASES) == before


@own_host
async def test_delete_without_the_plugins_executable_frees_the_address(world: World) -> None:
    """The bridge plugin was uninstalled: the error says what to install, and no address is lost."""
    await warm_up(world)
    world.link_plugins("bridge", "host-local", "firewall")
    world.settings["bin_dirs"] = [str(world.bin_dir)]
    world.configure(BRIDGE, FIREWALL)
    before = take_census(world.netns_dir, LEASES)
    async with world.network() as network:
        pod = await attach_pod(world, network)
        (world.bin_dir / "bridge").unlink()
        with pytest.raises(NetworkFailed, match=f"plugin bridge is not in {world.bin_dir}: install it"):
            await network.delete(pod.plan, pod.attachment)
        assert world.leases() == {}
        world.link_plugins("bridge")
        await detach_pod(network, pod)
    assert take_census(world.netns_dir, LEASES) == before


@own_host
async def test_operator_may_give_up_on_a_plugin_that_is_gone_for_good(world: World) -> None:
    """With the switch set, DEL goes through without the missing plugin."""
    world.link_plugins("bridge", "host-local")
    world.add_plugin("extra", f"{PASS_ON}\n")
    world.settings |= {"bin_dirs": [str(world.bin_dir)], "skip_missing_plugins_on_delete": True}
    world.configure(BRIDGE, {"type": "extra"})
    async with world.network() as network:
        pod = await attach_pod(world, network)
        (world.bin_dir / "extra").unlink()
        await detach_pod(network, pod)
    assert world.leases() == {}
