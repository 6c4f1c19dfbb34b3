"""The part of Kubernetes' Pod, ConfigMap and Secret that `play` and `explain` understand.

A field that is missing here is refused by its name: a pod that runs differently from what its manifest says would be
worse. Field names and meanings are Kubernetes'; defaults are those of its API server. Nothing here acts.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator
from pydantic.alias_generators import to_camel

from dispatcher.quantities import milli_cpus, whole_bytes

_LABEL = re.compile(r"[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?", re.ASCII)
_SUBDOMAIN = re.compile(r"[a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*", re.ASCII)
_DATA_KEY = re.compile(r"[-._a-zA-Z0-9]{1,253}", re.ASCII)
_HUGEPAGES = re.compile(r"hugepages-[1-9][0-9]{0,9}([KMG]i)", re.ASCII)
_MAX_ID = 2**31 - 1


def _label(text: str) -> str:
    if _LABEL.fullmatch(text) is None:
        raise ValueError(f"{text[:80]!r} has to be 1 to 63 of a-z, 0-9 and -, and not begin or end with -")
    return text


def _subdomain(text: str) -> str:
    if len(text) > 253 or _SUBDOMAIN.fullmatch(text) is None:
        raise ValueError(
            f"{text[:80]!r} has to be at most 253 of a-z, 0-9, - and ., each part beginning and ending with a-z or 0-9"
        )
    return text


def _data_key(text: str) -> str:
    if _DATA_KEY.fullmatch(text) is None or text in (".", "..") or text.startswith(".."):
        raise ValueError(f"{text[:80]!r} has to be 1 to 253 of a-z, A-Z, 0-9, -, _ and ., and not begin with ..")
    return text


def _relative(path: str) -> str:
    if path.startswith("/") or ".." in path.split("/") or "\0" in path or not path:
        raise ValueError(f"{path[:80]!r} has to be a relative path without ..")
    return path


def _absolute(path: str) -> str:
    if not path.startswith("/") or ".." in path.split("/") or "\0" in path:
        raise ValueError(f"{path[:80]!r} has to be an absolute path without ..")
    return path


def _no_nul(text: str) -> str:
    if "\0" in text:
        raise ValueError("a zero byte is not allowed here")
    return text


def _disk(medium: str) -> str:
    if medium:
        raise ValueError('only "" (the disk) can be had here: nothing mounts a memory file system for a client')
    return medium


def _env_name(text: str) -> str:
    if not text or "=" in text or not text.isprintable() or not text.isascii():
        raise ValueError(f"{text[:80]!r} is no name of an environment variable")
    return text


def _octal(value: Any) -> Any:
    """Read 0644 as the octal number that everybody means; YAML 1.2 leaves it a word."""
    if isinstance(value, str) and re.fullmatch(r"0[0-7]{1,4}", value):
        return int(value, 8)
    return value


def _cpu(value: Any) -> Any:
    return milli_cpus(value) if isinstance(value, str | int | float) and not isinstance(value, bool) else value


def _bytes(value: Any) -> Any:
    return whole_bytes(value) if isinstance(value, str | int | float) and not isinstance(value, bool) else value


Label = Annotated[str, AfterValidator(_label)]
Subdomain = Annotated[str, AfterValidator(_subdomain)]
DataKey = Annotated[str, AfterValidator(_data_key)]
RelativePath = Annotated[str, AfterValidator(_relative)]
AbsolutePath = Annotated[str, AfterValidator(_absolute)]
Argument = Annotated[str, AfterValidator(_no_nul)]
EnvName = Annotated[str, AfterValidator(_env_name)]
FileMode = Annotated[int, BeforeValidator(_octal), Field(ge=0, le=0o777)]
Id = Annotated[int, Field(ge=0, le=_MAX_ID)]
Port = Annotated[int, Field(ge=1, le=65535)]
Count = Annotated[int, Field(ge=0)]
MilliCpus = Annotated[int, BeforeValidator(_cpu)]
Bytes = Annotated[int, BeforeValidator(_bytes)]


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, alias_generator=to_camel, populate_by_name=True)


# ------------------------------------------------------------------------------------------------------------ metadata
class ObjectMeta(_Model):
    """Identity of an object. `uid` may be given, so that a manifest can be played twice as the same pod."""

    name: Subdomain
    namespace: Label = "default"
    uid: Annotated[str, Field(pattern=r"^[-0-9a-zA-Z]{1,64}$")] = ""
    labels: dict[str, str] = {}
    annotations: dict[str, str] = {}
    creation_timestamp: None = None  # `kubectl ... --dry-run=client -o yaml` writes null


# --------------------------------------------------------------------------------------------------------- environment
class KeyRef(_Model):
    """A key of a ConfigMap or Secret of the same file."""

    name: Subdomain
    key: DataKey
    optional: bool = False


class FieldRef(_Model):
    """A fact of the pod. Supported paths are in `dispatcher.manifest.environment`."""

    api_version: Literal["v1"] = "v1"
    field_path: str


class ValueFrom(_Model):
    """Where the value of a variable comes from: exactly one of these."""

    field_ref: FieldRef | None = None
    config_map_key_ref: KeyRef | None = None
    secret_key_ref: KeyRef | None = None

    @model_validator(mode="after")
    def _one(self) -> ValueFrom:
        if len(self.model_fields_set) != 1:
            raise ValueError("exactly one of fieldRef, configMapKeyRef and secretKeyRef is expected")
        return self


class EnvEntry(_Model):
    """One environment variable. `$(NAME)` in the value refers to an earlier one."""

    name: EnvName
    value: Argument = ""
    value_from: ValueFrom | None = None

    @model_validator(mode="after")
    def _one(self) -> EnvEntry:
        if self.value and self.value_from is not None:
            raise ValueError("value and valueFrom exclude each other")
        return self


class MapRef(_Model):
    """A whole ConfigMap or Secret of the same file."""

    name: Subdomain
    optional: bool = False


class EnvFrom(_Model):
    """All keys of a ConfigMap or Secret as variables."""

    prefix: str = ""
    config_map_ref: MapRef | None = None
    secret_ref: MapRef | None = None

    @model_validator(mode="after")
    def _one(self) -> EnvFrom:
        if (self.config_map_ref is None) == (self.secret_ref is None):
            raise ValueError("exactly one of configMapRef and secretRef is expected")
        return self


# ----------------------------------------------------------------------------------------------------------- resources
class ResourceList(_Model):
    """Amounts, already as numbers: `cpu` in thousandths of a CPU, the rest in bytes."""

    cpu: MilliCpus | None = None
    memory: Bytes | None = None
    ephemeral_storage: Annotated[Bytes | None, Field(alias="ephemeral-storage")] = None
    hugepages: dict[str, Bytes] = {}

    @model_validator(mode="before")
    @classmethod
    def _gather_hugepages(cls, value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        pages = {key: amount for key, amount in value.items() if _HUGEPAGES.fullmatch(str(key))}
        rest = {key: amount for key, amount in value.items() if key not in pages}
        if "hugepages" in rest:
            raise ValueError('huge pages are written with their size, such as "hugepages-2Mi"')
        return {**rest, "hugepages": {key.removeprefix("hugepages-"): amount for key, amount in pages.items()}}


class ResourceRequirements(_Model):
    """What a container is promised (requests) and may use at most (limits)."""

    requests: ResourceList = ResourceList()
    limits: ResourceList = ResourceList()

    @model_validator(mode="after")
    def _ordered(self) -> ResourceRequirements:
        for name in ("cpu", "memory"):
            request, limit = getattr(self.requests, name), getattr(self.limits, name)
            if request is not None and limit is not None and request > limit:
                raise ValueError(f"the request of {name} is larger than its limit")
        return self


# ------------------------------------------------------------------------------------------------------------ security
class Profile(_Model):
    """A seccomp or AppArmor profile. `localhostProfile` is needed with type Localhost, and only there."""

    type: Literal["RuntimeDefault", "Unconfined", "Localhost"]
    localhost_profile: str = ""

    @model_validator(mode="after")
    def _named(self) -> Profile:
        if (self.type == "Localhost") != bool(self.localhost_profile):
            raise ValueError("localhostProfile belongs to the type Localhost, and only to it")
        return self


class SELinuxOptions(_Model):
    """Parts of an SELinux label."""

    user: str = ""
    role: str = ""
    type: str = ""
    level: str = ""


class Sysctl(_Model):
    """One kernel parameter of the pod."""

    name: Annotated[
        str, Field(pattern=r"^[a-z0-9]([-_a-z0-9]*[a-z0-9])?([./][a-z0-9]([-_a-z0-9]*[a-z0-9])?)*$", max_length=253)
    ]
    value: str


class PodSecurityContext(_Model):
    """Security settings of all containers; a container's own ones win."""

    run_as_user: Id | None = None
    run_as_group: Id | None = None
    run_as_non_root: bool | None = None
    fs_group: Id | None = None
    supplemental_groups: list[Id] = []
    supplemental_groups_policy: Literal["Merge", "Strict"] = "Merge"
    sysctls: list[Sysctl] = []
    seccomp_profile: Profile | None = None
    app_armor_profile: Profile | None = None
    se_linux_options: Annotated[SELinuxOptions | None, Field(alias="seLinuxOptions")] = None


