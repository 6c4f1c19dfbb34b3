"""From a checked manifest to the CRI messages that a kubelet would send for it. Pure.

What a kubelet takes from its node and its configuration arrives as values (`Node`, `Placement`). The order of calls is
the caller's: sandbox first, then init containers and sidecars in turn, then the main containers.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass, field

from dispatcher.cri import api_pb2 as pb
from dispatcher.errors import InvalidRequest
from dispatcher.manifest import schema
from dispatcher.manifest.environment import expand, make_environment
from dispatcher.manifest.pods import ContainerKind, PodManifest
from dispatcher.manifest.volumes import termination_log_path, volume_path
from dispatcher.model import DnsConfig

_CPU_PERIOD_US = 100_000
_MIN_CPU_QUOTA_US = 1000
_MIN_CPU_SHARES = 2
_MAX_CPU_SHARES = 262_144
_HOSTNAME_MAX = 63
_DNS_SEARCHES_MAX = 32

# What Kubernetes hides by default in /proc and /sys (procMount: Default).
_MASKED_PATHS = (
    "/proc/asound",
    "/proc/acpi",
    "/proc/interrupts",
    "/proc/kcore",
    "/proc/keys",
    "/proc/latency_stats",
    "/proc/timer_list",
    "/proc/timer_stats",
    "/proc/sched_debug",
    "/proc/scsi",
    "/sys/firmware",
    "/sys/devices/virtual/powercap",
)
_READONLY_PATHS = ("/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger")

_PROFILES = {
    "RuntimeDefault": pb.SecurityProfile.RuntimeDefault,
    "Unconfined": pb.SecurityProfile.Unconfined,
    "Localhost": pb.SecurityProfile.Localhost,
}
_PROPAGATIONS = {
    "None": pb.PROPAGATION_PRIVATE,
    "HostToContainer": pb.PROPAGATION_HOST_TO_CONTAINER,
    "Bidirectional": pb.PROPAGATION_BIDIRECTIONAL,
}
_GROUPS_POLICIES = {"Merge": pb.Merge, "Strict": pb.Strict}
_PROTOCOLS = {"TCP": pb.TCP, "UDP": pb.UDP, "SCTP": pb.SCTP}


@dataclass(frozen=True, slots=True, kw_only=True)
class Node:
    """What a kubelet knows of its node. `dns` is the node's resolv.conf, `seccomp_dir` where profiles are kept."""

    name: str = "localhost"
    ips: tuple[str, ...] = ()
    dns: DnsConfig = field(default_factory=DnsConfig)
    memory_bytes: int = 0
    seccomp_dir: str = "/var/lib/kubelet/seccomp"


@dataclass(frozen=True, slots=True, kw_only=True)
class Placement:
    """Where one pod lives: its uid, its folder for volumes, its folder for logs, its cgroup ("" for none)."""

    uid: str
    pod_dir: str
    log_dir: str = ""
    cgroup_parent: str = ""
    attempt: int = 0


def default_log_dir(manifest: PodManifest, uid: str, root: str = "/var/log/pods") -> str:
    """Return the log folder that a kubelet would use. Namespace and name are checked, so no part of it can climb."""
    metadata = manifest.pod.metadata
    return f"{root}/{metadata.namespace}_{metadata.name}_{uid}"


def parse_resolv_conf(text: str) -> DnsConfig:
    """Read the node's resolv.conf; the last `search` line counts, as in the resolver."""
    servers: list[str] = []
    searches: list[str] = []
    options: list[str] = []
    for line in text.splitlines():
        word, *rest = line.split("#")[0].split(";")[0].split() or [""]
        if word == "nameserver" and rest:
            servers.append(rest[0])
        elif word in ("search", "domain"):
            searches = rest
        elif word == "options":
            options += rest
    return DnsConfig(servers=tuple(servers), searches=tuple(searches), options=tuple(options))


def pull_policy(container: schema.Container) -> str:
    """Return Always, IfNotPresent or Never; without a word of the manifest, Always for the tag latest or no tag."""
    if container.image_pull_policy is not None:
        return container.image_pull_policy
    name = container.image.rpartition("/")[2]
    if "@" in name:
        return "IfNotPresent"
    return "Always" if name.partition(":")[2] in ("", "latest") else "IfNotPresent"


# ------------------------------------------------------------------------------------------------------------- sandbox
def run_request(manifest: PodManifest, placement: Placement, node: Node) -> pb.RunPodSandboxRequest:
    """Build the RunPodSandbox call. Without RuntimeClass objects, a class's name is taken for its handler."""
    return pb.RunPodSandboxRequest(
        config=sandbox_config(manifest, placement, node),
        runtime_handler=manifest.spec.runtime_class_name or "",
    )


