"""The schema of dispatcher.yaml and its loader. Read once, by `app`; elsewhere a value arrives as an argument.

Every key has a default, so that an empty file is a working configuration. A plugin's section under `plugins.<name>` is
opaque here: its schema belongs to the plugin, whose check the registry runs. Errors come all at once, each with file,
line, column and, where a word is close to a known one, a suggestion.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Self
from urllib.parse import urlsplit

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, field_validator, model_validator

from dispatcher.yaml_marks import Document, Problem, YamlError, did_you_mean, load, validate

DEFAULT_PATH = Path("/etc/dispatcher/dispatcher.yaml")
OWN_PLUGINS = ("docker_shim", "hyper_vm", "cni", "images", "vm_sizing", "streaming")


def _absolute(path: Path) -> Path:
    if not path.is_absolute() or ".." in path.parts or "\0" in str(path):
        raise ValueError("must be an absolute path without ..")
    return path


def _loopback(address: str) -> str:
    host, _, port = address.rpartition(":")
    try:
        is_loopback = ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        is_loopback = False
    if not is_loopback or not port.isdigit() or int(port) > 65535:
        raise ValueError("must be a loopback address and a port, such as 127.0.0.1:9477")
    return address


AbsolutePath = Annotated[Path, Field(strict=False), AfterValidator(_absolute)]
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,62}$")]
Seconds = Annotated[float, Field(strict=False, gt=0, le=86_400)]


class _Part(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)


class SocketConfig(_Part):
    """Where the kubelet connects. `mode` is octal as chmod takes it, with a leading zero or in quotes."""

    path: AbsolutePath = Path("/run/dispatcher/cri.sock")
    mode: Annotated[str, Field(pattern=r"^0?[0-7]{3}$")] = "0600"

    @property
    def mode_bits(self) -> int:
        """The mode as a number."""
        return int(self.mode, 8)

    @field_validator("path")
    @classmethod
    def _fits(cls, path: Path) -> Path:
        if len(str(path).encode()) > 107:  # sun_path
            raise ValueError("is longer than the 107 bytes that a socket's path may have")
        return path


class ProvidersConfig(_Part):
    """Which offer is active, by name. Without a name: the only one that the enabled plugins offer."""

    network: Name | None = None
    images: Name | None = None
    sizer: Name | None = None
    streaming: Name | None = None


class RuntimeDeadlines(_Part):
    """Seconds for each method of a runtime. `stop_container` is on top of the grace period."""

    start: Seconds = 30.0
    aclose: Seconds = 10.0
    probe: Seconds = 5.0
    prepare_pod: Seconds = 60.0
    create_pod: Seconds = 120.0
    stop_pod: Seconds = 60.0
    remove_pod: Seconds = 60.0
    create_container: Seconds = 900.0  # the engine's copy of the image is made here
    start_container: Seconds = 60.0
    stop_container: Seconds = 60.0
    remove_container: Seconds = 60.0
    inspect: Seconds = 30.0
    exec: Seconds = 30.0
    attach: Seconds = 30.0
    connect: Seconds = 15.0
    update_resources: Seconds = 30.0
    update_pod_resources: Seconds = 30.0
    stats: Seconds = 10.0
    detailed_stats: Seconds = 30.0
    pod_stats: Seconds = 10.0
    trim_output: Seconds = 10.0
    disk_usage: Seconds = 30.0


class NetworkDeadlines(_Part):
    """Seconds for each method of the network provider: all CNI plugins of one pod together."""

    start: Seconds = 30.0
    aclose: Seconds = 10.0
    add: Seconds = 210.0  # a plugin that hangs is to be killed and named by the provider, long before this
    check: Seconds = 210.0
    delete: Seconds = 210.0
    gc: Seconds = 600.0


class ImageDeadlines(_Part):
    """Seconds for each method of the image provider. A pull is watched by progress within the provider as well."""

    start: Seconds = 60.0
    aclose: Seconds = 15.0
    pull: Seconds = 7200.0
    remove: Seconds = 60.0
    disk: Seconds = 30.0
    oci_dir: Seconds = 600.0
    docker_archive: Seconds = 900.0
    unpacked: Seconds = 1800.0
    sub_path: Seconds = 1800.0
    erofs: Seconds = 1800.0
    resolve_user: Seconds = 900.0


class StreamingDeadlines(_Part):
    """Seconds for each method of the streaming provider."""

    start: Seconds = 10.0
    aclose: Seconds = 10.0


class DeadlinesConfig(_Part):
    """How long a call into a plugin may take. What takes longer is cancelled and counts as down, to be retried."""

    runtime: RuntimeDeadlines = RuntimeDeadlines()
    network: NetworkDeadlines = NetworkDeadlines()
    images: ImageDeadlines = ImageDeadlines()
    streaming: StreamingDeadlines = StreamingDeadlines()


class HooksConfig(_Part):
    """Limits of routing hooks of plugins."""

    time_limit_s: Seconds = 0.25
    failures_before_disabled: Annotated[int, Field(ge=1, le=1000)] = 3


class LoggingConfig(_Part):
    """The daemon's own log, on standard error."""

    level: Literal["debug", "info", "warning", "error"] = "info"
    format: Literal["auto", "json", "text"] = "auto"