class CapabilityChanges(_Model):
    """Capabilities without the prefix CAP_; "ALL" is a name too."""

    add: list[Annotated[str, Field(pattern=r"^[A-Za-z_]{1,40}$")]] = []
    drop: list[Annotated[str, Field(pattern=r"^[A-Za-z_]{1,40}$")]] = []


class SecurityContext(_Model):
    """Security settings of one container."""

    privileged: bool = False
    allow_privilege_escalation: bool | None = None
    read_only_root_filesystem: bool = False
    run_as_user: Id | None = None
    run_as_group: Id | None = None
    run_as_non_root: bool | None = None
    capabilities: CapabilityChanges = CapabilityChanges()
    proc_mount: Literal["Default", "Unmasked"] = "Default"
    seccomp_profile: Profile | None = None
    app_armor_profile: Profile | None = None
    se_linux_options: Annotated[SELinuxOptions | None, Field(alias="seLinuxOptions")] = None

    @model_validator(mode="after")
    def _honest(self) -> SecurityContext:
        if self.privileged and self.allow_privilege_escalation is False:
            raise ValueError("a privileged container cannot have allowPrivilegeEscalation: false")
        return self


# ----------------------------------------------------------------------------------------------------------- container
class ContainerPort(_Model):
    """A port that the container listens on."""

    name: str = ""
    container_port: Port
    host_port: Port | None = None
    host_ip: Annotated[str, Field(alias="hostIP")] = ""
    protocol: Literal["TCP", "UDP", "SCTP"] = "TCP"


