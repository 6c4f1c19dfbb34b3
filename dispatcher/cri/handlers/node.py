"""Version, Status, UpdateRuntimeConfig, RuntimeConfig: what the kubelet asks about the node."""

from __future__ import annotations

import ipaddress

from dispatcher.api import RuntimeFeatures
from dispatcher.cri import api_pb2 as pb
from dispatcher.deps import Deps
from dispatcher.errors import InvalidRequest
from dispatcher.version import program_version

KUBELET_API_VERSION = "0.1.0"  # the kubelet compares with this constant and refuses to start on another
RUNTIME_NAME = "dispatcher"


async def version(request: pb.VersionRequest, deps: Deps) -> pb.VersionResponse:
    """Name and versions; clients ask at each connect, with an empty request or with "0.1.0"."""
    return pb.VersionResponse(
        version=KUBELET_API_VERSION,
        runtime_name=RUNTIME_NAME,
        runtime_version=program_version(),
        runtime_api_version="v1",
    )


async def status(request: pb.StatusRequest, deps: Deps) -> pb.StatusResponse:
    """Conditions from memory. Only a required runtime makes the node not ready; others turn their own condition."""
    health = deps.registry.all_health()
    missing = [
        f"{name}: {health[name].message if name in health else 'its plugin is not loaded'}"
        for name in deps.overdue_runtimes()
    ]
    network = deps.network.status()
    conditions = [
        pb.RuntimeCondition(
            type="RuntimeReady",
            status=not missing,
            reason="RequiredRuntimeDown" if missing else "",
            message="; ".join(missing),
        ),
        pb.RuntimeCondition(type="NetworkReady", status=network.ready, reason=network.reason, message=network.message),
    ]
    conditions += [
        pb.RuntimeCondition(
            type=f"Runtime/{name}",
            status=state.ready,
            reason=state.reason,
            message=state.message,
        )
        for name, state in sorted(health.items())
    ]
    conditions += [
        pb.RuntimeCondition(type=kind, status=ok, reason=reason, message=message)
        for kind, ok, reason, message in (*deps.conditions(), *deps.registry.extra_conditions())
    ]
    features = {name: state.features for name, state in health.items()}
    return pb.StatusResponse(
        status=pb.RuntimeStatus(conditions=conditions),
        info=deps.info() if request.verbose else None,
        runtime_handlers=_handlers(features, deps),
        features=pb.RuntimeFeatures(
            supplemental_groups_policy=bool(features) and all(f.supplemental_groups_policy for f in features.values()),
            user_namespaces_host_network=any(f.user_namespaces_host_network for f in features.values()),
            mount_options=bool(features) and all(f.mount_options for f in features.values()),
        ),
    )


def _handlers(features: dict[str, RuntimeFeatures], deps: Deps) -> list[pb.RuntimeHandler]:
    """One entry per handler of the policy file, and one with the name "" for pods that name none."""
    return [
        pb.RuntimeHandler(
            name=handler,
            features=pb.RuntimeHandlerFeatures(
                recursive_read_only_mounts=all(
                    runtime in features and features[runtime].recursive_read_only_mounts for runtime in runtimes
                ),
                user_namespaces=all(runtime in features and features[runtime].user_namespaces for runtime in runtimes),
            ),
        )
        for handler, runtimes in deps.policy.handlers().items()
    ]


async def update_runtime_config(request: pb.UpdateRuntimeConfigRequest, deps: Deps) -> pb.UpdateRuntimeConfigResponse:
    """Take the node's pod range, and keep it over restarts."""
    cidr = request.runtime_config.network_config.pod_cidr
    for part in filter(None, cidr.split(",")):
        try:
            ipaddress.ip_network(part, strict=False)
        except ValueError:
            raise InvalidRequest(f"{part!r} is not a network range.") from None
    if cidr:
        await deps.store.set_setting("pod_cidr", cidr)
        deps.network.set_pod_cidr(cidr)
    return pb.UpdateRuntimeConfigResponse()


async def runtime_config(request: pb.RuntimeConfigRequest, deps: Deps) -> pb.RuntimeConfigResponse:
    """The node's cgroup driver, which the kubelet adopts; UNAVAILABLE, on which it asks again, while it is not known."""
    driver = pb.SYSTEMD if deps.cgroup_driver() == "systemd" else pb.CGROUPFS
    return pb.RuntimeConfigResponse(linux=pb.LinuxRuntimeConfiguration(cgroup_driver=driver))