class MetricsConfig(_Part):
    """Prometheus metrics and health pages over HTTP, on loopback. `enabled: false` opens no port."""

    enabled: bool = True
    listen: Annotated[str, AfterValidator(_loopback)] = "127.0.0.1:9477"

    @property
    def host(self) -> str:
        """The address to listen on."""
        return self.listen.rpartition(":")[0].strip("[]")

    @property
    def port(self) -> int:
        """The port to listen on; 0 for any."""
        return int(self.listen.rpartition(":")[2])


def _collector(address: str) -> str:
    parts = urlsplit(address)
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.username or parts.query or parts.fragment:
        raise ValueError("must be the address of an OTLP collector, such as http://127.0.0.1:4318/v1/traces")
    return address


class TracingConfig(_Part):
    """Where the time of calls goes. `keep` starts of pods are kept for `dispatcher trace`; 0 turns it off.

    With `otlp_endpoint`, calls of all kinds are sent to an OpenTelemetry collector over HTTP, `sample_ratio` of them.
    """

    keep: Annotated[int, Field(ge=0, le=10_000)] = 512
    otlp_endpoint: Annotated[str, AfterValidator(_collector)] | None = None
    sample_ratio: Annotated[float, Field(strict=False, ge=0, le=1)] = 1.0


class HealthConfig(_Part):
    """How runtimes are watched, and when the node is reported as not ready because of one."""

    probe_interval_s: Seconds = 5.0
    required_grace_s: Annotated[float, Field(strict=False, ge=0, le=86_400)] = 60.0


class PluginsConfig(BaseModel):
    """Which plugins are loaded, in this order, and the section of each under its name."""

    model_config = ConfigDict(strict=True, extra="allow", frozen=True)

    enabled: tuple[Name, ...] = OWN_PLUGINS

    @field_validator("enabled")
    @classmethod
    def _once(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"{', '.join(twice)} stands there more than once")
        return names

    def section(self, name: str) -> Mapping[str, Any]:
        """Return the section of a plugin, empty where the file has none."""
        found = (self.model_extra or {}).get(name)
        return found if isinstance(found, dict) else {}


class Config(_Part):
    """dispatcher.yaml.

    `required_runtimes` of None means: the one of the policy's default route. `abandoned_call_s` is how long the result
    of a call, whose client went away, waits for the retry.
    """

    socket: SocketConfig = SocketConfig()
    state_dir: AbsolutePath = Path("/var/lib/dispatcher")
    run_dir: AbsolutePath = Path("/run/dispatcher")
    policy: AbsolutePath = Path("/etc/dispatcher/policy.yaml")
    plugins: PluginsConfig = PluginsConfig()
    providers: ProvidersConfig = ProvidersConfig()
    required_runtimes: tuple[Name, ...] | None = None
    cgroup_driver: Literal["auto", "cgroupfs", "systemd"] = "auto"
    deadlines: DeadlinesConfig = DeadlinesConfig()
    health: HealthConfig = HealthConfig()
    hooks: HooksConfig = HooksConfig()
    abandoned_call_s: Seconds = 600.0
    metrics: MetricsConfig = MetricsConfig()
    tracing: TracingConfig = TracingConfig()
    logging: LoggingConfig = LoggingConfig()

    @model_validator(mode="after")
    def _apart(self) -> Self:
        if self.state_dir == self.run_dir:
            raise ValueError("state_dir and run_dir must differ: one survives a reboot, the other must not")
        return self


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadedConfig:
    """A configuration with the document that it came from, for errors that plugins find later."""

    config: Config
    document: Document


def parse_config(text: str | bytes, file: str) -> LoadedConfig:
    """Check the text of a dispatcher.yaml. `file` is for messages.

    Raises:
        YamlError: everything that is wrong, except within the sections of plugins.
    """
    document = load(text, file)
    config = validate(document, Config)
    _check_sections(config, document)
    return LoadedConfig(config=config, document=document)


def load_config(path: Path) -> LoadedConfig:
    """Read and check a dispatcher.yaml.

    Raises:
        YamlError: the file cannot be read, or something in it is wrong.
    """
    try:
        text = path.read_bytes()
    except OSError as error:
        raise YamlError([Problem(str(path), 1, 1, f"cannot be read: {error.strerror}")]) from error
    return parse_config(text, str(path))


def _check_sections(config: Config, document: Document) -> None:
    """A section is a mapping and belongs to a plugin that is enabled or known: else its name is a slip of the pen."""
    problems = []
    known = {*config.plugins.enabled, *OWN_PLUGINS}
    for name, section in (config.plugins.model_extra or {}).items():
        path = ("plugins", name)
        if name not in known:
            hint = did_you_mean(name, {"enabled", *known})
            problems.append(document.problem(path, f"there is no enabled plugin of this name.{hint}", key=True))
        elif section is not None and not isinstance(section, dict):
            problems.append(document.problem(path, "should be a mapping"))
    if problems:
        raise YamlError(problems)
