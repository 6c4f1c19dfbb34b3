"""An engine that is killed, stopped, frozen or absent: no record is lost, no fact invented, nobody waits for ever."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import pytest
import pytest_asyncio

from dispatcher.errors import RuntimeDown
from dispatcher.model import Liveness, ObservedContainer, ObservedPod
from tests.docker.kit import DEADLINE_S, World, container_spec
from tests.lab.child import PartMissingError, patient
from tests.lab.engine import Engine
from tests.lab.images import TestImages
from tests.lab.registry import Registry

pytestmark = [
    pytest.mark.lab,
    pytest.mark.asyncio(loop_scope="session"),
    pytest.mark.timeout(180),
]


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def own(
    registry: Registry,
    test_images: TestImages,
    tmp_path_factory: pytest.TempPathFactory,
) -> AsyncIterator[World]:
    """A world on an engine of its own, which these tests kill."""
    try:
        engine = Engine()
    except PartMissingError as exc:
        pytest.skip(str(exc))
    try:
        engine.start()
        world = await World.open(engine, registry, tmp_path_factory.mktemp("loss"))
        yield world
        await world.close()
    finally:
        engine.close()


LINES = "i=0; while [ $i -lt 3000 ]; do echo line $i; i=$((i+1)); usleep 500; done; sleep 1000"


async def fails_fast(world: World, *, within_s: float) -> None:
    """Every kind of call ends with RuntimeDown in short time."""
    pod = world.pods[-1]
    calls = (world.runtime.stop_pod(pod), world.runtime.remove_pod(pod), world.runtime.inspect((pod,), ()))
    began = time.monotonic()
    health = await world.runtime.probe()
    assert not health.ready
    assert health.cgroup_driver == "cgroupfs", "what the engine was met with is forgotten while it is away"
    assert health.features.supplemental_groups_policy
    results = await asyncio.gather(*calls, return_exceptions=True)
    assert [type(result).__mro__.count(RuntimeDown) for result in results] == [1, 1, 1]
    assert time.monotonic() - began < within_s


async def test_killed_with_live_restore(own: World, busybox: str) -> None:
    """Containers run on, nothing written is lost or doubled, exits while the engine was down keep their codes."""
    pod = await own.make_pod()
    writer = await own.run(pod, busybox, container_spec("sh", "-c", LINES))
    ending = await own.run(pod, busybox, container_spec("sh", "-c", "sleep 3; exit 5"))
    pids = [own.engine.inspect(f"cri_{item.id}")["State"]["Pid"] for item in (pod, writer, ending)]
    stream = own.runtime.output(writer, 0)
    lines = [(await anext(stream)).data for _ in range(200)]
    own.snapshots.clear()

    own.engine.kill()
    await fails_fast(own, within_s=2)
    async with asyncio.timeout(DEADLINE_S):  # it ends while nobody watches; its shim keeps the code
        while Path(f"/proc/{pids[2]}").exists():
            await asyncio.sleep(0.05)
    own.engine.start()
    await own.until_ready()

    async with asyncio.timeout(patient(60)):
        while len(lines) < 3000:
            lines.append((await anext(stream)).data)
    assert lines == [b"line %d\n" % number for number in range(3000)]
    await stream.aclose()  # type: ignore[attr-defined]
    ended = await own.until_seen(ending, Liveness.EXITED)
    # Engines from 25 on lose the code of what ended while their containerd was down: then they do not get one.
    assert (ended.exit_code, ended.reason) in ((5, ""), (None, "EngineRestarted"))
    snapshot = await own.runtime.inspect((pod,), (writer,))
    assert (snapshot.pods[0].liveness, snapshot.containers[0].liveness) == (Liveness.RUNNING, Liveness.RUNNING)
    assert [own.engine.inspect(f"cri_{item.id}")["State"]["Pid"] for item in (pod, writer)] == pids[:2]
    assert len(own.snapshots) == 1
    assert await own.exec(writer, "echo", "alive") == (0, b"alive\n", b"")
    await own.remove_pod(pod)


@pytest.mark.parametrize("how", ["kill", "stop"])
async def test_restarted_without_live_restore(own: World, busybox: str, how: str) -> None:
    """Pods end with the named reason; an exit code is the real one or none at all."""
    own.engine.stop()
    own.engine.set_live_restore(enabled=False)
    own.engine.start()
    try:
        await own.until_ready()
        assert any("live-restore" in note for note in (await own.runtime.probe()).notes)
        pod = await own.make_pod()
        container = await own.run(pod, busybox, container_spec("sleep", "1000"))
        done = await own.run(pod, busybox, container_spec("sh", "-c", "exit 255"))
        assert (await own.until_seen(done, Liveness.EXITED)).exit_code == 255
        getattr(own.engine, how)()
        own.seen.clear()
        own.engine.start()

        ended = await own.until_seen(container, Liveness.EXITED)
        assert ended.reason == "EngineRestarted"
        assert ended.exit_code in (None, 137, 143)
        pod_facts = [fact for fact in own.seen if isinstance(fact, ObservedPod) and fact.id == pod.id]
        assert {fact.liveness for fact in pod_facts} == {Liveness.EXITED}
        assert pod_facts[-1].reason == "EngineRestarted"
        seen = [fact for fact in own.seen if isinstance(fact, ObservedContainer) and fact.id == done.id]
        assert {(fact.exit_code, fact.reason) for fact in seen} == {(255, "")}
        await own.remove_pod(pod)
    finally:
        own.engine.stop()
        own.engine.set_live_restore(enabled=True)
        own.engine.start()
        await own.until_ready()


async def test_lost_process_has_no_exit_code(own: World, busybox: str) -> None:
    """When shim and process died with nobody watching, the engine's 255 is not believed."""
    pod = await own.make_pod()
    container = await own.run(pod, busybox, container_spec("sleep", "1000"))
    pid = own.engine.inspect(f"cri_{container.id}")["State"]["Pid"]
    shim = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    own.engine.kill()
    os.kill(shim, signal.SIGKILL)
    os.kill(pid, signal.SIGKILL)
    own.seen.clear()
    own.engine.start()
    ended = await own.until_seen(container, Liveness.EXITED)
    assert (ended.exit_code, ended.reason) == (None, "EngineRestarted")
    await own.remove_pod(pod)


