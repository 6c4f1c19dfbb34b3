"""What is made from an image for runtimes: its tree, its erofs file, archives, layouts, account files.

Each is made once for all who ask at the same time, in `tmp/`, by a worker, and moved into place when it is whole and
durable. While a thing is being made the image is leased, so that a removal meanwhile waits.
"""

from __future__ import annotations

import asyncio
import base64
import json
import logging
import os
import shutil
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

from dispatcher.api import effect
from dispatcher.errors import InvalidRequest, NotSupported
from dispatcher.model import ImageId
from dispatcher_images.config import ImagesConfig
from dispatcher_images.content import Content, disk_full_is_out_of_resources, remove, sync_file
from dispatcher_images.exec import Workers, refuse
from dispatcher_images.flights import Flights
from dispatcher_images.hostile import BadImage
from dispatcher_images.rootfs import read_in_root
from dispatcher_images.store import ImageStore
from dispatcher_images.uninterrupted import finish, in_thread
from dispatcher_images.users import AccountFiles

log = logging.getLogger(__name__)

T = TypeVar("T")
_MAX_CACHED_ACCOUNTS = 256


class Deriver:
    """Makes and keeps derived things. Raises NotFound for an image that is not in the store."""

    def __init__(self, config: ImagesConfig, store: ImageStore, workers: Workers) -> None:
        self._config = config
        self._store = store
        self._content: Content = store.content
        self._workers = workers
        self._limits = asdict(config.limits())
        self._paths: Flights[Path] = Flights()
        self._account_flights: Flights[AccountFiles] = Flights()
        self._accounts: dict[ImageId, AccountFiles] = {}

    async def aclose(self) -> None:
        """Stop what is being made."""
        await self._paths.aclose()
        await self._account_flights.aclose()

    async def oci_dir(self, image_id: ImageId) -> Path:
        """See `ImageProvider.oci_dir`."""
        stored = self._store.stored(image_id)
        descriptor = stored.manifest_descriptor
        index = {
            "schemaVersion": 2,
            "mediaType": "application/vnd.oci.image.index.v1+json",
            "manifests": [
                {
                    "mediaType": descriptor.media_type,
                    "digest": descriptor.digest,
                    "size": descriptor.size,
                    "annotations": {"org.opencontainers.image.ref.name": image_id.removeprefix("sha256:")},
                }
            ],
        }

        async def make() -> Path:
            async with self._store.changing:
                self._store.stored(image_id)
                return await in_thread(self._content.make_layout, image_id, json.dumps(index).encode(), stored.digests)

        async with self._leased(image_id, "layout"):
            return await finish(make())

    async def docker_archive(self, image_id: ImageId, repo_tag: str) -> Path:
        """See `ImageProvider.docker_archive`."""
        target = self._content.scratch_file(".tar")
        job = {
            "config": str(self._content.blob(image_id)),
            "config_digest": image_id,
            "target": str(target),
            "repo_tag": repo_tag,
        }
        try:
            await self._run("archive", image_id, job)
        except BaseException:
            remove(target)
            raise
        return target

    async def unpacked(self, image_id: ImageId) -> Path:
        """See `ImageProvider.unpacked`."""
        if self._store.has_tree(image_id):
            return self._content.tree(image_id)
        return await self._paths.join(f"tree {image_id}", lambda: self._unpack(image_id))

    async def erofs(self, image_id: ImageId) -> Path:
        """See `ImageProvider.erofs`."""
        if self._store.has_erofs(image_id):
            return self._content.erofs(image_id)
        return await self._paths.join(f"erofs {image_id}", lambda: self._make_erofs(image_id))

    async def accounts(self, image_id: ImageId) -> AccountFiles:
        """The image's passwd and group files, read from its layers without unpacking; cached."""
        known = self._accounts.get(image_id)
        if known is None:
            known = await self._account_flights.join(image_id, lambda: self._read_accounts(image_id))
            if len(self._accounts) >= _MAX_CACHED_ACCOUNTS:
                self._accounts.clear()
            self._accounts[image_id] = known
        return known

    def forget(self, image_id: ImageId) -> None:
        """The image is gone."""
        self._accounts.pop(image_id, None)

    # ------------------------------------------------------------------------------------------------------ making
    async def _unpack(self, image_id: ImageId) -> Path:
        async def make(scratch: Path) -> Path:
            reply = await self._unpack_into(image_id, scratch)

            async def keep() -> Path:
                async with self._store.changing:
                    self._store.stored(image_id)
                    await in_thread(self._content.keep, scratch / "fs", self._content.tree(image_id))
                    await self._store.add_tree(image_id, int(reply["bytes"]), int(reply["inodes"]))
                return self._content.tree(image_id)

            return await finish(keep())

        async with self._leased(image_id, "unpack"):
            return await self._in_scratch(make)

    async def _unpack_into(self, image_id: ImageId, scratch: Path) -> dict[str, Any]:
        _make_root(scratch / "fs")
        reply = await self._run("unpack", image_id, {"target": str(scratch / "fs")})
        if reply["skipped"]:
            log.warning("unpacked %s without what is never made from an image: %s", image_id, reply["skipped"])
        return reply

    async def _make_erofs(self, image_id: ImageId) -> Path:
        program = shutil.which("mkfs.erofs")
        if program is None:
            raise NotSupported("Virtual machines need mkfs.erofs to read images: install the package erofs-utils.")

        async def make(scratch: Path) -> Path:
            tree = self._content.tree(image_id)
            if not self._store.has_tree(image_id):
                await self._unpack_into(image_id, scratch)
                tree = scratch / "fs"
            made = scratch / "image.erofs"
            compression = [] if self._config.erofs_compression == "none" else [f"-z{self._config.erofs_compression}"]
            limits = {**self._limits, "max_file_bytes": self._config.max_erofs_bytes, "max_memory_bytes": 4 << 30}
            argv = [program, "--quiet", *compression, str(made), str(tree)]
            job = {"job": "program", "program": program, "argv": argv, "limits": limits}
            await self._workers.run(job)
            with disk_full_is_out_of_resources():
                digest = await in_thread(sync_file, made)

            async def keep() -> Path:
                async with self._store.changing:
                    self._store.stored(image_id)
                    size = made.stat().st_size
                    await in_thread(self._content.keep, made, self._content.erofs(image_id))
                    await self._store.add_erofs(image_id, digest, size)
                return self._content.erofs(image_id)

            return await finish(keep())

        async with self._leased(image_id, "erofs"):
            return await self._in_scratch(make)

    async def _read_accounts(self, image_id: ImageId) -> AccountFiles:
        reply = await self._run("accounts", image_id, {})
        if reply.get("indirect"):
            async with self._leased(image_id, "accounts"):
                return await asyncio.to_thread(self._accounts_in, await self.unpacked(image_id))
        files = {name: base64.b64decode(content) for name, content in reply.items()}
        return AccountFiles(passwd=files.get("passwd", b""), group=files.get("group", b""))

    def _accounts_in(self, tree: Path) -> AccountFiles:
        limit = self._config.limits().max_account_bytes
        return AccountFiles(
            passwd=read_in_root(tree, "etc/passwd", limit), group=read_in_root(tree, "etc/group", limit)
        )

    # ------------------------------------------------------------------------------------------------------ common
    async def _run(self, job: str, image_id: ImageId, details: dict[str, Any]) -> dict[str, Any]:
        stored = self._store.stored(image_id)
        layers = [
            {"path": str(self._content.blob(layer.digest)), "diff_id": diff_id}
            for layer, diff_id in zip(stored.manifest.layers, stored.file.diff_ids, strict=True)
        ]

        async def work(scratch: Path) -> dict[str, Any]:
            return await self._workers.run(
                {"job": job, "layers": layers, "limits": self._limits, "empty": str(scratch), **details}
            )

        async with self._leased(image_id, job):
            try:
                return await self._in_scratch(work)
            except BadImage as error:
                raise refuse(image_id, error) from error

    async def _in_scratch(self, work: Callable[[Path], Awaitable[T]]) -> T:
        """Run `work` with a fresh folder; removing what it leaves may take long and happens in a thread."""
        context = self._content.scratch()
        scratch = context.__enter__()
        try:
            return await work(scratch)
        finally:
            await in_thread(context.__exit__, None, None, None)

    @asynccontextmanager
    async def _leased(self, image_id: ImageId, what: str) -> AsyncIterator[None]:
        """Keep the image while something is made from it; the holder's name cannot be a container's."""
        holder = f"making {what} {image_id} {os.urandom(4).hex()}"
        self._store.lease(holder, image_id)
        try:
            yield
        finally:
            for free in self._store.release(holder):
                await self._store.reclaim(free)


@effect("images.make_root")
def _make_root(path: Path) -> None:
    path.mkdir(mode=0o755)


def check_repo_tag(repo_tag: str) -> None:
    """A name for an engine's copy is ours, but a mistake must not become an odd name. Raises InvalidRequest."""
    name, colon, tag = repo_tag.rpartition(":")
    allowed = set("abcdefghijklmnopqrstuvwxyz0123456789._-/")
    if not colon or not name or not tag or not set(repo_tag) <= allowed | {":"}:
        raise InvalidRequest(f"{repo_tag!r} is no name for an image in an engine.")
