"""How a container's mounts reach the guest: a pure decision on what a look at the host found.

| way        | for                                                     | how |
|------------|---------------------------------------------------------|-----|
| files      | ConfigMaps, Secrets, tokens, hosts, resolv.conf         | copied over the agent, kept up to date, read-only |
| report     | the termination log                                     | a file in the guest, copied to the host at the exit |
| empty-dir  | the kubelet's emptyDir on disk                          | a sparse file-system image in that folder |
| memory     | the kubelet's emptyDir in memory                        | a tmpfs in the guest, charged to the pod |
| image      | image volumes                                           | the image's erofs file, read-only |
| block      | raw block volumes                                       | plugged in as a disk (see `volumes`) |
| share      | any other folder or file of the host                    | a bind into the pod's 9p export |

Paths of the host are named by the kubelet, from names that users chose: none of them becomes a path in the guest. There
each source has a name made of its kind and a digest, so the containers of a pod share what they share on the node.
"""

from __future__ import annotations

import hashlib
import posixpath
from dataclasses import dataclass
from enum import StrEnum
from typing import Final

from dispatcher.errors import InvalidRequest, NotSupported
from dispatcher.model import Mount, Propagation
from dispatcher_hyper_vm.oci_spec import GuestMount

FILES_LIMIT: Final = 2 << 20  # bytes of one source that travels over the agent
REPORT_LIMIT: Final = 64 << 10
_COPIED: Final = frozenset(f"kubernetes.io~{name}" for name in ("configmap", "secret", "projected", "downward-api"))
_EMPTY_DIR: Final = "kubernetes.io~empty-dir"
_ACCESS: Final = frozenset(("noexec", "exec", "nodev", "dev", "nosuid", "suid"))
_ADVICE: Final = 'route the pod to a runtime that shares the node\'s kernel: "runtime: docker" in the policy file'


class Way(StrEnum):
    """How a source reaches the guest; see the table above."""

    FILES = "files"
    REPORT = "report"
    EMPTY_DIR = "empty-dir"
    MEMORY = "memory"
    IMAGE = "image"
    SHARE = "share"


class Kind(StrEnum):
    """What a host path is."""

    FILE = "file"
    FOLDER = "folder"
    SOCKET = "socket"
    DEVICE = "device"
    OTHER = "other"


@dataclass(frozen=True, slots=True, kw_only=True)
class HostPath:
    """What a look at a mount's source found. `path` is real: no link is left in it.

    `size_bytes` is that of a file or of all files of a small folder, None where it is above the limit. `memory_bytes`
    is the size of the tmpfs that is mounted exactly there, 0 for none.
    """

    path: str
    kind: Kind
    size_bytes: int | None = None
    memory_bytes: int = 0
    mode: int = 0o755
    uid: int = 0
    gid: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedMount:
    """One mount: its way, the name of its source in the guest, where that comes from, and how it is bound."""

    way: Way
    name: str
    host: HostPath | None = None
    image_id: str = ""
    sub_path: str = ""
    readonly: bool = False
    slave: bool = False
    bind: GuestMount


def plan_mount(
    mount: Mount, found: HostPath | None, *, report_path: str = "", allow_share: bool = True
) -> PlannedMount:
    """Decide how one mount reaches the guest. `report_path` is where the container writes its termination message.

    Raises:
        InvalidRequest: a mount that cannot work anywhere.
        NotSupported: one that cannot be honest in a virtual machine.
    """
    _check(mount)
    if mount.image is not None:
        if not mount.readonly:
            raise InvalidRequest(f"image volume {mount.container_path} must be read-only")
        name = _name("img", mount.image.image_id)
        return PlannedMount(
            way=Way.IMAGE,
            name=name,
            image_id=mount.image.image_id,
            sub_path=mount.image.sub_path,
            readonly=True,
            bind=_bind(mount, guest_source(Way.IMAGE, name)),
        )
    if found is None:
        raise InvalidRequest(f"host path {mount.host_path!r} of mount {mount.container_path} does not exist")
    way = _way(mount, found, report_path)
    if way is Way.SHARE:
        _check_share(mount, found, allow_share=allow_share)
    name = _name(way.value, found.path)
    return PlannedMount(
        way=way,
        name=name,
        host=found,
        readonly=mount.readonly,
        slave=mount.propagation is Propagation.HOST_TO_CONTAINER,
        bind=_bind(mount, guest_source(way, name, found.kind)),
    )


