"""Images as every runtime sees them. Everything in an image's config is attacker-written."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from dispatcher.model.ids import ImageId


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageConfig:
    """The runtime part of an OCI image config. `user` is the raw string; see `ImageProvider.resolve_user`."""

    entrypoint: tuple[str, ...] = ()
    cmd: tuple[str, ...] = ()
    env: tuple[str, ...] = ()
    working_dir: str = ""
    user: str = ""
    stop_signal: str = ""
    volumes: tuple[str, ...] = ()
    labels: Mapping[str, str] = field(default_factory=dict)
    annotations: Mapping[str, str] = field(default_factory=dict)
    architecture: str = ""
    os: str = "linux"


@dataclass(frozen=True, slots=True, kw_only=True)
class Image:
    """An image of the store. Tags and digests are sorted, so equal images compare and serialise equal.

    `uid` is set when the image's user is numeric, else `username` holds it; neither when it names none.
    """

    id: ImageId
    repo_tags: tuple[str, ...]
    repo_digests: tuple[str, ...]
    size_bytes: int
    config: ImageConfig
    pinned: bool = False
    uid: int | None = None
    username: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Credentials:
    """How to authenticate against a registry. Never logged; the repr hides every secret."""

    username: str = field(default="", repr=False)
    password: str = field(default="", repr=False)
    auth: str = field(default="", repr=False)
    server_address: str = ""
    identity_token: str = field(default="", repr=False)
    registry_token: str = field(default="", repr=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class FilesystemUsage:
    """Disk use below one mount point. `timestamp_ns` is when it was measured."""

    timestamp_ns: int
    mountpoint: str
    used_bytes: int
    inodes_used: int
