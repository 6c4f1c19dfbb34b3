"""Making, stopping and removing: what every runtime does, in every order in which it may be asked."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest

from dispatcher.api import (
    CanDetailedStats,
    CanPodStats,
    CanPrepare,
    CanStats,
    CanUpdateResources,
    ContainerRef,
    ContainerUsage,
)
from dispatcher.errors import DispatcherError, InvalidRequest
from dispatcher.model import (
    EnvVar,
    Isolation,
    Liveness,
    PodMetadata,
    PodSpec,
    Resources,
    Stream,
    make_pod_id,
)
from dispatcher.testing.case import RuntimeCase, container_spec, pod_spec
from dispatcher.testing.contract.steps import (
    COUNTS_TERM,
    DEAF,
    UNTIL_TERM,
    ability,
    create,
    joined,
    look,
    look_at_pod,
    new_pod,
    read,
    remove_pod,
    script,
    start,
    start_ready,
    stop,
    until_exited,
)

pytestmark = pytest.mark.asyncio


async def test_it_says_what_it_is(case: RuntimeCase) -> None:
    """Name, isolation, version, facts schema and option keys are there from the start and never change."""
    runtime = case.runtime
    assert runtime.name
    assert isinstance(runtime.isolation, Isolation)
    assert runtime.version
    assert isinstance(runtime.facts_schema, int)
    assert isinstance(runtime.option_keys, frozenset)


async def test_a_probe_of_a_working_engine_is_ready(case: RuntimeCase) -> None:
    """`probe` answers fast, and ready with nothing to complain of."""
    async with asyncio.timeout(5):
        health = await case.runtime.probe()
    assert health.ready, health
    assert health.reason == ""
    assert health.engine


async def test_a_pod_lives_from_create_to_remove(case: RuntimeCase) -> None:
    """A created sandbox runs, a stopped one does not, a removed one is absent and leaves nothing."""
    pod = await case.make_pod(pod_spec())
    assert await look_at_pod(case, pod) is Liveness.ABSENT
    made = await case.runtime.create_pod(pod)
    pod = replace(pod, facts=made.facts)
    assert await look_at_pod(case, pod) is Liveness.RUNNING
    await case.runtime.stop_pod(pod)
    assert await look_at_pod(case, pod) in (Liveness.EXITED, Liveness.ABSENT)
    await case.runtime.stop_pod(pod)
    await case.runtime.remove_pod(pod)
    await case.runtime.remove_pod(pod)
    await case.runtime.stop_pod(pod)
    assert await look_at_pod(case, pod) is Liveness.ABSENT
    await case.release_pod(pod)
    assert await case.leftovers() == []


async def test_stopping_and_removing_what_never_existed_succeeds(case: RuntimeCase) -> None:
    """After a crash the core cannot know whether an act had happened: it undoes it anyway."""
    pod = await case.make_pod(pod_spec())
    container = await case.make_container(pod, script("true"))
    await case.runtime.remove_container(container)
    await case.runtime.stop_pod(pod)
    await case.runtime.remove_pod(pod)
    assert (await look(case, container)).liveness is Liveness.ABSENT
    await case.release_pod(pod)
    assert await case.leftovers() == []


async def test_a_container_lives_from_create_to_remove(case: RuntimeCase) -> None:
    """Created, it does not run; started, it runs; ended, its facts are complete; removed, it is absent."""
    async with new_pod(case) as pod:
        container = await create(case, pod, script("read line; exit 3", stdin=True))
        assert (await look(case, container)).liveness is Liveness.CREATED
        running = await case.runtime.start_container(container)
        assert running.liveness is Liveness.RUNNING
        assert running.started_at_ns > 0
        ended = await stop(case, container, 0)
        assert ended.liveness is Liveness.EXITED
        await case.runtime.remove_container(container)
        await case.runtime.remove_container(container)
        assert (await look(case, container)).liveness is Liveness.ABSENT


@pytest.mark.parametrize("code", [0, 3, 127, 255])
async def test_the_exit_code_is_the_process_s_own(case: RuntimeCase, code: int) -> None:
    """The exit arrives as a fact, with its code, and with times in order."""
    async with new_pod(case) as pod:
        container = await start(case, pod, script(f"exit {code}"))
        fact = await until_exited(case, container)
        assert fact.exit_code == code
        assert not fact.oom_killed
        assert 0 < fact.started_at_ns <= fact.finished_at_ns
        assert (await look(case, container)).exit_code == code


async def test_a_command_that_cannot_be_executed_is_no_success(case: RuntimeCase) -> None:
    """Refused at create, or EXITED with 128 and StartError at start; never RUNNING."""
    async with new_pod(case) as pod:
        container = await case.make_container(pod, container_spec("/no/such/program"))
        try:
            made = await case.runtime.create_container(container)
        except InvalidRequest:
            return
        fact = await case.runtime.start_container(replace(container, facts=made.facts))
        assert (fact.liveness, fact.exit_code, fact.reason) == (Liveness.EXITED, 128, "StartError")


async def test_the_environment_reaches_the_process(case: RuntimeCase) -> None:
    """Variables arrive byte by byte, and nothing of them is read as a command."""
    async with new_pod(case) as pod:
        envs = (EnvVar(key="GREETING", value=b"a b;c"), EnvVar(key="EMPTY", value=b""))
        container = await start(case, pod, script('echo "<$GREETING>" "<$EMPTY>"', envs=envs))
        assert joined(await read(case, container)) == b"<a b;c> <>\n"


async def test_a_stop_lets_the_process_end_by_itself(case: RuntimeCase) -> None:
    """The stop signal is sent, and the process's own exit code counts."""
    async with new_pod(case) as pod:
        container = await start_ready(case, pod, script(UNTIL_TERM))
        fact = await stop(case, container, 30)
        assert (fact.liveness, fact.exit_code) == (Liveness.EXITED, 7)
        assert joined(await read(case, container)) == b"ready\nterm\n"


