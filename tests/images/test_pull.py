"""Pulling from real registries, every way of logging in, with skopeo as the judge of what was pulled."""

from __future__ import annotations

import asyncio
import base64
import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from dispatcher.errors import InvalidRequest, PullFailed
from dispatcher.model import Credentials
from dispatcher_images.provider import OciImages
from tests.images.conftest import Open, files
from tests.lab import images as lab
from tests.lab.images import Image, Layer, Tree
from tests.lab.registry import IDENTITY_TOKEN, PASSWORD, USER, Auth, Registry

pytestmark = pytest.mark.lab
Registries = Callable[..., Registry]

BASE = Tree().file("bin/sh", "#!", 0o755).file("etc/passwd", "root:x:0:0::/:/bin/sh\n").tar()
TOP = Tree().file("hello", "world").whiteout("bin/nothing").tar()
KINDS = {
    "docker": Image(layers=[Layer.gzip(BASE), Layer.gzip(TOP)], process={"Cmd": ["sh"], "User": "1002"}),
    "oci": Image(layers=[Layer.gzip(BASE), Layer.gzip(TOP)], process={"Cmd": ["oci"]}, oci=True),
    "zstd": Image(layers=[Layer.zstd(BASE), Layer.zstd(TOP)], process={"Cmd": ["zstd"]}, oci=True),
    "plain": Image(layers=[Layer.plain(BASE), Layer.plain(TOP)], process={"Cmd": ["plain"]}, oci=True),
    "empty": Image(layers=[], process={"Cmd": ["empty"]}, oci=True),
    "twice": Image(layers=[Layer.gzip(BASE)] * 3, process={"Cmd": ["twice"]}),
}


@pytest.mark.parametrize("kind", KINDS)
async def test_images_of_every_kind_arrive_whole(kind: str, store: OciImages, registries: Registries) -> None:
    registry, image = registries(), KINDS[kind]
    digest = lab.push(registry, f"kinds/{kind}", "v1", image)
    pulled = await store.pull(f"{registry.address}/kinds/{kind}:v1", None)
    assert pulled.id == image.id
    assert pulled.repo_tags == (f"{registry.address}/kinds/{kind}:v1",)
    assert pulled.repo_digests == (f"{registry.address}/kinds/{kind}@{digest}",)
    blobs = {
        lab.digest_of(blob): blob for blob in (*(layer.blob for layer in image.layers), image.config, image.manifest)
    }
    assert files(store) == sorted(f"blobs/sha256/{name.removeprefix('sha256:')}" for name in blobs)
    for name, blob in blobs.items():
        assert (store._folder / "blobs/sha256" / name.removeprefix("sha256:")).read_bytes() == blob
    assert pulled.size_bytes == sum(len(blob) for blob in blobs.values()) + 2 * (kind == "twice") * 0
    assert store.list() == (pulled,)


async def test_skopeo_reads_the_same_image_from_our_layout(
    store: OciImages, registries: Registries, tmp_path: Path
) -> None:
    skopeo = shutil.which("skopeo")
    if skopeo is None:
        pytest.skip("skopeo is not installed")
    registry = registries()
    lab.push(registry, "oracle", "v1", KINDS["docker"])
    pulled = await store.pull(f"{registry.address}/oracle:v1", None)
    layout = await store.oci_dir(pulled.id)

    def inspect(source: str) -> object:
        done = subprocess.run(
            [skopeo, "inspect", "--tls-verify=false", source], capture_output=True, text=True, check=True
        )
        found = json.loads(done.stdout)
        return {key: found[key] for key in ("Layers", "Os", "Architecture", "Digest", "Env")}

    ours = await asyncio.to_thread(inspect, f"oci:{layout}")
    assert ours == await asyncio.to_thread(inspect, f"docker://{registry.address}/oracle:v1")
    copied = tmp_path / "copied"
    await asyncio.to_thread(subprocess.run, [skopeo, "copy", "-q", f"oci:{layout}", f"dir:{copied}"], check=True)
    assert (copied / pulled.id.removeprefix("sha256:")).read_bytes() == KINDS["docker"].config


async def test_an_image_that_skopeo_pushed_is_pulled(store: OciImages, registries: Registries, tmp_path: Path) -> None:
    skopeo = shutil.which("skopeo")
    if skopeo is None:
        pytest.skip("skopeo is not installed")
    registry = registries()
    layout = lab.write_oci_layout(tmp_path / "layout", KINDS["zstd"])
    argv = [skopeo, "copy", "-q", "--dest-tls-verify=false", f"oci:{layout}:latest", f"docker://{registry.address}/sko"]
    await asyncio.to_thread(subprocess.run, argv, check=True)
    assert (await store.pull(f"{registry.address}/sko", None)).id == KINDS["zstd"].id


