"""The test images are what a registry and an independent client take them for."""

from __future__ import annotations

import io
import json
import subprocess
import tarfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.lab.child import PartMissingError, find_program
from tests.lab.http import request
from tests.lab.images import (
    BUSYBOX,
    DOCKER_MANIFEST,
    Image,
    Layer,
    TestImages,
    Tree,
    base_tree,
    digest_of,
    push,
    write_oci_layout,
)
from tests.lab.registry import IDENTITY_TOKEN, PASSWORD, USER, Auth, Registry, basic


def small_image() -> Image:
    return Image(layers=[Layer.gzip(Tree().file("a/b", "x").tar())], process={"Cmd": ["/a/b"]})


def test_a_tree_is_the_same_tar_each_time_with_links_after_their_targets() -> None:
    def build() -> bytes:
        return Tree().hard_link("bin/a", "bin/z").file("bin/z", "z").symlink("l", "bin/z").whiteout("etc/gone").tar()

    assert build() == build()
    with tarfile.open(fileobj=io.BytesIO(build())) as archive:
        names = archive.getnames()
    assert names.index("bin/z") < names.index("bin/a")
    assert "etc/.wh.gone" in names


def test_the_base_tree_has_what_the_suite_runs() -> None:
    try:
        tar = base_tree().tar()
    except PartMissingError as exc:
        pytest.skip(str(exc))
    with tarfile.open(fileobj=io.BytesIO(tar)) as archive:
        assert archive.getmember("tmp").mode == 0o1777
        assert {"bin/sh", "bin/ls", "bin/top", "bin/brctl", "bin/ping", "bin/netstat", "bin/pgrep", "bin/ipcs"} <= set(
            archive.getnames()
        )
        assert not archive.getmember("bin/ls").issym()


@pytest.mark.lab
def test_the_suite_images_are_served_and_share_ids_where_the_suite_needs_it(test_images: TestImages) -> None:
    tags = [test_images.get(f"gcr.io/k8s-staging-cri-tools/test-image-tags:{tag}").id for tag in "123"]
    names = [test_images.get(f"gcr.io/k8s-staging-cri-tools/test-image-{name}").id for name in "123"]
    assert len(set(tags)) == 1
    assert len(set(names)) == 3
    served = test_images.registry.request(
        "GET", "/v2/e2e-test-images/busybox/manifests/1.29-2", headers={"Accept": DOCKER_MANIFEST}
    )
    assert digest_of(served.body) == test_images.get(BUSYBOX).digest


def test_an_oci_layout_is_readable_by_skopeo(tmp_path: Path) -> None:
    image = Image(layers=[Layer.plain(Tree().file("a", "x").tar())], oci=True)
    layout = write_oci_layout(tmp_path / "layout", image)
    try:
        skopeo = find_program("skopeo")
    except PartMissingError as exc:
        pytest.skip(str(exc))
    shown = subprocess.run([skopeo, "inspect", f"oci:{layout}:latest"], capture_output=True, text=True, check=True)
    assert json.loads(shown.stdout)["Digest"] == image.digest


@pytest.fixture(params=[(Auth.BASIC, False), (Auth.TOKEN, False), (Auth.NONE, True)], ids=["basic", "token", "tls"])
def guarded(request: pytest.FixtureRequest) -> Iterator[Registry]:
    auth, tls = request.param
    try:
        registry = Registry(auth=auth, tls=tls)
    except PartMissingError as exc:
        pytest.skip(str(exc))
    try:
        registry.start()
        yield registry
    finally:
        registry.close()


@pytest.mark.lab
def test_a_guarded_registry_serves_only_who_has_the_key(guarded: Registry) -> None:
    push(guarded, "team/app", "1", small_image())
    assert guarded.request("GET", "/v2/team/app/tags/list").json()["tags"] == ["1"]
    if guarded.tls:
        assert request(guarded.address, "GET", "/v2/").status == 400, "plain HTTP is refused"
    else:
        refused = request(guarded.address, "GET", "/v2/team/app/tags/list")
        assert refused.status == 401
        assert refused.headers["www-authenticate"].startswith("Basic" if guarded.auth is Auth.BASIC else "Bearer")


@pytest.mark.lab
def test_the_token_server_takes_a_password_or_an_identity_token() -> None:
    try:
        registry = Registry(auth=Auth.TOKEN)
        registry.start()
    except PartMissingError as exc:
        pytest.skip(str(exc))
    try:
        challenge = request(registry.address, "GET", "/v2/").headers["www-authenticate"]
        realm = challenge.partition('realm="')[2].partition('"')[0].removeprefix("http://").partition("/")[0]
        path = "/token?service=lab-registry&scope=repository:team/app:pull"
        assert request(realm, "GET", path).status == 401
        assert request(realm, "GET", path, headers={"Authorization": basic(USER, PASSWORD)}).json()["token"]
        form = f"grant_type=refresh_token&service=lab-registry&refresh_token={IDENTITY_TOKEN}".encode()
        assert request(realm, "POST", "/token", body=form).json()["access_token"]
    finally:
        registry.close()
