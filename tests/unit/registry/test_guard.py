"""Between the core and a plugin: deadlines hold, bugs are named, nonsense goes no further, cancellation arrives."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any

import pytest

from dispatcher.api import CanExec, ContainerRef, ExecSpec, PodRef, Runtime, RuntimeHealth
from dispatcher.config import DeadlinesConfig
from dispatcher.errors import (
    DispatcherError,
    Internal,
    InvalidRequest,
    NetworkFailed,
    NotSupported,
    RuntimeDown,
    TimedOut,
    Unsupported,
)
from dispatcher.model import (
    CreatedPod,
    Liveness,
    ObservedContainer,
    PodMetadata,
    PodSpec,
    Snapshot,
    make_container_id,
    make_pod_id,
)
from dispatcher.registry import guard as guard_module
from dispatcher.registry.guard import (
    ABILITY_METHODS,
    IMAGE_METHODS,
    NETWORK_METHODS,
    REQUIRED_METHODS,
    RUNTIME_METHODS,
    STREAMING_METHODS,
    Guard,
    guard_object,
)
from dispatcher.testing import ABILITIES, FakeCase, FakeEngine, FakeNetwork, Fault, make_runtime
from dispatcher.testing.case import container_spec, pod_spec

ODD_KEY: Any = {1: "a key that JSON makes a string"}
Calls = list[tuple[str, str, str, BaseException | None]]


def guarded(
    inner: Any, calls: Calls | None = None, kind: str = "runtime", deadline_s: float = 5.0, **properties: object
) -> Any:
    guard = Guard(
        kind=kind,
        plugin="third_party",
        provider="fake",
        deadlines=dict.fromkeys([*REQUIRED_METHODS[kind], *ABILITY_METHODS], deadline_s),
        on_call=lambda what, provider, method, _seconds, error: (
            calls.append((what, provider, method, error)) if calls is not None else None
        ),
    )
    return guard_object(inner, guard, {"name": "fake", **properties})


@pytest.fixture
async def engine() -> AsyncIterator[FakeEngine]:
    engine = FakeEngine()
    yield engine
    await engine.aclose()


def plant(inner: object, **methods: object) -> None:
    """Replace methods of a fake."""
    for name, method in methods.items():
        setattr(inner, name, method)


def pod() -> PodRef:
    return PodRef(id=make_pod_id(), spec=pod_spec())


async def running(runtime: Runtime) -> tuple[PodRef, ContainerRef]:
    reference = pod()
    await runtime.create_pod(reference)
    container = await FakeCase().make_container(reference, container_spec("sh", "-c", "echo up; sleep 1d"))
    await runtime.create_container(container)
    await runtime.start_container(container)
    return reference, container


# ------------------------------------------------------------------------------------------------------- what passes
async def test_a_good_runtime_works_through_the_guard(engine: FakeEngine) -> None:
    calls: Calls = []
    runtime = guarded(make_runtime(engine), calls)
    reference, container = await running(runtime)
    output = runtime.output(container, 0)
    assert (await anext(output)).data == b"up\n"
    await output.aclose()
    watch = runtime.watch()
    assert isinstance(await anext(watch), Snapshot)
    await watch.aclose()
    process = await runtime.exec(container, ExecSpec(command=("sh", "-c", "cat; exit 4"), stdin=True))
    await process.write_stdin(b"in")
    await process.resize(1, 2)
    await process.close_stdin()
    assert [item async for item in process.output()] == [("stdout", b"in")]
    assert await process.wait() == 4
    await process.kill()
    await process.aclose()
    with pytest.raises(BrokenPipeError):
        await process.write_stdin(b"late")
    assert (await runtime.stop_container(container, 0)).exit_code == 137
    await runtime.remove_pod(reference)
    assert {(kind, provider) for kind, provider, _, _ in calls} == {("runtime", "fake")}
    assert [method for *_, method, _ in calls] == [
        "create_pod", "create_container", "start_container", "exec", "stop_container", "remove_pod",
    ]  # fmt: skip
    assert all(error is None for *_, error in calls)


@pytest.mark.parametrize("ability", ABILITIES)
def test_a_guarded_runtime_has_an_ability_exactly_when_it_has_it(ability: type) -> None:
    assert isinstance(guarded(make_runtime(abilities=[ability])), ability)
    without = guarded(make_runtime(abilities=set(ABILITIES) - {ability}))
    assert not isinstance(without, ability)
    assert all(isinstance(without, other) for other in ABILITIES if other is not ability)


def test_every_protocol_method_is_guarded_and_every_deadline_is_used() -> None:
    """A method that is added to a protocol, or a deadline to the config, cannot be forgotten here."""
    from dispatcher import api

    def methods(*protocols: type) -> set[str]:
        return {
            name
            for protocol in protocols
            for name, member in vars(protocol).items()
            if inspect.isfunction(member) and not name.startswith("_")
        }

    assert methods(api.Runtime) == set(RUNTIME_METHODS)
    assert methods(*ABILITIES) == set(ABILITY_METHODS)
    assert methods(api.NetworkProvider) == set(NETWORK_METHODS)
    assert methods(api.ImageProvider) == set(IMAGE_METHODS)
    assert methods(api.StreamingProvider) == set(STREAMING_METHODS)
    tables = {
        "runtime": {**RUNTIME_METHODS, **ABILITY_METHODS},
        "network": NETWORK_METHODS,
        "images": IMAGE_METHODS,
        "streaming": STREAMING_METHODS,
    }
    for kind, table in tables.items():
        with_deadline = set(getattr(DeadlinesConfig(), kind).model_dump())
        assert with_deadline == {name for name, method in table.items() if method.kind == "async"}, kind


# ------------------------------------------------------------------------------------------------------------ deadlines
async def test_a_call_that_takes_too_long_is_cancelled_and_the_runtime_is_down(engine: FakeEngine) -> None:
    engine.faults["create_pod"] = Fault(hang=True)
    calls: Calls = []
    runtime = guarded(make_runtime(engine), calls, deadline_s=0.02)
    with pytest.raises(RuntimeDown, match=r'The runtime "fake" did not finish create_pod within 0\.02 s\.'):
        await runtime.create_pod(pod())
    assert isinstance(calls[0][3], RuntimeDown)


async def test_a_hanging_network_has_failed() -> None:
    class Hanging(FakeNetwork):
        async def add(self, plan: Any) -> Any:
            await asyncio.Event().wait()

    network = guarded(Hanging(), kind="network", deadline_s=0.02)
    plan = network.plan(make_pod_id(), PodSpec(metadata=PodMetadata(name="p", namespace="n", uid="u")), "/netns")
    with pytest.raises(NetworkFailed, match='network provider "fake" did not finish add'):
        await network.add(plan)


async def test_a_call_that_ignores_cancellation_is_left_behind(
    engine: FakeEngine, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(guard_module, "CANCEL_GRACE_S", 0.02)
    stuck = asyncio.Event()

    class Stubborn:
        async def create_pod(self, _pod: PodRef) -> CreatedPod:
            while not stuck.is_set():
                try:
                    await stuck.wait()
                except asyncio.CancelledError:
                    continue
            return CreatedPod()

    inner = make_runtime(engine)
    plant(inner, create_pod=Stubborn().create_pod)
    runtime = guarded(inner, deadline_s=0.02)
    with pytest.raises(RuntimeDown):
        await runtime.create_pod(pod())
    assert "ignores cancellation" in caplog.text
    stuck.set()
    await asyncio.sleep(0)
    await runtime.stop_pod(pod())


async def test_the_grace_of_a_stop_is_on_top_of_its_deadline(engine: FakeEngine) -> None:
    runtime = guarded(make_runtime(engine), deadline_s=0.05)
    _, container = await running(runtime)
    assert (await runtime.stop_container(container, 0.2)).exit_code == 137


async def test_a_cancelled_caller_waits_until_the_call_has_ended(engine: FakeEngine) -> None:
    """Whoever is cancelled undoes next: what is under way must not act any more by then."""
    ended = asyncio.Event()
    cleaning = asyncio.Event()

    class Slow:
        async def create_pod(self, _pod: PodRef) -> CreatedPod:
            try:
                await asyncio.Event().wait()
            finally:
                await cleaning.wait()
                ended.set()
            raise AssertionError

    inner = make_runtime(engine)
    plant(inner, create_pod=Slow().create_pod)
    call = asyncio.create_task(guarded(inner).create_pod(pod()))
    for _ in range(3):
        await asyncio.sleep(0.001)
        call.cancel()
    await asyncio.sleep(0.001)
    assert not call.done()
    cleaning.set()
    with pytest.raises(asyncio.CancelledError):
        await call
    assert ended.is_set()


# --------------------------------------------------------------------------------------------------------------- errors
@pytest.mark.parametrize("error", [InvalidRequest("bad"), RuntimeDown("away"), NotSupported("no")])
async def test_our_errors_pass_unchanged(engine: FakeEngine, error: DispatcherError) -> None:
    engine.fail("create_pod", error)
    with pytest.raises(type(error)) as caught:
        await guarded(make_runtime(engine)).create_pod(pod())
    assert caught.value is error


@pytest.mark.parametrize("error", [KeyError("x"), OSError(5, "io"), TimeoutError(), SystemExit(1), RecursionError()])
async def test_anything_else_is_a_bug_of_the_plugin_by_name(engine: FakeEngine, error: BaseException) -> None:
    engine.fail("create_pod", error)
    with pytest.raises(
        Internal, match=f"The plugin third_party failed in create_pod: {type(error).__name__}"
    ) as caught:
        await guarded(make_runtime(engine)).create_pod(pod())
    assert caught.value.__cause__ is error


@pytest.mark.parametrize(("error", "seen"), [(TimedOut("slow"), RuntimeDown), (Unsupported("none"), NotSupported)])
async def test_codes_with_a_meaning_of_their_own_do_not_leak(
    engine: FakeEngine, error: DispatcherError, seen: type[DispatcherError]
) -> None:
    """The kubelet reads DEADLINE_EXCEEDED as a command's timeout and UNIMPLEMENTED as a missing RPC."""
    engine.fail("create_pod", error)
    with pytest.raises(seen):
        await guarded(make_runtime(engine)).create_pod(pod())


