"""The policy in effect over its life: loading, hot reload, restarts with a broken file, and what a caller sees."""

from __future__ import annotations

import asyncio
import logging
import os
import threading
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from dispatcher.errors import InvalidRequest, NoRuntime, PolicyRefused
from dispatcher.model import (
    ContainerMetadata,
    ContainerSecurity,
    ContainerSpec,
    Image,
    ImageConfig,
    ImageId,
    Isolation,
    Mount,
    NamespaceMode,
    NamespaceOptions,
    PluginStamp,
    PodId,
    PodMetadata,
    PodRecord,
    PodSecurity,
    PodSpec,
    Resources,
    UserNamespace,
    Vote,
)
from dispatcher.policy import PolicyEngine, RuntimeTraits
from dispatcher.store import Store

DOCKER = {"docker": RuntimeTraits(isolation=Isolation.SHARED_KERNEL)}
BOTH = {**DOCKER, "vm": RuntimeTraits(isolation=Isolation.VM)}
HEAD = "apiVersion: dispatcher/v1\n"

Make = Callable[..., Awaitable[PolicyEngine]]


class Counter:
    """Records what the engine counts, and wakes whoever waits for the next load of the file."""

    def __init__(self) -> None:
        self.decided: list[tuple[str, str, str, str]] = []
        self.reloads: list[tuple[bool, int]] = []
        self._reloaded = asyncio.Event()

    def route_decided(self, *, rule: str, runtime: str, phase: str = "pod", outcome: str = "routed") -> None:
        self.decided.append((rule, runtime, phase, outcome))

    def policy_reloaded(self, *, ok: bool, generation: int) -> None:
        self.reloads.append((ok, generation))
        self._reloaded.set()

    async def next_reload(self, after: int) -> tuple[bool, int]:
        while len(self.reloads) <= after:
            self._reloaded.clear()
            await asyncio.wait_for(self._reloaded.wait(), 20)
        return self.reloads[after]


@pytest.fixture
async def store(tmp_path: Path) -> AsyncIterator[Store]:
    opened = await Store.open(tmp_path / "state.db")
    yield opened
    await opened.aclose()


@pytest.fixture
def file(tmp_path: Path) -> Path:
    folder = tmp_path / "etc"
    folder.mkdir()
    return folder / "policy.yaml"


@pytest.fixture
def counter() -> Counter:
    return Counter()


@pytest.fixture
async def make(file: Path, store: Store, counter: Counter) -> AsyncIterator[Make]:
    """Start engines over one file and one store."""
    made = []

    async def make_one(runtimes: dict[str, RuntimeTraits] = BOTH, **options: Any) -> PolicyEngine:
        engine = PolicyEngine(file, runtimes=runtimes, settings=store, observer=counter, **options)
        made.append(engine)
        await engine.start()
        return engine

    yield make_one
    for engine in made:
        await engine.aclose()


def put(file: Path, text: str) -> None:
    """Replace the file as editors and tools do."""
    fresh = file.with_name(".policy.yaml.new")
    fresh.write_text(HEAD + text)
    fresh.rename(file)


def pod(namespace: str = "default", *, handler: str = "", **options: Any) -> PodSpec:
    metadata = PodMetadata(name="web", namespace=namespace, uid="u")
    return PodSpec(metadata=metadata, runtime_handler=handler, **options)


# ------------------------------------------------------------------------------------------------------------- deciding
async def test_a_route_says_who_decided_and_by_which_policy(file: Path, make: Make, counter: Counter) -> None:
    put(file, "rules: [{name: r, match: {namespace: a}, runtime: vm}]\ndefault: docker")
    engine = await make()
    route = await engine.decide(pod("a"))
    assert (route.runtime, route.rule, route.isolation) == ("vm", "r", Isolation.VM)
    assert route.reason == 'Rule "r" matches (namespace a).'
    assert route.policy_hash == engine.status.hash
    assert route.decision_id != (await engine.decide(pod("a"))).decision_id
    assert counter.decided[0] == ("r", "vm", "pod", "routed")


