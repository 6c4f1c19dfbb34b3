"""The fakes behave: images have tags and leases, addresses are handed out and taken back, URLs work once."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest

from dispatcher.api import ExecSpec, ExecStream, Process, StreamTarget
from dispatcher.errors import InvalidRequest, NetworkFailed, NotFound, PullFailed, RuntimeDown
from dispatcher.model import (
    Change,
    ContainerId,
    ContainerUser,
    GroupsPolicy,
    ImageConfig,
    ImageId,
    Liveness,
    PodId,
    PodMetadata,
    PodSpec,
    Resources,
    Snapshot,
    make_pod_id,
)
from dispatcher.testing import (
    BUSYBOX,
    FakeCase,
    FakeEngine,
    FakeImages,
    FakeNetwork,
    FakeSizer,
    FakeStreaming,
    make_runtime,
)
from dispatcher.testing.case import container_spec, pod_spec

POD = PodSpec(metadata=PodMetadata(name="p", namespace="n", uid="u"))


# ------------------------------------------------------------------------------------------------------------ images
async def test_an_image_is_found_by_every_kind_of_reference() -> None:
    images = FakeImages()
    image = await images.pull("busybox", None)
    assert image.repo_tags == (BUSYBOX,)
    digest = image.id.removeprefix("sha256:")
    for reference in ("busybox", "busybox:latest", "library/busybox", BUSYBOX, image.id, digest, digest[:12]):
        assert images.find(reference) == image
    assert images.find(image.repo_digests[0]) == image
    assert images.find("alpine") is None
    assert images.find("") is None
    with pytest.raises(PullFailed, match="RegistryUnavailable: "):
        await images.pull("alpine", None)


async def test_a_tag_moves_to_the_newer_image() -> None:
    images = FakeImages()
    old = await images.pull("busybox", None)
    images.publish("busybox", ImageConfig(cmd=("other",)))
    new = await images.pull("busybox", None)
    assert new.id != old.id
    assert images.find("busybox") == new
    assert images.get(old.id).repo_tags == ()
    assert len(images.list()) == 2


async def test_a_leased_image_is_hidden_and_goes_with_its_last_lease() -> None:
    images = FakeImages()
    image = await images.pull("busybox", None)
    for holder in ("a", "b"):
        images.lease(holder, image.id)
    await images.remove("busybox")
    await images.remove("busybox")
    assert images.list() == ()
    assert images.get(image.id) == image
    images.release("a")
    assert images.get(image.id) == image
    images.release("b")
    images.release("b")
    with pytest.raises(NotFound):
        images.get(image.id)
    with pytest.raises(NotFound):
        images.lease("c", image.id)


async def test_users_are_resolved() -> None:
    images = FakeImages()
    image = await images.pull("busybox", None)

    async def resolve(user: str = "", uid: int | None = None, gid: int | None = None) -> ContainerUser:
        return await images.resolve_user(
            image.id, user=user, uid=uid, gid=gid, supplemental_groups=(7,), policy=GroupsPolicy.MERGE
        )

    assert await resolve() == ContainerUser(uid=0, gid=0, supplemental_groups=(0, 7))
    assert (await resolve("nobody")).uid == 65534
    assert (await resolve("12:34")).gid == 34
    assert (await resolve("nobody", uid=5, gid=6)) == ContainerUser(uid=5, gid=6, supplemental_groups=(6, 7))
    with pytest.raises(InvalidRequest):
        await resolve("ghost")


# ------------------------------------------------------------------------------------------------------------ network
async def test_addresses_are_handed_out_and_taken_back() -> None:
    network = FakeNetwork()
    plans = [network.plan(make_pod_id(), POD, f"/netns/{number}") for number in range(2)]
    first, second = [await network.add(plan) for plan in plans]
    assert first.ips != second.ips
    assert await network.add(plans[0]) == first
    assert await network.check(plans[0], first) == ()
    await network.delete(plans[0], first)
    await network.delete(plans[0], None)
    assert await network.check(plans[0], first) != ()
    await network.gc(())
    assert network.attached == {}


async def test_a_network_can_fail_after_the_act() -> None:
    network = FakeNetwork()
    network.break_down()
    plan = network.plan(make_pod_id(), POD, "/netns/x")
    with pytest.raises(NetworkFailed):
        await network.add(plan)
    assert list(network.attached) == ["/netns/x"], "a part stands, which DEL has to take away"
    await network.delete(plan, None)
    assert network.attached == {}


# -------------------------------------------------------------------------------------------------------------- sizer
def test_a_size_follows_the_limits() -> None:
    sizer = FakeSizer()
    assert sizer.size(POD).limit_bytes is None
    limits = Resources(cpu_quota_us=250_000, cpu_period_us=100_000, memory_limit_bytes=1 << 30)
    size = sizer.size(replace(POD, resources=limits))
    assert (size.vcpus, size.limit_bytes, size.cpu_quota_us) == (3, 1 << 30, 250_000)
    assert len(sizer.asked) == 2


# ---------------------------------------------------------------------------------------------------------- streaming
async def test_a_url_works_once() -> None:
    engine = FakeEngine()
    runtime = make_runtime(engine)
    pod = await FakeCase().make_pod(pod_spec())
    await runtime.create_pod(pod)
    container = await FakeCase().make_container(pod, container_spec("sleep", "1d"))
    await runtime.create_container(container)
    await runtime.start_container(container)

    async def execute(_container: ContainerId, spec: ExecSpec) -> Process:
        return await engine.execute(container, spec)

    async def attach(_container: ContainerId, _tty: bool, stdin: bool, _stdout: bool, _stderr: bool) -> Process:
        return await engine.attach(container, stdin=stdin)

    async def connect(pod_id: PodId, port: int) -> Process:
        return await engine.connect(pod_id, port)

    streaming = FakeStreaming()
    await streaming.start(StreamTarget(exec=execute, attach=attach, connect=connect))
    url = streaming.exec_url(ExecStream(container_id=container.id, command=("echo", "hi"), stdout=True))
    process = await streaming.open(url)
    assert [data async for _, data in process.output()] == [b"hi\n"]
    with pytest.raises(NotFound):
        await streaming.open(url)
    attached = await streaming.open(streaming.attach_url(ExecStream(container_id=container.id)))
    await attached.kill()
    with pytest.raises(InvalidRequest):
        await streaming.open(streaming.port_forward_url(pod.id, ()), 80)
    await engine.aclose()


# ------------------------------------------------------------------------------------------------------------- engine
async def test_an_engine_that_is_away_keeps_its_pods_and_tells_when_it_is_back() -> None:
    engine = FakeEngine()
    runtime = make_runtime(engine)
    pod = await FakeCase().make_pod(pod_spec())
    await runtime.create_pod(pod)
    watch = runtime.watch()
    assert isinstance(await anext(watch), Snapshot)
    engine.go_away()
    assert not (await runtime.probe()).ready
    with pytest.raises(RuntimeDown):
        await runtime.inspect((pod,), ())
    engine.come_back()
    snapshot = await anext(watch)
    assert isinstance(snapshot, Snapshot)
    assert [fact.liveness for fact in snapshot.pods] == [Liveness.RUNNING]
    engine.kill_pod(pod.id, reason="VmDied")
    change = await anext(watch)
    assert isinstance(change, Change)
    assert change.pod is not None
    assert (change.pod.liveness, change.pod.reason) == (Liveness.EXITED, "VmDied")
    await watch.aclose()  # type: ignore[attr-defined]


async def test_a_planted_failure_may_happen_a_given_number_of_times() -> None:
    engine = FakeEngine()
    runtime = make_runtime(engine)
    engine.fail("probe", RuntimeDown("x"), times=2)
    for _ in range(2):
        with pytest.raises(RuntimeDown):
            await runtime.probe()
    assert (await runtime.probe()).ready


async def test_a_pull_can_be_held_up() -> None:
    images = FakeImages()
    images.gate = asyncio.Event()
    pull = asyncio.create_task(images.pull("busybox", None))
    await asyncio.sleep(0)
    assert images.list() == ()
    images.gate.set()
    assert (await pull).id in [ImageId(image.id) for image in images.list()]