def sandbox_config(manifest: PodManifest, placement: Placement, node: Node) -> pb.PodSandboxConfig:
    """Build the configuration of the sandbox, which CreateContainer and PullImage repeat."""
    metadata, spec = manifest.pod.metadata, manifest.spec
    security = spec.security_context
    config = pb.PodSandboxConfig(
        metadata=pb.PodSandboxMetadata(
            name=metadata.name, namespace=metadata.namespace, uid=placement.uid, attempt=placement.attempt
        ),
        log_directory=placement.log_dir,
        dns_config=_dns_config(spec, node),
        labels={**metadata.labels, **_pod_labels(manifest, placement)},
        annotations=metadata.annotations,
        linux=pb.LinuxPodSandboxConfig(
            cgroup_parent=placement.cgroup_parent,
            sysctls={item.name.replace("/", "."): item.value for item in security.sysctls},
            resources=_pod_resources(manifest),
        ),
    )
    if not spec.host_network:
        config.hostname = (spec.hostname or metadata.name)[:_HOSTNAME_MAX].rstrip("-.")
        for _, container in manifest.containers:
            for port in container.ports:
                config.port_mappings.add(
                    protocol=_PROTOCOLS[port.protocol],
                    container_port=port.container_port,
                    host_port=port.host_port or 0,
                    host_ip=port.host_ip,
                )

    context = config.linux.security_context
    context.namespace_options.CopyFrom(_namespaces(spec))
    context.privileged = any(container.security_context.privileged for _, container in manifest.containers)
    # The sandbox's own process needs nothing, so it always gets the tightest profile.
    context.seccomp.profile_type = pb.SecurityProfile.RuntimeDefault
    context.supplemental_groups.extend(_groups(security))
    context.supplemental_groups_policy = _GROUPS_POLICIES[security.supplemental_groups_policy]
    if security.run_as_user is not None:
        context.run_as_user.value = security.run_as_user
        if security.run_as_group is not None:
            context.run_as_group.value = security.run_as_group
    if security.se_linux_options is not None:
        context.selinux_options.CopyFrom(_selinux(security.se_linux_options))
    return config


def _pod_labels(manifest: PodManifest, placement: Placement) -> dict[str, str]:
    return {
        "io.kubernetes.pod.name": manifest.pod.metadata.name,
        "io.kubernetes.pod.namespace": manifest.pod.metadata.namespace,
        "io.kubernetes.pod.uid": placement.uid,
    }


def _namespaces(spec: schema.PodSpecification) -> pb.NamespaceOption:
    pid = pb.NODE if spec.host_pid else pb.POD if spec.share_process_namespace else pb.CONTAINER
    return pb.NamespaceOption(
        network=pb.NODE if spec.host_network else pb.POD, pid=pid, ipc=pb.NODE if spec.host_ipc else pb.POD
    )


def _groups(security: schema.PodSecurityContext) -> list[int]:
    return [*([] if security.fs_group is None else [security.fs_group]), *security.supplemental_groups]


def _selinux(options: schema.SELinuxOptions) -> pb.SELinuxOption:
    return pb.SELinuxOption(user=options.user, role=options.role, type=options.type, level=options.level)


def _dns_config(spec: schema.PodSpecification, node: Node) -> pb.DNSConfig:
    """Without a cluster's DNS, ClusterFirst means the node's resolver, as it does for a kubelet that knows none."""
    base = DnsConfig() if spec.dns_policy == "None" else node.dns
    options = {option.partition(":")[0]: option for option in base.options}
    for option in spec.dns_config.options:
        options[option.name] = option.name if option.value is None else f"{option.name}:{option.value}"
    return pb.DNSConfig(
        servers=_unique([*base.servers, *spec.dns_config.nameservers])[:3],
        searches=_unique([*base.searches, *spec.dns_config.searches])[:_DNS_SEARCHES_MAX],
        options=list(options.values()),
    )


def _unique(items: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(items))