class VolumeMount(_Model):
    """Where a volume of the pod appears in the container."""

    name: Label
    mount_path: AbsolutePath
    read_only: bool = False
    sub_path: RelativePath | None = None
    mount_propagation: Literal["None", "HostToContainer", "Bidirectional"] = "None"
    recursive_read_only: Literal["Disabled", "IfPossible", "Enabled"] = "Disabled"


class Container(_Model):
    """One container. `restartPolicy: Always` on an init container makes it a sidecar."""

    name: Label
    image: Annotated[str, Field(min_length=1)]
    command: list[Argument] = []
    args: list[Argument] = []
    working_dir: str = ""
    env: list[EnvEntry] = []
    env_from: list[EnvFrom] = []
    ports: list[ContainerPort] = []
    resources: ResourceRequirements = ResourceRequirements()
    volume_mounts: list[VolumeMount] = []
    security_context: SecurityContext = SecurityContext()
    stdin: bool = False
    stdin_once: bool = False
    tty: bool = False
    image_pull_policy: Literal["Always", "IfNotPresent", "Never"] | None = None
    restart_policy: Literal["Always"] | None = None
    termination_message_path: AbsolutePath = "/dev/termination-log"
    termination_message_policy: Literal["File", "FallbackToLogsOnError"] = "File"


