"""RunPodSandbox: route, record, attach, make; or nothing at all."""

from __future__ import annotations

import asyncio
import hashlib
import logging

from google.protobuf.message import Message

from dispatcher import lifecycle
from dispatcher.api import CanPrepare
from dispatcher.cri import api_pb2 as pb
from dispatcher.cri import validate
from dispatcher.deps import Deps
from dispatcher.errors import AlreadyExists, DispatcherError
from dispatcher.model import Attachment, PodMetadata, PodRecord, PodSpec, make_pod_id
from dispatcher.netns import NetSysctl, apply_sysctls, ensure_namespace, make_net_sysctls
from dispatcher.observability.logformat import log_context
from dispatcher.pod_files import write_pod_files
from dispatcher.spans import Fact, annotate_call, step
from dispatcher.transitions import PodEvent, PodState

log = logging.getLogger(__name__)


def fingerprint(message: Message) -> str:
    """Digest of a request, by which a retry is told from another request under the same name."""
    return hashlib.sha256(message.SerializeToString(deterministic=True)).hexdigest()


def call_key(metadata: PodMetadata) -> tuple[object, ...]:
    """The key under which creations of one sandbox find each other."""
    return ("pod", metadata.namespace, metadata.name, metadata.uid, metadata.attempt)


def pod_facts(metadata: PodMetadata) -> dict[str, Fact]:
    """What a trace says of the pod that a call is about."""
    return {
        "namespace": metadata.namespace,
        "pod": metadata.name,
        "uid": metadata.uid,
        "attempt": metadata.attempt,
    }


async def handle(request: pb.RunPodSandboxRequest, deps: Deps) -> pb.RunPodSandboxResponse:
    """Make a sandbox. Runs on when the client's deadline passes; the same request joins it or gets its result."""
    with step("validate"):
        spec = validate.pod_spec(request.config, request.runtime_handler)
        sysctls = make_net_sysctls(spec.sysctls)
        mark = fingerprint(request)
    annotate_call(**pod_facts(spec.metadata))

    async def make() -> PodRecord:
        return await _find_made(spec, mark, deps) or await _make(spec, sysctls, mark, deps)

    async def undo(record: PodRecord) -> None:
        await _undo_abandoned(record, deps)

    record = await deps.calls.run(call_key(spec.metadata), mark, make, undo)
    return pb.RunPodSandboxResponse(pod_sandbox_id=record.id)


async def _find_made(spec: PodSpec, mark: str, deps: Deps) -> PodRecord | None:
    """The sandbox that an equal request already made, also before a restart. One that failed is cleared away first."""
    record = deps.store.find_pod_by_identity(spec.metadata)
    if record is None:
        return None
    if record.state is PodState.READY and record.fingerprint == mark:
        return record
    if record.state in (PodState.FAILED, PodState.CREATING):
        async with deps.locks.hold(record.id):
            await lifecycle.dispose_pod(record, deps)
        return None
    raise AlreadyExists(
        f"The pod {spec.metadata.namespace}/{spec.metadata.name}, attempt {spec.metadata.attempt}, is on record as "
        f"{record.id} ({record.state}).",
        pod_id=record.id,
    )


async def _undo_abandoned(record: PodRecord, deps: Deps) -> None:
    """Nobody fetched this sandbox. A client that found it by listing has put containers into it: then it stays."""
    current = deps.store.find_pod(record.id)
    if current is not None and not deps.store.list_containers(record.id):
        log.warning("removing an abandoned sandbox", extra={"pod_id": record.id})
        async with deps.locks.hold(record.id):
            await lifecycle.remove_pod(current, deps)


async def _make(spec: PodSpec, sysctls: tuple[NetSysctl, ...], mark: str, deps: Deps) -> PodRecord:
    with step("route"):
        route = await deps.policy.decide(spec)
    runtime = deps.registry.runtime(route.runtime)
    pod_id = make_pod_id()
    annotate_call(pod_id=pod_id, runtime=route.runtime, rule=route.rule)
    plan = None if spec.uses_host_network else deps.network.plan(pod_id, spec, str(deps.netns_path(pod_id)))
    record = PodRecord(
        id=pod_id,
        spec=spec,
        route=route,
        stamp=deps.stamp(runtime),
        created_at_ns=deps.now_ns(),
        fingerprint=mark,
        plan=plan,
        resources=spec.resources,
        overhead=spec.overhead,
    )

    with log_context(pod_id=pod_id):
        return await _record_and_act(record, sysctls, deps)


async def _record_and_act(record: PodRecord, sysctls: tuple[NetSysctl, ...], deps: Deps) -> PodRecord:
    async with deps.locks.hold(record.id):
        with step("commit"):
            await deps.store.create_pod(record)
        try:
            return await _act(record, sysctls, deps)
        except BaseException as error:
            with step("undo"):
                await _undo(record.id, error, deps)
            raise


async def _act(record: PodRecord, sysctls: tuple[NetSysctl, ...], deps: Deps) -> PodRecord:
    runtime = deps.runtime_of(record)
    if record.plan is not None:
        await ensure_namespace(deps.netns_path(record.id))
    prepared = None
    if isinstance(runtime, CanPrepare):
        prepared = asyncio.ensure_future(runtime.prepare_pod(deps.pod_ref(record)))
    try:
        attachment = await _attach(record, sysctls, deps)
        if attachment is not None:
            with step("commit"):
                record = await deps.store.update_pod(record.id, attachment=attachment, ips=attachment.ips)
        write_pod_files(deps.state_dir(record.id), record.spec, attachment)
        if prepared is not None:
            with step("await prepare_pod"):
                facts = await prepared
            with step("commit"):
                record = await deps.store.update_pod(record.id, facts=facts)
        created = await runtime.create_pod(deps.pod_ref(record))
    finally:
        if prepared is not None and not prepared.done():
            prepared.cancel()
            await asyncio.wait({prepared})
    with step("commit"):
        return await deps.store.update_pod(
            record.id, PodEvent.BOOTED, facts=created.facts, ips=record.ips or created.ips
        )


async def _attach(record: PodRecord, sysctls: tuple[NetSysctl, ...], deps: Deps) -> Attachment | None:
    if record.plan is None:
        return None
    attachment = await deps.network.add(record.plan)
    await apply_sysctls(deps.netns_path(record.id), sysctls)
    return attachment


async def _undo(pod_id: str, error: BaseException, deps: Deps) -> None:
    """Undo from the record, shielded from a second cancellation. What cannot be undone stays listed, as FAILED."""

    async def undo() -> None:
        current = deps.store.find_pod(pod_id)
        if current is None:
            return
        try:
            await lifecycle.dispose_pod(current, deps)
        except DispatcherError as failure:
            log.error("undo failed", extra={"pod_id": pod_id, "cause": str(failure)})
            await deps.store.update_pod(
                current.id,
                PodEvent.CREATE_FAILED,
                reason="CreateFailed",
                message=f"{error} Undoing it failed too: {failure}",
            )

    await asyncio.shield(asyncio.ensure_future(undo()))
