"""From CRI messages to typed values, or InvalidRequest. The only way by which a request's contents come in.

Everything is untrusted. What is a closed set on the wire becomes an enum; what becomes a path, a sysctl or an argument
later is checked against its grammar here, once. Labels and annotations pass unchanged: nothing may ever act on them
as text. Pure functions of a message; no look-ups, no I/O.
"""

from __future__ import annotations

import ipaddress
import posixpath
import re
from collections.abc import Iterable
from typing import Any

from dispatcher.cri import api_pb2 as pb
from dispatcher.errors import InvalidRequest
from dispatcher.model import (
    Capabilities,
    ContainerMetadata,
    ContainerSecurity,
    ContainerSpec,
    Credentials,
    Device,
    DnsConfig,
    EnvVar,
    GroupsPolicy,
    HugepageLimit,
    IdMapping,
    ImageVolume,
    Mount,
    NamespaceMode,
    NamespaceOptions,
    PodMetadata,
    PodSecurity,
    PodSpec,
    PortMapping,
    ProfileType,
    Propagation,
    Protocol,
    Resources,
    SecurityProfile,
    SelinuxOptions,
    UserNamespace,
)

_PROTOCOLS = {pb.TCP: Protocol.TCP, pb.UDP: Protocol.UDP, pb.SCTP: Protocol.SCTP}
_PROPAGATIONS = {
    pb.PROPAGATION_PRIVATE: Propagation.PRIVATE,
    pb.PROPAGATION_HOST_TO_CONTAINER: Propagation.HOST_TO_CONTAINER,
    pb.PROPAGATION_BIDIRECTIONAL: Propagation.BIDIRECTIONAL,
}
_MODES = {
    pb.POD: NamespaceMode.POD,
    pb.CONTAINER: NamespaceMode.CONTAINER,
    pb.NODE: NamespaceMode.NODE,
    pb.TARGET: NamespaceMode.TARGET,
}
_GROUPS = {pb.Merge: GroupsPolicy.MERGE, pb.Strict: GroupsPolicy.STRICT}
_PROFILES = {
    pb.SecurityProfile.RuntimeDefault: ProfileType.RUNTIME_DEFAULT,
    pb.SecurityProfile.Unconfined: ProfileType.UNCONFINED,
    pb.SecurityProfile.Localhost: ProfileType.LOCALHOST,
}
_MOUNT_OPTIONS = frozenset({"noexec", "exec", "nodev", "dev", "nosuid", "suid"})
# sysctl(8) names: dot-separated words. "/" and ".." never occur, so a name can not leave /proc/sys.
_SYSCTL = re.compile(r"[a-z0-9_-]+(\.[a-zA-Z0-9_:*-]+)+", re.ASCII)
_CAPABILITY = re.compile(r"[A-Za-z_]{1,40}", re.ASCII)
_CGROUP_PATH = re.compile(r"[A-Za-z0-9_.:/@\\-]*", re.ASCII)
_HOSTNAME_MAX = 64  # HOST_NAME_MAX of Linux
_MAX_ID = 2**31 - 1  # runtimes disagree above; an id that wraps around would become root (CVE-2024-40635)
_MAX_ID_MAPPING = 2**32 - 1
_MAX_TEXT = 1 << 20  # one string of a request; the message as a whole is capped at 16 MiB


def _refuse(message: str) -> InvalidRequest:
    return InvalidRequest(message)


def _no_control(text: str, what: str) -> str:
    if any(ord(c) < 32 or ord(c) == 127 for c in text):
        raise _refuse(f"{what} holds a control character.")
    return text


def _enum(table: dict[Any, Any], value: int, what: str) -> Any:
    try:
        return table[value]
    except KeyError:
        raise _refuse(f"{what} has the unknown value {value}.") from None


def identifier(text: str, what: str) -> str:
    """Return an id or id prefix as given. An empty one names nothing, which the look-up reports."""
    if len(text) > 256:
        raise _refuse(f"{what} is longer than any id.")
    return text


def pod_metadata(message: pb.PodSandboxMetadata) -> PodMetadata:
    """Check and convert a sandbox's identity."""
    for field in ("name", "namespace", "uid"):
        value = getattr(message, field)
        if not value:
            raise _refuse(f"The sandbox config's metadata has no {field}.")
        if len(value) > _MAX_TEXT:
            raise _refuse(f"The sandbox config's metadata.{field} is too long.")
    return PodMetadata(name=message.name, namespace=message.namespace, uid=message.uid, attempt=message.attempt)


