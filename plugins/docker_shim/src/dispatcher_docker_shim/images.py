"""The engine's copies of images of our store. They carry a repository prefix of ours and go with the image."""

from __future__ import annotations

import asyncio
import contextlib
import os
from pathlib import Path

from dispatcher.api import ImageProvider, effect
from dispatcher.errors import RuntimeDown
from dispatcher.model import FilesystemUsage, ImageId
from dispatcher_docker_shim import naming
from dispatcher_docker_shim.docker_client import DockerClient
from dispatcher_docker_shim.errors import EngineConflict, EngineFailed


class EngineImages:
    """Loads images into the engine when a container first needs them. Implements `EngineCopies`."""

    def __init__(self, client: DockerClient, images: ImageProvider, *, repository: str, node_uuid: str) -> None:
        self._client = client
        self.images = images
        self._repository = repository
        self._node_uuid = node_uuid
        self._locks: dict[ImageId, asyncio.Lock] = {}
        self._known: set[ImageId] = set()
        self.root_dir = "/var/lib/docker"

    def tag(self, image_id: ImageId) -> str:
        """The engine's name for the copy. Containers are made from it, whatever id the engine gives the image: with
        the containerd image store that is the digest of a manifest, not of the config.
        """
        return naming.image_tag(self._repository, self._node_uuid, image_id)

    async def ensure(self, image_id: ImageId, *, look_again: bool = False) -> str:
        """Return the tag of the engine's copy, loading it if needed; calls for one image share the work.

        Raises:
            NotFound: our store does not have the image.
            EngineFailed: the engine took the archive but does not have the image.
        """
        tag = self.tag(image_id)
        if image_id in self._known and not look_again:
            return tag
        lock = self._locks.setdefault(image_id, asyncio.Lock())
        try:
            async with lock:
                if await self._client.find_image(tag) is None:
                    await self._load(image_id, tag)
                self._known.add(image_id)
        finally:
            if not lock.locked():
                self._locks.pop(image_id, None)
        return tag

    def forget_all(self) -> None:
        """Look again at the next `ensure`: another engine process may know less."""
        self._known.clear()

    async def forget_image(self, image_id: ImageId) -> None:
        """Remove the engine's copy. Idempotent.

        Raises:
            RuntimeDown: the engine is away, or a container still uses the copy: ask again.
        """
        self._known.discard(image_id)
        try:
            await self._client.remove_image(self.tag(image_id))
        except EngineConflict as error:
            raise RuntimeDown("A container still uses the engine's copy of the image.") from error

    async def copies_disk_usage(self) -> tuple[FilesystemUsage, ...]:
        """Sum of the copies as the engine counts them; layers that two share are counted twice."""
        import time

        rows = await self._client.list_images(naming.image_repository(self._repository, self._node_uuid))
        used = sum(int(row.get("Size") or 0) for row in rows)
        return (FilesystemUsage(timestamp_ns=time.time_ns(), mountpoint=self.root_dir, used_bytes=used, inodes_used=0),)

    async def _load(self, image_id: ImageId, tag: str) -> None:
        archive = await self.images.docker_archive(image_id, tag)
        try:
            await self._client.load(archive)
        finally:
            _unlink(archive)
        if await self._client.find_image(tag) is None:
            raise EngineFailed(f"Docker Engine loaded image {image_id} but does not find it as {tag}")


@effect("docker.unlink_archive")
def _unlink(archive: Path) -> None:
    with contextlib.suppress(FileNotFoundError):
        os.unlink(archive)