async def test_a_spec_may_choose_the_stop_signal(case: RuntimeCase) -> None:
    """`stop_signal` of the spec is sent instead of TERM."""
    async with new_pod(case) as pod:
        text = UNTIL_TERM.replace("TERM", "USR1")
        container = await start_ready(case, pod, script(text, stop_signal="SIGUSR1"))
        assert (await stop(case, container, 30)).exit_code == 7


async def test_a_stop_kills_after_the_grace(case: RuntimeCase) -> None:
    """A process that ignores the signal is killed when its time is over, and not before."""
    async with new_pod(case) as pod:
        container = await start_ready(case, pod, script(DEAF))
        began = asyncio.get_running_loop().time()
        fact = await stop(case, container, 1)
        assert asyncio.get_running_loop().time() - began >= 1
        assert (fact.liveness, fact.exit_code) == (Liveness.EXITED, 137)


async def test_a_stop_without_grace_kills_at_once(case: RuntimeCase) -> None:
    """0 means: no signal but KILL."""
    async with new_pod(case) as pod:
        container = await start_ready(case, pod, script(UNTIL_TERM))
        fact = await stop(case, container, 0)
        assert (fact.liveness, fact.exit_code) == (Liveness.EXITED, 137)
        assert b"term" not in joined(await read(case, container))


async def test_a_shorter_stop_moves_the_deadline_and_signals_no_second_time(case: RuntimeCase) -> None:
    """Three stops at once: one signal, the earliest deadline, the same facts for all."""
    async with new_pod(case) as pod:
        container = await start_ready(case, pod, script(COUNTS_TERM))
        stops = [asyncio.create_task(stop(case, container, grace)) for grace in (60, 60)]
        async with asyncio.timeout(case.deadline_s):
            async for chunk in case.runtime.output(container, 0):
                if b"term" in chunk.data:
                    break
            last = await case.runtime.stop_container(container, 1)
            facts = [last, *await asyncio.gather(*stops)]
        assert {(fact.liveness, fact.exit_code) for fact in facts} == {(Liveness.EXITED, 137)}
        assert joined(await read(case, container)).count(b"term") == 1