def guest_source(way: Way, name: str, kind: Kind = Kind.FOLDER) -> str:
    """The path in the guest of a source. A single file that is copied lies in a folder of its own, as "file"."""
    if way in {Way.FILES, Way.REPORT} and kind is Kind.FILE:
        return f"/run/pod/files/{name}/file"
    folder = {
        Way.FILES: "files",
        Way.REPORT: "files",
        Way.EMPTY_DIR: "vol",
        Way.MEMORY: "vol",
        Way.IMAGE: "vol",
        Way.SHARE: "share",
    }[way]
    return f"/run/pod/{folder}/{name}"


def _way(mount: Mount, found: HostPath, report_path: str) -> Way:
    parts = found.path.split("/")
    if found.kind is Kind.FOLDER:
        if len(parts) > 2 and parts[-2] == _EMPTY_DIR:
            return Way.MEMORY if found.memory_bytes else Way.EMPTY_DIR
        copied = _COPIED & set(parts)
        if copied and mount.readonly and found.size_bytes is not None:
            return Way.FILES
        return Way.SHARE
    if found.kind is Kind.FILE and found.size_bytes is not None:
        if report_path and posixpath.normpath(mount.container_path) == posixpath.normpath(report_path):
            return Way.REPORT
        if mount.readonly or mount.container_path in {"/etc/hosts", "/etc/resolv.conf", "/etc/hostname"}:
            return Way.FILES
    return Way.SHARE


def _check(mount: Mount) -> None:
    target = mount.container_path
    if not target.startswith("/") or "\0" in target or ".." in target.split("/"):
        raise InvalidRequest(f"container path {target!r} of a mount is not an absolute path without '..'")
    if mount.propagation is Propagation.BIDIRECTIONAL:
        raise NotSupported(f"mount {target} asks to propagate to the node, which a guest cannot; {_ADVICE}")
    if mount.uid_mappings or mount.gid_mappings:
        raise NotSupported(f"mount {target} asks for id mapping, which the guest cannot do for it; {_ADVICE}")
    if mount.recursive_readonly and not mount.readonly:
        raise InvalidRequest(f"mount {target} is recursively read-only but not read-only")
    if mount.recursive_readonly and mount.propagation is not Propagation.PRIVATE:
        raise InvalidRequest(f"mount {target} is recursively read-only but not private")
    if not set(mount.options) <= _ACCESS:
        raise InvalidRequest(f"mount {target} has options that are not known")
    if mount.image is not None and mount.host_path:
        raise InvalidRequest(f"mount {target} names both an image and a host path")


def _check_share(mount: Mount, found: HostPath, *, allow_share: bool) -> None:
    if found.kind in {Kind.SOCKET, Kind.DEVICE, Kind.OTHER}:
        raise NotSupported(
            f"mount {mount.container_path}: a {found.kind} of the node cannot be used from inside a virtual machine; "
            f"{_ADVICE}"
        )
    if not allow_share:
        raise NotSupported(
            f"mount {mount.container_path}: host folders are closed to virtual machines "
            f"(plugins.hyper_vm.host_folders: refuse); {_ADVICE}"
        )


def _bind(mount: Mount, source: str) -> GuestMount:
    access = "ro" if mount.readonly else "rw"
    options = ["rbind", access, "rslave" if mount.propagation is Propagation.HOST_TO_CONTAINER else "rprivate"]
    if mount.recursive_readonly:
        options.append("rro")
    options += sorted(set(mount.options))
    return GuestMount(target=posixpath.normpath(mount.container_path), source=source, options=tuple(options))


def _name(kind: str, source: str) -> str:
    return f"{kind}-{hashlib.sha256(source.encode('utf-8', 'surrogateescape')).hexdigest()[:24]}"
