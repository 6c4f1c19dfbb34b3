"""The plugin's section of dispatcher.yaml. An unknown key is an error that names the key."""

from __future__ import annotations

import ipaddress
import platform
import re
from pathlib import Path
from typing import Annotated, Literal, Self
from urllib.parse import urlsplit

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from dispatcher_images.hostile import Limits

_HOST = re.compile(r"[A-Za-z0-9.\-]+(:\d{1,5})?|\[[0-9a-fA-F:]+\](:\d{1,5})?")
_MIRRORED = re.compile(r"[A-Za-z0-9.\-\[\]:]+(/[a-z0-9._/\-]+)?")
_ARCHITECTURES = {"x86_64": "amd64", "aarch64": "arm64", "armv7l": "arm/v7", "i686": "386"}

Bytes = Annotated[int, Field(gt=0)]


def host_platform() -> str:
    """The platform of this node as `os/architecture[/variant]`."""
    machine = platform.machine()
    return f"linux/{_ARCHITECTURES.get(machine, machine)}"


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class Mirror(_Section):
    """Another place to pull from. The path of `url` replaces the mirrored prefix.

    Credentials of a pull are for the origin and are not sent here, unless `send_credentials` says so.
    """

    url: str
    send_credentials: bool = False

    @field_validator("url")
    @classmethod
    def _is_a_url(cls, url: str) -> str:
        parts = urlsplit(url)
        if parts.scheme not in {"http", "https"} or not _HOST.fullmatch(parts.netloc):
            raise ValueError(f"{url!r} is no mirror: expected http://HOST[:PORT][/PREFIX] or https://...")
        if parts.query or parts.fragment:
            raise ValueError(f"{url!r} is no mirror: a query makes no sense here")
        return url.rstrip("/")


class Mirrored(_Section):
    """Mirrors of one registry, or of one of its folders; `origin` says whether the registry itself is asked last."""

    mirrors: tuple[Mirror, ...] = ()
    origin: bool = True

    @model_validator(mode="before")
    @classmethod
    def _short_form(cls, value: object) -> object:
        if isinstance(value, list):
            return {"mirrors": tuple({"url": item} if isinstance(item, str) else item for item in value)}
        if isinstance(value, dict) and isinstance(value.get("mirrors"), list):
            mirrors = tuple({"url": item} if isinstance(item, str) else item for item in value["mirrors"])
            return {**value, "mirrors": mirrors}
        return value


class ImagesConfig(_Section):
    """All options, with the defaults that suit a node."""

    # Where blobs, trees and erofs files lie; "" is the plugin's own state folder.
    folder: str = ""
    # Registry, or registry/folder, to its mirrors; the longest match counts.
    mirrors: dict[str, Mirrored] = Field(default_factory=dict)
    # Registries that speak plain HTTP, as HOST or HOST:PORT.
    plain_http: tuple[str, ...] = ()
    # Plain HTTP for 127.0.0.0/8, ::1 and localhost, unless they have a certificate folder.
    plain_http_loopback: bool = True
    # HOST[:PORT]/ below this folder holds ca.crt and, for client certificates, NAME.cert with NAME.key.
    certs_dir: str = "/etc/docker/certs.d"
    # In order of preference; the default is this node's own.
    platforms: tuple[str, ...] = Field(default_factory=lambda: (host_platform(),))
    # References that garbage collection must spare, such as the pause image.
    pinned: tuple[str, ...] = ()

    parallel_downloads: Annotated[int, Field(ge=1, le=64)] = 3
    connect_timeout_s: Annotated[float, Field(gt=0)] = 10.0
    stall_timeout_s: Annotated[float, Field(gt=0)] = 60.0
    attempts: Annotated[int, Field(ge=1, le=20)] = 4
    progress_every_s: Annotated[float, Field(gt=0)] = 10.0
    max_image_bytes: Bytes = 64 << 30

    workers: Annotated[int, Field(ge=1, le=16)] = 2
    worker_deadline_s: Annotated[float, Field(gt=0)] = 1800.0
    max_unpacked_bytes: Bytes = 64 << 30
    max_unpacked_file_bytes: Bytes = 32 << 30
    max_unpacked_files: Bytes = 1_000_000
    max_compression_ratio: Annotated[int, Field(ge=2)] = 300
    max_erofs_bytes: Bytes = 32 << 30
    erofs_compression: Literal["none", "lz4", "lz4hc"] = "none"

    @model_validator(mode="before")
    @classmethod
    def _lists_are_tuples(cls, value: object) -> object:
        # YAML knows lists only; strict mode would refuse them for tuples.
        if not isinstance(value, dict):
            return value
        return {key: tuple(item) if isinstance(item, list) else item for key, item in value.items()}

    @field_validator("mirrors")
    @classmethod
    def _mirrored_names(cls, mirrors: dict[str, Mirrored]) -> dict[str, Mirrored]:
        for name in mirrors:
            if not _MIRRORED.fullmatch(name):
                raise ValueError(f"{name!r} is no registry: expected HOST[:PORT] or HOST[:PORT]/FOLDER")
        return mirrors

    @field_validator("plain_http")
    @classmethod
    def _plain_hosts(cls, hosts: tuple[str, ...]) -> tuple[str, ...]:
        for host in hosts:
            if not _HOST.fullmatch(host):
                raise ValueError(f"{host!r} is no registry: expected HOST or HOST:PORT")
        return hosts

    @field_validator("platforms")
    @classmethod
    def _known_form(cls, platforms: tuple[str, ...]) -> tuple[str, ...]:
        if not platforms or any(not re.fullmatch(r"[a-z0-9]+/[a-z0-9_]+(/[a-z0-9]+)?", item) for item in platforms):
            raise ValueError("expected at least one platform such as linux/amd64")
        return platforms

    @model_validator(mode="after")
    def _folders_are_absolute(self) -> Self:
        for name, value in (("folder", self.folder), ("certs_dir", self.certs_dir)):
            if value and not Path(value).is_absolute():
                raise ValueError(f"{name}: {value!r} is not an absolute path")
        return self

    def limits(self) -> Limits:
        """The bounds for the worker processes."""
        return Limits(
            max_bytes=self.max_unpacked_bytes,
            max_file_bytes=min(self.max_unpacked_file_bytes, self.max_unpacked_bytes),
            max_entries=self.max_unpacked_files,
            max_ratio=self.max_compression_ratio,
            max_cpu_s=max(1, int(self.worker_deadline_s)),
        )


def is_loopback(host: str) -> bool:
    """Whether HOST[:PORT] names this machine itself."""
    name = urlsplit(f"//{host}").hostname or ""
    if name == "localhost":
        return True
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False
