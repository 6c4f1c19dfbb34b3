"""The image store: which images there are, under which names, who needs them, and what may go.

Theory of operation. All look-ups are answered from memory; the index and the files follow it under one lock
(`changing`), so that reclaiming and pulling never cross: a pull pins its digests before it asks what is missing, and
reclaiming looks at pins, leases and other images in the same breath as it unlinks. An image is *visible* (listed),
*hidden* (removed, but leased) or gone.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections import Counter
from collections.abc import AsyncIterator, Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field

from dispatcher.errors import InvalidRequest, NotFound, PullFailed
from dispatcher.model import Image, ImageId
from dispatcher_images import manifest as manifests
from dispatcher_images import reference as references
from dispatcher_images.content import Content
from dispatcher_images.index import Index, Loaded
from dispatcher_images.manifest import ConfigFile, Descriptor, Manifest
from dispatcher_images.uninterrupted import finish, in_thread
from dispatcher_images.users import numeric_user

log = logging.getLogger(__name__)

# A shorter prefix of an id could be a name: "cafe" is a repository first of all, and a crafted id must not answer it.
MIN_ID_PREFIX = 12


@dataclass(slots=True, kw_only=True)
class Stored:
    """One image in memory."""

    id: ImageId
    manifest: Manifest
    manifest_descriptor: Descriptor
    file: ConfigFile
    names: set[str] = field(default_factory=set)
    hidden: bool = False

    @property
    def digests(self) -> tuple[str, ...]:
        """Every blob that the image needs."""
        return (self.manifest_descriptor.digest, *(item.digest for item in self.manifest.descriptors))

    @property
    def size_bytes(self) -> int:
        """What it takes in the store: manifest, config and compressed layers."""
        return self.manifest_descriptor.size + sum(item.size for item in self.manifest.descriptors)


class ImageStore:
    """See the module's docstring. Methods that are not async run on the loop and do no I/O."""

    def __init__(self, content: Content, index: Index, pinned: Sequence[str]) -> None:
        self.content = content
        self.changing = asyncio.Lock()
        self._index = index
        self._pinned_names = frozenset(str(references.parse(item)) for item in pinned)
        self._images: dict[ImageId, Stored] = {}
        self._names: dict[str, ImageId] = {}
        self._layers: dict[str, str] = {}
        self._trees: dict[ImageId, tuple[int, int]] = {}
        self._erofs: dict[ImageId, tuple[str, int]] = {}
        self._leases: dict[str, set[ImageId]] = {}
        self._lease_counts: Counter[ImageId] = Counter()
        self._pins: Counter[str] = Counter()
        self._uses: Counter[str] = Counter()  # of each blob, by images
        self._listed: tuple[Image, ...] | None = None
        self._views: dict[ImageId, Image] = {}
        self.to_forget: set[ImageId] = set()
        self.on_gone: Callable[[ImageId], None] = lambda _image: None

    # ------------------------------------------------------------------------------------------------- life cycle
    async def open(self, leases: Sequence[tuple[str, ImageId]]) -> None:
        """Load, drop what is damaged, take the leases, and remove what nobody needs."""
        loaded = await in_thread(self._load)
        for holder, image_id in leases:
            if image_id in self._images:
                self.lease(holder, image_id)
            else:
                log.warning("image %s of %s is not in the store any more", image_id, holder)
        for image_id in [item.id for item in self._images.values() if item.hidden]:
            await self.reclaim(image_id)
        await in_thread(self._sweep, loaded)

    async def close(self) -> None:
        """Close the index."""
        await in_thread(self._index.close)

    def _load(self) -> Loaded:
        self.content.prepare()
        loaded = self._index.open()
        for image, (manifest_digest, hidden) in loaded.images.items():
            image_id = ImageId(image)
            try:
                stored = self._load_image(image_id, manifest_digest)
            except (OSError, ValueError, PullFailed) as error:
                log.error("image %s is damaged and is dropped; it will be pulled anew: %s", image_id, error)
                self._index.delete(image, ())
                continue
            stored.hidden = hidden
            self._add(stored)
        for name, image in loaded.names.items():
            if (found := self._images.get(ImageId(image))) is not None:
                found.names.add(name)
                self._names[name] = found.id
        self._layers = {digest: diff_id for digest, diff_id in loaded.layers.items() if self._is_needed(digest)}
        self._trees = {ImageId(image): figures for image, figures in loaded.trees.items() if image in self._images}
        self._erofs = {ImageId(image): figures for image, figures in loaded.erofs.items() if image in self._images}
        self.to_forget = {ImageId(image) for image in loaded.forget}
        return loaded

    def _load_image(self, image_id: ImageId, manifest_digest: str) -> Stored:
        content = self.content.read(manifest_digest, manifests.MAX_MANIFEST_BYTES)
        manifest = manifests.parse_document(content, manifests.OCI_MANIFEST)
        if not isinstance(manifest, Manifest) or manifest.config.digest != image_id:
            raise ValueError("its manifest is another image's")
        config = self.content.read(image_id, manifests.MAX_CONFIG_BYTES)
        file = manifests.parse_config(config, manifest, ())
        for layer in manifest.layers:
            if not self.content.has(layer.digest, layer.size):
                raise ValueError(f"its layer {layer.digest} is missing")
        descriptor = Descriptor(media_type=manifest.media_type, digest=manifest_digest, size=len(content))
        return Stored(id=image_id, manifest=manifest, manifest_descriptor=descriptor, file=file)

    def _sweep(self, loaded: Loaded) -> None:
        blobs = {digest for stored in self._images.values() for digest in stored.digests}
        removed = self.content.sweep(blobs=blobs, trees=self._trees, erofs=self._erofs, layouts=self._images.keys())
        if removed:
            log.info("removed %d files that an interrupted run left", removed)
        for image_id in [*self._trees]:
            if not self.content.tree(image_id).is_dir():
                del self._trees[image_id]
        for image_id, (_, size) in [*self._erofs.items()]:
            file = self.content.erofs(image_id)
            if not file.exists() or file.stat().st_size != size:
                del self._erofs[image_id]
        lost = [image for image in loaded.images if ImageId(image) not in self._images]
        if lost:
            log.info("%d images were dropped", len(lost))

    # --------------------------------------------------------------------------------------------------- look-ups
    def list(self) -> tuple[Image, ...]:
        """All visible images, by id."""
        if self._listed is None:
            visible = sorted(stored.id for stored in self._images.values() if not stored.hidden)
            self._listed = tuple(self.get(image_id) for image_id in visible)
        return self._listed

    def find(self, reference: str) -> Image | None:
        """Find a visible image by any kind of reference; the result never depends on which kind."""
        image_id = self._resolve(reference)
        if image_id is None or self._images[image_id].hidden:
            return None
        return self.get(image_id)

    def get(self, image_id: ImageId) -> Image:
        """The image, visible or hidden. Raises NotFound."""
        view = self._views.get(image_id)
        if view is None:
            view = self._views[image_id] = self._view(self.stored(image_id))
        return view

    def stored(self, image_id: ImageId) -> Stored:
        """The image with all that the store knows. Raises NotFound."""
        try:
            return self._images[image_id]
        except KeyError:
            raise NotFound(f"The image {image_id} is not in the store.", image=image_id) from None

    def contains(self, image_id: str) -> bool:
        """Whether the image is there, visible or hidden."""
        return image_id in self._images

    def _resolve(self, reference: str) -> ImageId | None:
        digits = reference.removeprefix("sha256:")
        by_id = ImageId(f"sha256:{digits}")
        if by_id in self._images:
            return by_id
        with contextlib.suppress(InvalidRequest):
            if (named := self._names.get(str(references.parse(reference)))) is not None:
                return named
        if MIN_ID_PREFIX <= len(digits) < 64 and all(digit in "0123456789abcdef" for digit in digits):
            matches = [image_id for image_id in self._images if image_id.startswith(by_id)]
            visible = [image_id for image_id in matches if not self._images[image_id].hidden]
            return visible[0] if len(visible) == 1 else None
        if references.is_digest(reference):
            return self._by_manifest(reference)
        return None

    def _by_manifest(self, digest: str) -> ImageId | None:
        """A bare digest of a manifest or index: engines name images so."""
        matches = {image_id for name, image_id in self._names.items() if name.endswith(f"@{digest}")}
        matches |= {item.id for item in self._images.values() if item.manifest_descriptor.digest == digest}
        return matches.pop() if len(matches) == 1 else None

    def _view(self, stored: Stored) -> Image:
        uid, username = _image_user(stored.file.config.user)
        return Image(
            id=stored.id,
            repo_tags=tuple(sorted(name for name in stored.names if "@" not in name)),
            repo_digests=tuple(sorted(name for name in stored.names if "@" in name)),
            size_bytes=stored.size_bytes,
            config=stored.file.config,
            pinned=not stored.names.isdisjoint(self._pinned_names),
            uid=uid,
            username=username,
        )

    def _changed(self) -> None:
        self._listed = None
        self._views.clear()

    # ----------------------------------------------------------------------------------------------------- leases
    def lease(self, holder: str, image_id: ImageId) -> None:
        """Keep an image for `holder`. Raises NotFound."""
        self.stored(image_id)
        held = self._leases.setdefault(holder, set())
        if image_id not in held:
            held.add(image_id)
            self._lease_counts[image_id] += 1

    def release(self, holder: str) -> tuple[ImageId, ...]:
        """Drop a holder's leases; returns the images that may be reclaimed now."""
        free = []
        for image_id in self._leases.pop(holder, ()):
            self._lease_counts[image_id] -= 1
            if not self._lease_counts[image_id]:
                del self._lease_counts[image_id]
                if image_id in self._images and self._images[image_id].hidden:
                    free.append(image_id)
        return tuple(free)

    @contextlib.asynccontextmanager
    async def pinned(self, digests: Collection[str]) -> AsyncIterator[None]:
        """Keep blobs while a pull gathers them; what no image needs afterwards is removed again."""
        async with self.changing:
            self._pins.update(digests)
        try:
            yield
        finally:
            self._pins.subtract(digests)
            for digest in digests:
                if not self._pins[digest]:
                    del self._pins[digest]
            await finish(self._drop(digests))

    async def _drop(self, digests: Collection[str]) -> None:
        async with self.changing:
            unneeded = [digest for digest in digests if not self._is_needed(digest)]
            if unneeded:
                await in_thread(self.content.remove_blobs, unneeded)

    def _is_needed(self, digest: str) -> bool:
        return digest in self._pins or self._uses[digest] > 0

    def _add(self, stored: Stored) -> None:
        self._images[stored.id] = stored
        self._uses.update(stored.digests)

    # ---------------------------------------------------------------------------------------------------- changes
    async def publish(self, stored: Stored, names: Collection[str], layers: Mapping[str, str]) -> Image:
        """Make an image visible under these names. Its blobs are there and pinned by the caller.

        An image that is there already keeps the manifest that it has.
        """

        async def publish() -> Image:
            async with self.changing:
                return await self._publish(self._images.get(stored.id, stored), names, layers)

        return await finish(publish())

    async def add_names(self, image_id: ImageId, names: Collection[str]) -> Image | None:
        """Make an image that is in the store visible under these names; None where it is not."""

        async def publish() -> Image | None:
            async with self.changing:
                stored = self._images.get(image_id)
                return None if stored is None else await self._publish(stored, names, {})

        return await finish(publish())

    async def _publish(self, stored: Stored, names: Collection[str], layers: Mapping[str, str]) -> Image:
        """Under `changing`."""
        await in_thread(self._index.publish, stored.id, stored.manifest_descriptor.digest, tuple(names), layers)
        if stored.id not in self._images:
            self._add(stored)
        stored.hidden = False
        self._layers.update(layers)
        self.to_forget.discard(stored.id)
        for name in names:
            previous = self._names.get(name)
            if previous is not None and previous in self._images:
                self._images[previous].names.discard(name)
            self._names[name] = stored.id
        stored.names.update(names)
        self._changed()
        return self.get(stored.id)

    async def remove(self, reference: str) -> None:
        """Remove an image with all names. Idempotent. Returns when it is neither listed nor, unless leased, on disk."""
        await finish(self._remove(reference))

    async def _remove(self, reference: str) -> None:
        async with self.changing:
            image_id = self._resolve(reference)
            if image_id is None:
                return
            stored = self._images[image_id]
            if not stored.hidden:
                await in_thread(self._index.hide, image_id)
                stored.hidden = True
                for name in stored.names:
                    self._names.pop(name, None)
                stored.names.clear()
                self._changed()
        await self.reclaim(image_id)

    async def reclaim(self, image_id: ImageId) -> None:
        """Free what a hidden image takes, unless somebody needs it."""
        if await finish(self._reclaim(image_id)):
            self.on_gone(image_id)
            await in_thread(self.content.empty_garbage)

    async def _reclaim(self, image_id: ImageId) -> bool:
        async with self.changing:
            stored = self._images.get(image_id)
            if stored is None or not stored.hidden or self._lease_counts[image_id]:
                return False
            del self._images[image_id]
            self._uses.subtract(stored.digests)
            unneeded = tuple(digest for digest in stored.digests if not self._is_needed(digest))
            self._changed()
            self._trees.pop(image_id, None)
            self._erofs.pop(image_id, None)
            for digest in unneeded:
                self._layers.pop(digest, None)
            self.to_forget.add(image_id)
            await in_thread(self._delete, image_id, unneeded)
            return True

    def _delete(self, image_id: ImageId, unneeded: tuple[str, ...]) -> None:
        self._index.delete(image_id, unneeded)
        self.content.remove_blobs(unneeded)
        for path in (self.content.erofs(image_id), self.content.layout(image_id), self.content.tree(image_id)):
            self.content.discard(path)

    async def forgotten(self, image_id: ImageId) -> None:
        """Every engine has dropped its copy of an image that is gone."""
        async with self.changing:
            if image_id in self.to_forget:
                self.to_forget.discard(image_id)
                await in_thread(self._index.forgotten, image_id)

    # -------------------------------------------------------------------------------------------- what was derived
    def diff_id(self, digest: str) -> str | None:
        """What a layer blob was seen to unpack to, or None where nobody looked."""
        return self._layers.get(digest)

    def has_tree(self, image_id: ImageId) -> bool:
        """Whether the image lies unpacked."""
        return image_id in self._trees

    def has_erofs(self, image_id: ImageId) -> bool:
        """Whether the image's erofs file was made."""
        return image_id in self._erofs

    async def add_tree(self, image_id: ImageId, size: int, inodes: int) -> None:
        """Record a finished tree; the caller moved it into place under `changing`."""
        await in_thread(self._index.add_tree, image_id, size, inodes)
        self._trees[image_id] = (size, inodes)

    async def add_erofs(self, image_id: ImageId, digest: str, size: int) -> None:
        """Record a finished erofs file; the caller moved it into place under `changing`."""
        await in_thread(self._index.add_erofs, image_id, digest, size)
        self._erofs[image_id] = (digest, size)

    def erofs_digest(self, image_id: ImageId) -> str:
        """The digest of the image's erofs file as it was made. Raises NotFound."""
        try:
            return self._erofs[image_id][0]
        except KeyError:
            raise NotFound(f"The image {image_id} has no erofs file.", image=image_id) from None

    async def usage(self) -> tuple[int, int]:
        """Bytes and inodes on disk."""
        return await in_thread(self.content.usage, tuple(self._trees.values()))


def _image_user(user: str) -> tuple[int | None, str]:
    """What the kubelet is told: a number out of range is a name that no check for root will trust."""
    name = user.partition(":")[0]
    try:
        uid = numeric_user(user)
    except InvalidRequest:
        return None, name
    return (uid, "") if uid is not None else (None, name)
