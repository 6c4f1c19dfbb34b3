"""A pod's figures: its runtime's, else its own cgroup's, else the sum of its containers."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from dispatcher.api import CanDetailedStats, CanPodStats, CanStats, ContainerUsage, PodUsage
from dispatcher.errors import RuntimeDown
from dispatcher.model import (
    ContainerMetadata,
    ContainerRecord,
    ContainerSpec,
    InterfaceUsage,
    Isolation,
    PluginStamp,
    PodMetadata,
    PodRecord,
    PodSpec,
    Route,
    Usage,
    make_container_id,
    make_pod_id,
)
from dispatcher.stats import Meter, meter
from dispatcher.transitions import ContainerState, PodState


class Runtime:
    """Counts how often it is asked."""

    def __init__(self, error: Exception | None = None) -> None:
        self.asked: list[str] = []
        self.error = error
        self.own: tuple[PodUsage, ...] = ()

    async def stats(self, containers: tuple[Any, ...]) -> tuple[ContainerUsage, ...]:
        self.asked.append("stats")
        if self.error is not None:
            raise self.error
        return tuple(ContainerUsage(id=ref, usage=usage(7)) for ref in containers)

    async def detailed_stats(self, containers: tuple[Any, ...]) -> tuple[ContainerUsage, ...]:
        self.asked.append("detailed_stats")
        return tuple(ContainerUsage(id=ref, usage=usage(8)) for ref in containers)

    async def pod_stats(self, pods: tuple[Any, ...], *, detailed: bool) -> tuple[PodUsage, ...]:
        self.asked.append("pod_stats")
        return self.own


class World:
    """Records and runtimes, as a meter sees them."""

    def __init__(self, tmp_path: Path) -> None:
        self.pods: dict[str, PodRecord] = {}
        self.containers: dict[str, ContainerRecord] = {}
        self.runtimes: dict[str, tuple[Runtime, set[type]]] = {}
        self.cgroups: dict[str, Usage] = {}
        deps: Any = SimpleNamespace(
            store=SimpleNamespace(
                subscribe=lambda _subscriber: None,
                find_pod=self.pods.get,
                list_pods=lambda: [*self.pods.values()],
                list_containers=lambda pod_id: [c for c in self.containers.values() if c.pod_id == pod_id],
            ),
            registry=SimpleNamespace(find_ability=self._find),
            container_ref=lambda record, _pod: record.id,
            pod_ref=lambda record: record.id,
            netns_path=lambda pod_id: tmp_path / pod_id,
            now_ns=lambda: 5,
        )
        self.meter = Meter(deps)

    def _find(self, name: str, ability: type) -> Runtime | None:
        runtime, abilities = self.runtimes[name]
        return runtime if ability in abilities else None

    def runtime(self, name: str, abilities: Iterable[type], error: Exception | None = None) -> Runtime:
        made = Runtime(error)
        self.runtimes[name] = (made, set(abilities))
        return made

    def pod(self, runtime: str, cgroup_parent: str = "", uid: str = "", containers: int = 2) -> PodRecord:
        uid = uid or f"u{len(self.pods)}"
        record = PodRecord(
            id=make_pod_id(),
            spec=PodSpec(
                metadata=PodMetadata(name=uid, namespace="n", uid=uid, attempt=len(self.pods)),
                cgroup_parent=cgroup_parent,
            ),
            route=Route(runtime=runtime, rule="r", reason="", isolation=Isolation.SANDBOXED),
            stamp=PluginStamp(name="p", version="1", facts_schema=1),
            created_at_ns=1,
            fingerprint="",
            state=PodState.READY,
        )
        self.pods[record.id] = record
        for number in range(containers):
            container = ContainerRecord(
                id=make_container_id(),
                pod_id=record.id,
                spec=ContainerSpec(metadata=ContainerMetadata(name=f"c{number}"), image_ref="i"),
                image_id="i",
                created_at_ns=1,
                fingerprint="",
                state=ContainerState.RUNNING,
            )
            self.containers[container.id] = container
        return record


def usage(memory: int) -> Usage:
    return Usage(timestamp_ns=3, memory_usage_bytes=memory, cpu_usage_ns=memory)


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> World:
    world = World(tmp_path)
    monkeypatch.setattr(
        meter,
        "_read_cgroups",
        lambda parents, _detailed: {p: world.cgroups[name] for p, name in parents.items() if name in world.cgroups},
    )
    return world


async def test_a_pods_own_cgroup_is_its_figure(world: World) -> None:
    world.runtime("docker", [CanStats])
    pod = world.pod("docker", "/kubepods/a")
    world.cgroups["/kubepods/a"] = usage(100)
    [found] = await world.meter.pods([pod])
    assert found.usage == usage(100)
    assert [c.measured.usage for c in found.containers] == [usage(7), usage(7)]


async def test_a_cgroup_that_pods_share_is_nobodys(world: World) -> None:
    """Then the containers are added up. A second attempt of the same pod is no other pod."""
    world.runtime("docker", [CanStats])
    world.cgroups |= {"/test.slice": usage(100), "/kubepods/a": usage(50)}
    first, second = world.pod("docker", "/test.slice"), world.pod("docker", "/test.slice")
    old, new = world.pod("docker", "/kubepods/a", uid="same"), world.pod("docker", "/kubepods/a", uid="same")
    found = [entry.usage for entry in await world.meter.pods([first, second, old, new])]
    summed = usage(14)
    assert found == [summed, summed, usage(50), usage(50)]


async def test_a_runtime_may_know_better(world: World) -> None:
    """What it leaves out is measured by the core."""
    runtime = world.runtime("vm", [CanStats, CanPodStats])
    first, second = world.pod("vm", "/a"), world.pod("vm", "/b")
    world.cgroups |= {"/a": usage(1), "/b": usage(2)}
    runtime.own = (PodUsage(id=first.id, usage=usage(900), interfaces=(InterfaceUsage(name="eth0", rx_bytes=5),)),)
    found = await world.meter.pods([first, second])
    assert [entry.usage for entry in found] == [usage(900), usage(2)]
    assert found[0].interfaces == (InterfaceUsage(name="eth0", rx_bytes=5),)


async def test_each_runtime_is_asked_once(world: World) -> None:
    """However many pods and containers there are."""
    docker, vm = world.runtime("docker", [CanStats, CanDetailedStats]), world.runtime("vm", [CanStats, CanPodStats])
    pods = [world.pod(name) for name in ("docker", "vm") * 10]
    assert len([c for entry in await world.meter.pods(pods) for c in entry.containers]) == 40
    assert (docker.asked, sorted(vm.asked)) == (["stats"], ["pod_stats", "stats"])
    docker.asked.clear()
    vm.asked.clear()
    await world.meter.pods(pods, detailed=True)
    assert (docker.asked, sorted(vm.asked)) == (["detailed_stats"], ["pod_stats", "stats"])


async def test_a_runtime_that_is_down_fails_nobody_else(world: World) -> None:
    world.runtime("docker", [CanStats], RuntimeDown("away"))
    world.runtime("vm", [CanStats])
    world.runtime("dumb", [])
    pods = [world.pod(name) for name in ("docker", "vm", "dumb")]
    found = await world.meter.pods(pods)
    assert [len(entry.containers) for entry in found] == [0, 2, 0]
    assert [entry.usage for entry in found] == [None, usage(14), None]


async def test_what_does_not_run_is_not_measured(world: World) -> None:
    world.runtime("docker", [CanStats])
    pod = world.pod("docker")
    first, *_ = world.containers.values()
    world.containers[first.id] = replace(first, state=ContainerState.EXITED)
    [found] = await world.meter.pods([pod])
    assert first.id not in {c.record.id for c in found.containers}
    assert len(found.containers) == 1
