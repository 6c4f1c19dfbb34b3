"""Containers: start, exit, stop, and the facts on them."""

from __future__ import annotations

import asyncio
import time
from dataclasses import replace

import pytest

from dispatcher.errors import InvalidRequest, WrongState
from dispatcher.model import Liveness, Resources
from tests.docker.kit import World, container_spec, env, texts
from tests.lab.child import patient

pytestmark = [pytest.mark.lab, pytest.mark.asyncio(loop_scope="session")]
MIB = 1 << 20


async def test_life_of_a_container(world: World, busybox: str) -> None:
    """Created, running, exited with its own code; every step is a full fact and reaches the watcher."""
    pod = await world.make_pod()
    container = await world.make(pod, busybox, container_spec("sh", "-c", "sleep 0.2; exit 3"))
    created = await world.facts(container)
    assert (created.liveness, created.started_at_ns, created.exit_code) == (Liveness.CREATED, 0, None)

    before = time.time_ns()
    started = await world.runtime.start_container(container)
    assert started.liveness is Liveness.RUNNING
    assert before <= started.started_at_ns <= time.time_ns()
    with pytest.raises(WrongState):
        await world.runtime.start_container(container)

    ended = await world.until_seen(container, Liveness.EXITED)
    assert (ended.exit_code, ended.oom_killed, ended.reason) == (3, False, "")
    assert ended.started_at_ns == started.started_at_ns < ended.finished_at_ns
    assert ended == await world.facts(container)
    await world.runtime.remove_container(container)
    await world.until_seen(container, Liveness.ABSENT)
    await world.remove_pod(pod)


@pytest.mark.parametrize("command", ["/no/such/file", "/etc/passwd"])
async def test_command_that_cannot_run_is_a_start_error(world: World, busybox: str, command: str) -> None:
    """A command that is missing or not executable gives an exit with code 128, not a container that waits."""
    pod = await world.make_pod()
    container = await world.make(pod, busybox, container_spec(command))
    facts = await world.runtime.start_container(container)
    assert (facts.liveness, facts.exit_code, facts.reason) == (Liveness.EXITED, 128, "StartError")
    assert command in facts.message
    assert (await world.facts(container)).reason == "StartError"
    assert await world.output(container) == []
    await world.remove_pod(pod)


async def test_exit_at_once_is_a_successful_start(world: World, busybox: str) -> None:
    """A process that ends before anybody looks has been started."""
    pod = await world.make_pod()
    container = await world.make(pod, busybox, container_spec("true"))
    assert (await world.runtime.start_container(container)).reason == ""
    assert (await world.until_seen(container, Liveness.EXITED)).exit_code == 0
    await world.remove_pod(pod)


async def test_image_defaults(world: World, busybox: str) -> None:
    """Command, arguments, environment and working directory follow CRI's rules over the image's."""
    image = "registry.k8s.io/lab/process:1"
    pod = await world.make_pod()
    assert await world.text(pod, image) == "entrypoint cmd\n"
    assert await world.text(pod, image, args=("mine",)) == "entrypoint mine\n"
    assert await world.text(pod, image, "echo") == "\n"
    script = "echo $FROM_IMAGE $SHARED $MINE; pwd"
    printed = await world.text(pod, image, "sh", "-c", script, envs=env(SHARED="pod", MINE="ä=b"))
    assert printed == "yes pod ä=b\n/var/www\n"
    assert await world.text(pod, busybox, "pwd") == "/\n"
    assert await world.text(pod, busybox, "pwd", working_dir="/made/here") == "/made/here\n"
    with pytest.raises(InvalidRequest, match="no command"):
        await world.make(pod, "registry.k8s.io/lab/empty:1", container_spec())
    await world.remove_pod(pod)


async def test_out_of_memory_is_told_with_the_exit(world: World, busybox: str) -> None:
    """The first fact that shows the exit already says that the OOM killer did it."""
    pod = await world.make_pod()
    limits = Resources(memory_limit_bytes=15 * MIB, memory_swap_limit_bytes=15 * MIB)
    for _ in range(5):
        command = ("sh", "-c", "dd if=/dev/zero of=/dev/null bs=20M")
        container = await world.run(pod, busybox, container_spec(*command, resources=limits))
        ended = await world.until_seen(container, Liveness.EXITED)
        assert (ended.exit_code, ended.oom_killed) == (137, True)
    await world.remove_pod(pod)


TRAP = "trap 'echo {0}; exit {1}' {0}; echo ready; while :; do sleep 0.05; done"


async def ready(world: World, container: object) -> None:
    async for chunk in world.runtime.output(container, 0):  # type: ignore[arg-type]
        assert chunk.data == b"ready\n"
        return


async def test_stop_signal_of_container_image_and_default(world: World, busybox: str) -> None:
    """The container's own stop signal wins over its image's, which wins over SIGTERM."""
    pod = await world.make_pod()
    image = "registry.k8s.io/lab/process:1"  # names SIGUSR1
    for reference, own, expected in ((busybox, "", "TERM"), (image, "", "USR1"), (image, "SIGUSR2", "USR2")):
        spec = container_spec("sh", "-c", TRAP.format(expected, 9), stop_signal=own)
        container = await world.run(pod, reference, spec)
        await ready(world, container)
        facts = await world.runtime.stop_container(container, 20)
        assert (facts.exit_code, texts(await world.output(container))[1:]) == (9, [f"{expected}\n"])
    await world.remove_pod(pod)