async def test_frozen_engine_costs_a_deadline_once(own: World, busybox: str) -> None:
    """An engine that does not answer is noticed by its ping; later calls fail at once; it is met again when it wakes."""
    pod = await own.make_pod()
    container = await own.run(pod, busybox, container_spec("sleep", "1000"))
    own.engine.pause()
    try:
        async with asyncio.timeout(patient(20)):
            while not own.runtime._link.client._away:
                await asyncio.sleep(0.05)
        await fails_fast(own, within_s=5)
        began = time.monotonic()
        with pytest.raises(RuntimeDown):
            await own.facts(container)
        assert time.monotonic() - began < 0.2
    finally:
        own.engine.resume()
    await own.until_ready()
    assert (await own.facts(container)).liveness is Liveness.RUNNING
    await own.remove_pod(pod)


async def test_pod_is_proven_gone_without_the_engine(own: World, busybox: str) -> None:
    """A pod whose every process is gone counts as stopped though the engine is away; one that runs does not."""
    pod = await own.make_pod()
    container = await own.run(pod, busybox, container_spec("sleep", "1000"))
    pids = [own.engine.inspect(f"cri_{item.id}")["State"]["Pid"] for item in (pod, container)]
    own.engine.kill()
    try:
        for pid in pids:
            with pytest.raises(RuntimeDown):
                await own.runtime.stop_pod(pod)
            with pytest.raises(RuntimeDown):
                await own.runtime.stop_pod(replace(pod, facts={}))
            os.kill(pid, signal.SIGKILL)
        async with asyncio.timeout(DEADLINE_S):
            while True:
                try:
                    await own.runtime.stop_pod(pod)
                except RuntimeDown:
                    await asyncio.sleep(0.05)
                else:
                    break
    finally:
        own.engine.start()
        await own.until_ready()
    await own.remove_pod(pod)


async def test_daemon_that_starts_before_its_engine(own: World, busybox: str) -> None:
    """A runtime whose engine is away starts, says so, and is ready by itself once the engine is there."""
    await own.end()
    own.engine.stop()
    try:
        from dispatcher_docker_shim.config import parse
        from dispatcher_docker_shim.runtime import DockerRuntime

        own.runtime = DockerRuntime(parse(own.section), own.services)
        await own.runtime.start()
        health = await own.runtime.probe()
        assert (health.ready, health.reason) == (False, "EngineDown")
        assert "is it running?" in health.message
        await own.runtime.aclose()
    finally:
        own.engine.start()
        own.runtime = DockerRuntime(parse(own.section), own.services)
        await own.begin()
    pod = await own.make_pod()
    assert await own.text(pod, busybox, "echo", "fine") == "fine\n"
    await own.remove_pod(pod)