async def test_stopping_what_has_ended_changes_nothing(case: RuntimeCase) -> None:
    """The facts of the end stay what they were."""
    async with new_pod(case) as pod:
        container = await start(case, pod, script("exit 5"))
        ended = await until_exited(case, container)
        fact = await stop(case, container, 1)
        assert (fact.exit_code, fact.finished_at_ns) == (5, ended.finished_at_ns)


async def test_starting_a_second_time_starts_nothing(case: RuntimeCase) -> None:
    """Start of what runs, or ran, is refused or answers with the facts; it never runs twice."""
    async with new_pod(case) as pod:
        container = await start(case, pod, script("echo once"))
        await until_exited(case, container)
        try:
            fact = await case.runtime.start_container(container)
        except DispatcherError:
            pass
        else:
            assert fact.liveness is Liveness.EXITED
        assert joined(await read(case, container)) == b"once\n"


async def test_removing_kills_what_runs(case: RuntimeCase) -> None:
    """Remove needs no stop before it."""
    async with new_pod(case) as pod:
        container = await start_ready(case, pod, script(DEAF))
        async with asyncio.timeout(case.deadline_s):
            await case.runtime.remove_container(container)
        assert (await look(case, container)).liveness is Liveness.ABSENT


async def test_stopping_a_pod_ends_its_containers(case: RuntimeCase) -> None:
    """When `stop_pod` returns, no process of the pod is left."""
    async with new_pod(case) as pod:
        containers = [await start_ready(case, pod, script(DEAF, name=name)) for name in ("one", "two")]
        async with asyncio.timeout(case.deadline_s):
            await case.runtime.stop_pod(pod)
        for container in containers:
            assert (await look(case, container)).liveness in (Liveness.EXITED, Liveness.ABSENT)


async def test_removing_a_pod_removes_its_containers(case: RuntimeCase) -> None:
    """Created, running or ended: all of them go."""
    pod = await case.make_pod(pod_spec())
    await case.runtime.create_pod(pod)
    await create(case, pod, script("true", name="created"))
    await start_ready(case, pod, script(DEAF, name="running"))
    await until_exited(case, await start(case, pod, script("true", name="ended")))
    await remove_pod(case, pod)
    assert await case.leftovers() == []


async def test_pods_do_not_wait_for_each_other(case: RuntimeCase) -> None:
    """Calls for different pods run at the same time and do not mix."""

    async def run(number: int) -> bytes:
        async with new_pod(case, pod_spec(f"many-{number}")) as pod:
            container = await start(case, pod, script(f"echo {number}"))
            return joined(await read(case, container))

    found = await asyncio.gather(*(run(number) for number in range(4)))
    assert found == [b"%d\n" % number for number in range(4)]
    assert await case.leftovers() == []


async def test_hostile_names_are_only_names(case: RuntimeCase) -> None:
    """What users write into metadata, labels and annotations reaches no argument, path or config key."""
    nasty = "--privileged\n../../etc;$(reboot)\x7f,a=b"
    spec = PodSpec(
        metadata=PodMetadata(name=nasty, namespace=nasty, uid=nasty),
        labels={nasty: nasty},
        annotations={nasty: nasty},
        hostname="plain",
    )
    async with new_pod(case, spec) as pod:
        container = await start(case, pod, script("echo fine", name=nasty, labels={nasty: nasty}))
        assert joined(await read(case, container)) == b"fine\n"
    assert await case.leftovers() == []


async def test_a_container_without_a_sandbox_is_refused(case: RuntimeCase) -> None:
    """`create_container` in a pod that does not run fails, and leaves nothing."""
    pod = await case.make_pod(pod_spec())
    container = await case.make_container(pod, script("true"))
    with pytest.raises(DispatcherError):
        await case.runtime.create_container(container)
    await remove_pod(case, pod)
    assert await case.leftovers() == []