def pod_spec(config: pb.PodSandboxConfig, runtime_handler: str = "") -> PodSpec:
    """Check and convert a sandbox config.

    Raises:
        InvalidRequest: what is missing, out of range, contradicts itself, or could escape its meaning.
    """
    if not config.HasField("metadata"):
        raise _refuse("The sandbox config has no metadata.")
    if config.HasField("windows"):
        raise _refuse("The sandbox config is for Windows; this node runs Linux pods.")
    linux = config.linux
    security = _pod_security(linux.security_context)
    return PodSpec(
        metadata=pod_metadata(config.metadata),
        hostname=_hostname(config.hostname),
        log_directory=_absolute_or_empty(config.log_directory, "log_directory"),
        dns=_dns(config.dns_config) if config.HasField("dns_config") else None,
        port_mappings=tuple(_port(p) for p in config.port_mappings),
        labels=dict(config.labels),
        annotations=dict(config.annotations),
        has_linux=config.HasField("linux"),
        cgroup_parent=_cgroup_parent(linux.cgroup_parent),
        sysctls=_sysctls(linux.sysctls, security.namespaces),
        security=security,
        overhead=resources(linux.overhead) if linux.HasField("overhead") else None,
        resources=resources(linux.resources) if linux.HasField("resources") else None,
        runtime_handler=_no_control(runtime_handler, "runtime_handler"),
    )


def container_spec(config: pb.ContainerConfig, pod: PodSpec) -> ContainerSpec:
    """Check and convert a container config for a container of `pod`.

    Raises:
        InvalidRequest: as for `pod_spec`; also what asks for more than its sandbox was given.
    """
    if not config.HasField("metadata") or not config.metadata.name:
        raise _refuse("The container config's metadata has no name.")
    if not config.image.image:
        raise _refuse("The container config names no image.")
    if config.HasField("windows"):
        raise _refuse("The container config is for Windows; this node runs Linux pods.")
    linux = config.linux
    security = _container_security(linux.security_context)
    if security.privileged and not pod.security.privileged:
        raise _refuse("A privileged container is not allowed in a sandbox that is not privileged.")
    return ContainerSpec(
        metadata=ContainerMetadata(name=config.metadata.name, attempt=config.metadata.attempt),
        image_ref=config.image.image,
        user_image=config.image.user_specified_image,
        command=tuple(_no_nul(c, "command") for c in config.command),
        args=tuple(_no_nul(a, "args") for a in config.args),
        working_dir=_absolute_or_empty(config.working_dir, "working_dir"),
        envs=tuple(_env(e) for e in config.envs),
        mounts=tuple(_mount(m) for m in config.mounts),
        devices=tuple(_device(d) for d in config.devices),
        cdi_devices=tuple(_cdi(d.name) for d in config.CDI_devices),
        labels=dict(config.labels),
        annotations=dict(config.annotations),
        log_path=_log_path(config.log_path),
        stdin=config.stdin,
        stdin_once=config.stdin_once,
        tty=config.tty,
        stop_signal=signal_name(config.stop_signal),
        resources=resources(linux.resources) if linux.HasField("resources") else None,
        security=security,
    )


def resources(message: pb.LinuxContainerResources) -> Resources:
    """Check and convert limits. Negative values mean "unlimited" where the kernel has such a value."""
    if message.memory_limit_in_bytes < 0 or message.cpu_period < 0 or message.cpu_shares < 0:
        raise _refuse("A memory limit, CPU period or CPU shares below zero means nothing.")
    if message.cpu_quota < -1 or message.memory_swap_limit_in_bytes < -1:
        raise _refuse("A CPU quota or swap limit is at least -1, which means unlimited.")
    if not -1000 <= message.oom_score_adj <= 1000:
        raise _refuse(f"oom_score_adj {message.oom_score_adj} is outside -1000..1000.")
    return Resources(
        cpu_period_us=message.cpu_period,
        cpu_quota_us=message.cpu_quota,
        cpu_shares=message.cpu_shares,
        memory_limit_bytes=message.memory_limit_in_bytes,
        memory_swap_limit_bytes=message.memory_swap_limit_in_bytes,
        oom_score_adj=message.oom_score_adj,
        cpuset_cpus=_cpuset(message.cpuset_cpus),
        cpuset_mems=_cpuset(message.cpuset_mems),
        hugepage_limits=tuple(_hugepage(h) for h in message.hugepage_limits),
        unified={_unified_key(k): _no_control(v, "unified") for k, v in message.unified.items()},
    )


