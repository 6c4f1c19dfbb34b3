"""What a container asks for: the validated, typed form of CRI's ContainerConfig."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import ClassVar

from dispatcher.model.resources import Resources
from dispatcher.model.security import ContainerSecurity, IdMapping


class Propagation(StrEnum):
    """Mount propagation between host and container."""

    PRIVATE = "private"
    HOST_TO_CONTAINER = "host-to-container"
    BIDIRECTIONAL = "bidirectional"


@dataclass(frozen=True, slots=True, kw_only=True)
class ContainerMetadata:
    """Kubernetes identity of a container within its sandbox."""

    name: str
    attempt: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class EnvVar:
    """An environment variable. The value is bytes since CRI 1.37 and need not be UTF-8."""

    __pydantic_config__: ClassVar[dict[str, str]] = {"ser_json_bytes": "base64", "val_json_bytes": "base64"}

    key: str
    value: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageVolume:
    """An OCI image mounted read-only as a volume. `reference` is as received, `image_id` as resolved."""

    reference: str
    image_id: str = ""
    sub_path: str = ""
    user_specified: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Mount:
    """A mount of the container: of a host path, or of an image when `image` is set (then host_path is "")."""

    container_path: str
    host_path: str = ""
    readonly: bool = False
    recursive_readonly: bool = False
    selinux_relabel: bool = False
    propagation: Propagation = Propagation.PRIVATE
    uid_mappings: tuple[IdMapping, ...] = ()
    gid_mappings: tuple[IdMapping, ...] = ()
    image: ImageVolume | None = None
    options: tuple[str, ...] = ()  # of the allow-list noexec, exec, nodev, dev, nosuid, suid


@dataclass(frozen=True, slots=True, kw_only=True)
class Device:
    """A host device; `host_path` may be a directory. `permissions` is a subset of "rwm"."""

    container_path: str
    host_path: str
    permissions: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ContainerSpec:
    """A container as asked for.

    `image_ref` is what the request named (the kubelet sends Image.id), `user_image` what the user wrote.
    `log_path` is relative to the pod's log directory, or "" for no log. `stop_signal` is a signal name such as
    "SIGTERM", or "" for the image's or SIGTERM.
    """

    metadata: ContainerMetadata
    image_ref: str
    user_image: str = ""
    command: tuple[str, ...] = ()
    args: tuple[str, ...] = ()
    working_dir: str = ""
    envs: tuple[EnvVar, ...] = ()
    mounts: tuple[Mount, ...] = ()
    devices: tuple[Device, ...] = ()
    cdi_devices: tuple[str, ...] = ()
    labels: Mapping[str, str] = field(default_factory=dict)
    annotations: Mapping[str, str] = field(default_factory=dict)
    log_path: str = ""
    stdin: bool = False
    stdin_once: bool = False
    tty: bool = False
    stop_signal: str = ""
    resources: Resources | None = None
    security: ContainerSecurity = field(default_factory=ContainerSecurity)