async def test_errors_tell_refusal_from_bad_request_from_missing_runtime(
    file: Path, make: Make, counter: Counter
) -> None:
    put(
        file,
        "runtimes: {vm: vm}\nhandlers: {vm: vm}\n"
        "rules: [{name: no, match: {namespace: bad}, refuse: not here}]\ndefault: docker",
    )
    engine = await make(DOCKER)
    with pytest.raises(PolicyRefused, match=r'Pod bad/web is refused by the policy. Rule "no" refuses it .*not here'):
        await engine.decide(pod("bad"))
    with pytest.raises(InvalidRequest, match="no RuntimeClass handler 'kata'; it maps: vm"):
        await engine.decide(pod(handler="kata"))
    with pytest.raises(NoRuntime, match='has to run on the runtime "vm", which is not loaded') as caught:
        await engine.decide(pod(handler="vm"))
    assert caught.value.data["runtime"] == "vm"
    assert [decided[3] for decided in counter.decided] == ["refused", "refused", "refused"]


async def test_every_decision_is_in_the_audit_log(file: Path, make: Make, caplog: pytest.LogCaptureFixture) -> None:
    put(file, "default: docker")
    engine = await make()
    caplog.set_level(logging.INFO, "dispatcher.policy.audit")
    route = await engine.decide(pod("a"))
    line = next(record for record in caplog.records if record.name == "dispatcher.policy.audit")
    data: dict[str, Any] = vars(line)["data"]
    assert data["decision_id"] == route.decision_id
    assert (data["namespace"], data["pod"], data["runtime"], data["rule"]) == ("a", "web", "docker", "default")
    assert data["policy_hash"] == route.policy_hash


async def test_facts_come_from_the_whole_request(file: Path, make: Make) -> None:
    """Everything that a matcher can ask is really read from the pod."""
    security = PodSecurity(
        privileged=True,
        namespaces=NamespaceOptions(
            network=NamespaceMode.NODE,
            pid=NamespaceMode.NODE,
            ipc=NamespaceMode.NODE,
            user=UserNamespace(mode=NamespaceMode.POD),
        ),
    )
    put(
        file,
        "rules: [{name: all, match: {privileged: true, hostNetwork: true, hostPID: true, hostIPC: true, userns: true,"
        " sysctls: 'net.*', qos: burstable, cpu: {at_least: 1500m, at_most: 1500m},"
        " memory: {at_least: 1Mi, at_most: 1Mi}, name: web, labels: {a: b}, annotations: {c: d}}, refuse: x}]\n"
        "default: docker",
    )
    engine = await make()
    whole = pod(
        labels={"a": "b"},
        annotations={"c": "d"},
        security=security,
        sysctls={"net.ipv4.x": "1"},
        cgroup_parent="/kubepods/burstable/podu",
        resources=Resources(cpu_period_us=100_000, cpu_quota_us=150_000, memory_limit_bytes=1 << 20),
    )
    explained = await engine.explain(whole)
    assert (explained.rule, [rule.failures for rule in explained.rules]) == ("all", [()])
    assert (await engine.explain(pod())).rule == "default"


QOS = [
    ("/kubepods/besteffort/podu", "besteffort"),
    ("kubepods-burstable-podu.slice", "burstable"),
    ("/kubepods/podu", "guaranteed"),
    ("kubepods-podu.slice", "guaranteed"),
    ("/other", ""),
    ("", ""),
]


@pytest.mark.parametrize(("parent", "qos"), QOS)
async def test_qos_is_read_from_the_cgroup(file: Path, make: Make, parent: str, qos: str) -> None:
    put(file, "rules: [{name: r, match: {qos: [guaranteed, burstable, besteffort]}, refuse: x}]\ndefault: docker")
    explained = await (await make()).explain(pod(cgroup_parent=parent))
    assert explained.is_refused is bool(qos)
    assert explained.is_refused or explained.rules[0].failures[0].found == "unknown"
    assert not qos or f"(qos {qos})" in explained.reason


