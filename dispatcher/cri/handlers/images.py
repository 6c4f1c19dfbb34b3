"""The image service: one store behind every runtime."""

from __future__ import annotations

import asyncio
import hashlib
import logging

from dispatcher.api import CanReportFootprint
from dispatcher.cri import api_pb2 as pb
from dispatcher.cri import convert, validate
from dispatcher.deps import Deps
from dispatcher.errors import DispatcherError, InvalidRequest
from dispatcher.model import Credentials, FilesystemUsage, Image
from dispatcher.spans import annotate_call

log = logging.getLogger(__name__)


async def list_images(request: pb.ListImagesRequest, deps: Deps) -> pb.ListImagesResponse:
    """All images, or the one that the filter names."""
    return pb.ListImagesResponse(images=[convert.image(i) for i in select(request.filter, deps)])


def select(wanted: pb.ImageFilter, deps: Deps) -> tuple[Image, ...]:
    """The images that a filter selects."""
    if not wanted.image.image:
        return deps.images.list()
    found = deps.images.find(wanted.image.image)
    return (found,) if found else ()


async def status(request: pb.ImageStatusRequest, deps: Deps) -> pb.ImageStatusResponse:
    """A missing image is no error: the reply then has none."""
    if not request.image.image:
        raise InvalidRequest("The request names no image.")
    found = deps.images.find(request.image.image)
    if found is None:
        return pb.ImageStatusResponse()
    info = None
    if request.verbose:
        info = {"dispatcher": convert.as_json({"id": found.id, "config": found.config})}
    return pb.ImageStatusResponse(image=convert.image(found), info=info)


async def pull(request: pb.PullImageRequest, deps: Deps) -> pb.PullImageResponse:
    """Pull. Equal requests join one pull; it stops when its last client left, and leaves nothing then."""
    if not request.image.image:
        raise InvalidRequest("The request names no image.")
    if request.image.runtime_handler:
        deps.policy.check_handler(request.image.runtime_handler)
    credentials = validate.credentials(request.auth) if request.HasField("auth") else None

    reference = request.image.image
    mark = _credentials_mark(credentials)
    for_pod = request.sandbox_config.metadata  # a kubelet says for which pod it pulls
    annotate_call(
        image=reference,
        namespace=for_pod.namespace,
        pod=for_pod.name,
        uid=for_pod.uid,
        attempt=for_pod.attempt,
    )

    async def make() -> Image:
        return await deps.images.pull(reference, credentials)

    image = await deps.calls.run(("pull", reference, mark), mark, make, None, stop_when_abandoned=True)
    return pb.PullImageResponse(image_ref=image.id)


def _credentials_mark(credentials: Credentials | None) -> str:
    """Pulls with different credentials never join: one client's rights must not fetch for another."""
    if credentials is None:
        return ""
    fields = (getattr(credentials, name) for name in Credentials.__dataclass_fields__)
    return hashlib.sha256("\0".join(fields).encode()).hexdigest()


async def remove(request: pb.RemoveImageRequest, deps: Deps) -> pb.RemoveImageResponse:
    """Remove an image with all of its names. Idempotent."""
    if not request.image.image:
        raise InvalidRequest("The request names no image.")
    await deps.images.remove(request.image.image)
    return pb.RemoveImageResponse()


async def fs_info(request: pb.ImageFsInfoRequest, deps: Deps) -> pb.ImageFsInfoResponse:
    """Disk use. Also the clients' check that the image service lives: it answers for an empty store too."""
    disk, containers = await asyncio.gather(deps.images.disk(), _container_filesystems(deps))
    return pb.ImageFsInfoResponse(
        image_filesystems=[convert.filesystem(f) for f in disk.image_filesystems],
        # The kubelet takes an empty list for a fault; before any runtime has told, the store's own answer stands.
        container_filesystems=[convert.filesystem(f) for f in containers or disk.container_filesystems],
    )


async def _container_filesystems(deps: Deps) -> list[FilesystemUsage]:
    """What writable layers take, by mount point, as the runtimes tell; one that cannot be asked is left out."""
    totals: dict[str, tuple[int, int]] = {}
    for runtime in deps.registry.runtimes():
        if not isinstance(runtime, CanReportFootprint):
            continue
        try:
            usage = await runtime.disk_usage()
        except DispatcherError as error:
            log.warning("no disk usage", extra={"runtime": runtime.name, "cause": error.message})
            continue
        for mountpoint, (used, inodes) in usage.items():
            before = totals.get(mountpoint, (0, 0))
            totals[mountpoint] = (before[0] + used, before[1] + inodes)
    return [
        FilesystemUsage(timestamp_ns=deps.now_ns(), mountpoint=mountpoint, used_bytes=used, inodes_used=inodes)
        for mountpoint, (used, inodes) in sorted(totals.items())
    ]
