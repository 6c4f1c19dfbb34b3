"""StartContainer, StopContainer, RemoveContainer, ReopenContainerLog, UpdateContainerResources.

ContainerStatus is in `statuses`; its verbose info is made here.
"""

from __future__ import annotations

import logging
from dataclasses import replace

from dispatcher import lifecycle
from dispatcher.api import CanUpdateResources
from dispatcher.cri import api_pb2 as pb
from dispatcher.cri import convert, validate
from dispatcher.cri.handlers import container_create
from dispatcher.cri.handlers.lookup import find_container, get_container, require_ready, require_running
from dispatcher.cri.handlers.pod_run import pod_facts
from dispatcher.deps import Deps
from dispatcher.errors import DispatcherError, InvalidRequest, RuntimeDown, WrongState
from dispatcher.model import ContainerRecord, Liveness, PodRecord, Resources
from dispatcher.spans import annotate_call, step
from dispatcher.transitions import ContainerEvent, ContainerState

log = logging.getLogger(__name__)


async def start(request: pb.StartContainerRequest, deps: Deps) -> pb.StartContainerResponse:
    """Start a created container. On return it runs, or has run; only CREATED may be started (CRI)."""
    record = get_container(request.container_id, deps)
    pod = require_ready(deps.store.get_pod(record.pod_id))

    annotate_call(
        pod_id=pod.id,
        runtime=pod.route.runtime,
        container=record.spec.metadata.name,
        container_id=record.id,
        **pod_facts(pod.spec.metadata),
    )
    with step("commit"):
        record = await deps.store.update_container(record.id, ContainerEvent.START_REQUESTED)
    runtime = deps.runtime_of(pod)
    reference = deps.container_ref(record, pod)
    try:
        with step("log"):
            await deps.logs.open(runtime, reference, record.log)
        observed = await runtime.start_container(reference)
    except RuntimeDown:
        raise  # whether it started is not known: the runtime's next snapshot tells
    except DispatcherError:
        await deps.store.update_container(record.id, ContainerEvent.NOT_STARTED)
        raise

    deps.logs.follow(runtime, reference, record.log)
    if observed.liveness is Liveness.EXITED and observed.started_at_ns:
        # It ran, and is gone already: show it running first, so that no client misses that it was started.
        await deps.facts.apply_container(replace(observed, liveness=Liveness.RUNNING))
    with step("commit"):
        await deps.facts.apply_container(observed)
    if observed.reason == "StartError":
        raise InvalidRequest(f"The container could not be started: {observed.message}", container_id=record.id)
    return pb.StartContainerResponse()


async def stop(request: pb.StopContainerRequest, deps: Deps) -> pb.StopContainerResponse:
    """Stop within the grace period. Idempotent; a second call with a shorter period shortens the first."""
    if request.timeout < 0:
        raise InvalidRequest("The timeout of StopContainer is below zero.")
    record = find_container(request.container_id, deps)
    if record is None or record.state in (ContainerState.EXITED, ContainerState.REMOVING):
        return pb.StopContainerResponse()
    pod = deps.store.get_pod(record.pod_id)

    if record.state is not ContainerState.CREATED:
        observed = await deps.runtime_of(pod).stop_container(deps.container_ref(record, pod), float(request.timeout))
        await deps.facts.apply_container(observed)
    return pb.StopContainerResponse()


async def remove(request: pb.RemoveContainerRequest, deps: Deps) -> pb.RemoveContainerResponse:
    """Remove a container, killing it if it runs. Idempotent."""
    record = find_container(request.container_id, deps)
    if record is None:
        return pb.RemoveContainerResponse()
    pod = deps.store.get_pod(record.pod_id)

    deps.calls.settle(container_create.call_key(pod.id, record.spec.metadata))
    async with deps.locks.hold(pod.id):
        current = deps.store.find_container(record.id)
        if current is not None:
            await lifecycle.remove_container(current, pod, deps)
    return pb.RemoveContainerResponse()


async def reopen_log(request: pb.ReopenContainerLogRequest, deps: Deps) -> pb.ReopenContainerLogResponse:
    """Go on in a fresh log file after a rotation. The file exists when this returns."""
    record = require_running(get_container(request.container_id, deps))

    await deps.logs.reopen(record.id)
    return pb.ReopenContainerLogResponse()


def container_info(record: ContainerRecord, pod: PodRecord | None) -> dict[str, str]:
    """The verbose info of a container: the real state, where it runs, and what was adjusted."""
    return {
        "dispatcher": convert.as_json(
            {
                "state": record.state,
                "pod": record.pod_id,
                "runtime": pod.route.runtime if pod else "",
                "facts": dict(record.facts),
                "notes": record.notes,
                "log": record.log,
                "granted": record.granted,
                "version": record.version,
            }
        )
    }


async def update_resources(
    request: pb.UpdateContainerResourcesRequest, deps: Deps
) -> pb.UpdateContainerResourcesResponse:
    """Change limits of a container; the status then reports what is really in force.

    One at a time per container: each is merged with what the one before it left.
    """
    asked = validate.resources(request.linux)
    container_id = get_container(request.container_id, deps).id

    async with deps.locks.hold(f"resources/{container_id}"):
        record = get_container(container_id, deps)
        pod = deps.store.get_pod(record.pod_id)
        if record.state not in (ContainerState.CREATED, ContainerState.RUNNING):
            raise WrongState(f"The container {record.id} is {record.state}.", container_id=record.id)

        runtime = deps.registry.ability(pod.route.runtime, CanUpdateResources)
        wanted = merge(record.granted or record.spec.resources or Resources(), asked)
        granted = await runtime.update_resources(deps.container_ref(record, pod), wanted)
        await deps.store.update_container(record.id, granted=granted)
    return pb.UpdateContainerResourcesResponse()


def merge(standing: Resources, asked: Resources) -> Resources:
    """Return `standing` with all that `asked` specifies: 0, "" and empty mean "leave it" (CRI).

    A container without swap of its own stays one: its limit of memory plus swap follows a new limit of memory.
    """
    changes = {
        field: value
        for field in Resources.__dataclass_fields__
        if (value := getattr(asked, field)) and field != "unified"
    }
    has_no_swap = standing.memory_swap_limit_bytes == standing.memory_limit_bytes
    if asked.memory_limit_bytes and not asked.memory_swap_limit_bytes and has_no_swap:
        changes["memory_swap_limit_bytes"] = asked.memory_limit_bytes
    return replace(standing, **changes, unified={**standing.unified, **asked.unified})
