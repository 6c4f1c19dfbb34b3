"""Statuses that are put together from bytes say the same as messages would."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from dispatcher.cri import api_pb2 as pb
from dispatcher.cri import convert, validate
from dispatcher.cri.statuses import Statuses
from dispatcher.errors import NotFound
from dispatcher.model import (
    ContainerRecord,
    Isolation,
    PluginStamp,
    PodRecord,
    Route,
    make_container_id,
    make_pod_id,
)
from dispatcher.transitions import ContainerState, PodState


class Memory:
    """The reads of a store, over plain dicts, with the notice of a commit."""

    def __init__(self) -> None:
        self.pods: dict[str, PodRecord] = {}
        self.containers: dict[str, ContainerRecord] = {}
        self.subscriber: Any = None

    def subscribe(self, subscriber: Any) -> Any:
        self.subscriber = subscriber

    def find_pod(self, pod_id: str) -> PodRecord | None:
        return self.pods.get(pod_id)

    def find_container(self, container_id: str) -> ContainerRecord | None:
        return self.containers.get(container_id)

    def resolve_pod_id(self, text: str) -> str | None:
        return text if text in self.pods else None

    def resolve_container_id(self, text: str) -> str | None:
        return text if text in self.containers else None

    def list_containers(self, pod_id: str) -> list[ContainerRecord]:
        return [record for record in self.containers.values() if record.pod_id == pod_id]


@pytest.fixture
def memory() -> Memory:
    return Memory()


@pytest.fixture
def deps(memory: Memory) -> Any:
    return SimpleNamespace(store=memory, now_ns=lambda: 42)


def add_pod(memory: Memory) -> PodRecord:
    config = pb.PodSandboxConfig(
        metadata=pb.PodSandboxMetadata(name="web", namespace="default", uid="u1"),
        labels={"app": "web"},
        log_directory="/var/log/pods/x",
        linux=pb.LinuxPodSandboxConfig(),
    )
    record = PodRecord(
        id=make_pod_id(),
        spec=validate.pod_spec(config, ""),
        route=Route(runtime="docker", rule="default", reason="r", isolation=Isolation.SHARED_KERNEL),
        stamp=PluginStamp(name="docker", version="1", facts_schema=1),
        created_at_ns=7,
        fingerprint="f",
        state=PodState.READY,
        ips=("10.0.0.1", "fd00::1"),
    )
    memory.pods[record.id] = record
    return record


def add_container(memory: Memory, pod: PodRecord, name: str) -> ContainerRecord:
    config = pb.ContainerConfig(
        metadata=pb.ContainerMetadata(name=name),
        image=pb.ImageSpec(image="busybox"),
        log_path=f"{name}/0.log",
        linux=pb.LinuxContainerConfig(),
    )
    record = ContainerRecord(
        id=make_container_id(),
        pod_id=pod.id,
        spec=validate.container_spec(config, pod.spec),
        image_id="sha256:" + "0" * 64,
        created_at_ns=8,
        fingerprint="f",
        state=ContainerState.RUNNING,
        started_at_ns=9,
    )
    memory.containers[record.id] = record
    return record


async def ask_pod(statuses: Statuses, deps: Any, pod_id: str) -> pb.PodSandboxStatusResponse:
    reply = await statuses.pod(pb.PodSandboxStatusRequest(pod_sandbox_id=pod_id), deps)
    assert isinstance(reply, bytes)
    return pb.PodSandboxStatusResponse.FromString(reply)


async def test_a_reply_equals_the_message(memory: Memory, deps: Any) -> None:
    pod = add_pod(memory)
    containers = [add_container(memory, pod, name) for name in ("a", "b")]
    statuses = Statuses(deps)
    expected = pb.PodSandboxStatusResponse(
        status=convert.pod_status(pod),
        containers_statuses=[convert.container_status(container, pod) for container in containers],
        timestamp=42,
    )
    for _ in range(2):  # made, then kept
        assert await ask_pod(statuses, deps, pod.id) == expected
        reply = await statuses.container(pb.ContainerStatusRequest(container_id=containers[0].id), deps)
        assert isinstance(reply, bytes)
        answered = pb.ContainerStatusResponse.FromString(reply)
        assert answered == pb.ContainerStatusResponse(status=convert.container_status(containers[0], pod))
        assert answered.status.log_path == "/var/log/pods/x/a/0.log"


async def test_a_change_is_visible_at_once(memory: Memory, deps: Any) -> None:
    pod = add_pod(memory)
    container = add_container(memory, pod, "a")
    statuses = Statuses(deps)
    await ask_pod(statuses, deps, pod.id)
    memory.pods[pod.id] = replace(pod, version=1, state=PodState.NOTREADY)
    memory.containers[container.id] = replace(container, version=1, state=ContainerState.EXITED, exit_code=3)
    reply = await ask_pod(statuses, deps, pod.id)
    assert reply.status.state == pb.SANDBOX_NOTREADY
    assert reply.containers_statuses[0].exit_code == 3


async def test_what_was_removed_is_not_found_and_not_kept(memory: Memory, deps: Any) -> None:
    pod = add_pod(memory)
    container = add_container(memory, pod, "a")
    statuses = Statuses(deps)
    await ask_pod(statuses, deps, pod.id)
    await statuses.container(pb.ContainerStatusRequest(container_id=container.id), deps)
    for records, record in ((memory.containers, container), (memory.pods, pod)):
        del records[record.id]
        memory.subscriber(record, None)
    with pytest.raises(NotFound):
        await ask_pod(statuses, deps, pod.id)
    with pytest.raises(NotFound):
        await statuses.container(pb.ContainerStatusRequest(container_id=container.id), deps)
    assert not statuses._pods._kept
    assert not statuses._in_pods._kept
    assert not statuses._containers._kept