def credentials(message: pb.AuthConfig) -> Credentials:
    """Convert registry credentials; their values never appear in an error."""
    return Credentials(
        username=message.username,
        password=message.password,
        auth=message.auth,
        server_address=message.server_address,
        identity_token=message.identity_token,
        registry_token=message.registry_token,
    )


def signal_name(value: int) -> str:
    """Return "SIGTERM", "SIGRTMIN+3" and the like, or "" for the runtime's default."""
    try:
        name = pb.Signal.Name(value)
    except ValueError:
        raise _refuse(f"stop_signal has the unknown value {value}.") from None
    if value == pb.SIGNAL_RUNTIME_DEFAULT:
        return ""
    return name.removeprefix("SIGNAL_").replace("PLUS", "+").replace("MINUS", "-")


def exec_streams(message: pb.ExecRequest | pb.AttachRequest) -> None:
    """Refuse combinations of streams that cannot be served (CRI's streaming rules)."""
    if message.tty and message.stderr:
        raise _refuse("tty and stderr exclude each other: a terminal has one output.")
    if not (message.stdin or message.stdout or message.stderr):
        raise _refuse("None of stdin, stdout and stderr is asked for.")


def command(words: Iterable[str]) -> tuple[str, ...]:
    """Check a command to execute."""
    result = tuple(_no_nul(w, "cmd") for w in words)
    if not result:
        raise _refuse("The command is empty.")
    return result


def _no_nul(text: str, what: str) -> str:
    if "\0" in text:
        raise _refuse(f"{what} holds a NUL character.")
    return text


def _hostname(text: str) -> str:
    if len(text) > _HOSTNAME_MAX:
        raise _refuse(f"The hostname is longer than {_HOSTNAME_MAX} characters.")
    if "/" in text or any(c.isspace() for c in text):
        raise _refuse("The hostname holds a slash or white space.")
    return _no_control(text, "hostname")


def _absolute_or_empty(path: str, what: str) -> str:
    if path and not path.startswith("/"):
        raise _refuse(f"{what} must be an absolute path.")
    if ".." in path.split("/"):
        raise _refuse(f"{what} must not hold '..'.")
    return _no_nul(path, what)


def _log_path(path: str) -> str:
    if not path:
        return ""
    clean = posixpath.normpath(path)
    if path.startswith("/") or clean.startswith("..") or clean == "." or ".." in path.split("/"):
        raise _refuse("log_path must be a path below the sandbox's log directory.")
    return _no_control(clean, "log_path")


def _cgroup_parent(path: str) -> str:
    if ".." in path or not _CGROUP_PATH.fullmatch(path) or len(path) > 4096:
        raise _refuse("cgroup_parent is not a cgroup path.")
    return path


def _dns(message: pb.DNSConfig) -> DnsConfig:
    for server in message.servers:
        try:
            ipaddress.ip_address(server.partition("%")[0])
        except ValueError:
            raise _refuse(f"The DNS server {server!r} is not an IP address.") from None
    for word in (*message.servers, *message.searches, *message.options):
        if any(c.isspace() for c in _no_control(word, "dns_config")):
            raise _refuse("A DNS server, search domain or option holds white space.")
    return DnsConfig(servers=tuple(message.servers), searches=tuple(message.searches), options=tuple(message.options))


def _port(message: pb.PortMapping) -> PortMapping:
    if not 0 < message.container_port < 65536 or not 0 <= message.host_port < 65536:
        raise _refuse(f"The port mapping {message.host_port}:{message.container_port} is out of range.")
    if message.host_ip:
        try:
            ipaddress.ip_address(message.host_ip)
        except ValueError:
            raise _refuse(f"The port mapping's host_ip {message.host_ip!r} is not an IP address.") from None
    return PortMapping(
        container_port=message.container_port,
        host_port=message.host_port,
        protocol=_enum(_PROTOCOLS, message.protocol, "A port mapping's protocol"),
        host_ip=message.host_ip,
    )


