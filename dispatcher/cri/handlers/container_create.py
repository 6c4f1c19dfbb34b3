"""CreateContainer: everything that can be refused is refused here, not at the start."""

from __future__ import annotations

import asyncio
import logging
from dataclasses import replace

from dispatcher import lifecycle
from dispatcher.cri import api_pb2 as pb
from dispatcher.cri import validate
from dispatcher.cri.handlers.lookup import get_pod, require_ready
from dispatcher.cri.handlers.pod_run import fingerprint, pod_facts
from dispatcher.deps import Deps
from dispatcher.errors import AlreadyExists, DispatcherError, InvalidRequest, NotFound, WrongState
from dispatcher.model import (
    ContainerMetadata,
    ContainerRecord,
    ContainerSpec,
    Image,
    Mount,
    PodId,
    PodRecord,
    make_container_id,
)
from dispatcher.spans import annotate_call, step
from dispatcher.transitions import ContainerEvent, ContainerState, PodState

log = logging.getLogger(__name__)


def call_key(pod_id: PodId, metadata: ContainerMetadata) -> tuple[object, ...]:
    """The key under which creations of one container find each other."""
    return ("container", pod_id, metadata.name, metadata.attempt)


async def handle(request: pb.CreateContainerRequest, deps: Deps) -> pb.CreateContainerResponse:
    """Make a container in a READY sandbox, from an image that is already here. A retry joins or gets the result."""
    pod = require_ready(get_pod(request.pod_sandbox_id, deps))
    with step("validate"):
        spec = validate.container_spec(request.config, pod.spec)
        mark = fingerprint(request)
    annotate_call(
        pod_id=pod.id, runtime=pod.route.runtime, container=spec.metadata.name, **pod_facts(pod.spec.metadata)
    )

    async def make() -> ContainerRecord:
        return await _find_made(pod, spec, mark, deps) or await _make(pod, spec, mark, deps)

    async def undo(record: ContainerRecord) -> None:
        await _undo_abandoned(record, deps)

    record = await deps.calls.run(call_key(pod.id, spec.metadata), mark, make, undo)
    return pb.CreateContainerResponse(container_id=record.id)


async def _find_made(pod: PodRecord, spec: ContainerSpec, mark: str, deps: Deps) -> ContainerRecord | None:
    record = deps.store.find_container_by_identity(pod.id, spec.metadata)
    if record is None:
        return None
    if record.state is ContainerState.CREATED and record.fingerprint == mark:
        return record
    if record.state is ContainerState.CREATING:
        async with deps.locks.hold(pod.id):
            await lifecycle.remove_container(record, pod, deps)
        return None
    raise AlreadyExists(
        f"The container {spec.metadata.name}, attempt {spec.metadata.attempt}, of the sandbox {pod.id} is on record "
        f"as {record.id} ({record.state}).",
        container_id=record.id,
    )


async def _undo_abandoned(record: ContainerRecord, deps: Deps) -> None:
    current = deps.store.find_container(record.id)
    pod = deps.store.find_pod(record.pod_id)
    if current is not None and pod is not None and current.state is ContainerState.CREATED:
        log.warning("removing an abandoned container", extra={"container_id": record.id})
        async with deps.locks.hold(pod.id):
            await lifecycle.remove_container(current, pod, deps)


def _resolve(spec: ContainerSpec, deps: Deps) -> tuple[ContainerSpec, Image]:
    """Look up the image and those of image volumes; nothing is ever pulled here (CRI)."""
    image = deps.images.find(spec.image_ref)
    if image is None:
        raise NotFound(f"The image {spec.image_ref!r} is not on this node: pull it first.", image=spec.image_ref)
    if not (spec.command or spec.args or image.config.entrypoint or image.config.cmd):
        raise InvalidRequest("No command is specified: neither the container nor its image names one.")
    return replace(spec, mounts=tuple(_resolve_mount(m, deps) for m in spec.mounts)), image


def _resolve_mount(mount: Mount, deps: Deps) -> Mount:
    if mount.image is None:
        return mount
    image = deps.images.find(mount.image.reference)
    if image is None:
        raise NotFound(f"The image {mount.image.reference!r} of a volume is not on this node: pull it first.")
    return replace(mount, image=replace(mount.image, image_id=image.id))


async def _make(pod: PodRecord, spec: ContainerSpec, mark: str, deps: Deps) -> ContainerRecord:
    spec, image = _resolve(spec, deps)
    with step("policy"):
        await deps.policy.check_container(pod, spec, image)
    record = ContainerRecord(
        id=make_container_id(),
        pod_id=pod.id,
        spec=spec,
        image_id=image.id,
        image_ref=image.id,
        image_name=next(iter((*image.repo_tags, *image.repo_digests)), ""),
        created_at_ns=deps.now_ns(),
        fingerprint=mark,
        stop_signal=spec.stop_signal or image.config.stop_signal or "SIGTERM",
    )

    async with deps.locks.hold(pod.id):
        current = deps.store.find_pod(pod.id)
        if current is None or current.state is not PodState.READY:
            raise WrongState(f"The sandbox {pod.id} is no longer ready.", pod_id=pod.id)
        with step("commit"):
            await deps.store.create_container(record)
        try:
            for leased in record.leased_images:
                deps.images.lease(record.id, leased)
            created = await deps.runtime_of(pod).create_container(deps.container_ref(record, pod))
            with step("commit"):
                return await deps.store.update_container(
                    record.id,
                    ContainerEvent.MADE,
                    facts=created.facts,
                    granted=created.granted,
                    user=created.user,
                    notes=created.notes,
                )
        except BaseException:
            await asyncio.shield(asyncio.ensure_future(_undo(record, pod, deps)))
            raise


async def _undo(record: ContainerRecord, pod: PodRecord, deps: Deps) -> None:
    try:
        await lifecycle.remove_container(record, pod, deps)
    except DispatcherError as failure:
        # The record stays as REMOVING, shown as exited: the kubelet's collector calls RemoveContainer again.
        log.error("undo failed", extra={"container_id": record.id, "cause": str(failure)})
