"""A registry that misbehaves on demand: breaks, lies, redirects, stalls, asks for logins.

A good registry is a real one (tests.lab.registry); this one exists for what a real one cannot be made to do. It runs on
the test's own loop, so that tests wait for its events instead of sleeping.
"""

from __future__ import annotations

import asyncio
import json
import ssl
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any, Self

from aiohttp import web

from tests.lab.images import Image, digest_of

Hook = Callable[[web.Request], Awaitable[web.StreamResponse | None]]


@dataclass
class Blob:
    """How one blob is served. `cut_at` breaks the connection there, once per entry of `cuts`."""

    content: bytes
    cuts: list[int] = field(default_factory=list)
    ranges: bool = True
    served: int = 0
    gate: asyncio.Event | None = None
    started: asyncio.Event = field(default_factory=asyncio.Event)


class OddRegistry:
    """Serves pulls only. `log` has (method, path, headers) of each request."""

    def __init__(self, tls: ssl.SSLContext | None = None) -> None:
        self._tls = tls
        self.blobs: dict[str, Blob] = {}
        self.manifests: dict[str, tuple[bytes, str]] = {}
        self.log: list[tuple[str, str, dict[str, str]]] = []
        self.hooks: list[Hook] = []
        self.address = ""
        self._runner: web.AppRunner | None = None

    async def __aenter__(self) -> Self:
        app = web.Application()
        app.router.add_route("*", "/{path:.*}", self._serve)
        self._runner = web.AppRunner(app, access_log=None, shutdown_timeout=0)
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", 0, ssl_context=self._tls)
        await site.start()
        sockets: Any = site._server.sockets  # type: ignore[union-attr]
        self.address = f"127.0.0.1:{sockets[0].getsockname()[1]}"
        return self

    async def __aexit__(self, *_exc: object) -> None:
        assert self._runner is not None
        for blob in self.blobs.values():
            if blob.gate is not None:
                blob.gate.set()
        await self._runner.cleanup()

    def put(self, repository: str, tag: str, image: Image) -> str:
        """Offer an image; returns the reference to pull."""
        for layer in image.layers:
            self.blobs.setdefault(digest_of(layer.blob), Blob(layer.blob))
        self.blobs.setdefault(image.id, Blob(image.config))
        self.put_manifest(repository, tag, image.manifest, image.media_type)
        return f"{self.address}/{repository}:{tag}"

    def put_manifest(self, repository: str, tag: str, manifest: bytes, media_type: str) -> None:
        """Offer a manifest by tag and digest."""
        for name in (tag, digest_of(manifest)):
            self.manifests[f"/v2/{repository}/manifests/{name}"] = (manifest, media_type)

    def requests(self, part: str) -> list[tuple[str, str, dict[str, str]]]:
        """The requests whose path holds `part`."""
        return [entry for entry in self.log if part in entry[1]]

    async def _serve(self, request: web.Request) -> web.StreamResponse:
        self.log.append((request.method, request.raw_path, {k.lower(): v for k, v in request.headers.items()}))
        for hook in self.hooks:
            if (answer := await hook(request)) is not None:
                return answer
        if request.path in self.manifests:
            content, media_type = self.manifests[request.path]
            return web.Response(body=content, content_type=media_type)
        blob = self.blobs.get(request.path.rpartition("/")[2])
        if blob is None:
            return web.Response(status=404, text=json.dumps({"errors": [{"code": "UNKNOWN"}]}))
        return await self._send(request, blob)

    async def _send(self, request: web.Request, blob: Blob) -> web.StreamResponse:
        blob.served += 1
        start = 0
        response = web.StreamResponse()
        if (wanted := request.headers.get("Range")) and blob.ranges:
            start = int(wanted.removeprefix("bytes=").removesuffix("-"))
            response.set_status(206)
            response.headers["Content-Range"] = f"bytes {start}-{len(blob.content) - 1}/{len(blob.content)}"
        response.content_length = len(blob.content) - start
        await response.prepare(request)
        cut = blob.cuts.pop(0) if blob.cuts else None
        half = (start + len(blob.content)) // 2
        await response.write(blob.content[start : half if cut is None else min(half, cut)])
        blob.started.set()
        if blob.gate is not None:
            await blob.gate.wait()
        if cut is not None:
            await response.write(blob.content[half:cut])
            assert request.transport is not None
            request.transport.close()
            return response
        await response.write(blob.content[half:])
        await response.write_eof()
        return response