async def test_a_plugin_that_cancels_itself_is_a_bug_and_no_cancellation(engine: FakeEngine) -> None:
    engine.fail("create_pod", asyncio.CancelledError())
    with pytest.raises(Internal, match="cancelled its own create_pod"):
        await guarded(make_runtime(engine)).create_pod(pod())


# ------------------------------------------------------------------------------------------------------------- nonsense
@pytest.mark.parametrize(
    ("method", "result"),
    [
        ("create_pod", None),
        ("create_pod", {"facts": {}}),
        ("create_pod", CreatedPod(facts={"socket": object()})),
        ("create_pod", CreatedPod(facts=ODD_KEY)),
        ("create_pod", CreatedPod(facts={"t": (1, 2)})),
        ("probe", True),
        ("inspect", []),
        ("start_container", ObservedContainer(id=make_container_id(), liveness=Liveness.RUNNING)),
        ("stop_container", None),
        ("exec", "process"),
        ("stats", [1]),
        ("update_resources", None),
        ("disk_usage", 5),
    ],
)
async def test_nonsense_goes_no_further(engine: FakeEngine, method: str, result: object) -> None:
    runtime = guarded(make_runtime(engine))
    reference, container = await running(runtime)
    engine.faults[method] = Fault(result=result)
    arguments: dict[str, tuple[Any, ...]] = {
        "create_pod": (reference,),
        "probe": (),
        "inspect": ((), ()),
        "start_container": (container,),
        "stop_container": (container, 0),
        "exec": (container, ExecSpec(command=("true",))),
        "stats": ((container,),),
        "update_resources": (container, None),
        "disk_usage": (),
    }
    with pytest.raises(Internal, match=f"The plugin third_party returned nonsense .* from {method}"):
        await getattr(runtime, method)(*arguments[method])