def _sysctls(sysctls: Any, namespaces: NamespaceOptions) -> dict[str, str]:
    """Only sysctls that a namespace of the pod contains; with the host's namespace they would change the node."""
    result = {}
    for name, value in sysctls.items():
        if not _SYSCTL.fullmatch(name):
            raise _refuse(f"{name!r} is not the name of a sysctl.")
        if name.startswith("net."):
            if namespaces.network is NamespaceMode.NODE:
                raise _refuse(f"The sysctl {name} needs a network namespace of the pod's own.")
        elif name.startswith(("kernel.shm", "kernel.msg", "fs.mqueue.")) or name == "kernel.sem":
            if namespaces.ipc is NamespaceMode.NODE:
                raise _refuse(f"The sysctl {name} needs an IPC namespace of the pod's own.")
        else:
            raise _refuse(f"The sysctl {name} is not namespaced: it would change the whole node.")
        result[name] = _no_control(value, f"The value of the sysctl {name}")
    return result


def _namespaces(message: pb.NamespaceOption, *, of_pod: bool) -> NamespaceOptions:
    network = _enum(_MODES, message.network, "namespace_options.network")
    pid = _enum(_MODES, message.pid, "namespace_options.pid")
    ipc = _enum(_MODES, message.ipc, "namespace_options.ipc")
    for what, mode in (("network", network), ("ipc", ipc)):
        if mode not in (NamespaceMode.POD, NamespaceMode.NODE):
            raise _refuse(f"namespace_options.{what} must be POD or NODE.")
    if pid is NamespaceMode.TARGET:
        if of_pod:
            raise _refuse("namespace_options.pid TARGET is for containers, not for a sandbox.")
        if not message.target_id:
            raise _refuse("namespace_options.pid TARGET needs a target_id.")
    elif message.target_id:
        raise _refuse("target_id goes with namespace_options.pid TARGET only.")
    user = _user_namespace(message.userns_options) if message.HasField("userns_options") else None
    return NamespaceOptions(network=network, pid=pid, ipc=ipc, target_id=message.target_id, user=user)


def _user_namespace(message: pb.UserNamespace) -> UserNamespace:
    mode = _enum(_MODES, message.mode, "userns_options.mode")
    if mode not in (NamespaceMode.POD, NamespaceMode.NODE):
        raise _refuse(f"userns_options.mode {mode} is not possible: it must be POD or NODE.")
    uids = tuple(_id_mapping(m) for m in message.uids)
    gids = tuple(_id_mapping(m) for m in message.gids)
    if mode is NamespaceMode.NODE:
        if uids or gids:
            raise _refuse("userns_options.mode NODE takes no mappings.")
        return UserNamespace(mode=mode)
    for what, mappings in (("uid", uids), ("gid", gids)):
        if len(mappings) != 1:
            raise _refuse(f"userns_options needs exactly one {what} mapping, but has {len(mappings)}.")
        if mappings[0].container_id != 0:
            raise _refuse(f"userns_options must map the {what} 0 of the container.")
    return UserNamespace(mode=mode, uids=uids, gids=gids)


def _id_mapping(message: pb.IDMapping) -> IdMapping:
    if not message.length or max(message.host_id, message.container_id) + message.length - 1 > _MAX_ID_MAPPING:
        raise _refuse("An id mapping is empty or goes beyond the last id.")
    return IdMapping(host_id=message.host_id, container_id=message.container_id, length=message.length)


def _id(message: pb.Int64Value, what: str) -> int:
    if not 0 <= message.value <= _MAX_ID:
        raise _refuse(f"{what} {message.value} is outside 0..{_MAX_ID}.")
    return int(message.value)


def _groups(values: Iterable[int]) -> tuple[int, ...]:
    groups = tuple(values)
    for value in groups:
        if not 0 <= value <= _MAX_ID:
            raise _refuse(f"The supplemental group {value} is outside 0..{_MAX_ID}.")
    return groups


def _selinux(message: pb.SELinuxOption) -> SelinuxOptions:
    parts = SelinuxOptions(user=message.user, role=message.role, type=message.type, level=message.level)
    for text in (parts.user, parts.role, parts.type, parts.level):
        if not re.fullmatch(r"[A-Za-z0-9_.,:-]*", text, re.ASCII):
            raise _refuse(f"{text!r} is not part of an SELinux label.")
    return parts


def _profile(message: pb.SecurityProfile, what: str) -> SecurityProfile:
    kind = _enum(_PROFILES, message.profile_type, f"{what}.profile_type")
    if kind is ProfileType.LOCALHOST and not message.localhost_ref:
        raise _refuse(f"{what} of type Localhost needs a localhost_ref.")
    return SecurityProfile(type=kind, localhost_ref=_no_control(message.localhost_ref, what))