async def test_a_prepared_pod_can_be_made_or_removed(case: RuntimeCase) -> None:
    """`prepare_pod` begins; `create_pod` goes on from its facts, `remove_pod` undoes it."""
    runtime = ability(case, CanPrepare)
    pod = await case.make_pod(pod_spec())
    facts = await runtime.prepare_pod(replace(pod, attachment=None))
    made = await case.runtime.create_pod(replace(pod, facts=facts))
    assert await look_at_pod(case, replace(pod, facts=made.facts)) is Liveness.RUNNING
    await remove_pod(case, pod)
    other = await case.make_pod(pod_spec("other"))
    await runtime.prepare_pod(replace(other, attachment=None))
    await remove_pod(case, other)
    assert await case.leftovers() == []


async def test_limits_can_change_while_it_runs(case: RuntimeCase) -> None:
    """`update_resources` answers with what is in force, and `inspect` says the same where it says anything."""
    runtime = ability(case, CanUpdateResources)
    async with new_pod(case) as pod:
        first = Resources(cpu_shares=512, memory_limit_bytes=64 << 20)
        container = await start_ready(case, pod, script(DEAF, resources=first))
        wanted = replace(first, cpu_shares=256, memory_limit_bytes=96 << 20)
        granted = await runtime.update_resources(container, wanted)
        assert granted.memory_limit_bytes == 96 << 20
        seen = (await look(case, container)).granted
        assert seen is None or seen.memory_limit_bytes == 96 << 20


async def test_usage_is_measured_for_what_runs(case: RuntimeCase) -> None:
    """`stats` measures in one call and leaves out what cannot be measured."""
    runtime = ability(case, CanStats)
    async with new_pod(case) as pod:
        running = await start_ready(case, pod, script(DEAF, name="running"))
        missing = await case.make_container(pod, script("true", name="missing"))
        check_usage(await runtime.stats((running, missing)), running)


async def test_all_figures_are_measured_for_what_runs(case: RuntimeCase) -> None:
    """`detailed_stats` is `stats` with more figures."""
    runtime = ability(case, CanDetailedStats)
    async with new_pod(case) as pod:
        running = await start_ready(case, pod, script(DEAF, name="running"))
        missing = await case.make_container(pod, script("true", name="missing"))
        found = await runtime.detailed_stats((running, missing))
        check_usage(found, running)
        assert found[0].usage.process_count is None or found[0].usage.process_count > 0


def check_usage(found: tuple[ContainerUsage, ...], running: ContainerRef) -> None:
    """One reading, of the container that runs, with figures that can be."""
    assert [entry.id for entry in found] == [running.id]
    usage = found[0].usage
    assert usage.timestamp_ns > 0
    assert usage.cpu_usage_ns is None or usage.cpu_usage_ns >= 0
    assert usage.memory_working_set_bytes is None or usage.memory_working_set_bytes > 0
    layer = found[0].writable_layer
    assert layer is None or (layer.mountpoint.startswith("/") and layer.timestamp_ns > 0)


async def test_pods_are_measured_by_a_runtime_that_has_their_figures(case: RuntimeCase) -> None:
    """`pod_stats` measures the pods that run, and leaves out what it does not know."""
    runtime = ability(case, CanPodStats)
    async with new_pod(case) as pod:
        unknown = replace(pod, id=make_pod_id(), facts={})
        for detailed in (False, True):
            found = await runtime.pod_stats((pod, unknown), detailed=detailed)
            assert [entry.id for entry in found] == [pod.id]
            assert found[0].usage.timestamp_ns > 0
            names = [interface.name for interface in found[0].interfaces or ()]
            assert len(names) == len(set(names))


async def test_standard_error_is_kept_apart(case: RuntimeCase) -> None:
    """Both streams arrive, each under its name."""
    async with new_pod(case) as pod:
        container = await start(case, pod, script("echo out; echo err >&2"))
        chunks = await read(case, container)
        assert joined(chunks) == b"out\n"
        assert joined(chunks, Stream.STDERR) == b"err\n"
