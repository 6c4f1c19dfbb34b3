"""Pulling an image: resolve, fetch what is missing, verify, publish.

Theory of operation. Each pull resolves its reference with its own credentials: what one pod may see says nothing about
another. From there on content has an identity, and downloads are shared: one flight per blob, whoever asks. A layer is
not only held against its digest but also inflated once, in a worker, and held against the config's diff id: otherwise
anybody could publish a manifest that pairs a famous image's config with other layers, and break that image here.

Order: the config first (it is small and may refuse the platform), then the layers, then the index. Nothing is visible
before everything is on disk; cancelled at any point, a pull leaves only blobs that others need.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial

from dispatcher.errors import OutOfResources, PullFailed
from dispatcher.model import Credentials, Image, ImageId
from dispatcher_images import manifest as manifests
from dispatcher_images import reference as references
from dispatcher_images.config import ImagesConfig
from dispatcher_images.content import Arrival, Content
from dispatcher_images.exec import Workers
from dispatcher_images.flights import Flights
from dispatcher_images.hostile import BadImage
from dispatcher_images.manifest import ConfigFile, Descriptor, Manifest
from dispatcher_images.registry_client import Document, EndpointFailed, RegistryClient, Remote, backoff_s
from dispatcher_images.store import ImageStore, Stored
from dispatcher_images.uninterrupted import in_thread

log = logging.getLogger(__name__)

_MAX_INDEX_DEPTH = 2
_BATCH = 1 << 20
_PROGRESS_THAT_COUNTS = 1 << 20
_SPARE_BYTES = 64 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class PullProgress:
    """How far a pull is. `total_bytes` is 0 until the manifest is known; bytes that were here count as done."""

    reference: str
    stage: str  # "resolving" | "downloading" | "verifying" | "complete" | "failed" | "cancelled"
    done_bytes: int = 0
    total_bytes: int = 0


class _Pull:
    """The progress of one pull, reported as it goes."""

    def __init__(self, reference: str, report: Callable[[PullProgress], None]) -> None:
        self._reference = reference
        self._report = report
        self._sizes: dict[str, int] = {}
        self._present: set[str] = set()
        self.stage = "resolving"

    def begin(self, descriptors: Sequence[Descriptor], missing: Sequence[Descriptor]) -> None:
        self._sizes = {item.digest: item.size for item in descriptors}
        self._present = self._sizes.keys() - {item.digest for item in missing}
        self.enter("downloading", {})

    def enter(self, stage: str, arrived: dict[str, int]) -> None:
        self.stage = stage
        self._report(self.progress(arrived))

    def progress(self, arrived: dict[str, int]) -> PullProgress:
        done = sum(size for digest, size in self._sizes.items() if digest in self._present)
        done += sum(arrived.get(digest, 0) for digest in self._sizes if digest not in self._present)
        return PullProgress(
            reference=self._reference, stage=self.stage, done_bytes=done, total_bytes=sum(self._sizes.values())
        )

    def landed(self, digest: str) -> None:
        self._present.add(digest)


class Puller:
    """Pulls images into a store. `listeners` get every report of progress; they must not raise or block."""

    def __init__(self, config: ImagesConfig, store: ImageStore, client: RegistryClient, workers: Workers) -> None:
        self._config = config
        self._store = store
        self._content: Content = store.content
        self._client = client
        self._workers = workers
        self._limits = asdict(config.limits())
        self._flights: Flights[None] = Flights()
        self._arrived: dict[str, int] = {}
        self._pulls: set[_Pull] = set()
        self.listeners: list[Callable[[PullProgress], None]] = []

    async def aclose(self) -> None:
        """Stop all downloads; each removes what it had."""
        await self._flights.aclose()

    def pulls(self) -> tuple[PullProgress, ...]:
        """Every pull in progress."""
        return tuple(pull.progress(self._arrived) for pull in self._pulls)

    async def pull(self, text: str, credentials: Credentials | None) -> Image:
        """Pull by reference; see `ImageProvider.pull`."""
        reference = references.parse(text)
        remote = self._client.remote(reference, credentials)
        async with self._tracked(str(reference)) as pull:
            document, manifest = await self._resolve(remote, reference.selector)
            # The name carries the digest of what was asked for (an index, say), as every engine does it.
            names = {f"{reference.name}@{document[0].digest}"} | ({str(reference)} if reference.tag else set())
            image_id = ImageId(manifest.config.digest)
            if (known := await self._store.add_names(image_id, names)) is not None:
                return known
            own = document[-1]
            self_descriptor = Descriptor(media_type=manifest.media_type, digest=own.digest, size=len(own.content))
            descriptors = (self_descriptor, *manifest.descriptors)
            async with self._store.pinned(tuple(dict.fromkeys(item.digest for item in descriptors))):
                file = await self._fetch(remote, pull, own, manifest)
                layers = await self._verify(pull, manifest, file)
                stored = Stored(id=image_id, manifest=manifest, manifest_descriptor=self_descriptor, file=file)
                return await self._store.publish(stored, names, layers)

    async def _resolve(self, remote: Remote, selector: str) -> tuple[tuple[Document, ...], Manifest]:
        """Follow indexes to this node's manifest. Returns the documents on the way, the manifest's own last."""
        documents: list[Document] = []
        while True:
            document = await remote.manifest(selector)
            documents.append(document)
            parsed = manifests.parse_document(document.content, document.media_type)
            if isinstance(parsed, Manifest):
                return tuple(documents), parsed
            if len(documents) > _MAX_INDEX_DEPTH:
                raise PullFailed("The image's index leads to further indexes without end.")
            selector = manifests.choose(parsed, self._config.platforms).digest

    async def _fetch(self, remote: Remote, pull: _Pull, document: Document, manifest: Manifest) -> ConfigFile:
        total = sum(item.size for item in manifest.descriptors)
        if total > self._config.max_image_bytes:
            raise PullFailed(f"The image has {total} bytes, more than `max_image_bytes` allows.")
        missing = await asyncio.to_thread(self._missing, manifest.descriptors)
        pull.begin(manifest.descriptors, missing)
        wanted = sum(item.size for item in missing)
        if wanted and wanted + _SPARE_BYTES > await asyncio.to_thread(self._content.free_bytes):
            raise OutOfResources(f"The image needs {wanted} bytes more than the disk of the image store has to spare.")
        if manifest.config in missing:
            await self._download(remote, pull, manifest.config)
        content = await asyncio.to_thread(self._content.read, manifest.config.digest, manifests.MAX_CONFIG_BYTES)
        file = manifests.parse_config(content, manifest, self._config.platforms)
        await in_thread(self._put, document)
        slots = asyncio.Semaphore(self._config.parallel_downloads)

        async def one(descriptor: Descriptor) -> None:
            async with slots:
                await self._download(remote, pull, descriptor)

        await _all([partial(one, item) for item in missing if item != manifest.config])
        return file

    def _missing(self, descriptors: Sequence[Descriptor]) -> list[Descriptor]:
        return [item for item in descriptors if not self._content.has(item.digest, item.size)]

    def _put(self, document: Document) -> None:
        if not self._content.has(document.digest, len(document.content)):
            arrival = self._content.arrive(document.digest, len(document.content))
            try:
                arrival.write(document.content)
                arrival.commit()
            finally:
                arrival.abort()

    # ------------------------------------------------------------------------------------------------------ blobs
    async def _download(self, remote: Remote, pull: _Pull, descriptor: Descriptor) -> None:
        """Fetch a blob, or wait for whoever is fetching it. Their failure may be their credentials': try ours then."""
        key = f"{descriptor.digest} {descriptor.size}"
        is_joining = key in self._flights
        try:
            await self._flights.join(key, lambda: self._fetch_blob(remote, descriptor))
        except PullFailed:
            if not is_joining:
                raise
            await self._flights.join(key, lambda: self._fetch_blob(remote, descriptor))
        pull.landed(descriptor.digest)

    async def _fetch_blob(self, remote: Remote, descriptor: Descriptor) -> None:
        if await asyncio.to_thread(self._content.has, descriptor.digest, descriptor.size):
            return
        arrival = self._content.arrive(descriptor.digest, descriptor.size)
        try:
            await self._receive(remote, descriptor, arrival)
            await in_thread(arrival.commit)
        finally:
            self._arrived.pop(descriptor.digest, None)
            arrival.abort()

    async def _receive(self, remote: Remote, descriptor: Descriptor, arrival: Arrival) -> None:
        """Stream into `arrival` until it is intact, resuming where a connection broke."""
        failures = refusals = attempt = mark = 0
        while True:
            try:
                await self._stream(remote, descriptor, arrival, attempt)
                if arrival.is_intact():
                    return
                if arrival.count == descriptor.size:
                    await in_thread(arrival.rewind)
                    raise EndpointFailed("refused", f"What arrived as {descriptor.digest} has another digest.")  # noqa: TRY301
                raise EndpointFailed("unavailable", "A download ended early.", is_transient=True)  # noqa: TRY301
            except EndpointFailed as failure:
                # A registry that drips a few bytes and breaks again must not keep us for ever.
                failures = 0 if arrival.count - mark >= _PROGRESS_THAT_COUNTS else failures
                failures, attempt, mark = failures + 1, attempt + 1, arrival.count
                refusals += failure.kind == "refused"
                is_final = failure.kind in {"missing", "denied"} or refusals >= remote.endpoint_count
                if is_final or failures >= self._config.attempts:
                    raise remote.give_up(failure) from failure
                log.info("resuming %s at %d of %d bytes: %s", descriptor.digest, mark, descriptor.size, failure)
            await asyncio.sleep(backoff_s(failures - 1))

    async def _stream(self, remote: Remote, descriptor: Descriptor, arrival: Arrival, attempt: int) -> None:
        if descriptor.size and arrival.count == descriptor.size:
            return
        async with remote.blob(descriptor, arrival.count, attempt) as body:
            if body.offset != arrival.count:
                await in_thread(arrival.rewind)
            batch = bytearray()
            try:
                async for chunk in body.chunks():
                    batch += chunk
                    self._arrived[descriptor.digest] = arrival.count + len(batch)
                    if len(batch) >= _BATCH:
                        await in_thread(arrival.write, bytes(batch))
                        batch.clear()
            except EndpointFailed:
                if batch:  # what came before the break need not come again
                    await in_thread(arrival.write, bytes(batch))
                raise
            if batch:
                await in_thread(arrival.write, bytes(batch))

    # ------------------------------------------------------------------------------------------------------ verify
    async def _verify(self, pull: _Pull, manifest: Manifest, file: ConfigFile) -> dict[str, str]:
        """Hold every layer against its diff id. Returns what was found out, by blob digest."""
        pairs = list(zip(manifest.layers, file.diff_ids, strict=True))
        unknown = {layer.digest: diff_id for layer, diff_id in pairs if self._store.diff_id(layer.digest) is None}
        pull.enter("verifying", self._arrived)
        if unknown:
            job = {
                "job": "verify",
                "limits": self._limits,
                "layers": [
                    {"path": str(self._content.blob(digest)), "diff_id": diff_id} for digest, diff_id in unknown.items()
                ],
            }
            try:
                with self._content.scratch() as folder:
                    await self._workers.run({**job, "empty": str(folder)})
            except BadImage as error:
                raise PullFailed(f"The image is refused: {error}.") from error
        for layer, diff_id in pairs:
            if unknown.get(layer.digest, self._store.diff_id(layer.digest)) != diff_id:
                raise PullFailed(f"The image is refused: its layer {layer.digest} does not unpack to {diff_id}.")
        return unknown

    # ---------------------------------------------------------------------------------------------------- progress
    @contextlib.asynccontextmanager
    async def _tracked(self, reference: str) -> AsyncIterator[_Pull]:
        """Report a pull from its begin to its end, in the log and to listeners."""
        pull = _Pull(reference, self._tell)
        self._pulls.add(pull)
        began = time.monotonic()
        reporter = asyncio.ensure_future(self._report_often(pull))
        try:
            yield pull
        except asyncio.CancelledError:
            pull.enter("cancelled", self._arrived)
            raise
        except BaseException:
            pull.enter("failed", self._arrived)
            raise
        else:
            pull.enter("complete", self._arrived)
            done = pull.progress(self._arrived)
            log.info("pulled %s: %d bytes in %.2f s", reference, done.total_bytes, time.monotonic() - began)
        finally:
            self._pulls.discard(pull)
            reporter.cancel()

    async def _report_often(self, pull: _Pull) -> None:
        while True:
            await asyncio.sleep(self._config.progress_every_s)
            progress = pull.progress(self._arrived)
            log.info(
                "pulling %s: %s, %d of %d bytes",
                progress.reference,
                progress.stage,
                progress.done_bytes,
                progress.total_bytes,
            )
            self._tell(progress)

    def _tell(self, progress: PullProgress) -> None:
        for listener in self.listeners:
            listener(progress)


async def _all(works: Sequence[Callable[[], object]]) -> None:
    """Run all; the first failure cancels the rest and is raised by itself, not in a group."""
    try:
        async with asyncio.TaskGroup() as group:
            for work in works:
                group.create_task(work())  # type: ignore[arg-type]
    except BaseExceptionGroup as failures:
        raise failures.exceptions[0] from failures.exceptions[0].__cause__
