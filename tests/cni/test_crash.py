"""`kill -9` of the daemon around and within every act on the network; then a new daemon takes over."""

from __future__ import annotations

import asyncio
import os
import random
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from dispatcher.model import PodId, make_pod_id
from dispatcher.netns import list_namespaces, remove_namespace
from tests.cni.crash_child import read_record
from tests.cni.net import (
    BRIDGE,
    FIREWALL,
    PORTMAP,
    World,
    attach_pod,
    detach_pod,
    eventually,
    is_running,
    require_plugins,
)
from tests.cni.test_failure import LEASES, PASS_ON, PUBLISHED, warm_up
from tests.lab.own_host import own_host, take_census

pytestmark = pytest.mark.lab

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def world(tmp_path: Path) -> World:
    require_plugins("bridge", "host-local", "portmap", "firewall")
    return World(root=tmp_path)


def start_child(world: World, pod_id: PodId, **environment: str) -> subprocess.Popen[bytes]:
    """Start the daemon in small on this host."""
    (world.root / "record").unlink(missing_ok=True)
    argv = [sys.executable, "-m", "tests.cni.crash_child", str(world.root), pod_id]
    return subprocess.Popen(argv, cwd=ROOT, env={**os.environ, **environment})


async def take_over(world: World, *, with_record: bool) -> None:
    """What a new daemon does: undo the pod on record, free what is not on record, remove stray namespaces."""
    async with world.network() as network:
        plan = read_record(world.root) if with_record else None
        if plan is not None:
            await network.delete(plan, None)
        await network.gc(())
    for name in list_namespaces(world.netns_dir):
        await remove_namespace(world.netns_dir / name)


def find_passages(world: World) -> list[str]:
    """Every failpoint that the life of one pod passes, each passage with its number: "cni.exec:before=kill@2"."""
    trace = world.root / "trace"
    child = start_child(
        world,
        make_pod_id(),
        DISPATCHER_FAILPOINTS="*:before=trace,*:after=trace",
        DISPATCHER_FAILPOINT_TRACE=str(trace),
    )
    assert child.wait() == 0
    seen: Counter[str] = Counter()
    found = []
    for name in trace.read_text().split():
        seen[name] += 1
        found.append(f"{name}=kill@{seen[name]}")
    return found


@pytest.mark.timeout(180)
@pytest.mark.parametrize(("when", "with_record"), [("before", True), ("after", False)])
@own_host
async def test_killed_at_any_act_the_next_daemon_leaves_nothing(world: World, when: str, with_record: bool) -> None:
    """Killed at each failpoint, once with the plan on record and once with the provider's own journal alone."""
    await warm_up(world)
    world.configure(BRIDGE, FIREWALL)
    folders = (world.netns_dir, world.state_dir, world.root / "run", LEASES)
    before = take_census(*folders)
    passages = [passage for passage in find_passages(world) if f":{when}=" in passage]
    assert {passage.partition(":")[0] for passage in passages} >= {
        "cni.exec",
        "cni.journal.open",
        "cni.journal.remove",
        "cni.journal.write",
        "cni.lock.open",
        "cni.lock.remove",
        "cni.lock.renew",
        "cni.restore_interface",
        "netns.ensure",
        "netns.remove",
    }
    for passage in passages:
        child = start_child(world, make_pod_id(), DISPATCHER_FAILPOINTS=passage)
        assert child.wait() == -9, passage
        await take_over(world, with_record=with_record)
        assert take_census(*folders) == before, passage
    print(f"{len(passages)} kills")


def add_slow_plugin(world: World) -> tuple[Path, Path, Path]:
    """A plugin whose ADD waits for a word in a pipe. Returns its log, the pipe, and the file with its pid."""
    log, pipe, pid = world.root / "log", world.root / "pipe", world.root / "pid"
    os.mkfifo(pipe)
    world.add_plugin(
        "slow",
        f"""echo "$CNI_COMMAND begins" >> {log}
        if [ "$CNI_COMMAND" = ADD ]; then echo $$ > {pid}.new; mv {pid}.new {pid}; read word < {pipe}; fi
        {PASS_ON}
        echo "$CNI_COMMAND ends" >> {log}
        """,
    )
    world.configure(BRIDGE, {"type": "slow"}, PORTMAP, FIREWALL)
    return log, pipe, pid