def _deprecated_profile(text: str, what: str) -> SecurityProfile | None:
    """The string form that newer fields replaced: runtime/default, docker/default, unconfined, localhost/NAME."""
    if not text:
        return None
    if text in ("runtime/default", "docker/default"):
        return SecurityProfile(type=ProfileType.RUNTIME_DEFAULT)
    if text == "unconfined":
        return SecurityProfile(type=ProfileType.UNCONFINED)
    kind, _, name = text.partition("/")
    if kind == "localhost" and name:
        return SecurityProfile(type=ProfileType.LOCALHOST, localhost_ref=_no_control(name, what))
    raise _refuse(f"{what} {text!r} is none of runtime/default, unconfined, localhost/NAME.")


def _seccomp(message: Any) -> SecurityProfile | None:
    if message.HasField("seccomp"):
        profile: SecurityProfile | None = _profile(message.seccomp, "seccomp")
    else:
        profile = _deprecated_profile(message.seccomp_profile_path, "seccomp_profile_path")
    if profile is not None and profile.type is ProfileType.LOCALHOST:
        _absolute_or_empty(profile.localhost_ref, "A seccomp profile's localhost_ref")
    return profile


def _pod_security(message: pb.LinuxSandboxSecurityContext) -> PodSecurity:
    if message.HasField("run_as_group") and not message.HasField("run_as_user"):
        raise _refuse("run_as_group needs run_as_user.")
    return PodSecurity(
        namespaces=_namespaces(message.namespace_options, of_pod=True),
        selinux=_selinux(message.selinux_options) if message.HasField("selinux_options") else None,
        run_as_user=_id(message.run_as_user, "run_as_user") if message.HasField("run_as_user") else None,
        run_as_group=_id(message.run_as_group, "run_as_group") if message.HasField("run_as_group") else None,
        supplemental_groups=_groups(message.supplemental_groups),
        groups_policy=_enum(_GROUPS, message.supplemental_groups_policy, "supplemental_groups_policy"),
        readonly_rootfs=message.readonly_rootfs,
        privileged=message.privileged,
        seccomp=_seccomp(message),
        apparmor=_profile(message.apparmor, "apparmor") if message.HasField("apparmor") else None,
    )


def _container_security(message: pb.LinuxContainerSecurityContext) -> ContainerSecurity:
    has_user = message.HasField("run_as_user")
    if has_user and message.run_as_username:
        raise _refuse("run_as_user and run_as_username exclude each other.")
    if message.HasField("run_as_group") and not (has_user or message.run_as_username):
        raise _refuse("run_as_group needs run_as_user or run_as_username.")
    if message.HasField("apparmor"):
        apparmor: SecurityProfile | None = _profile(message.apparmor, "apparmor")
    else:
        apparmor = _deprecated_profile(message.apparmor_profile, "apparmor_profile")
    return ContainerSecurity(
        namespaces=_namespaces(message.namespace_options, of_pod=False),
        selinux=_selinux(message.selinux_options) if message.HasField("selinux_options") else None,
        run_as_user=_id(message.run_as_user, "run_as_user") if has_user else None,
        run_as_username=_username(message.run_as_username),
        run_as_group=_id(message.run_as_group, "run_as_group") if message.HasField("run_as_group") else None,
        supplemental_groups=_groups(message.supplemental_groups),
        groups_policy=_enum(_GROUPS, message.supplemental_groups_policy, "supplemental_groups_policy"),
        capabilities=_capabilities(message.capabilities),
        privileged=message.privileged,
        readonly_rootfs=message.readonly_rootfs,
        no_new_privs=message.no_new_privs,
        masked_paths=tuple(_absolute_or_empty(p, "masked_paths") for p in message.masked_paths),
        readonly_paths=tuple(_absolute_or_empty(p, "readonly_paths") for p in message.readonly_paths),
        seccomp=_seccomp(message),
        apparmor=apparmor,
    )


def _username(text: str) -> str:
    if text and not re.fullmatch(r"[A-Za-z0-9_.][A-Za-z0-9_.-]{0,255}\$?", text, re.ASCII):
        raise _refuse(f"{text!r} is not a user name.")
    return text


def _capabilities(message: pb.Capability) -> Capabilities:
    def names(values: Iterable[str]) -> tuple[str, ...]:
        result = []
        for value in values:
            if not _CAPABILITY.fullmatch(value):
                raise _refuse(f"{value!r} is not the name of a capability.")
            result.append(value.upper().removeprefix("CAP_"))
        return tuple(result)

    return Capabilities(
        add=names(message.add_capabilities),
        drop=names(message.drop_capabilities),
        add_ambient=names(message.add_ambient_capabilities),
    )


