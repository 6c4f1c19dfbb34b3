"""The image service: one store behind every runtime."""

from __future__ import annotations

import hashlib

from dispatcher.cri import api_pb2 as pb
from dispatcher.cri import convert, validate
from dispatcher.deps import Deps
from dispatcher.errors import InvalidRequest
from dispatcher.model import Credentials, Image


async def list_images(request: pb.ListImagesRequest, deps: Deps) -> pb.ListImagesResponse:
    """All images, or the one that the filter names."""
    wanted = request.filter.image.image
    if wanted:
        found = deps.images.find(wanted)
        images: tuple[Image, ...] = (found,) if found else ()
    else:
        images = deps.images.list()
    return pb.ListImagesResponse(images=[convert.image(i) for i in images])


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
    disk = await deps.images.disk()
    return pb.ImageFsInfoResponse(
        image_filesystems=[convert.filesystem(f) for f in disk.image_filesystems],
        container_filesystems=[convert.filesystem(f) for f in disk.container_filesystems],
    )