async def test_an_index_gives_this_nodes_platform_and_the_indexs_digest(
    store: OciImages, registries: Registries
) -> None:
    registry = registries()
    other = Image(layers=[Layer.gzip(TOP)], architecture="s390x")
    digest = lab.push_index(registry, "multi", "v1", [other, KINDS["oci"]])
    pulled = await store.pull(f"{registry.address}/multi:v1", None)
    assert pulled.id == KINDS["oci"].id
    assert pulled.repo_digests == (f"{registry.address}/multi@{digest}",)
    by_digest = await store.pull(f"{registry.address}/multi@{digest}", None)
    assert by_digest == pulled


async def test_a_pull_by_digest_has_no_tag(store: OciImages, registries: Registries) -> None:
    registry = registries()
    digest = lab.push(registry, "bydigest", "v1", KINDS["docker"])
    pulled = await store.pull(f"{registry.address}/bydigest:ignored@{digest}", None)
    assert pulled.repo_tags == ()
    assert pulled.repo_digests == (f"{registry.address}/bydigest@{digest}",)


async def test_a_moved_tag_leaves_the_old_image_to_its_digest(store: OciImages, registries: Registries) -> None:
    registry = registries()
    old_digest = lab.push(registry, "moving", "v1", KINDS["docker"])
    old = await store.pull(f"{registry.address}/moving:v1", None)
    lab.push(registry, "moving", "v1", KINDS["oci"])
    new = await store.pull(f"{registry.address}/moving:v1", None)
    assert new.id != old.id
    assert store.get(old.id).repo_tags == ()
    assert store.get(old.id).repo_digests == (f"{registry.address}/moving@{old_digest}",)
    assert store.find(f"{registry.address}/moving:v1") == new


GOOD = {
    "password": Credentials(username=USER, password=PASSWORD),
    "auth field": Credentials(auth=base64.b64encode(f"{USER}:{PASSWORD}".encode()).decode()),
    "identity token": Credentials(identity_token=IDENTITY_TOKEN),
}