async def test_hooks_are_asked_once_per_decision_and_their_votes_kept(file: Path, make: Make) -> None:
    put(file, "hooks: {may_override: [good]}\ndefault: docker")
    asked: list[PodSpec] = []

    async def ask(spec: PodSpec) -> list[Vote]:
        asked.append(spec)
        return [Vote(plugin="good", runtime="vm", reason="I like it", counted=False)]

    engine = await make(ask_hooks=ask, hook_plugins=("good",))
    route = await engine.decide(pod())
    assert (route.runtime, route.rule) == ("vm", "hook:good")
    assert route.votes == (Vote(plugin="good", runtime="vm", reason="I like it", counted=True),)
    assert len(asked) == 1


async def test_handlers_are_published_with_what_they_lead_to(file: Path, make: Make) -> None:
    put(
        file,
        "runtimes: {far: vm}\nhandlers: {a: docker, b: vm, c: far}\n"
        "rules: [{name: r, match: {privileged: true}, runtime: docker}, {name: s, match: {userns: true}, runtime: far}]"
        "\ndefault: vm",
    )
    engine = await make()
    assert engine.handlers() == {"": ("docker", "vm"), "a": ("docker",), "b": ("vm",)}
    assert engine.default_runtime == "vm"
    engine.check_handler("a")
    engine.check_handler("")
    with pytest.raises(InvalidRequest):
        engine.check_handler("z")


async def test_containers_are_held_against_their_rules(file: Path, make: Make, counter: Counter) -> None:
    put(
        file,
        "rules: [{name: etc, phase: container, match: {host_mounts: /etc, namespace: a}, refuse: hands off}]\n"
        "default: docker",
    )
    engine = await make()

    async def record(namespace: str) -> PodRecord:
        spec = pod(namespace)
        return PodRecord(
            id=PodId("f" * 64),
            spec=spec,
            route=await engine.decide(spec),
            stamp=PluginStamp(name="docker", version="1", facts_schema=1),
            created_at_ns=1,
            fingerprint="",
        )

    image = Image(
        id=ImageId("sha256:" + "0" * 64), repo_tags=("a:1",), repo_digests=(), size_bytes=1, config=ImageConfig()
    )
    container = ContainerSpec(
        metadata=ContainerMetadata(name="c"),
        image_ref="a:1",
        mounts=(Mount(container_path="/x", host_path="/etc/passwd"),),
        security=ContainerSecurity(),
    )
    await engine.check_container(await record("b"), container, image)
    with pytest.raises(PolicyRefused, match=r'Container "c" is refused .* "etc" .*hands off'):
        await engine.check_container(await record("a"), container, image)
    assert ("etc", "docker", "container", "refused") in counter.decided


