"""The image provider: one content-addressed store behind every runtime. Orchestration only."""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

from dispatcher.api import EngineCopies, ImageDisk, Services
from dispatcher.errors import DispatcherError
from dispatcher.model import ContainerUser, Credentials, FilesystemUsage, GroupsPolicy, Image, ImageId
from dispatcher_images import users
from dispatcher_images.config import ImagesConfig
from dispatcher_images.content import Content
from dispatcher_images.derive import Deriver, check_repo_tag
from dispatcher_images.exec import Workers
from dispatcher_images.index import Index
from dispatcher_images.pull import Puller, PullProgress
from dispatcher_images.registry_client import RegistryClient
from dispatcher_images.rootfs import resolve_in_root
from dispatcher_images.store import ImageStore
from dispatcher_images.uninterrupted import in_thread

log = logging.getLogger(__name__)

_FORGET_RETRY_S = 60.0
_ENGINE_DEADLINE_S = 60.0


class OciImages:
    """Implements `dispatcher.api.ImageProvider`; see there for the contract of each method.

    Beyond it: `pulls` and `on_progress` show pulls in progress, `erofs_digest` the digest recorded for an erofs file,
    `sub_path` a safe path inside an unpacked image.
    """

    def __init__(self, config: ImagesConfig, services: Services) -> None:
        self._config = config
        self._services = services
        self._folder = Path(config.folder) if config.folder else services.state_dir
        content = Content(self._folder)
        self._workers = Workers(config.workers, config.worker_deadline_s)
        self._index = Index(self._folder / "index.db")
        self._store = ImageStore(content, self._index, config.pinned)
        self._client = RegistryClient(config)
        self._puller = Puller(config, self._store, self._client, self._workers)
        self._puller.listeners.append(self._count)
        self._deriver = Deriver(config, self._store, self._workers)
        self._engines: list[EngineCopies] = []
        self._tasks: set[asyncio.Task[None]] = set()
        self._forgetting = asyncio.Event()
        self._store.on_gone = self._gone

    def _count(self, progress: PullProgress) -> None:
        if progress.stage == "complete":
            self._services.observe("image.bytes", progress.total_bytes, {})

    @property
    def name(self) -> str:
        """The provider's name."""
        return "oci"

    # ------------------------------------------------------------------------------------------------- life cycle
    async def start(self, leases: tuple[tuple[str, ImageId], ...]) -> None:
        """Open the store and sweep what a crash left."""
        await self._store.open(leases)
        if self._index.set_aside is not None:
            self._services.notify(
                "ImageIndexUnreadable", f"Images are pulled anew; the old index is {self._index.set_aside}."
            )
        self._spawn(self._forget_for_ever())
        self._spawn(in_thread(self._store.content.empty_garbage))

    async def aclose(self) -> None:
        """Stop pulls and workers, then close the store."""
        for task in [*self._tasks]:
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks)
        await self._puller.aclose()
        await self._deriver.aclose()
        await self._client.aclose()
        await self._store.close()

    # ----------------------------------------------------------------------------------------------------- images
    async def pull(self, reference: str, credentials: Credentials | None) -> Image:
        """Pull and return the image."""
        return await self._puller.pull(reference, credentials)

    def pulls(self) -> tuple[PullProgress, ...]:
        """Every pull in progress."""
        return self._puller.pulls()

    def on_progress(self, listener: Callable[[PullProgress], None]) -> None:
        """Have `listener` called, on the loop, whenever a pull gets on, ends or fails."""
        self._puller.listeners.append(listener)

    def list(self) -> tuple[Image, ...]:
        """All visible images, by id."""
        return self._store.list()

    def find(self, reference: str) -> Image | None:
        """Find by any kind of reference."""
        return self._store.find(reference)

    async def remove(self, reference: str) -> None:
        """Remove the image with all of its names."""
        await self._store.remove(reference)

    def get(self, image_id: ImageId) -> Image:
        """The image, visible or hidden."""
        return self._store.get(image_id)

    # ----------------------------------------------------------------------------------------------------- leases
    def lease(self, holder: str, image_id: ImageId) -> None:
        """Keep the image's content for `holder`."""
        self._store.lease(holder, image_id)

    def release(self, holder: str) -> None:
        """Drop all leases of `holder`; what nobody needs any more is reclaimed in the background."""
        for image_id in self._store.release(holder):
            self._spawn(self._store.reclaim(image_id))

    # ------------------------------------------------------------------------------------------------------- disk
    async def disk(self) -> ImageDisk:
        """Measure. Engine copies on the store's own disk count with it, as the kubelet reads one figure only."""
        used, inodes = await self._store.usage()
        mountpoint = str(self._folder)
        device = os.stat(self._folder).st_dev
        elsewhere: list[FilesystemUsage] = []
        for engine in self._engines:
            for usage in await self._copies(engine):
                if _device(usage.mountpoint) == device:
                    used += usage.used_bytes
                    inodes += usage.inodes_used
                else:
                    elsewhere.append(usage)
        now = self._services.now_ns()
        store = FilesystemUsage(timestamp_ns=now, mountpoint=mountpoint, used_bytes=used, inodes_used=inodes)
        # Writable layers are the runtimes' to report. An empty list would leave the kubelet's eviction blind, so the
        # disk of the store stands for them until a runtime reports its own.
        layers = FilesystemUsage(timestamp_ns=now, mountpoint=mountpoint, used_bytes=0, inodes_used=0)
        return ImageDisk(image_filesystems=(store, *elsewhere), container_filesystems=(layers,))

    def add_engine(self, copies: EngineCopies) -> None:
        """Register a runtime that keeps copies of its own."""
        self._engines.append(copies)
        self._forgetting.set()

    # ---------------------------------------------------------------------------------------------- for runtimes
    async def oci_dir(self, image_id: ImageId) -> Path:
        """An OCI image layout folder with this one image, as hard links. Never to be written to."""
        return await self._deriver.oci_dir(image_id)

    async def docker_archive(self, image_id: ImageId, repo_tag: str) -> Path:
        """A tar that `docker load` takes. The caller unlinks it; a crash leaves it to the next start's sweep."""
        check_repo_tag(repo_tag)
        return await self._deriver.docker_archive(image_id, repo_tag)

    async def unpacked(self, image_id: ImageId) -> Path:
        """The image's root file system as a folder, never to be written to."""
        return await self._deriver.unpacked(image_id)

    async def sub_path(self, image_id: ImageId, path: str) -> Path:
        """A path inside the unpacked image, links resolved with the image as root. Raises InvalidRequest."""
        return await asyncio.to_thread(resolve_in_root, await self.unpacked(image_id), path)

    async def erofs(self, image_id: ImageId) -> Path:
        """The image's root file system as one erofs file."""
        return await self._deriver.erofs(image_id)

    def erofs_digest(self, image_id: ImageId) -> str:
        """The digest that the image's erofs file had when it was made. Raises NotFound."""
        return self._store.erofs_digest(image_id)

    async def resolve_user(
        self,
        image_id: ImageId,
        *,
        user: str,
        uid: int | None,
        gid: int | None,
        supplemental_groups: tuple[int, ...],
        policy: GroupsPolicy,
    ) -> ContainerUser:
        """Work out the ids of a container's first process from the image's own account files."""
        files = await self._deriver.accounts(image_id)
        return users.resolve_user(
            files, user=user, uid=uid, gid=gid, supplemental_groups=supplemental_groups, policy=policy
        )

    # ---------------------------------------------------------------------------------------------------- engines
    def _gone(self, image_id: ImageId) -> None:
        self._deriver.forget(image_id)
        self._forgetting.set()

    async def _forget_for_ever(self) -> None:
        """Have engines drop copies of images that are gone; those that are away are asked again."""
        while True:
            try:
                # Without an engine there is nobody to tell, now or at an interval.
                delay = _FORGET_RETRY_S if self._store.to_forget and self._engines else None
                async with asyncio.timeout(delay):
                    await self._forgetting.wait()
            except TimeoutError:
                pass
            self._forgetting.clear()
            for image_id in [*self._store.to_forget]:
                if self._engines and await self._forget(image_id):
                    await self._store.forgotten(image_id)

    async def _forget(self, image_id: ImageId) -> bool:
        has_all = True
        for engine in self._engines:
            if self._store.contains(image_id):
                return False  # pulled again meanwhile
            try:
                async with asyncio.timeout(_ENGINE_DEADLINE_S):
                    await engine.forget_image(image_id)
            except (DispatcherError, TimeoutError) as error:
                log.warning("an engine keeps its copy of %s for now: %s", image_id, error)
                has_all = False
            except Exception:
                log.exception("an engine failed to drop its copy of %s", image_id)
                has_all = False
        return has_all

    async def _copies(self, engine: EngineCopies) -> tuple[FilesystemUsage, ...]:
        try:
            async with asyncio.timeout(_ENGINE_DEADLINE_S):
                return await engine.copies_disk_usage()
        except (DispatcherError, TimeoutError) as error:
            log.warning("an engine does not say what its image copies take: %s", error)
            return ()

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._done)

    def _done(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("a background task of the image store failed", exc_info=error)


def _device(path: str) -> int:
    try:
        return os.stat(path).st_dev
    except OSError:
        return -1
