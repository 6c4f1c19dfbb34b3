"""StopPodSandbox and RemovePodSandbox. Both succeed for what does not exist (CRI), and resume what failed before."""

from __future__ import annotations

from dispatcher import lifecycle
from dispatcher.cri import api_pb2 as pb
from dispatcher.cri.handlers.lookup import find_pod, get_pod
from dispatcher.cri.handlers.pod_run import call_key
from dispatcher.deps import Deps
from dispatcher.errors import NoRuntime, WrongState
from dispatcher.transitions import PodEvent, PodState

# A RemovePodSandbox call with this key beside it forgets. Its value repeats the pod's id, so that no retry, proxy or
# copied command line can mean another pod. There is no RPC for it: a kubelet must never do this.
FORGET_KEY = "dispatcher-forget"


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


async def forget(request: pb.RemovePodSandboxRequest, deps: Deps) -> pb.RemovePodSandboxResponse:
    """Drop a sandbox whose plugin is not loaded. What the dispatcher made itself is freed, the runtime's part is not.

    Raises:
        WrongState: its plugin is loaded, so it can be removed properly.
    """
    record = get_pod(request.pod_sandbox_id, deps)
    name = record.route.runtime
    try:
        deps.registry.runtime(name)
    except NoRuntime:
        pass
    else:
        raise WrongState(f"The runtime {name!r} of pod {record.id} is loaded: remove the pod instead.", runtime=name)

    deps.calls.settle(call_key(record.spec.metadata))
    async with deps.locks.hold(record.id):
        current = deps.store.find_pod(record.id)
        if current is not None:
            await lifecycle.forget_pod(current, deps)
    return pb.RemovePodSandboxResponse()