# ----------------------------------------------------------------------------------------------------------- container
def container_config(
    manifest: PodManifest,
    container: schema.Container,
    placement: Placement,
    node: Node,
    *,
    image: pb.Image | None = None,
    pod_ips: tuple[str, ...] = (),
    attempt: int = 0,
) -> pb.ContainerConfig:
    """Build the configuration of one attempt of a container.

    `image` is the pulled image: its id is what a kubelet names, and its user counts where the manifest says none.
    `pod_ips` come from the sandbox's status.

    Raises:
        InvalidRequest: runAsNonRoot is set and the container would run as root, or as nobody knows whom.
    """
    variables = make_environment(
        manifest, container, uid=placement.uid, node_name=node.name, node_ips=node.ips, pod_ips=pod_ips
    )
    config = pb.ContainerConfig(
        metadata=pb.ContainerMetadata(name=container.name, attempt=attempt),
        image=pb.ImageSpec(
            image=image.id if image is not None else container.image,
            user_specified_image=container.image,
            image_ref=image.id if image is not None else "",
        ),
        command=[expand(word, variables) for word in container.command],
        args=[expand(word, variables) for word in container.args],
        working_dir=container.working_dir,
        labels={**_pod_labels(manifest, placement), "io.kubernetes.container.name": container.name},
        annotations=_container_annotations(manifest, container, attempt),
        log_path=f"{container.name}/{attempt}.log",
        stdin=container.stdin,
        stdin_once=container.stdin_once,
        tty=container.tty,
    )
    for key, value in variables.items():
        config.envs.add(key=key, value=value.encode(errors="surrogateescape"))
    for mount in container.volume_mounts:
        config.mounts.append(_mount(manifest, mount, placement))
    if all(mount.mount_path != container.termination_message_path for mount in container.volume_mounts):
        config.mounts.add(
            container_path=container.termination_message_path,
            host_path=termination_log_path(placement.pod_dir, container.name, attempt),
        )
    config.linux.resources.CopyFrom(_container_resources(manifest, container, node))
    config.linux.security_context.CopyFrom(_container_security(manifest, container, node, image))
    return config


def _container_annotations(manifest: PodManifest, container: schema.Container, attempt: int) -> dict[str, str]:
    document = container.model_dump_json(by_alias=True, exclude_defaults=True)
    annotations = {
        "io.kubernetes.container.hash": hashlib.sha256(document.encode()).hexdigest()[:8],
        "io.kubernetes.container.restartCount": str(attempt),
        "io.kubernetes.container.terminationMessagePath": container.termination_message_path,
        "io.kubernetes.container.terminationMessagePolicy": container.termination_message_policy,
        "io.kubernetes.pod.terminationGracePeriod": str(manifest.spec.termination_grace_period_seconds),
    }
    if container.ports:
        ports = [port.model_dump(by_alias=True, exclude_unset=True) for port in container.ports]
        annotations["io.kubernetes.container.ports"] = json.dumps(ports, separators=(",", ":"))
    return annotations


def _mount(manifest: PodManifest, mount: schema.VolumeMount, placement: Placement) -> pb.Mount:
    path = volume_path(manifest, mount.name, placement.pod_dir)
    volume = next(volume for volume in manifest.spec.volumes if volume.name == mount.name)
    is_object = volume.config_map is not None or volume.secret is not None
    return pb.Mount(
        container_path=mount.mount_path,
        host_path=path if mount.sub_path is None else f"{path}/{mount.sub_path}",
        readonly=mount.read_only or is_object,
        propagation=_PROPAGATIONS[mount.mount_propagation],
        recursive_read_only=mount.recursive_read_only == "Enabled",
    )


