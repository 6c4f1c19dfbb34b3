"""Pulling from registries that break, lie, stall and redirect; and pulls that are cancelled."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import ssl
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from aiohttp import web

from dispatcher.errors import PullFailed
from dispatcher.model import Credentials
from dispatcher_images.provider import OciImages
from dispatcher_images.pull import PullProgress
from tests.images.conftest import Open, files
from tests.images.odd_registry import Blob, OddRegistry
from tests.images.tars import Tar
from tests.lab.child import PartMissingError
from tests.lab.images import Image, Layer, Tree, digest_of
from tests.lab.registry import make_certificates

BIG = Layer.plain(Tree().file("big", os.urandom(3 << 20)).tar())
SMALL = Layer.gzip(Tree().file("small", "x").tar())
IMAGE = Image(layers=[SMALL, BIG])
BIG_DIGEST = digest_of(BIG.blob)


async def test_a_broken_download_goes_on_where_it_stopped(odd: OddRegistry, store: OciImages) -> None:
    reference = odd.put("app", "v1", IMAGE)
    odd.blobs[BIG_DIGEST].cuts = [1_000_000, 2_500_000]
    assert (await store.pull(reference, None)).id == IMAGE.id
    ranges = [headers.get("range") for _, _, headers in odd.requests(BIG_DIGEST)]
    assert ranges[0] is None
    assert [int(str(value).removeprefix("bytes=").removesuffix("-")) > 0 for value in ranges[1:]] == [True, True]


async def test_a_registry_without_ranges_is_asked_from_the_start_again(odd: OddRegistry, store: OciImages) -> None:
    reference = odd.put("app", "v1", IMAGE)
    odd.blobs[BIG_DIGEST].cuts = [2_000_000]
    odd.blobs[BIG_DIGEST].ranges = False
    assert (await store.pull(reference, None)).id == IMAGE.id


async def test_a_registry_that_always_breaks_is_given_up(odd: OddRegistry, open_store: Open) -> None:
    store = await open_store(attempts=2)
    reference = odd.put("app", "v1", IMAGE)
    odd.blobs[BIG_DIGEST].cuts = [10] * 100
    with pytest.raises(PullFailed) as caught:
        await store.pull(reference, None)
    assert caught.value.reason == "RegistryUnavailable"
    assert files(store) == []


async def test_a_stalled_registry_is_given_up(odd: OddRegistry, open_store: Open) -> None:
    store = await open_store(attempts=1, stall_timeout_s=0.2)
    reference = odd.put("app", "v1", IMAGE)
    odd.blobs[BIG_DIGEST].gate = asyncio.Event()
    with pytest.raises(PullFailed) as caught:
        await store.pull(reference, None)
    assert caught.value.reason == "RegistryUnavailable"
    assert files(store) == []


@pytest.mark.parametrize("status", [500, 503, 429])
async def test_a_busy_registry_is_asked_again(odd: OddRegistry, store: OciImages, status: int) -> None:
    reference = odd.put("app", "v1", IMAGE)
    left = [status, status]

    async def busy(request: web.Request) -> web.StreamResponse | None:
        return web.Response(status=left.pop()) if left else None

    odd.hooks.append(busy)
    assert (await store.pull(reference, None)).id == IMAGE.id


@pytest.mark.parametrize(
    "content", [b"y" * len(BIG.blob), BIG.blob + b"more", BIG.blob[:-1]], ids=["other", "longer", "shorter"]
)
async def test_content_that_is_not_what_its_digest_says_is_refused(
    odd: OddRegistry, open_store: Open, content: bytes
) -> None:
    store = await open_store(attempts=2)
    reference = odd.put("app", "v1", IMAGE)
    odd.blobs[BIG_DIGEST] = Blob(content)
    with pytest.raises(PullFailed):
        await store.pull(reference, None)
    assert files(store) == []
    assert store.list() == ()


async def test_a_lying_mirror_is_passed_over(odd: OddRegistry, open_store: Open) -> None:
    reference = odd.put("app", "v1", IMAGE)
    async with OddRegistry() as mirror:
        mirror.put("app", "v1", IMAGE)
        mirror.blobs[BIG_DIGEST] = Blob(b"y" * len(BIG.blob))
        store = await open_store(mirrors={odd.address: [f"http://{mirror.address}"]})
        assert (await store.pull(reference, None)).id == IMAGE.id
        assert mirror.blobs[BIG_DIGEST].served == 1


async def test_a_manifest_that_is_not_what_was_asked_for_is_refused(odd: OddRegistry, store: OciImages) -> None:
    odd.put("app", "v1", IMAGE)
    other = "sha256:" + "a" * 64
    odd.manifests[f"/v2/app/manifests/{other}"] = (IMAGE.manifest, IMAGE.media_type)
    with pytest.raises(PullFailed, match="other content"):
        await store.pull(f"{odd.address}/app@{other}", None)


async def test_layers_swapped_under_a_known_config_are_refused(odd: OddRegistry, store: OciImages) -> None:
    """Otherwise one bad manifest would break a famous image on this node for everybody."""
    honest = odd.put("app", "v1", IMAGE)
    evil = Layer.gzip(Tree().file("evil", "x").tar())
    forged = Image(layers=[evil, BIG])
    object.__setattr__(forged, "config", IMAGE.config)
    reference = odd.put("evil", "v1", forged)
    with pytest.raises(PullFailed, match="promises"):
        await store.pull(reference, None)
    assert files(store) == []
    assert (await store.pull(honest, None)).id == IMAGE.id
    await store.unpacked(store.list()[0].id)


async def test_a_bomb_is_refused_at_the_pull(odd: OddRegistry, open_store: Open) -> None:
    store = await open_store(max_compression_ratio=100, max_unpacked_bytes=80 << 20)
    bomb = Image(layers=[Layer.gzip(Tar().add("zeros", bytes(79 << 20)).bytes())])
    with pytest.raises(PullFailed, match="100 times"):
        await store.pull(odd.put("bomb", "v1", bomb), None)
    assert files(store) == []


async def test_an_image_above_the_limit_is_refused_before_it_is_fetched(odd: OddRegistry, open_store: Open) -> None:
    store = await open_store(max_image_bytes=1 << 20)
    with pytest.raises(PullFailed, match="max_image_bytes"):
        await store.pull(odd.put("app", "v1", IMAGE), None)
    assert odd.requests("/blobs/") == []


async def test_an_endless_index_is_refused(odd: OddRegistry, store: OciImages) -> None:
    kind = "application/vnd.oci.image.index.v1+json"
    chain = b"{}"
    for depth in range(6):
        entry = {"mediaType": kind, "size": len(chain), "digest": digest_of(chain)}
        chain = json.dumps({"schemaVersion": 2, "mediaType": kind, "manifests": [entry], "n": depth}).encode()
        odd.put_manifest("loop", f"v{depth}", chain, kind)
    with pytest.raises(PullFailed, match="without end"):
        await store.pull(f"{odd.address}/loop:v5", None)


async def test_an_endless_manifest_is_refused(odd: OddRegistry, store: OciImages) -> None:
    odd.put_manifest("huge", "v1", b" " * (5 << 20), "application/vnd.oci.image.manifest.v1+json")
    with pytest.raises(PullFailed, match="more than"):
        await store.pull(f"{odd.address}/huge:v1", None)


# ----------------------------------------------------------------------------------------------- redirects and secrets
async def test_a_redirected_blob_is_fetched_without_the_secret(odd: OddRegistry, store: OciImages) -> None:
    async with OddRegistry() as storage:
        storage.put("app", "v1", IMAGE)

        async def login_and_redirect(request: web.Request) -> web.StreamResponse | None:
            if "Authorization" not in request.headers:
                return web.Response(status=401, headers={"WWW-Authenticate": 'Basic realm="x"'})
            if "/blobs/" in request.path:
                location = f"http://{storage.address}{request.path}?signature=a%2Fb%3D"
                return web.Response(status=307, headers={"Location": location})
            return None

        odd.hooks.append(login_and_redirect)
        reference = odd.put("app", "v1", IMAGE)
        await store.pull(reference, Credentials(username="u", password="p"))
        assert storage.log
        for _, path, headers in storage.log:
            assert "authorization" not in headers
            assert path.endswith("signature=a%2Fb%3D")


async def test_a_mirror_never_sees_the_secret_unless_told_so(odd: OddRegistry, open_store: Open) -> None:
    async def ask(request: web.Request) -> web.StreamResponse | None:
        if "Authorization" not in request.headers:
            return web.Response(status=401, headers={"WWW-Authenticate": 'Basic realm="x"'})
        return None

    reference = odd.put("app", "v1", IMAGE)
    async with OddRegistry() as mirror:
        mirror.put("app", "v1", IMAGE)
        mirror.hooks.append(ask)
        credentials = Credentials(username="u", password="p", registry_token="")
        store = await open_store(mirrors={odd.address: [f"http://{mirror.address}"]})
        await store.pull(reference, credentials)
        assert all("authorization" not in headers for _, _, headers in mirror.log)
        store = await open_store(
            mirrors={odd.address: {"mirrors": [{"url": f"http://{mirror.address}", "send_credentials": True}]}}
        )
        await store.pull(reference, credentials)
        assert any("authorization" in headers for _, _, headers in mirror.log)


async def test_redirects_without_end_are_given_up(odd: OddRegistry, open_store: Open) -> None:
    store = await open_store(attempts=1)

    async def again(request: web.Request) -> web.StreamResponse | None:
        raise web.HTTPTemporaryRedirect(request.path)

    odd.hooks.append(again)
    with pytest.raises(PullFailed, match="without end"):
        await store.pull(f"{odd.address}/app:v1", None)
    assert len(odd.log) < 10


@pytest.mark.parametrize("location", ["file:///etc/passwd", "ftp://x/", "http://u:p@x/", ""])
async def test_a_redirect_to_nowhere_is_refused(odd: OddRegistry, store: OciImages, location: str) -> None:
    async def away(request: web.Request) -> web.StreamResponse | None:
        return web.Response(status=307, headers={"Location": location})

    odd.hooks.append(away)
    with pytest.raises(PullFailed, match="unusable"):
        await store.pull(f"{odd.address}/app:v1", None)


@pytest.fixture
async def tls_odd(tmp_path: Path) -> AsyncIterator[tuple[OddRegistry, Path]]:
    """A registry over TLS that wants a client certificate, with the folder for `certs_dir`."""
    keys = tmp_path / "keys"
    keys.mkdir()
    try:
        await asyncio.to_thread(make_certificates, keys)
    except PartMissingError as missing:
        pytest.skip(str(missing))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(keys / "server.crt", keys / "server.key")
    context.load_verify_locations(keys / "ca.crt")
    context.verify_mode = ssl.CERT_REQUIRED
    async with OddRegistry(context) as registry:
        folder = tmp_path / "certs" / registry.address
        folder.mkdir(parents=True)
        shutil.copy(keys / "ca.crt", folder / "ca.crt")
        shutil.copy(keys / "server.crt", folder / "client.cert")
        shutil.copy(keys / "server.key", folder / "client.key")
        yield registry, folder


async def test_client_certificates_are_shown_where_there_are_some(
    tls_odd: tuple[OddRegistry, Path], open_store: Open
) -> None:
    odd, folder = tls_odd
    reference = odd.put("app", "v1", IMAGE)
    store = await open_store(certs_dir=str(folder.parent), attempts=1)
    assert (await store.pull(reference, None)).id == IMAGE.id
    (folder / "client.cert").unlink()
    await store.remove(reference)
    with pytest.raises(PullFailed) as caught:
        await store.pull(reference, None)
    assert caught.value.reason == "RegistryUnavailable"
    (folder / "client.cert").write_text("no certificate")
    with pytest.raises(PullFailed, match="cannot be used"):
        await store.pull(reference, None)


async def test_tls_is_never_left(tls_odd: tuple[OddRegistry, Path], odd: OddRegistry, open_store: Open) -> None:
    secure, folder = tls_odd
    odd.put("app", "v1", IMAGE)

    async def away(request: web.Request) -> web.StreamResponse | None:
        if "/blobs/" in request.path:
            return web.Response(status=307, headers={"Location": f"http://{odd.address}{request.path}"})
        return None

    secure.hooks.append(away)
    reference = secure.put("app", "v1", IMAGE)
    store = await open_store(certs_dir=str(folder.parent), plain_http_loopback=False)
    with pytest.raises(PullFailed, match="away from TLS"):
        await store.pull(reference, None)
    assert odd.log == []


async def test_a_token_service_without_tls_gets_no_secret(
    tls_odd: tuple[OddRegistry, Path], odd: OddRegistry, open_store: Open
) -> None:
    secure, folder = tls_odd

    async def ask(request: web.Request) -> web.StreamResponse | None:
        challenge = f'Bearer realm="http://{odd.address}/token",service="x"'
        return web.Response(status=401, headers={"WWW-Authenticate": challenge})

    secure.hooks.append(ask)
    store = await open_store(certs_dir=str(folder.parent))
    with pytest.raises(PullFailed, match="without TLS"):
        await store.pull(secure.put("app", "v1", IMAGE), Credentials(username="u", password="p"))
    assert odd.log == []


# -------------------------------------------------------------------------------------------- joining and cancellation
async def test_equal_pulls_at_once_fetch_once(odd: OddRegistry, store: OciImages) -> None:
    reference = odd.put("app", "v1", IMAGE)
    odd.put("same", "v2", IMAGE)
    references = [reference] * 7 + [f"{odd.address}/same:v2"]
    pulled = await asyncio.gather(*(store.pull(item, None) for item in references))
    assert {image.id for image in pulled} == {IMAGE.id}
    assert odd.blobs[BIG_DIGEST].served == 1
    assert len(store.find(IMAGE.id).repo_tags) == 2  # type: ignore[union-attr]


async def test_a_cancelled_pull_leaves_nothing(odd: OddRegistry, store: OciImages) -> None:
    reference = odd.put("app", "v1", IMAGE)
    blob = odd.blobs[BIG_DIGEST]
    blob.gate = asyncio.Event()
    task = asyncio.create_task(store.pull(reference, None))
    await blob.started.wait()
    assert any(name.startswith("arriving/") for name in files(store))
    assert [progress.stage for progress in store.pulls()] == ["downloading"]
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert files(store) == []
    assert store.pulls() == ()
    blob.gate.set()
    assert (await store.pull(reference, None)).id == IMAGE.id


async def test_a_pull_goes_on_for_whoever_still_waits(odd: OddRegistry, store: OciImages) -> None:
    reference = odd.put("app", "v1", IMAGE)
    blob = odd.blobs[BIG_DIGEST]
    blob.gate = asyncio.Event()
    first = asyncio.create_task(store.pull(reference, None))
    await blob.started.wait()
    second = asyncio.create_task(store.pull(reference, None))
    while len(odd.requests("/manifests/")) < 2 or len(store._puller._flights._flights) < 1:
        await asyncio.sleep(0)
    for _ in range(200):
        await asyncio.sleep(0)
    first.cancel()
    with pytest.raises(asyncio.CancelledError):
        await first
    blob.gate.set()
    assert (await second).id == IMAGE.id
    assert blob.served <= 2


async def test_closing_the_store_stops_pulls_and_leaves_nothing(odd: OddRegistry, open_store: Open) -> None:
    store = await open_store()
    reference = odd.put("app", "v1", IMAGE)
    blob = odd.blobs[BIG_DIGEST]
    blob.gate = asyncio.Event()
    task = asyncio.create_task(store.pull(reference, None))
    await blob.started.wait()
    await store.aclose()
    with pytest.raises((asyncio.CancelledError, Exception)):
        await task
    assert [name for name in files(store) if name.startswith(("arriving", "tmp"))] == []


async def test_one_pods_wrong_secret_does_not_fail_another_ones_pull(odd: OddRegistry, store: OciImages) -> None:
    """The manifest is public here, the blobs are not: the second caller's own secret must count."""
    good = "Basic dTpw"  # u:p

    async def guard(request: web.Request) -> web.StreamResponse | None:
        if BIG_DIGEST in request.path and request.headers.get("Authorization") != good:
            await joined.wait()
            return web.Response(status=401, headers={"WWW-Authenticate": 'Basic realm="x"'})
        return None

    joined = asyncio.Event()
    odd.hooks.append(guard)
    reference = odd.put("app", "v1", IMAGE)
    bad = asyncio.create_task(store.pull(reference, Credentials(username="u", password="wrong")))
    while not odd.requests(BIG_DIGEST):
        await asyncio.sleep(0.01)
    fine = asyncio.create_task(store.pull(reference, Credentials(username="u", password="p")))
    while len(odd.requests("/manifests/")) < 2:
        await asyncio.sleep(0.01)
    for _ in range(50):
        await asyncio.sleep(0.001)
    joined.set()
    with pytest.raises(PullFailed, match="pull secret"):
        await bad
    assert (await fine).id == IMAGE.id


# --------------------------------------------------------------------------------------------------------- progress
async def test_progress_is_logged_and_told(
    odd: OddRegistry, open_store: Open, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "dispatcher_images")
    store = await open_store(progress_every_s=0.02)
    seen: list[PullProgress] = []
    half = asyncio.Event()

    def listen(progress: PullProgress) -> None:
        seen.append(progress)
        if progress.total_bytes and progress.done_bytes >= len(BIG.blob) // 2 - 1:
            half.set()

    store.on_progress(listen)
    reference = odd.put("app", "v1", IMAGE)
    blob = odd.blobs[BIG_DIGEST]
    blob.gate = asyncio.Event()
    task = asyncio.create_task(store.pull(reference, None))
    await asyncio.wait_for(half.wait(), 10)
    blob.gate.set()
    await task
    assert seen[-1].stage == "complete"
    assert seen[-1].done_bytes == seen[-1].total_bytes == len(BIG.blob) + len(SMALL.blob) + len(IMAGE.config)
    assert list(dict.fromkeys(item.stage for item in seen)) == ["downloading", "verifying", "complete"]
    done = [item.done_bytes for item in seen]
    assert done == sorted(done)
    assert "pulling " in caplog.text
    assert "pulled " in caplog.text
