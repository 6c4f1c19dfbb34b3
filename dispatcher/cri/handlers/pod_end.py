"""StopPodSandbox and RemovePodSandbox. Both succeed for what does not exist (CRI), and resume what failed before."""

from __future__ import annotations

from dispatcher import lifecycle
from dispatcher.cri import api_pb2 as pb
from dispatcher.cri.handlers.lookup import find_pod
from dispatcher.cri.handlers.pod_run import call_key
from dispatcher.deps import Deps
from dispatcher.transitions import PodEvent, PodState


async def stop(request: pb.StopPodSandboxRequest, deps: Deps) -> pb.StopPodSandboxResponse:
    """Stop a sandbox with its containers and free its addresses; the record stays, NOTREADY."""
    record = find_pod(request.pod_sandbox_id, deps)
    if record is None or record.state in (PodState.STOPPED, PodState.REMOVING):
        return pb.StopPodSandboxResponse()

    deps.calls.settle(call_key(record.spec.metadata))
    record = await deps.store.update_pod(record.id, PodEvent.STOP_REQUESTED)
    await lifecycle.stop_pod(record, deps)
    return pb.StopPodSandboxResponse()


async def remove(request: pb.RemovePodSandboxRequest, deps: Deps) -> pb.RemovePodSandboxResponse:
    """Remove a sandbox with its containers, stopping what runs."""
    record = find_pod(request.pod_sandbox_id, deps)
    if record is None:
        return pb.RemovePodSandboxResponse()

    deps.calls.settle(call_key(record.spec.metadata))
    async with deps.locks.hold(record.id):
        current = deps.store.find_pod(record.id)
        if current is not None:
            await lifecycle.remove_pod(current, deps)
    return pb.RemovePodSandboxResponse()