# ----------------------------------------------------------------------------------------------------------- resources
def _linux_resources(
    cpu_request: int | None, cpu_limit: int | None, memory_limit: int | None
) -> pb.LinuxContainerResources:
    """Shares follow the request, or the limit where only that is given; CPU amounts are in thousandths."""
    resources = pb.LinuxContainerResources(memory_limit_in_bytes=memory_limit or 0)
    share_of = cpu_limit if cpu_request is None and cpu_limit is not None else cpu_request or 0
    resources.cpu_shares = min(max(share_of * 1024 // 1000, _MIN_CPU_SHARES), _MAX_CPU_SHARES)
    if cpu_limit:
        resources.cpu_period = _CPU_PERIOD_US
        resources.cpu_quota = max(cpu_limit * _CPU_PERIOD_US // 1000, _MIN_CPU_QUOTA_US)
    return resources


def _container_resources(manifest: PodManifest, container: schema.Container, node: Node) -> pb.LinuxContainerResources:
    wanted = container.resources
    resources = _linux_resources(wanted.requests.cpu, wanted.limits.cpu, wanted.limits.memory)
    resources.oom_score_adj = _oom_score_adj(manifest, container, node)
    for size, limit in sorted(wanted.limits.hugepages.items()):
        resources.hugepage_limits.add(page_size=size.replace("i", "B"), limit=limit)
    return resources


def _pod_resources(manifest: PodManifest) -> pb.LinuxContainerResources:
    """What the whole pod may use at a time: sidecars and main containers together, or an init container in its turn."""
    return _linux_resources(
        _pod_total(manifest, "requests", "cpu"),
        _pod_total(manifest, "limits", "cpu"),
        _pod_total(manifest, "limits", "memory"),
    )


def _amount(container: schema.Container, section: str, name: str) -> int | None:
    amounts: schema.ResourceList = getattr(container.resources, section)
    value: int | None = getattr(amounts, name)
    if value is None and section == "requests":
        value = getattr(container.resources.limits, name)  # the API server's default
    return value


def _pod_total(manifest: PodManifest, section: str, name: str) -> int | None:
    standing, peak, is_given = 0, 0, False
    for kind, container in manifest.containers:
        amount = _amount(container, section, name)
        is_given = is_given or amount is not None
        if kind is ContainerKind.INIT:
            peak = max(peak, standing + (amount or 0))
        else:
            standing += amount or 0
    return max(standing, peak) if is_given else None


def _oom_score_adj(manifest: PodManifest, container: schema.Container, node: Node) -> int:
    """The kubelet's order of victims: best effort first, guaranteed last, others by their share of the node."""
    everything = [item for _, item in manifest.containers]
    pairs = [(item, name) for item in everything for name in ("cpu", "memory")]
    if all(_amount(item, "requests", name) is None for item, name in pairs):
        return 1000
    if all(
        getattr(item.resources.limits, name) is not None
        and _amount(item, "requests", name) == getattr(item.resources.limits, name)
        for item, name in pairs
    ):
        return -997
    request = _amount(container, "requests", "memory") or 0
    share = 1000 * request // node.memory_bytes if node.memory_bytes else 0
    return min(max(1000 - share, 3), 999)


# ------------------------------------------------------------------------------------------------------------ security
def _container_security(
    manifest: PodManifest, container: schema.Container, node: Node, image: pb.Image | None
) -> pb.LinuxContainerSecurityContext:
    pod, own = manifest.spec.security_context, container.security_context
    context = pb.LinuxContainerSecurityContext(
        privileged=own.privileged,
        namespace_options=_namespaces(manifest.spec),
        readonly_rootfs=own.read_only_root_filesystem,
        no_new_privs=own.allow_privilege_escalation is False,
        supplemental_groups=_groups(pod),
        supplemental_groups_policy=_GROUPS_POLICIES[pod.supplemental_groups_policy],
        capabilities=pb.Capability(add_capabilities=own.capabilities.add, drop_capabilities=own.capabilities.drop),
        seccomp=_profile(own.seccomp_profile or pod.seccomp_profile, node) or _unconfined(),
        apparmor=_profile(own.app_armor_profile or pod.app_armor_profile, None),
    )
    if own.proc_mount == "Default" and not own.privileged:
        context.masked_paths.extend(_MASKED_PATHS)
        context.readonly_paths.extend(_READONLY_PATHS)
    selinux = own.se_linux_options or pod.se_linux_options
    if selinux is not None:
        context.selinux_options.CopyFrom(_selinux(selinux))

    user = own.run_as_user if own.run_as_user is not None else pod.run_as_user
    group = own.run_as_group if own.run_as_group is not None else pod.run_as_group
    if user is not None:
        context.run_as_user.value = user
    elif image is not None and image.username:
        context.run_as_username = image.username
    elif image is not None and image.HasField("uid"):
        context.run_as_user.value = image.uid.value
    else:
        context.run_as_user.value = 0
    if group is not None:
        context.run_as_group.value = group

    needs_other = own.run_as_non_root if own.run_as_non_root is not None else pod.run_as_non_root
    if needs_other:
        _refuse_root(container, context)
    return context


def _refuse_root(container: schema.Container, context: pb.LinuxContainerSecurityContext) -> None:
    if context.run_as_username:
        raise InvalidRequest(
            f'Container "{container.name}" has runAsNonRoot, and its image names the user '
            f'"{context.run_as_username}": set runAsUser to a number, so that it can be verified.'
        )
    if context.run_as_user.value == 0:
        raise InvalidRequest(f'Container "{container.name}" has runAsNonRoot, but would run as root: set runAsUser.')


def _profile(profile: schema.Profile | None, node: Node | None) -> pb.SecurityProfile | None:
    if profile is None:
        return None
    reference = profile.localhost_profile
    if reference and node is not None:  # seccomp: a file below the kubelet's folder; AppArmor: a name
        if reference.startswith("/") or ".." in reference.split("/"):
            raise InvalidRequest(f"The seccomp profile {reference!r} has to be a relative path without ..")
        reference = f"{node.seccomp_dir}/{reference}"
    return pb.SecurityProfile(profile_type=_PROFILES[profile.type], localhost_ref=reference)


def _unconfined() -> pb.SecurityProfile:
    return pb.SecurityProfile(profile_type=pb.SecurityProfile.Unconfined)