@pytest.mark.parametrize(
    ("auth", "kind"),
    [(Auth.BASIC, "password"), (Auth.BASIC, "auth field")] + [(Auth.TOKEN, kind) for kind in GOOD],
)
async def test_every_kind_of_login_works(
    auth: Auth, kind: str, store: OciImages, registries: Registries, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("DEBUG")
    registry = registries(auth=auth)
    lab.push(registry, "private", "v1", KINDS["docker"])
    pulled = await store.pull(f"{registry.address}/private:v1", GOOD[kind])
    assert pulled.id == KINDS["docker"].id
    assert not any(secret in caplog.text for secret in (PASSWORD, IDENTITY_TOKEN, "Bearer ", "Basic "))


async def test_a_registry_token_is_used_as_it_is(store: OciImages, registries: Registries) -> None:
    registry = registries(auth=Auth.TOKEN)
    lab.push(registry, "private", "v1", KINDS["docker"])
    assert registry._tokens is not None
    token = registry._tokens.issue([{"type": "repository", "name": "private", "actions": ["pull"]}])
    asked = len(registry._tokens.requests)
    pulled = await store.pull(f"{registry.address}/private:v1", Credentials(registry_token=token))
    assert pulled.id == KINDS["docker"].id
    assert len(registry._tokens.requests) == asked


@pytest.mark.parametrize("auth", [Auth.BASIC, Auth.TOKEN])
@pytest.mark.parametrize(
    "credentials",
    [
        None,
        Credentials(username=USER, password="wrong"),
        Credentials(username=USER, password=PASSWORD, server_address="elsewhere.example"),
        Credentials(registry_token="nonsense"),
    ],
    ids=["none", "wrong", "for another registry", "token"],
)
async def test_without_the_right_login_nothing_is_pulled(
    auth: Auth, credentials: Credentials | None, store: OciImages, registries: Registries
) -> None:
    registry = registries(auth=auth)
    lab.push(registry, "private", "v1", KINDS["docker"])
    with pytest.raises(PullFailed, match="pull secret") as caught:
        await store.pull(f"{registry.address}/private:v1", credentials)
    assert caught.value.reason == ""
    assert PASSWORD not in str(caught.value)
    assert files(store) == []


async def test_an_image_on_the_node_is_no_way_around_the_login(store: OciImages, registries: Registries) -> None:
    registry = registries(auth=Auth.BASIC)
    lab.push(registry, "private", "v1", KINDS["docker"])
    await store.pull(f"{registry.address}/private:v1", GOOD["password"])
    with pytest.raises(PullFailed, match="pull secret"):
        await store.pull(f"{registry.address}/private:v1", None)


async def test_a_certificate_folder_makes_tls_trusted(open_store: Open, registries: Registries, tmp_path: Path) -> None:
    registry = registries(tls=True)
    lab.push(registry, "tls", "v1", KINDS["docker"])
    reference = f"{registry.address}/tls:v1"
    certs = tmp_path / "certs"
    store = await open_store(certs_dir=str(certs), plain_http_loopback=False)
    with pytest.raises(PullFailed, match="not trusted") as caught:
        await store.pull(reference, None)
    assert str(caught.value).startswith("RegistryUnavailable: ")
    folder = certs / registry.address
    folder.mkdir(parents=True)
    shutil.copy(registry.ca, folder / "ca.crt")
    assert (await store.pull(reference, None)).id == KINDS["docker"].id  # no restart needed


async def test_mirrors_serve_under_the_original_names(open_store: Open, registries: Registries) -> None:
    registry = registries()
    lab.push(registry, "cri-tools/tagged", "v1", KINDS["docker"])
    lab.push(registry, "pause", "3.9", KINDS["oci"])
    store = await open_store(
        mirrors={
            "gcr.io/k8s-staging-cri-tools": [f"http://{registry.address}/cri-tools"],
            # The first mirror is not even there.
            "registry.k8s.io": {"mirrors": ["http://127.0.0.1:1", f"http://{registry.address}"], "origin": False},
        }
    )
    tagged = await store.pull("gcr.io/k8s-staging-cri-tools/tagged:v1", None)
    assert tagged.repo_tags == ("gcr.io/k8s-staging-cri-tools/tagged:v1",)
    assert tagged.repo_digests[0].startswith("gcr.io/k8s-staging-cri-tools/tagged@sha256:")
    assert (await store.pull("registry.k8s.io/pause:3.9", None)).id == KINDS["oci"].id


async def test_a_mirror_without_the_image_falls_back_to_the_registry(open_store: Open, registries: Registries) -> None:
    mirror, origin = registries(), registries(auth=Auth.BASIC)
    lab.push(origin, "only/here", "v1", KINDS["plain"])
    store = await open_store(mirrors={origin.address: [f"http://{mirror.address}"]})
    pulled = await store.pull(f"{origin.address}/only/here:v1", GOOD["password"])
    assert pulled.id == KINDS["plain"].id


async def test_what_does_not_exist_is_said_so(store: OciImages, registries: Registries) -> None:
    registry = registries()
    with pytest.raises(PullFailed, match="does not have it") as caught:
        await store.pull(f"{registry.address}/nothing/here:v1", None)
    assert caught.value.reason == ""
    with pytest.raises(InvalidRequest):
        await store.pull("no reference at all", None)


async def test_a_registry_that_is_away_has_the_reason_that_the_kubelet_reads(store: OciImages) -> None:
    with pytest.raises(PullFailed) as caught:
        await store.pull("127.0.0.1:1/app:v1", None)
    assert str(caught.value).startswith("RegistryUnavailable: ")


async def test_an_image_for_another_platform_is_refused(open_store: Open, registries: Registries) -> None:
    registry = registries()
    lab.push(registry, "foreign", "v1", Image(layers=[Layer.gzip(TOP)], architecture="s390x"))
    store = await open_store()
    with pytest.raises(PullFailed, match="linux/s390x"):
        await store.pull(f"{registry.address}/foreign:v1", None)
    assert files(store) == []
    store = await open_store(platforms=["linux/s390x"])
    assert (await store.pull(f"{registry.address}/foreign:v1", None)).config.architecture == "s390x"


async def test_shared_layers_are_fetched_once(store: OciImages, registries: Registries) -> None:
    registry = registries()
    base = Layer.gzip(Tree().file("big", "b" * 1000).tar())
    images = [Image(layers=[base, Layer.gzip(Tree().file("own", str(n)).tar())]) for n in range(3)]
    for number, image in enumerate(images):
        lab.push(registry, f"shared/{number}", "v1", image)
    before = len(registry.access_log())
    await asyncio.gather(*(store.pull(f"{registry.address}/shared/{number}:v1", None) for number in range(3)))
    fetched = [line for line in registry.access_log()[before:] if lab.digest_of(base.blob) in line and "GET" in line]
    assert len(fetched) == 1
    assert len(store.list()) == 3