async def test_a_path_on_a_dead_file_system_holds_nobody_but_its_container(
    file: Path, make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(file, "rules: [{name: etc, phase: container, match: {host_mounts: /etc}, refuse: hands off}]\ndefault: docker")
    engine = await make()
    entered, release = threading.Event(), threading.Event()
    monkeypatch.setattr("dispatcher.policy.engine._PATHS_LIMIT_S", 0.1)
    real = os.path.realpath

    def resolve(path: str, **options: Any) -> str:
        if path == "/dead":
            entered.set()
            release.wait(60)
        return real(path, **options)

    monkeypatch.setattr(os.path, "realpath", resolve)
    spec = pod()
    record = PodRecord(
        id=PodId("f" * 64),
        spec=spec,
        route=await engine.decide(spec),
        stamp=PluginStamp(name="docker", version="1", facts_schema=1),
        created_at_ns=1,
        fingerprint="",
    )
    image = Image(
        id=ImageId("sha256:" + "0" * 64), repo_tags=("a:1",), repo_digests=(), size_bytes=1, config=ImageConfig()
    )

    def mounting(path: str) -> ContainerSpec:
        mounts = (Mount(container_path="/x", host_path=path),)
        return ContainerSpec(
            metadata=ContainerMetadata(name="c"), image_ref="a:1", mounts=mounts, security=ContainerSecurity()
        )

    with pytest.raises(PolicyRefused, match="takes too long"):
        await engine.check_container(record, mounting("/dead"), image)
    with pytest.raises(PolicyRefused, match="takes too long"):
        await engine.check_container(record, mounting("/srv"), image)
    release.set()
    monkeypatch.setattr("dispatcher.policy.engine._PATHS_LIMIT_S", 30.0)
    async with asyncio.timeout(40):
        while True:
            with suppress(PolicyRefused):
                await engine.check_container(record, mounting("/srv"), image)
                break
            await asyncio.sleep(0.01)
    # What the path waits for happens on the loop: were that held, the container would be refused.
    release.clear()
    entered.clear()
    checking = asyncio.create_task(engine.check_container(record, mounting("/dead"), image))
    while not entered.is_set():
        await asyncio.sleep(0.001)
    release.set()
    await checking


# ------------------------------------------------------------------------------------------------------------ reloading
async def test_a_new_file_takes_effect_by_rename(file: Path, make: Make, counter: Counter) -> None:
    put(file, "default: docker")
    engine = await make()
    assert (await engine.decide(pod())).runtime == "docker"
    put(file, "default: vm")
    assert await counter.next_reload(1) == (True, 2)
    assert (await engine.decide(pod())).runtime == "vm"


async def test_a_file_written_in_place_takes_effect(file: Path, make: Make, counter: Counter) -> None:
    put(file, "default: docker")
    engine = await make()
    file.write_text(HEAD + "default: vm\n")
    # A write is not atomic: what is read half way is refused, and read again.
    seen = 1
    while not (await counter.next_reload(seen))[0]:
        seen += 1
    assert (await engine.decide(pod())).runtime == "vm"


async def test_a_swapped_link_takes_effect(file: Path, make: Make, counter: Counter) -> None:
    """As a mounted ConfigMap: the file is a link through `..data`, and that link is replaced."""
    folder = file.parent
    for name, text in (("..1", "default: docker"), ("..2", "default: vm")):
        (folder / name).mkdir()
        (folder / name / "policy.yaml").write_text(HEAD + text)
    (folder / "..data").symlink_to("..1")
    file.symlink_to("..data/policy.yaml")
    engine = await make()
    assert (await engine.decide(pod())).runtime == "docker"
    (folder / "..next").symlink_to("..2")
    os.replace(folder / "..next", folder / "..data")
    assert await counter.next_reload(1) == (True, 2)
    assert (await engine.decide(pod())).runtime == "vm"


async def test_sighup_reads_again(file: Path, make: Make, counter: Counter) -> None:
    put(file, "default: docker")
    engine = await make()
    engine.request_reload()
    assert await counter.next_reload(1) == (True, 1)  # read, and the same
    assert engine.status.generation == 1


BROKEN = [
    "default: nothing",
    "default: [",
    "default: docker\ndefalt: vm",
    "default: docker\ntests: [{name: t, expect: {runtime: vm}}]",
]


@pytest.mark.parametrize("text", BROKEN)
async def test_a_broken_file_changes_nothing_but_the_status(
    file: Path, make: Make, counter: Counter, text: str
) -> None:
    put(file, "default: docker")
    engine = await make()
    before = engine.status
    put(file, text)
    assert await counter.next_reload(1) == (False, 1)
    assert (await engine.decide(pod())).runtime == "docker"
    status = engine.status
    assert (status.hash, status.source, status.is_in_sync) == (before.hash, "file", False)
    assert status.reason == "PolicyFileRefused"
    assert status.problems[0].startswith(f"{file}:")
    assert before.hash in status.message
    put(file, "default: vm")
    assert await counter.next_reload(2) == (True, 2)
    assert engine.status.is_in_sync
    assert engine.status.message == ""


async def test_putting_the_old_file_back_clears_the_condition(file: Path, make: Make, counter: Counter) -> None:
    put(file, "default: docker")
    engine = await make()
    put(file, "default: x")
    await counter.next_reload(1)
    put(file, "default: docker")
    assert await counter.next_reload(2) == (True, 1)
    assert engine.status.is_in_sync


async def test_removing_the_file_keeps_the_policy(file: Path, make: Make, counter: Counter) -> None:
    put(file, "default: docker")
    engine = await make()
    file.unlink()
    assert await counter.next_reload(1) == (False, 1)
    assert (await engine.decide(pod())).runtime == "docker"
    assert "cannot be read: No such file" in engine.status.message
    put(file, "default: docker")
    assert await counter.next_reload(2) == (True, 1)
    assert engine.status.is_in_sync


# ------------------------------------------------------------------------------------------------------------- restarts
async def test_a_restart_with_a_broken_file_serves_the_last_known_good(file: Path, make: Make) -> None:
    put(file, "rules: [{name: r, match: {privileged: true}, runtime: docker}]\ndefault: vm")
    first = await make()
    await first.aclose()
    put(file, "default: [")
    second = await make()
    assert (await second.decide(pod())).runtime == "vm"
    assert second.status.source == "last known good"
    assert second.status.hash == first.status.hash
    assert not second.status.is_in_sync
    assert "stays in effect" in second.status.message


async def test_a_restart_reads_a_file_that_was_mended_meanwhile(file: Path, make: Make) -> None:
    put(file, "default: docker")
    await (await make()).aclose()
    put(file, "default: vm")
    engine = await make()
    assert ((await engine.decide(pod())).runtime, engine.status.source) == ("vm", "file")


async def test_without_any_policy_pods_are_refused_and_the_file_is_waited_for(
    file: Path, make: Make, counter: Counter
) -> None:
    engine = await make()
    with pytest.raises(PolicyRefused, match=r"No policy is in effect.*cannot be read.*new pods are refused"):
        await engine.decide(pod())
    assert engine.status.reason == "NoPolicy"
    assert engine.default_runtime is None
    assert engine.handlers() == {"": ()}
    put(file, "default: docker")
    assert await counter.next_reload(1) == (True, 1)
    assert (await engine.decide(pod())).runtime == "docker"


async def test_a_plugin_that_went_missing_is_no_mistake_of_the_file(file: Path, make: Make) -> None:
    """The file names a runtime without declaring it; after a restart its plugin fails to load. Other pods go on."""
    put(file, "rules: [{name: r, match: {namespace: a}, runtime: vm}]\ndefault: docker")
    await (await make(BOTH)).aclose()
    engine = await make(DOCKER)
    assert engine.status.is_in_sync
    assert (await engine.decide(pod())).runtime == "docker"
    with pytest.raises(NoRuntime, match='"vm"'):
        await engine.decide(pod("a"))


async def test_a_store_that_fails_does_not_keep_a_good_policy_out(file: Path) -> None:
    class Full:
        def get_setting(self, key: str) -> Any:
            return None

        async def set_setting(self, key: str, value: Any) -> None:
            raise OSError("disk full")

    put(file, "default: docker")
    engine = PolicyEngine(file, runtimes=BOTH, settings=Full())
    await engine.reload()
    assert (await engine.decide(pod())).runtime == "docker"


async def test_nonsense_in_the_store_is_survived(file: Path, make: Make, store: Store) -> None:
    nonsense: Any
    for nonsense in ("x", [], {"text": 3}, {"text": "default: ["}, {"runtimes": {"vm": 99}}):
        await store.set_setting("policy", nonsense)
        engine = await make()
        assert engine.status.source == "none"
        await engine.aclose()