async def test_stop_kills_at_the_deadline_and_a_shorter_one_moves_it(world: World, busybox: str) -> None:
    """TERM is sent once however often stop is called; the earliest deadline kills."""
    pod = await world.make_pod()
    script = "trap 'echo TERM' TERM; echo ready; while :; do sleep 0.05; done"
    container = await world.run(pod, busybox, container_spec("sh", "-c", script))
    await ready(world, container)
    began = time.monotonic()
    long = asyncio.create_task(world.runtime.stop_container(container, 600))
    later = asyncio.create_task(world.runtime.stop_container(container, 900))
    stream = world.runtime.output(container, 0)
    assert [(await anext(stream)).data, (await anext(stream)).data] == [b"ready\n", b"TERM\n"]
    facts = await world.runtime.stop_container(container, 0.3)
    assert (facts.liveness, facts.exit_code, facts.oom_killed) == (Liveness.EXITED, 137, False)
    assert await long == await later == facts
    assert time.monotonic() - began < 10
    assert texts(await world.output(container)) == ["ready\n", "TERM\n"]
    assert await world.runtime.stop_container(container, 5) == facts
    await world.remove_pod(pod)


async def test_stop_outlives_a_caller_that_gives_up(world: World, busybox: str) -> None:
    """A stop whose caller is gone still kills at its deadline."""
    pod = await world.make_pod()
    container = await world.run(pod, busybox, container_spec("sh", "-c", "trap '' TERM; while :; do sleep 0.05; done"))
    call = asyncio.create_task(world.runtime.stop_container(container, 0.3))
    await asyncio.sleep(0)
    call.cancel()
    assert (await world.until_seen(container, Liveness.EXITED)).exit_code == 137
    await world.remove_pod(pod)


async def test_remove_takes_a_running_container_along(world: World, busybox: str) -> None:
    """Remove kills; the second remove finds nothing and succeeds."""
    pod = await world.make_pod()
    container = await world.run(pod, busybox, container_spec("sleep", "1000"))
    for _ in range(2):
        await world.runtime.remove_container(container)
    assert (await world.facts(container)).liveness is Liveness.ABSENT
    await world.remove_pod(pod)


async def test_facts_come_back_after_a_restart_of_the_daemon(world: World, busybox: str) -> None:
    """A new runtime that knows nothing finds everything by id alone, with exit codes of what ended meanwhile."""
    pod = await world.make_pod()
    lasting = await world.run(pod, busybox, container_spec("sleep", "1000"))
    ending = await world.run(pod, busybox, container_spec("sh", "-c", "sleep 0.2; exit 9"))
    world.snapshots.clear()
    await world.restart_runtime()
    ended = await world.until_seen(ending, Liveness.EXITED)
    assert ended.exit_code == 9
    async with world.news:
        await world.news.wait_for(lambda: world.snapshots)
    assert {fact.id for fact in world.snapshots[0].containers} >= {lasting.id, ending.id}
    assert pod.id in [fact.id for fact in world.snapshots[0].pods]
    nameless = replace(lasting, facts={})
    assert (await world.runtime.stop_container(nameless, 0)).exit_code == 137
    await world.remove_pod(pod)


async def test_many_are_inspected_in_few_calls(world: World, busybox: str) -> None:
    """Facts on many at once are complete, and what does not exist is ABSENT."""
    pod = await world.make_pod()
    made = [await world.make(pod, busybox, container_spec("true")) for _ in range(10)]
    ghost = replace(made[0], id=type(made[0].id)("0" * 64))
    snapshot = await world.runtime.inspect((pod,), (*made, ghost))
    assert [fact.id for fact in snapshot.containers] == [item.id for item in (*made, ghost)]
    assert [fact.liveness for fact in snapshot.containers] == [Liveness.CREATED] * 10 + [Liveness.ABSENT]
    await world.remove_pod(pod)


async def test_pruned_engine_image_is_loaded_again(world: World, busybox: str) -> None:
    """Somebody who prunes the engine's images costs the next container a load, not its life."""
    pod = await world.make_pod()
    image = await world.image(busybox)
    await world.text(pod, busybox, "true")
    copy = next(tag for row in world.engine.images() for tag in row["RepoTags"] or () if image.id[7:] in tag)
    assert copy.startswith("cri-dispatcher.local/")
    world.engine.request("DELETE", f"/images/{copy}?force=1")
    assert await world.text(pod, busybox, "echo", "back") == "back\n"
    await world.remove_pod(pod)


async def test_engine_copy_goes_with_the_image(world: World) -> None:
    """Removing an image from the store removes the engine's copy, once no container uses it."""
    reference = "gcr.io/k8s-staging-cri-tools/test-image-1:latest"
    pod = await world.make_pod()
    container = await world.make(pod, reference, container_spec("true"))
    image = await world.image(reference)

    def copies() -> list[str]:
        return [tag for row in world.engine.images() for tag in row["RepoTags"] or () if image.id[7:] in tag]

    assert len(copies()) == 1
    engine = world.runtime._link.need_copies()
    before = (await engine.copies_disk_usage())[0].used_bytes
    assert before > 0
    await world.images.remove(reference)
    assert len(copies()) == 1
    await world.runtime.remove_container(container)
    world.images.release(container.id)
    async with asyncio.timeout(patient(10)):
        while copies():
            await asyncio.sleep(0.02)
    assert (await engine.copies_disk_usage())[0].used_bytes < before
    await world.remove_pod(pod)