def _env(message: pb.KeyValue) -> EnvVar:
    if not message.key or "=" in message.key or "\0" in message.key:
        raise _refuse(f"{message.key!r} is not the name of an environment variable.")
    if b"\0" in message.value:
        raise _refuse(f"The value of the environment variable {message.key} holds a NUL byte.")
    return EnvVar(key=message.key, value=message.value)


def _mount(message: pb.Mount) -> Mount:
    path = _absolute_or_empty(message.container_path, "A mount's container_path")
    if not path or posixpath.normpath(path) == "/":
        raise _refuse("A mount needs a container_path below the root.")
    propagation = _enum(_PROPAGATIONS, message.propagation, "A mount's propagation")
    image = None
    if message.HasField("image"):
        if message.host_path:
            raise _refuse("A mount of an image must have no host_path.")
        if not message.readonly:
            raise _refuse("A mount of an image must be readonly.")
        if propagation is not Propagation.PRIVATE:
            raise _refuse("A mount of an image must have private propagation.")
        image = ImageVolume(
            reference=message.image.image,
            sub_path=_sub_path(message.image_sub_path),
            user_specified=message.image.user_specified_image,
        )
    elif not message.host_path:
        raise _refuse(f"The mount at {path} has neither a host_path nor an image.")
    if message.recursive_read_only and not (message.readonly and propagation is Propagation.PRIVATE):
        raise _refuse(f"The mount at {path}: recursive_read_only needs readonly and private propagation.")
    if unknown := set(message.mount_options) - _MOUNT_OPTIONS:
        raise _refuse(f"The mount at {path} has the unknown option {min(unknown)!r}.")
    return Mount(
        container_path=path,
        host_path=_absolute_or_empty(message.host_path, "A mount's host_path"),
        readonly=message.readonly,
        recursive_readonly=message.recursive_read_only,
        selinux_relabel=message.selinux_relabel,
        propagation=propagation,
        uid_mappings=tuple(_id_mapping(m) for m in message.uidMappings),
        gid_mappings=tuple(_id_mapping(m) for m in message.gidMappings),
        image=image,
        options=tuple(message.mount_options),
    )


def _sub_path(path: str) -> str:
    if path.startswith("/") or ".." in path.split("/"):
        raise _refuse("image_sub_path must be relative and must not hold '..'.")
    return _no_nul(path, "image_sub_path")


def _device(message: pb.Device) -> Device:
    if not message.host_path.startswith("/") or ".." in message.host_path.split("/"):
        raise _refuse("A device needs an absolute host_path.")
    if not set(message.permissions) <= set("rwm"):
        raise _refuse(f"The permissions {message.permissions!r} of the device {message.host_path} are not of r, w, m.")
    return Device(
        container_path=_absolute_or_empty(message.container_path, "A device's container_path") or message.host_path,
        host_path=_no_nul(message.host_path, "A device's host_path"),
        permissions=message.permissions or "rwm",
    )


def _cdi(name: str) -> str:
    """A qualified CDI name: vendor.com/class=device (CDI specification 0.6)."""
    if not re.fullmatch(r"[A-Za-z0-9._-]+/[A-Za-z0-9._-]+=[A-Za-z0-9._:-]+", name, re.ASCII):
        raise _refuse(f"{name!r} is not a qualified CDI device name (vendor/class=device).")
    return name


def _cpuset(text: str) -> str:
    if not re.fullmatch(r"([0-9]+(-[0-9]+)?(,[0-9]+(-[0-9]+)?)*)?", text, re.ASCII) or len(text) > 4096:
        raise _refuse(f"{text!r} is not a list of CPUs or memory nodes.")
    return text


def _hugepage(message: pb.HugepageLimit) -> HugepageLimit:
    if not re.fullmatch(r"[0-9]{1,6}[KMG]B", message.page_size, re.ASCII):
        raise _refuse(f"{message.page_size!r} is not a huge page size such as 2MB.")
    return HugepageLimit(page_size=message.page_size, limit_bytes=message.limit)


def _unified_key(key: str) -> str:
    if not re.fullmatch(r"[a-z0-9_]+\.[a-zA-Z0-9_.]+", key, re.ASCII) or ".." in key:
        raise _refuse(f"{key!r} is not the name of a cgroup v2 file.")
    return key
