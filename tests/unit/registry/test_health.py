"""Runtimes are probed, started again when they did not start, and reported as overdue only after their grace."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable

import pytest

from dispatcher.api import CanAttach, CanExec, CanStats
from dispatcher.errors import NoRuntime, NotSupported, RuntimeDown
from dispatcher.model import make_pod_id
from dispatcher.registry import Registry
from dispatcher.testing import FakeEngine, Fault
from dispatcher.testing.fake_runtime import FakeRuntime
from dispatcher.testing.plugin import plugin as fake
from tests.unit.registry.conftest import Install, Load

CONFIG = """
plugins: {enabled: [fake]}
health: {probe_interval_s: 0.01, required_grace_s: 0.05}
deadlines: {runtime: {probe: 0.05, start: 0.05}}
"""


@pytest.fixture
async def registry(load: Load) -> AsyncIterator[Registry]:
    registry = load(CONFIG)
    yield registry
    await registry.aclose()


def engine() -> FakeEngine:
    made: FakeRuntime = fake.newest(FakeRuntime)
    return made.engine


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(5):
        while not condition():
            await asyncio.sleep(0.005)


async def test_health_follows_the_engine(registry: Registry) -> None:
    await registry.start(lambda: ())
    assert registry.health("fake").ready
    engine().go_away()
    await until(lambda: not registry.health("fake").ready)
    assert registry.all_health()["fake"].reason == "EngineDown"
    assert registry.overdue(["fake"]) == ()
    await until(lambda: registry.overdue(["fake"]) == ("fake",))
    engine().come_back()
    await until(lambda: registry.health("fake").ready)
    assert registry.overdue(["fake"]) == ()


async def test_a_missing_runtime_is_overdue_after_the_grace_too(registry: Registry) -> None:
    await registry.start(lambda: ())
    assert registry.overdue(["ghost", "fake"]) == ()
    await until(lambda: registry.overdue(["ghost", "fake"]) == ("ghost",))
    with pytest.raises(NoRuntime):
        registry.health("ghost")


@pytest.mark.parametrize("fault", [Fault(hang=True), Fault(error=KeyError("x")), Fault(result="fine")])
async def test_a_probe_that_hangs_or_fails_is_not_ready(registry: Registry, fault: Fault) -> None:
    engine().faults["probe"] = fault
    await registry.start(lambda: ())
    assert registry.health("fake").ready is False
    assert registry.health("fake").reason == "ProbeFailed"
    del engine().faults["probe"]
    assert (await registry.probe_now("fake")).ready


@pytest.mark.parametrize("fault", [Fault(hang=True), Fault(error=RuntimeDown("no socket"))])
async def test_what_does_not_start_is_unavailable_and_tried_again(registry: Registry, fault: Fault) -> None:
    engine().faults["start"] = fault
    await registry.start(lambda: ())
    assert registry.health("fake").reason == "StartFailed"
    with pytest.raises(RuntimeDown, match="did not start"):
        await registry.runtime("fake").remove_pod(None)  # type: ignore[arg-type]
    assert [report["message"] for report in registry.report()] == [registry.health("fake").message]
    del engine().faults["start"]
    await until(lambda: registry.health("fake").ready)
    assert engine().calls.count("start") >= 2


async def test_an_image_provider_that_does_not_start_is_tried_again(load: Load, install: Install) -> None:
    install(
        "late",
        """
        from dispatcher.testing import FakeImages
        class LateImages(FakeImages):
            attempts = 0
            async def start(self, leases):
                LateImages.attempts += 1
                if LateImages.attempts < 3:
                    raise OSError("planted")
        class plugin:
            API = (1, 0)
            name = "late"
            def register(registrar):
                registrar.images("late", lambda section, services: LateImages(name="late"))
        """,
    )
    registry = load("plugins: {enabled: [late, fake]}\nproviders: {images: late}\nhealth: {probe_interval_s: 0.01}")
    await registry.start(lambda: ())
    (condition,) = registry.extra_conditions()
    assert condition[:3] == ("Provider/images", False, "StartFailed")
    with pytest.raises(RuntimeDown, match='The image provider "late" did not start'):
        registry.images.list()
    await until(lambda: not registry.extra_conditions())
    assert registry.images.list() == ()
    await registry.aclose()


async def test_a_runtime_that_cannot_read_its_records_is_not_started(registry: Registry) -> None:
    """A plugin was downgraded: its pods run on, and it must not guess at what a newer version noted."""
    registry.refuse_newer_facts([("fake", 1), ("fake", 2), ("ghost", 9)])
    await registry.start(lambda: ())
    assert registry.health("fake").reason == "NewerRecords"
    assert "facts schema 2" in registry.health("fake").message
    with pytest.raises(RuntimeDown, match="newer version"):
        await registry.runtime("fake").inspect((), ())
    await registry.probe_now("fake")
    assert "start" not in engine().calls


async def test_abilities_are_asked_in_one_place(load: Load) -> None:
    registry = load("plugins: {enabled: [fake], fake: {abilities: [CanExec]}}")
    await registry.start(lambda: ())
    assert isinstance(registry.ability("fake", CanExec), CanExec)
    with pytest.raises(NotSupported, match='The runtime "fake" cannot attach to its containers'):
        registry.ability("fake", CanAttach)
    assert registry.find_ability("fake", CanStats) is None
    with pytest.raises(NoRuntime):
        registry.ability("ghost", CanExec)
    assert registry.report()[0]["abilities"] == {"fake": ["CanExec"]}
    await registry.aclose()


async def test_the_end_closes_everything_once(load: Load) -> None:
    calls: list[tuple[str, str]] = []
    registry = load(
        "plugins: {enabled: [fake]}",
        on_call=lambda kind, _provider, method, _seconds, _error: calls.append((kind, method)),
    )
    await registry.start(lambda: ())

    async def refuse(*_arguments: object) -> object:
        raise AssertionError

    from dispatcher.api import StreamTarget

    await registry.start_streaming(StreamTarget(exec=refuse, attach=refuse, connect=refuse))  # type: ignore[arg-type]
    assert registry.streaming.port_forward_url(make_pod_id(), ()).startswith("http://127.0.0.1:")
    await registry.aclose()
    await registry.aclose()
    assert [call for call in calls if call[1] == "start"] == [
        ("images", "start"), ("network", "start"), ("runtime", "start"), ("streaming", "start"),
    ]  # fmt: skip
    assert [call for call in calls if call[1] == "aclose"] == [
        ("streaming", "aclose"), ("runtime", "aclose"), ("network", "aclose"), ("images", "aclose"),
    ]  # fmt: skip
