"""From records to CRI messages. Pure; the only place that knows how our states look on the wire."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict
from typing import Any, cast

from dispatcher.cri import api_pb2 as pb
from dispatcher.model import (
    ContainerRecord,
    FilesystemUsage,
    IdMapping,
    Image,
    Mount,
    NamespaceMode,
    NamespaceOptions,
    PodRecord,
    Propagation,
    Resources,
)
from dispatcher.transitions import ContainerState, PodState

_CONTAINER_STATES = {
    ContainerState.CREATED: pb.CONTAINER_CREATED,
    ContainerState.STARTING: pb.CONTAINER_CREATED,
    ContainerState.RUNNING: pb.CONTAINER_RUNNING,
    ContainerState.EXITED: pb.CONTAINER_EXITED,
    ContainerState.REMOVING: pb.CONTAINER_EXITED,
    ContainerState.UNKNOWN: pb.CONTAINER_UNKNOWN,
}
_MODES = {
    NamespaceMode.POD: pb.POD,
    NamespaceMode.CONTAINER: pb.CONTAINER,
    NamespaceMode.NODE: pb.NODE,
    NamespaceMode.TARGET: pb.TARGET,
}
_PROPAGATIONS = {
    Propagation.PRIVATE: pb.PROPAGATION_PRIVATE,
    Propagation.HOST_TO_CONTAINER: pb.PROPAGATION_HOST_TO_CONTAINER,
    Propagation.BIDIRECTIONAL: pb.PROPAGATION_BIDIRECTIONAL,
}


_SIGNALS = dict(pb.Signal.items())


def is_shown(container: ContainerRecord) -> bool:
    """True once the container exists for clients: while it is being created, its id was told to nobody."""
    return container.state is not ContainerState.CREATING


def newest_first(containers: Iterable[ContainerRecord]) -> list[ContainerRecord]:
    """The containers of a pod that are shown, in the order in which a pod's status tells of them.

    A kubelet with evented PLEG takes the first of a name for the present attempt, and would make that anew otherwise.
    """
    return sorted(filter(is_shown, containers), key=lambda container: container.created_at_ns, reverse=True)


def pod_state(record: PodRecord) -> pb.PodSandboxState:
    """CRI knows two states of a sandbox; the real one is in the verbose info."""
    return pb.SANDBOX_READY if record.state is PodState.READY else pb.SANDBOX_NOTREADY


def container_state(record: ContainerRecord) -> pb.ContainerState:
    """Return the state as CRI shows it."""
    return _CONTAINER_STATES[record.state]


def pod_metadata(record: PodRecord) -> pb.PodSandboxMetadata:
    """A pod's identity, as it was asked for."""
    metadata = record.spec.metadata
    return pb.PodSandboxMetadata(
        name=metadata.name, uid=metadata.uid, namespace=metadata.namespace, attempt=metadata.attempt
    )


def container_metadata(record: ContainerRecord) -> pb.ContainerMetadata:
    """A container's identity, as it was asked for."""
    return pb.ContainerMetadata(name=record.spec.metadata.name, attempt=record.spec.metadata.attempt)


def _id_mappings(mappings: Iterable[IdMapping]) -> list[pb.IDMapping]:
    return [pb.IDMapping(host_id=m.host_id, container_id=m.container_id, length=m.length) for m in mappings]


def pod_item(record: PodRecord) -> pb.PodSandbox:
    """One entry of ListPodSandbox."""
    return pb.PodSandbox(
        id=record.id,
        metadata=pod_metadata(record),
        state=pod_state(record),
        created_at=record.created_at_ns,
        labels=record.spec.labels,
        annotations=record.spec.annotations,
        runtime_handler=record.spec.runtime_handler,
    )


def container_item(record: ContainerRecord) -> pb.Container:
    """One entry of ListContainers."""
    return pb.Container(
        id=record.id,
        pod_sandbox_id=record.pod_id,
        metadata=container_metadata(record),
        image=pb.ImageSpec(image=record.spec.image_ref, user_specified_image=record.spec.user_image),
        image_ref=record.image_id,
        image_id=record.image_id,
        state=container_state(record),
        created_at=record.created_at_ns,
        labels=record.spec.labels,
        annotations=record.spec.annotations,
    )


def _namespace_options(options: NamespaceOptions) -> pb.NamespaceOption:
    message = pb.NamespaceOption(
        network=_MODES[options.network],
        pid=_MODES[options.pid],
        ipc=_MODES[options.ipc],
        target_id=options.target_id,
    )
    if options.user is not None:
        message.userns_options.mode = _MODES[options.user.mode]
        message.userns_options.uids.extend(_id_mappings(options.user.uids))
        message.userns_options.gids.extend(_id_mappings(options.user.gids))
    return message


def pod_status(record: PodRecord) -> pb.PodSandboxStatus:
    """The status of a sandbox. A pod of the host's network has no address of its own (CRI)."""
    status = pb.PodSandboxStatus(
        id=record.id,
        metadata=pod_metadata(record),
        state=pod_state(record),
        created_at=record.created_at_ns,
        labels=record.spec.labels,
        annotations=record.spec.annotations,
        runtime_handler=record.spec.runtime_handler,
    )
    status.linux.namespaces.options.CopyFrom(_namespace_options(record.spec.security.namespaces))
    status.network.SetInParent()
    if record.ips and not record.spec.uses_host_network:
        status.network.ip = record.ips[0]
        status.network.additional_ips.extend(pb.PodIP(ip=ip) for ip in record.ips[1:])
    return status


