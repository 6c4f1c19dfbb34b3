"""Looks up what a container needs from the host and the image, before anything is made. Reads only."""

from __future__ import annotations

import asyncio
import json
import os

from dispatcher.api import ContainerRef, ImageProvider
from dispatcher.api.containers import first_user, pod_files, read_seccomp_profile
from dispatcher.errors import InvalidRequest
from dispatcher.model import ImageId, Mount, ProfileType
from dispatcher_docker_shim import host
from dispatcher_docker_shim.container_config import Resolved


async def resolve(
    container: ContainerRef, images: ImageProvider, *, image_tag: str, rlimits: dict[str, tuple[int, int]]
) -> Resolved:
    """Look up everything. Raises InvalidRequest naming what is missing or wrong."""
    for device in container.spec.devices:
        if not os.path.exists(device.host_path):
            raise InvalidRequest(f"device {device.host_path} does not exist on this node")
    _check_apparmor(container)
    profile = await asyncio.to_thread(read_seccomp_profile, container)
    return Resolved(
        image=image_tag,
        user=await first_user(container, images),
        sources=tuple([await _source(container, mount, images) for mount in container.spec.mounts]),
        pod_files=pod_files(container),
        seccomp_json="" if profile is None else json.dumps(profile, separators=(",", ":")),
        rlimits=rlimits,
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
    return str(await images.sub_path(image_id, mount.image.sub_path))


def _check_apparmor(container: ContainerRef) -> None:
    """Refuse an AppArmor profile that is not loaded now, since the engine would only notice at the start."""
    profile = container.spec.security.apparmor
    if profile is None or profile.type is not ProfileType.LOCALHOST or container.spec.security.privileged:
        return
    loaded = host.apparmor_profiles()
    if loaded is not None and profile.localhost_ref not in loaded:
        raise InvalidRequest(f"AppArmor profile {profile.localhost_ref} is not loaded on this node")
