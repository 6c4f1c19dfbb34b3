"""Looks up what a container needs from the host and the image, before anything is made. Reads only."""

from __future__ import annotations

import asyncio
import json
import os
from pathlib import Path

from dispatcher.api import ContainerRef, ImageProvider
from dispatcher.errors import InvalidRequest
from dispatcher.model import ContainerUser, ImageId, Mount, ProfileType
from dispatcher_docker_shim import host
from dispatcher_docker_shim.container_config import Resolved

_MAX_PROFILE = 1 << 20
_MAX_LINKS = 40
_POD_FILES = ("resolv.conf", "hosts", "hostname")


async def resolve(
    container: ContainerRef, images: ImageProvider, *, image_tag: str, rlimits: dict[str, tuple[int, int]]
) -> Resolved:
    """Look up everything. Raises InvalidRequest naming what is missing or wrong."""
    for device in container.spec.devices:
        if not os.path.exists(device.host_path):
            raise InvalidRequest(f"device {device.host_path} does not exist on this node")
    _check_apparmor(container)
    return Resolved(
        image=image_tag,
        user=await _user(container, images),
        sources=tuple([await _source(container, mount, images) for mount in container.spec.mounts]),
        pod_files=_pod_files(container),
        seccomp_json=await asyncio.to_thread(_seccomp_profile, container),
        rlimits=rlimits,
    )


def _pod_files(container: ContainerRef) -> dict[str, str]:
    """The files that the core wrote for the pod, by their path in the container."""
    if not container.pod.state_dir:
        return {}
    files = {f"/etc/{name}": os.path.join(container.pod.state_dir, name) for name in _POD_FILES}
    return {target: source for target, source in files.items() if os.path.exists(source)}


async def _user(container: ContainerRef, images: ImageProvider) -> ContainerUser:
    security = container.spec.security
    if security.run_as_group is not None and security.run_as_user is None and not security.run_as_username:
        raise InvalidRequest("run_as_group is set without run_as_user or run_as_username")
    return await images.resolve_user(
        container.image_id,
        user=security.run_as_username or container.image.user,
        uid=security.run_as_user,
        gid=security.run_as_group,
        supplemental_groups=security.supplemental_groups,
        policy=security.groups_policy,
    )


async def _source(container: ContainerRef, mount: Mount, images: ImageProvider) -> str:
    """The real host path that a mount shows; symbolic links of the host are followed."""
    if mount.image is None:
        path = os.path.realpath(mount.host_path)
        if not mount.host_path.startswith("/") or not os.path.exists(path):
            raise InvalidRequest(f"host path {mount.host_path!r} of mount {mount.container_path} does not exist")
        return path
    if mount.host_path:
        raise InvalidRequest(f"mount {mount.container_path} names both an image and a host path")
    image_id = ImageId(mount.image.image_id)
    images.lease(container.id, image_id)
    root = await images.unpacked(image_id)
    return str(resolve_in_root(root, mount.image.sub_path)) if mount.image.sub_path else str(root)


def resolve_in_root(root: Path, sub_path: str) -> Path:
    """Follow `sub_path` below `root` as a process with that root would: no link of an image leads out of it.

    Raises:
        InvalidRequest: it does not exist, leaves the root, or loops.
    """
    if ".." in sub_path.split("/"):
        raise InvalidRequest(f"sub path {sub_path!r} of an image volume holds '..'")
    left = [part for part in sub_path.split("/") if part not in ("", ".")]
    done: list[str] = []
    links = 0
    while left:
        part = left.pop(0)
        if part == "..":
            done = done[:-1]
            continue
        path = root.joinpath(*done, part)
        try:
            target = os.readlink(path)
        except OSError:
            if not os.path.lexists(path):
                raise InvalidRequest(f"sub path {sub_path!r} does not exist in the image volume") from None
            done.append(part)
            continue
        links += 1
        if links > _MAX_LINKS:
            raise InvalidRequest(f"sub path {sub_path!r} of an image volume has too many symbolic links")
        if target.startswith("/"):
            done = []
        left = [piece for piece in target.split("/") if piece not in ("", ".")] + left
    return root.joinpath(*done)


def _seccomp_profile(container: ContainerRef) -> str:
    """The text of a localhost profile, "" where none is asked for."""
    profile = container.spec.security.seccomp
    if profile is None or profile.type is not ProfileType.LOCALHOST or container.spec.security.privileged:
        return ""
    path = profile.localhost_ref
    if not os.path.isabs(path):
        raise InvalidRequest(f"seccomp profile {path!r} is not an absolute path")
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        with open(fd, "rb") as file:
            if not Path(f"/proc/self/fd/{fd}").is_file():
                raise InvalidRequest(f"seccomp profile {path} is not a regular file")
            text = file.read(_MAX_PROFILE + 1)
    except OSError as error:
        raise InvalidRequest(f"seccomp profile {path} cannot be read: {error.strerror}") from error
    if len(text) > _MAX_PROFILE:
        raise InvalidRequest(f"seccomp profile {path} is larger than {_MAX_PROFILE} bytes")
    try:
        parsed = json.loads(text)
    except ValueError as error:
        raise InvalidRequest(f"seccomp profile {path} is not JSON") from error
    if not isinstance(parsed, dict):
        raise InvalidRequest(f"seccomp profile {path} is not a JSON object")
    return json.dumps(parsed, separators=(",", ":"))


def _check_apparmor(container: ContainerRef) -> None:
    """Refuse an AppArmor profile that is not loaded now, since the engine would only notice at the start."""
    profile = container.spec.security.apparmor
    if profile is None or profile.type is not ProfileType.LOCALHOST or container.spec.security.privileged:
        return
    loaded = host.apparmor_profiles()
    if loaded is not None and profile.localhost_ref not in loaded:
        raise InvalidRequest(f"AppArmor profile {profile.localhost_ref} is not loaded on this node")
