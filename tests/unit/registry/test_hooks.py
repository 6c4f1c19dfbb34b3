"""Routing hooks vote in order of their plugins' names; one that fails, lies or blocks abstains, and is asked no more."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import pytest

from dispatcher.api import hookimpl
from dispatcher.model import PodMetadata, PodSpec, Vote
from dispatcher.registry.hooks import HookRefusedError, RoutingVotes
from tests.unit.registry.conftest import Install, Load

POD = PodSpec(metadata=PodMetadata(name="p", namespace="n", uid="u"), labels={"tenant": "blue"})


def hooks(answer: Callable[[PodSpec], Any]) -> object:
    class Hooks:
        @hookimpl
        def route_pod(self, pod: PodSpec) -> Any:
            return answer(pod)

    return Hooks()


def votes(time_limit_s: float = 2.0, failures: int = 3, on_failure: Any = lambda _plugin, _why: None) -> RoutingVotes:
    return RoutingVotes(time_limit_s=time_limit_s, failures_before_disabled=failures, on_failure=on_failure)


def test_all_votes_come_back_in_the_order_of_names() -> None:
    routing = votes()
    routing.add("zeta", hooks(lambda _pod: ("docker", "z")))
    routing.add("alpha", hooks(lambda pod: ("hyper_vm", f"tenant {pod.labels['tenant']}")))
    routing.add("mute", hooks(lambda _pod: None))
    assert routing.vote(POD) == (
        Vote(plugin="alpha", runtime="hyper_vm", reason="tenant blue", counted=False),
        Vote(plugin="zeta", runtime="docker", reason="z", counted=False),
    )
    assert routing.names() == ("alpha", "mute", "zeta")


def test_a_hook_may_leave_out_its_argument() -> None:
    class Hooks:
        @hookimpl
        def route_pod(self) -> tuple[str, str]:
            return ("docker", "always")

    routing = votes()
    routing.add("a", Hooks())
    assert [vote.runtime for vote in routing.vote(POD)] == ["docker"]


def test_a_long_reason_is_cut() -> None:
    routing = votes()
    routing.add("a", hooks(lambda _pod: ("docker", "x" * 10_000)))
    assert len(routing.vote(POD)[0].reason) == 500


class Misspelt:
    @hookimpl
    def rout_pod(self, pod: PodSpec) -> None: ...


class WrongArgument:
    @hookimpl
    def route_pod(self, container: object) -> None: ...


class Async:
    @hookimpl
    async def route_pod(self, pod: PodSpec) -> None: ...


class Empty:
    def route_pod(self, pod: PodSpec) -> None: ...


@pytest.mark.parametrize(
    ("offered", "words"),
    [(Misspelt(), "unknown hook"), (WrongArgument(), "container"), (Async(), "not async"), (Empty(), "has none")],
)
def test_hooks_that_cannot_work_are_refused_when_they_are_offered(offered: object, words: str) -> None:
    routing = votes()
    with pytest.raises(HookRefusedError, match=words):
        routing.add("bad", offered)
    routing.add("good", hooks(lambda _pod: ("docker", "")))
    assert len(routing.vote(POD)) == 1


@pytest.mark.parametrize("answer", ["docker", ("docker",), ("docker", 5), ("", "x"), ["docker", "x"], 7, object()])
def test_nonsense_is_an_abstention(answer: object) -> None:
    failed: list[str] = []
    routing = votes(on_failure=lambda plugin, _why: failed.append(plugin))
    routing.add("bad", hooks(lambda _pod: answer))
    routing.add("good", hooks(lambda _pod: ("docker", "")))
    assert [vote.plugin for vote in routing.vote(POD)] == ["good"]
    assert failed == ["bad"]


@pytest.mark.parametrize("error", [KeyError("tenant"), SystemExit(1), RecursionError()])
def test_a_hook_that_keeps_failing_is_disabled(error: BaseException) -> None:
    asked = []

    def fail(_pod: PodSpec) -> None:
        asked.append(1)
        raise error

    routing = votes(failures=3)
    routing.add("bad", hooks(fail))
    for _ in range(6):
        assert routing.vote(POD) == ()
    assert len(asked) == 3
    assert type(error).__name__ in routing.disabled()["bad"]


def test_a_success_forgives_earlier_failures() -> None:
    results: list[Any] = [1, 1, ("docker", ""), 1, 1, ("docker", "")]
    routing = votes(failures=3)
    routing.add("moody", hooks(lambda _pod: results.pop(0)))
    assert [len(routing.vote(POD)) for _ in range(6)] == [0, 0, 1, 0, 0, 1]
    assert routing.disabled() == {}


def test_a_hook_that_blocks_costs_its_time_limit_and_one_thread() -> None:
    release = threading.Event()
    before = threading.active_count()
    routing = votes(time_limit_s=0.05, failures=2)
    routing.add("blocker", hooks(lambda _pod: release.wait(30)))
    routing.add("good", hooks(lambda _pod: ("docker", "")))
    began = time.perf_counter()
    for _ in range(4):
        assert [vote.plugin for vote in routing.vote(POD)] == ["good"]
    assert time.perf_counter() - began < 2
    assert threading.active_count() <= before + 2
    assert "blocker" in routing.disabled()
    release.set()


async def test_the_event_loop_turns_while_a_hook_thinks() -> None:
    """What the hook waits for happens on the loop: were that held, the hook would never answer."""
    entered, release = threading.Event(), threading.Event()

    def think(_pod: PodSpec) -> tuple[str, str] | None:
        entered.set()
        return ("docker", "") if release.wait(30) else None

    routing = votes(time_limit_s=40.0)
    routing.add("thinker", hooks(think))
    asking = asyncio.create_task(routing.ask(POD))
    while not entered.is_set():
        await asyncio.sleep(0.001)
    release.set()
    assert [vote.plugin for vote in await asking] == ["thinker"]


async def test_a_hook_that_hangs_costs_many_decisions_at_once_its_limit_and_no_more() -> None:
    release = threading.Event()
    heard: list[str] = []
    routing = RoutingVotes(
        time_limit_s=2.0,
        failures_before_disabled=3,
        on_call=lambda plugin, _seconds, error: heard.append(f"{plugin} {type(error).__name__}"),
    )
    routing.add("blocker", hooks(lambda _pod: release.wait(40)))
    routing.add("good", hooks(lambda _pod: ("docker", "")))
    answers = await asyncio.gather(*(routing.ask(POD) for _ in range(20)))
    assert [[vote.plugin for vote in votes] for votes in answers] == [["good"]] * 20
    assert "blocker" in routing.disabled()
    assert heard.count("good NoneType") == 20
    release.set()


async def test_decisions_at_once_take_turns_at_a_slow_hook() -> None:
    """Waiting for one's turn is not the hook's time: a hook that always answers in time is never disabled."""

    def slow(_pod: PodSpec) -> tuple[str, str]:
        time.sleep(0.02)
        return ("docker", "")

    routing = votes(time_limit_s=5.0, failures=1)
    routing.add("slow", hooks(slow))
    answers = await asyncio.gather(*(routing.ask(POD) for _ in range(20)))
    assert all(len(votes) == 1 for votes in answers)
    assert routing.disabled() == {}


async def test_a_decision_that_is_cancelled_leaves_the_hook_usable() -> None:
    release = threading.Event()
    routing = votes(time_limit_s=20.0)
    routing.add("a", hooks(lambda _pod: release.wait(30) and ("docker", "")))
    task = asyncio.create_task(routing.ask(POD))
    await asyncio.sleep(0)
    task.cancel()
    with suppress(asyncio.CancelledError):
        await task
    release.set()
    async with asyncio.timeout(20):
        while not await routing.ask(POD):
            await asyncio.sleep(0.01)


def test_a_hook_that_was_slow_once_is_asked_again_when_it_has_ended() -> None:
    release = threading.Event()
    ended = threading.Event()
    first = [True]

    def slow(_pod: PodSpec) -> tuple[str, str]:
        if first.pop() if first else False:
            release.wait(30)
            ended.set()
        return ("docker", "")

    routing = votes(time_limit_s=0.05, failures=100)
    routing.add("slow", hooks(slow))
    assert routing.vote(POD) == ()
    assert routing.vote(POD) == (), "it is still busy with the first question"
    release.set()
    ended.wait(5)
    deadline = time.monotonic() + 5
    while not routing.vote(POD) and time.monotonic() < deadline:
        pass
    assert len(routing.vote(POD)) == 1


def test_hooks_of_plugins_reach_the_registry(load: Load, install: Install) -> None:
    source = """
        from dispatcher.api import hookimpl
        class Hooks:
            @hookimpl
            def route_pod(self, pod):
                return ("fake", "because") if pod.labels.get("tenant") else None
        class plugin:
            API = (1, 0)
            name = "voter"
            def register(registrar):
                registrar.route_hook(Hooks())
    """
    install("voter", source)
    install("silly", source.replace("voter", "silly").replace("route_pod", "rout_pod"))
    registry = load("plugins: {enabled: [fake, voter, silly]}\nhooks: {failures_before_disabled: 1}")
    assert registry.vote(POD) == (Vote(plugin="voter", runtime="fake", reason="because", counted=False),)
    reports = {report["name"]: report for report in registry.report()}
    assert (reports["voter"]["state"], reports["voter"]["hooks"]) == ("active", True)
    assert "unknown hook" in reports["silly"]["error"]


def test_a_disabled_hook_is_a_condition(load: Load, install: Install) -> None:
    install(
        "bad",
        """
        from dispatcher.api import hookimpl
        class Hooks:
            @hookimpl
            def route_pod(self):
                raise OSError("planted")
        class plugin:
            API = (1, 0)
            name = "bad"
            def register(registrar):
                registrar.route_hook(Hooks())
        """,
    )
    registry = load("plugins: {enabled: [fake, bad]}\nhooks: {failures_before_disabled: 2}")
    for _ in range(3):
        assert registry.vote(POD) == ()
    (condition,) = registry.extra_conditions()
    assert condition[:3] == ("Hooks/bad", False, "Disabled")
    assert "planted" in condition[3]
    assert "routing hooks disabled" in {r["name"]: r["message"] for r in registry.report()}["bad"]