# ------------------------------------------------------------------------------------------------------------- volumes
class EmptyDir(_Model):
    """An empty folder that lives as long as the pod."""

    medium: Annotated[str, AfterValidator(_disk)] = ""
    size_limit: Bytes | None = None


class HostPath(_Model):
    """A path of the node."""

    path: AbsolutePath
    type: Literal[
        "", "Directory", "DirectoryOrCreate", "File", "FileOrCreate", "Socket", "CharDevice", "BlockDevice"
    ] = ""


class KeyToPath(_Model):
    """One key of a ConfigMap or Secret as a file."""

    key: DataKey
    path: RelativePath
    mode: FileMode | None = None


class ConfigMapVolume(_Model):
    """A ConfigMap of the same file as a folder."""

    name: Subdomain
    items: list[KeyToPath] = []
    default_mode: FileMode = 0o644
    optional: bool = False


class SecretVolume(_Model):
    """A Secret of the same file as a folder."""

    secret_name: Subdomain
    items: list[KeyToPath] = []
    default_mode: FileMode = 0o644
    optional: bool = False


class Volume(_Model):
    """A volume: its name and exactly one source."""

    name: Label
    empty_dir: EmptyDir | None = None
    host_path: HostPath | None = None
    config_map: ConfigMapVolume | None = None
    secret: SecretVolume | None = None

    @model_validator(mode="after")
    def _one(self) -> Volume:
        sources = [self.empty_dir, self.host_path, self.config_map, self.secret]
        if sum(source is not None for source in sources) != 1:
            raise ValueError("exactly one of emptyDir, hostPath, configMap and secret is expected")
        return self


# ----------------------------------------------------------------------------------------------------------------- pod
class DnsOption(_Model):
    """One resolver option."""

    name: Annotated[str, Field(min_length=1)]
    value: str | None = None


class PodDnsConfig(_Model):
    """Resolver settings that are added to those of the policy."""

    nameservers: list[str] = []
    searches: list[str] = []
    options: list[DnsOption] = []


class PodSpecification(_Model):
    """What a pod consists of."""

    containers: Annotated[list[Container], Field(min_length=1)]
    init_containers: list[Container] = []
    volumes: list[Volume] = []
    restart_policy: Literal["Always", "OnFailure", "Never"] = "Always"
    termination_grace_period_seconds: Count = 30
    dns_policy: Literal["ClusterFirst", "ClusterFirstWithHostNet", "Default", "None"] = "ClusterFirst"
    dns_config: PodDnsConfig = PodDnsConfig()
    host_network: bool = False
    host_pid: Annotated[bool, Field(alias="hostPID")] = False
    host_ipc: Annotated[bool, Field(alias="hostIPC")] = False
    share_process_namespace: bool = False
    hostname: Label | None = None
    runtime_class_name: Subdomain | None = None
    security_context: PodSecurityContext = PodSecurityContext()

    @model_validator(mode="after")
    def _namespaces(self) -> PodSpecification:
        if self.share_process_namespace and self.host_pid:
            raise ValueError("hostPID and shareProcessNamespace exclude each other")
        return self


class Pod(_Model):
    """A Pod document."""

    api_version: Literal["v1"]
    kind: Literal["Pod"]
    metadata: ObjectMeta
    spec: PodSpecification
    status: Annotated[dict[str, Any], Field(max_length=0)] = {}


class ConfigMap(_Model):
    """A ConfigMap document. `binaryData` is base64."""

    api_version: Literal["v1"]
    kind: Literal["ConfigMap"]
    metadata: ObjectMeta
    data: dict[DataKey, str] = {}
    binary_data: dict[DataKey, str] = {}
    immutable: bool = False


class Secret(_Model):
    """A Secret document. `data` is base64, `stringData` is plain and wins."""

    api_version: Literal["v1"]
    kind: Literal["Secret"]
    metadata: ObjectMeta
    type: str = "Opaque"
    data: dict[DataKey, str] = Field(default={}, repr=False)
    string_data: dict[DataKey, str] = Field(default={}, repr=False)
    immutable: bool = False
