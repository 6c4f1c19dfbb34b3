"""UpdatePodSandboxResources, and the verbose info of a pod; ListPodSandbox is in `lists`, its status in `statuses`."""

from __future__ import annotations

from dispatcher.api import CanUpdatePod
from dispatcher.cri import api_pb2 as pb
from dispatcher.cri import convert, validate
from dispatcher.cri.handlers.lookup import get_pod
from dispatcher.deps import Deps
from dispatcher.model import PodRecord


def pod_info(record: PodRecord, deps: Deps) -> dict[str, str]:
    """The verbose info of a pod: the real state, the route with its reason, and what was made."""
    return {
        "dispatcher": convert.as_json(
            {
                "state": record.state,
                "reason": record.reason,
                "message": record.message,
                "runtime": record.route.runtime,
                "rule": record.route.rule,
                "route_reason": record.route.reason,
                "isolation": record.route.isolation.label,
                "decision_id": record.route.decision_id,
                "policy_hash": record.route.policy_hash,
                "votes": record.route.votes,
                "plugin": record.stamp,
                "plan": record.plan,
                "attachment": record.attachment,
                "facts": dict(record.facts),
                "notes": record.notes,
                "resources": record.resources,
                "overhead": record.overhead,
                "netns": None if record.plan is None else str(deps.netns_path(record.id)),
                "version": record.version,
            }
        )
    }


async def update_resources(
    request: pb.UpdatePodSandboxResourcesRequest, deps: Deps
) -> pb.UpdatePodSandboxResourcesResponse:
    """Hand the pod's new limits to its runtime where it has a part in them, and record what it did not refuse."""
    overhead = validate.resources(request.overhead) if request.HasField("overhead") else None
    wanted = validate.resources(request.resources) if request.HasField("resources") else None
    record = get_pod(request.pod_sandbox_id, deps)

    runtime = deps.registry.find_ability(record.route.runtime, CanUpdatePod)
    if runtime is not None:
        await runtime.update_pod_resources(deps.pod_ref(record), overhead, wanted)
    await deps.store.update_pod(record.id, overhead=overhead or record.overhead, resources=wanted or record.resources)
    return pb.UpdatePodSandboxResourcesResponse()