async def test_a_method_that_is_not_async_is_nonsense(engine: FakeEngine) -> None:
    inner = make_runtime(engine)
    plant(inner, create_pod=lambda _pod: CreatedPod())
    with pytest.raises(Internal, match="nonsense"):
        await guarded(inner).create_pod(pod())


async def test_streams_are_checked_item_by_item(engine: FakeEngine) -> None:
    inner = make_runtime(engine)
    runtime = guarded(inner)
    _, container = await running(runtime)
    engine.faults["output"] = Fault(result="a line")
    with pytest.raises(Internal, match=r"nonsense \(str\) from output"):
        await anext(runtime.output(container, 0))
    engine.faults["output"] = Fault(error=ZeroDivisionError())
    with pytest.raises(Internal, match="failed in output"):
        await anext(runtime.output(container, 0))
    engine.faults["output"] = Fault(error=RuntimeDown("away"))
    with pytest.raises(RuntimeDown):
        await anext(runtime.output(container, 0))

    async def no_iterator(*_arguments: object) -> None:
        return None

    plant(inner, watch=no_iterator)
    with pytest.raises(Internal, match=r"nonsense \(coroutine\) from watch"):
        await anext(guarded(inner).watch())


async def test_closing_a_guarded_stream_closes_the_plugin_s(engine: FakeEngine) -> None:
    closed = asyncio.Event()

    async def watch() -> AsyncIterator[Snapshot]:
        try:
            while True:
                yield Snapshot()
        finally:
            closed.set()

    inner = make_runtime(engine)
    plant(inner, watch=watch)
    stream = guarded(inner).watch()
    await anext(stream)
    await stream.aclose()
    assert closed.is_set()


