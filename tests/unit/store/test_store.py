"""The contract of the store, on a file and in memory: durable before visible, one version after the other."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest

from dispatcher.errors import AlreadyExists, DispatcherError, Internal, NotFound, WrongState
from dispatcher.model import ContainerMetadata, PodMetadata
from dispatcher.store import Record, Store
from dispatcher.transitions import ContainerEvent, ContainerState, PodEvent, PodState
from tests.unit.store.records import make_container, make_pod


@pytest.fixture(params=["file", "memory"])
async def store(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Store]:
    store = await Store.open(tmp_path / "state.db" if request.param == "file" else None)
    yield store
    await store.aclose()


async def test_an_empty_store_knows_nothing(store: Store) -> None:
    assert store.list_pods() == ()
    assert store.list_containers() == ()
    assert store.find_pod("x") is None
    assert store.find_pod_by_identity(PodMetadata(name="a", namespace="b", uid="c")) is None
    assert store.resolve_pod_id("") is None
    assert store.resolve_container_id("abc") is None
    assert store.get_setting("x") is None
    assert store.condition == ""
    with pytest.raises(NotFound):
        store.get_pod("x")
    with pytest.raises(NotFound):
        store.get_container("x")


async def test_a_created_pod_is_found_in_every_way(store: Store) -> None:
    pod = await store.create_pod(make_pod())
    assert pod.version == 1
    assert store.get_pod(pod.id) is pod
    assert store.find_pod_by_identity(pod.spec.metadata) is pod
    assert store.resolve_pod_id(pod.id) == pod.id
    assert store.resolve_pod_id(pod.id[:12]) == pod.id
    assert store.list_pods() == (pod,)


async def test_an_ambiguous_prefix_finds_nothing_and_an_exact_id_wins(store: Store) -> None:
    first = await store.create_pod(make_pod("a", id="aa" + "0" * 62))
    await store.create_pod(make_pod("b", id="aa" + "1" * 62))
    longer = await store.create_pod(make_pod("c", id="c"))
    await store.create_pod(make_pod("d", id="cc"))
    assert store.resolve_pod_id("aa") is None
    assert store.resolve_pod_id("aa0") == first.id
    assert store.resolve_pod_id("c") == longer.id


async def test_an_identity_belongs_to_one_pod(store: Store) -> None:
    pod = await store.create_pod(make_pod())
    with pytest.raises(AlreadyExists, match=pod.id):
        await store.create_pod(make_pod())
    with pytest.raises(AlreadyExists):
        await store.create_pod(make_pod("other", id=pod.id))
    await store.delete_pod(pod.id)
    assert (await store.create_pod(make_pod())).id != pod.id


async def test_of_two_creations_at_once_one_wins(store: Store) -> None:
    """The second one is refused although the first is not on disk yet."""
    outcomes = await asyncio.gather(store.create_pod(make_pod()), store.create_pod(make_pod()), return_exceptions=True)
    assert sorted(type(outcome).__name__ for outcome in outcomes) == ["AlreadyExists", "PodRecord"]
    assert len(store.list_pods()) == 1


async def test_a_new_attempt_follows_a_deletion_that_is_under_way(store: Store) -> None:
    pod = await store.create_pod(make_pod())
    _, fresh = await asyncio.gather(store.delete_pod(pod.id), store.create_pod(make_pod()))
    assert store.list_pods() == (fresh,)
    assert store.find_pod_by_identity(pod.spec.metadata) is fresh


async def test_a_container_needs_its_pod(store: Store) -> None:
    with pytest.raises(NotFound):
        await store.create_container(make_container(make_pod()))
    pod = await store.create_pod(make_pod())
    container = await store.create_container(make_container(pod))
    with pytest.raises(AlreadyExists):
        await store.create_container(make_container(pod))
    other = await store.create_container(make_container(pod, "sidecar"))
    assert store.list_containers(pod.id) == (container, other)
    assert store.find_container_by_identity(pod.id, ContainerMetadata(name="sidecar")) is other
    assert store.find_container_by_identity("nobody", ContainerMetadata(name="sidecar")) is None
    assert store.resolve_container_id(other.id[:20]) == other.id


async def test_a_pod_goes_with_its_containers_and_only_with_those(store: Store) -> None:
    pod, other = await store.create_pod(make_pod("a")), await store.create_pod(make_pod("b"))
    await store.create_container(make_container(pod))
    kept = await store.create_container(make_container(other))
    await asyncio.gather(store.create_container(make_container(pod, "late")), store.delete_pod(pod.id))
    assert store.list_pods() == (other,)
    assert store.list_containers() == (kept,)
    assert store.list_containers(pod.id) == ()
    await store.delete_pod(pod.id)
    await store.delete_container("nobody")


async def test_an_update_takes_a_step_and_sets_fields_as_one(store: Store) -> None:
    pod = await store.create_pod(make_pod())
    ready = await store.update_pod(pod.id, PodEvent.BOOTED, ips=("10.0.0.2",), facts={"pid": 7})
    assert (ready.state, ready.ips, ready.facts, ready.version) == (PodState.READY, ("10.0.0.2",), {"pid": 7}, 2)
    assert pod.state is PodState.CREATING, "a record in hand never changes"
    container = await store.create_container(make_container(pod))
    made = await store.update_container(container.id, ContainerEvent.MADE, notes=("limit lowered",))
    assert (made.state, made.notes) == (ContainerState.CREATED, ("limit lowered",))


async def test_a_wrong_step_changes_nothing(store: Store) -> None:
    pod = await store.create_pod(make_pod())
    container = await store.create_container(make_container(pod))
    with pytest.raises(WrongState):
        await store.update_pod(pod.id, PodEvent.STOPPED, ips=("1",))
    with pytest.raises(WrongState):
        await store.update_container(container.id, ContainerEvent.STARTED)
    with pytest.raises(NotFound):
        await store.update_pod("nobody", PodEvent.BOOTED)
    with pytest.raises(NotFound):
        await store.update_container("nobody", ContainerEvent.MADE)
    assert store.get_pod(pod.id) is pod


@pytest.mark.parametrize("field", ["id", "version", "state", "spec", "schema"])
async def test_what_identifies_a_record_cannot_be_set(store: Store, field: str) -> None:
    pod = await store.create_pod(make_pod())
    with pytest.raises(TypeError, match=field):
        await store.update_pod(pod.id, **{field: "x"})


async def test_updates_at_once_build_on_each_other(store: Store) -> None:
    """Fifty writers of one record: every version exists, none is overwritten."""
    pod = await store.create_pod(make_pod())
    seen: list[int] = []
    store.subscribe(lambda _old, new: seen.append(new.version) if new else None)
    records = await asyncio.gather(*(store.update_pod(pod.id, notes=(str(number),)) for number in range(50)))
    assert [record.version for record in records] == list(range(2, 52))
    assert seen == list(range(2, 52))
    assert store.get_pod(pod.id).notes == ("49",)


async def test_the_second_of_two_steps_is_judged_by_the_first(store: Store) -> None:
    pod = await store.create_pod(make_pod())
    outcomes = await asyncio.gather(
        store.update_pod(pod.id, PodEvent.REMOVE_REQUESTED),
        store.update_pod(pod.id, PodEvent.BOOTED),
        return_exceptions=True,
    )
    assert isinstance(outcomes[1], WrongState)
    assert store.get_pod(pod.id).state is PodState.REMOVING


async def test_nothing_is_written_when_nothing_changes(store: Store) -> None:
    pod = await store.create_pod(make_pod())
    ready = await store.update_pod(pod.id, PodEvent.BOOTED)
    heard: list[Any] = []
    store.subscribe(lambda old, new: heard.append(new))
    assert await store.update_pod(pod.id, PodEvent.BOOTED, reason="") is ready
    await store.set_setting("key", 1)
    await store.set_setting("key", 1)
    assert heard == []
    assert store.get_pod(pod.id).version == ready.version


async def test_a_change_is_visible_when_the_call_returns_and_not_before(store: Store) -> None:
    pod = await store.create_pod(make_pod())
    call = asyncio.create_task(store.update_pod(pod.id, PodEvent.BOOTED))
    await asyncio.sleep(0)
    assert store.get_pod(pod.id) is pod
    assert await call is store.get_pod(pod.id)


async def test_an_unchanged_update_waits_for_what_it_relies_on(store: Store) -> None:
    """The same step twice at once: the second call must not return before the step is on disk."""
    pod = await store.create_pod(make_pod())
    first = asyncio.create_task(store.update_pod(pod.id, PodEvent.BOOTED))
    second = asyncio.create_task(store.update_pod(pod.id, PodEvent.BOOTED))
    await second
    assert store.get_pod(pod.id).state is PodState.READY
    assert await first == await second


async def test_a_cancelled_caller_leaves_a_whole_change(store: Store) -> None:
    pod = await store.create_pod(make_pod())
    call = asyncio.create_task(store.update_pod(pod.id, PodEvent.BOOTED, ips=("10.0.0.9",)))
    await asyncio.sleep(0)
    call.cancel()
    with pytest.raises(asyncio.CancelledError):
        await call
    after = await store.update_pod(pod.id, notes=("next",))
    assert (after.state, after.ips, after.version) == (PodState.READY, ("10.0.0.9",), 3)


async def test_subscribers_hear_of_each_change_in_order(store: Store) -> None:
    heard: list[tuple[Record | None, Record | None]] = []

    def fail(_old: Record | None, _new: Record | None) -> None:
        raise RuntimeError("a listener's own bug")

    store.subscribe(fail)
    end = store.subscribe(lambda old, new: heard.append((old, new)))
    pod = await store.create_pod(make_pod())
    container = await store.create_container(make_container(pod))
    ready = await store.update_pod(pod.id, PodEvent.BOOTED)
    await store.delete_pod(pod.id)
    assert heard == [(None, pod), (None, container), (pod, ready), (container, None), (ready, None)]
    end()
    end()
    await store.create_pod(make_pod())
    assert len(heard) == 5


async def test_settings_hold_plain_json(store: Store) -> None:
    value = {"cidr": "10.0.0.0/16", "list": [1, None, True]}
    await store.set_setting("network", value)
    value["cidr"] = "changed by the caller afterwards"
    assert store.get_setting("network") == {"cidr": "10.0.0.0/16", "list": [1, None, True]}
    await asyncio.gather(store.set_setting("k", 1), store.set_setting("k", 2))
    assert store.get_setting("k") == 2
    with pytest.raises(TypeError):
        await store.set_setting("bad", object())


async def test_a_closed_store_refuses_changes_and_still_answers(tmp_path: Path) -> None:
    store = await Store.open(tmp_path / "state.db")
    pod = await store.create_pod(make_pod())
    last = asyncio.create_task(store.update_pod(pod.id, PodEvent.BOOTED))
    await asyncio.sleep(0)
    await store.aclose()
    await store.aclose()
    assert (await last).state is PodState.READY
    with pytest.raises(Internal):
        await store.create_pod(make_pod("late"))
    assert store.get_pod(pod.id).state is PodState.READY


async def test_everything_comes_back_after_a_restart(tmp_path: Path) -> None:
    store = await Store.open(tmp_path / "state.db")
    pods = [await store.create_pod(make_pod(f"pod{number}", created_at_ns=number)) for number in range(20)]
    for pod in pods:
        await store.create_container(make_container(pod))
        await store.update_pod(pod.id, PodEvent.BOOTED)
    await store.delete_pod(pods[3].id)
    await store.set_setting("boot_id", "abc")
    before = (store.list_pods(), store.list_containers(), store.get_setting("boot_id"))
    await store.aclose()
    again = await Store.open(tmp_path / "state.db")
    assert [pod.id for pod in again.list_pods()] == [pod.id for pod in before[0]], "oldest first, as before"
    assert sorted(again.list_containers(), key=lambda c: c.id) == sorted(before[1], key=lambda c: c.id)
    assert again.get_setting("boot_id") == "abc"
    assert again.set_aside == ()
    await again.aclose()


async def test_an_armed_failure_reaches_the_caller_and_memory_keeps_to_the_file(
    tmp_path: Path, arm: Callable[[str], None]
) -> None:
    """The commit fails before the act: the change never happened, and the next one works."""
    store = await Store.open(tmp_path / "state.db")
    pod = await store.create_pod(make_pod())
    arm("store.commit:before=error@1")
    calls = await asyncio.gather(
        store.update_pod(pod.id, PodEvent.BOOTED),
        store.update_pod(pod.id, notes=("built on it",)),
        return_exceptions=True,
    )
    assert all(isinstance(outcome, Exception) for outcome in calls), "what was built on a failed change fails too"
    assert store.get_pod(pod.id) == pod
    assert (await store.update_pod(pod.id, PodEvent.BOOTED)).version == 2
    await store.aclose()


async def test_a_commit_that_fails_after_the_act_is_seen_as_what_it_is(
    tmp_path: Path, arm: Callable[[str], None]
) -> None:
    """The file has the change although the commit reported an error: memory must not contradict the file."""
    store = await Store.open(tmp_path / "state.db")
    pod = await store.create_pod(make_pod())
    heard: list[Any] = []
    store.subscribe(lambda _old, new: heard.append(new))
    arm("store.commit:after=error@1")
    with pytest.raises(Exception, match="store"):
        await store.update_pod(pod.id, PodEvent.BOOTED)
    assert store.get_pod(pod.id).state is PodState.READY
    assert [record.state for record in heard] == [PodState.READY]
    arm("store.commit:after=error@1")
    with pytest.raises(Exception, match="store"):
        await store.delete_pod(pod.id)
    assert store.find_pod(pod.id) is None
    await store.aclose()
    again = await Store.open(tmp_path / "state.db")
    assert again.list_pods() == ()
    await again.aclose()


async def test_a_fact_that_is_no_json_is_refused_before_anything_happens(store: Store) -> None:
    pod = await store.create_pod(make_pod())
    with pytest.raises((TypeError, ValueError, DispatcherError)):
        await store.update_pod(pod.id, facts={"socket": object()})
    assert store.get_pod(pod.id) is pod
    assert (await store.update_pod(pod.id, facts={"pid": 1})).version == 2