def mount(value: Mount) -> pb.Mount:
    """A mount exactly as it was asked for, with the resolved image for an image volume."""
    message = pb.Mount(
        container_path=value.container_path,
        host_path=value.host_path,
        readonly=value.readonly,
        selinux_relabel=value.selinux_relabel,
        propagation=_PROPAGATIONS[value.propagation],
        recursive_read_only=value.recursive_readonly,
        uidMappings=_id_mappings(value.uid_mappings),
        gidMappings=_id_mappings(value.gid_mappings),
        mount_options=value.options,
    )
    if value.image is not None:
        message.image.image = value.image.reference
        message.image.user_specified_image = value.image.user_specified
        message.image.image_ref = value.image.image_id
        message.image_sub_path = value.image.sub_path
    return message


def resources(value: Resources) -> pb.LinuxContainerResources:
    """Limits in CRI's form."""
    return pb.LinuxContainerResources(
        cpu_period=value.cpu_period_us,
        cpu_quota=value.cpu_quota_us,
        cpu_shares=value.cpu_shares,
        memory_limit_in_bytes=value.memory_limit_bytes,
        memory_swap_limit_in_bytes=value.memory_swap_limit_bytes,
        oom_score_adj=value.oom_score_adj,
        cpuset_cpus=value.cpuset_cpus,
        cpuset_mems=value.cpuset_mems,
        hugepage_limits=[pb.HugepageLimit(page_size=h.page_size, limit=h.limit_bytes) for h in value.hugepage_limits],
        unified=value.unified,
    )


def signal_value(name: str) -> pb.Signal:
    """The CRI enum value of a signal name; the default for one that CRI does not know."""
    text = "SIGNAL_" + name.replace("+", "PLUS").replace("-", "MINUS")
    return cast("pb.Signal", _SIGNALS.get(text, pb.SIGNAL_RUNTIME_DEFAULT))


def container_status(record: ContainerRecord, pod: PodRecord | None) -> pb.ContainerStatus:
    """The status of a container. `log_path` is absolute; times and exit code follow CRI's rules for each state."""
    state = container_state(record)
    status = pb.ContainerStatus(
        id=record.id,
        metadata=container_metadata(record),
        state=state,
        created_at=record.created_at_ns,
        started_at=record.started_at_ns,
        image=pb.ImageSpec(
            image=record.spec.user_image or record.image_name or record.spec.image_ref,
            user_specified_image=record.spec.user_image,
        ),
        image_ref=record.image_ref or record.image_id,
        image_id=record.image_id,
        reason=record.reason,
        message=record.message,
        labels=record.spec.labels,
        annotations=record.spec.annotations,
        mounts=[mount(m) for m in record.spec.mounts],
        stop_signal=signal_value(record.stop_signal) if record.stop_signal else pb.SIGNAL_RUNTIME_DEFAULT,
    )
    if state == pb.CONTAINER_EXITED:
        status.finished_at = record.finished_at_ns
        status.exit_code = record.exit_code if record.exit_code is not None else 255
    if pod is not None and pod.spec.log_directory and record.spec.log_path:
        status.log_path = f"{pod.spec.log_directory.rstrip('/')}/{record.spec.log_path}"
    granted = record.granted or record.spec.resources
    if granted is not None:
        status.resources.linux.CopyFrom(resources(granted))
    if record.user is not None:
        status.user.linux.uid = record.user.uid
        status.user.linux.gid = record.user.gid
        status.user.linux.supplemental_groups.extend(record.user.supplemental_groups)
    return status


def image(value: Image) -> pb.Image:
    """An image; never an echo of how it was asked for."""
    message = pb.Image(
        id=value.id,
        repo_tags=value.repo_tags,
        repo_digests=value.repo_digests,
        size=value.size_bytes,
        username=value.username,
        spec=pb.ImageSpec(image=value.id, annotations=value.config.annotations),
        pinned=value.pinned,
    )
    if value.uid is not None:
        message.uid.value = value.uid
    return message


def filesystem(value: FilesystemUsage) -> pb.FilesystemUsage:
    """Disk use of one mount point."""
    return pb.FilesystemUsage(
        timestamp=value.timestamp_ns,
        fs_id=pb.FilesystemIdentifier(mountpoint=value.mountpoint),
        used_bytes=pb.UInt64Value(value=value.used_bytes),
        inodes_used=pb.UInt64Value(value=value.inodes_used),
    )


def as_json(value: object) -> str:
    """Compact JSON for the verbose info maps."""
    return json.dumps(value, default=_plain, sort_keys=True)


def _plain(value: object) -> Any:
    if isinstance(value, bytes):
        return value.decode("utf-8", "replace")
    if hasattr(value, "__dataclass_fields__"):
        return asdict(value)  # type: ignore[call-overload]
    return str(value)