async def test_errors_of_a_process_are_translated_too(engine: FakeEngine) -> None:
    class Bad:
        async def output(self) -> AsyncIterator[Any]:
            yield ("stdout", "text instead of bytes")

        async def wait(self) -> Any:
            return None

        async def fail(self, *_arguments: object) -> None:
            raise ConnectionResetError

        write_stdin = close_stdin = resize = kill = aclose = fail

    runtime = guarded(make_runtime(engine))
    _, container = await running(runtime)
    engine.faults["exec"] = Fault(result=Bad())
    process = await runtime.exec(container, ExecSpec(command=("true",)))
    with pytest.raises(Internal, match="nonsense"):
        await anext(process.output())
    with pytest.raises(Internal, match="nonsense"):
        await process.wait()
    for call in (
        process.write_stdin(b""),
        process.close_stdin(),
        process.resize(1, 1),
        process.kill(),
        process.aclose(),
    ):
        with pytest.raises(Internal, match="third_party failed in Process"):
            await call


def test_plain_methods_are_guarded_as_well() -> None:
    calls: Calls = []
    inner = FakeNetwork()
    network = guarded(inner, calls, kind="network")
    spec = PodSpec(metadata=PodMetadata(name="p", namespace="n", uid="u"))
    inner.failures["plan"] = KeyError("missing")
    with pytest.raises(Internal, match="third_party failed in plan: KeyError"):
        network.plan(make_pod_id(), spec, "/x")
    inner.ready = None  # type: ignore[assignment]
    with pytest.raises(Internal, match=r"nonsense \(NoneType\) from status"):
        network.status()
    assert [(method, type(error)) for _, _, method, error in calls] == [("plan", Internal), ("status", Internal)]


async def test_what_did_not_start_is_not_called(engine: FakeEngine) -> None:
    runtime = guarded(make_runtime(engine))
    type(runtime).guard.blocked = "no socket"
    with pytest.raises(RuntimeDown, match='The runtime "fake" did not start: no socket'):
        await runtime.create_pod(pod())
    with pytest.raises(RuntimeDown):
        await anext(runtime.watch())
    await runtime.start()
    assert engine.calls == ["start"]


async def test_properties_are_fixed_when_it_is_loaded(engine: FakeEngine) -> None:
    inner = make_runtime(engine)
    runtime = guarded(inner, isolation=inner.isolation)
    inner.name = "another"
    assert runtime.name == "fake"
    assert runtime.isolation is inner.isolation
    assert repr(runtime) == '<guarded runtime "fake">'
    with pytest.raises(AttributeError):
        runtime.name = "x"
    assert isinstance(await runtime.probe(), RuntimeHealth)
    assert isinstance(runtime, CanExec)
    assert replace(pod(), facts={}).facts == {}