def has_open(path: Path) -> bool:
    """Tell whether this process has a file open."""
    return any(os.path.realpath(link) == str(path) for link in Path("/proc/self/fd").iterdir())


@own_host
async def test_delete_waits_for_a_plugin_that_outlived_its_daemon(world: World) -> None:
    """The daemon dies while a plugin works. The next one lets it end before it begins to delete."""
    await warm_up(world)
    before = take_census(world.netns_dir, LEASES)
    log, pipe, pid = add_slow_plugin(world)
    pod_id = make_pod_id()
    child = start_child(world, pod_id)
    await eventually(pid.exists, what="the plugin works", timeout_s=20)
    child.kill()
    child.wait()
    log.write_text("")
    taking_over = asyncio.create_task(take_over(world, with_record=True))
    await eventually(lambda: has_open(world.root / "run" / "locks" / pod_id), what="DEL waits")
    await asyncio.to_thread(pipe.write_text, "go\n")
    await taking_over
    assert [line for line in log.read_text().splitlines() if "VERSION" not in line] == [
        "ADD ends",
        "DEL begins",
        "DEL ends",
    ]
    assert take_census(world.netns_dir, LEASES) == before


@own_host
async def test_plugin_that_outlived_its_daemon_and_does_not_end_is_killed(world: World) -> None:
    """After its patience the new daemon kills it, and frees what it had taken."""
    await warm_up(world)
    before = take_census(world.netns_dir, LEASES)
    _, _, pid = add_slow_plugin(world)
    child = start_child(world, make_pod_id())
    await eventually(pid.exists, what="the plugin works", timeout_s=20)
    child.kill()
    child.wait()
    world.settings["stray_patience_s"] = 0.5
    await take_over(world, with_record=True)
    await eventually(lambda: not is_running(int(pid.read_text())), what="the plugin is gone")
    assert take_census(world.netns_dir, LEASES) == before


@own_host
async def test_clean_up_at_start_frees_only_what_is_not_on_record(world: World) -> None:
    """Pods whose record is lost are detached by what the provider remembers; the others keep their network."""
    world.configure(BRIDGE, PORTMAP, FIREWALL)
    async with world.network() as network:
        kept, lost = await attach_pod(world, network), await attach_pod(world, network, PUBLISHED)
    async with world.network() as network:
        newcomer = await attach_pod(world, network)
        await network.gc((kept.plan,))
        await detach_pod(network, newcomer)
        assert set(world.leases().values()) == {kept.id}
        assert kept.attachment is not None
        assert await network.check(kept.plan, kept.attachment) == ()
        await detach_pod(network, kept)
    await remove_namespace(lost.netns)
    assert world.leases() == {}


@own_host
async def test_address_of_a_pod_whose_file_is_damaged_is_freed(world: World) -> None:
    """The machine died while the provider wrote: neither a record nor a plan is left, only the pod's id."""
    world.configure(BRIDGE, FIREWALL)
    async with world.network() as network:
        pod = await attach_pod(world, network)
    await remove_namespace(pod.netns)
    (world.state_dir / "attachments" / f"{pod.id}.json").write_bytes(b"")
    async with world.network() as network:
        await network.gc(())
    assert world.leases() == {}
    assert list((world.state_dir / "attachments").iterdir()) == []


@pytest.mark.soak
@own_host
async def test_killed_at_random_moments_the_next_daemon_leaves_nothing(world: World) -> None:
    """Not at failpoints but at any moment, with plugins at work: they go on while the next daemon takes over."""
    rounds, seed = int(os.environ.get("CNI_SOAK_ROUNDS", "100")), int(os.environ.get("CNI_SOAK_SEED", "7"))
    chance = random.Random(seed)
    await warm_up(world)
    folders = (world.netns_dir, world.state_dir, world.root / "run", LEASES)
    before = take_census(*folders)
    outcomes: Counter[str] = Counter()
    for number in range(rounds):
        child = start_child(world, make_pod_id())
        await eventually((world.root / "record").exists, what="it begins", timeout_s=20)
        await asyncio.sleep(chance.random() * 1.2)  # the moment is the input of this test
        child.kill()
        outcomes["killed" if child.wait() == -9 else "had ended"] += 1
        await take_over(world, with_record=chance.random() < 0.5)
        assert take_census(*folders) == before, f"round {number} of seed {seed}"
    print(dict(outcomes))
