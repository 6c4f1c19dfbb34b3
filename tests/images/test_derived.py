"""What runtimes are given: layouts, archives for engines, trees, erofs files."""

from __future__ import annotations

import asyncio
import hashlib
import io
import json
import os
import shutil
import subprocess
import tarfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from dispatcher.errors import InvalidRequest, NotFound, OutOfResources
from dispatcher.model import ImageId
from dispatcher_images.provider import OciImages
from tests.images.conftest import Open, files
from tests.images.odd_registry import OddRegistry
from tests.images.tars import Tar
from tests.lab.engine import Engine
from tests.lab.images import Image, Layer, Tree

LOWER = Tree().file("bin/tool", "tool", 0o4755).file("etc/passwd", "root:x:0:0::/:/bin/sh\n").file("gone", "x").tar()
UPPER = Tree().file("data/file", "hello", uid=7, gid=8).whiteout("gone").symlink("link", "/data/file").tar()
IMAGE = Image(
    layers=[Layer.gzip(LOWER), Layer.zstd(UPPER), Layer.gzip(LOWER)], process={"Cmd": ["/bin/tool"]}, oci=True
)


@pytest.fixture
async def image_id(odd: OddRegistry, store: OciImages) -> ImageId:
    return (await store.pull(odd.put("app", "v1", IMAGE), None)).id


async def test_an_archive_holds_the_config_and_inflated_layers(store: OciImages, image_id: ImageId) -> None:
    path = await store.docker_archive(image_id, "cri-dispatcher/app:1")
    with tarfile.open(path) as tar:
        content = {member.name: tar.extractfile(member).read() for member in tar}  # type: ignore[union-attr]
    (manifest,) = json.loads(content["manifest.json"])
    assert manifest["RepoTags"] == ["cri-dispatcher/app:1"]
    assert content[manifest["Config"]] == IMAGE.config
    assert [content[name] for name in manifest["Layers"]] == [LOWER, UPPER, LOWER]
    path.unlink()
    assert [name for name in files(store) if name.startswith("tmp")] == []


@pytest.mark.lab
async def test_a_real_engine_loads_the_archive_with_the_same_id(
    store: OciImages, image_id: ImageId, engine: Engine
) -> None:
    path = await store.docker_archive(image_id, "cri-dispatcher/app:1")

    def load() -> str:
        docker = ["docker", "-H", f"unix://{engine.socket}"]
        subprocess.run([*docker, "load", "-q", "-i", str(path)], check=True, capture_output=True)
        argv = [*docker, "image", "inspect", "-f", "{{.Id}}", "cri-dispatcher/app:1"]
        found = subprocess.run(argv, check=True, capture_output=True, text=True).stdout.strip()
        subprocess.run([*docker, "rmi", "cri-dispatcher/app:1"], check=True, capture_output=True)
        return found

    if shutil.which("docker") is None:
        pytest.skip("no docker command")
    assert await asyncio.to_thread(load) == image_id
    path.unlink()


@pytest.mark.parametrize("name", ["", "x", "x:", ":y", "a b:c", "$(id):x", "x:y\n"])
async def test_odd_names_for_engines_are_refused(store: OciImages, image_id: ImageId, name: str) -> None:
    with pytest.raises(InvalidRequest):
        await store.docker_archive(image_id, name)


async def test_the_tree_is_what_a_container_sees(store: OciImages, image_id: ImageId) -> None:
    tree = await store.unpacked(image_id)
    assert (tree / "data/file").read_text() == "hello"
    assert (tree / "data/file").stat().st_uid == 7
    assert (tree / "bin/tool").stat().st_mode & 0o7777 == 0o4755
    assert await store.sub_path(image_id, "link") == tree / "data/file"
    with pytest.raises(InvalidRequest):
        await store.sub_path(image_id, "../x")


async def test_many_who_ask_at_once_share_one_unpacking(
    store: OciImages, image_id: ImageId, monkeypatch: pytest.MonkeyPatch
) -> None:
    jobs = []
    run = store._workers.run

    async def counted(job: Mapping[str, Any]) -> dict[str, Any]:
        jobs.append(job["job"])
        return await run(job)

    monkeypatch.setattr(store._workers, "run", counted)
    trees = await asyncio.gather(*(store.unpacked(image_id) for _ in range(8)))
    assert len(set(trees)) == 1
    assert jobs == ["unpack"]


async def test_cancelled_unpacking_leaves_nothing(store: OciImages, image_id: ImageId) -> None:
    before = files(store)
    task = asyncio.create_task(store.unpacked(image_id))
    while not list((store._folder / "tmp").iterdir()):
        await asyncio.sleep(0)
    await asyncio.sleep(0.03)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert files(store) == before
    assert list((store._folder / "tmp").iterdir()) == []
    assert (await store.unpacked(image_id) / "data/file").exists()


async def test_a_removal_waits_for_what_is_being_made(store: OciImages, image_id: ImageId) -> None:
    task = asyncio.create_task(store.unpacked(image_id))
    await asyncio.sleep(0)
    await store.remove(image_id)
    with_result = await asyncio.gather(task, return_exceptions=True)
    assert isinstance(with_result[0], Path | NotFound)
    async with asyncio.timeout(5):
        while files(store):
            await asyncio.sleep(0.01)


async def test_an_image_that_is_not_there_is_not_found(store: OciImages) -> None:
    missing = ImageId("sha256:" + "0" * 64)
    for make in (store.oci_dir, store.unpacked, store.erofs):
        with pytest.raises(NotFound):
            await make(missing)
    with pytest.raises(NotFound):
        await store.docker_archive(missing, "x/y:z")
    assert files(store) == []


async def test_a_hostile_tree_is_refused_in_words(odd: OddRegistry, store: OciImages) -> None:
    evil = Image(layers=[Layer.gzip(Tar().add("../../etc/cron.d/evil", b"x").bytes())])
    pulled = await store.pull(odd.put("evil", "v1", evil), None)
    for make in (store.unpacked, store.erofs):
        with pytest.raises(InvalidRequest, match=r"'\.\.'"):
            await make(pulled.id)
    assert list((store._folder / "tmp").iterdir()) == []


needs_erofs = pytest.mark.skipif(shutil.which("mkfs.erofs") is None, reason="erofs-utils is not installed")


@needs_erofs
@pytest.mark.parametrize("compression", ["none", "lz4"])
async def test_an_erofs_file_is_made_once_and_holds_the_tree(
    odd: OddRegistry, open_store: Open, compression: str
) -> None:
    store = await open_store(erofs_compression=compression)
    image_id = (await store.pull(odd.put("app", "v1", IMAGE), None)).id
    first, second = await asyncio.gather(store.erofs(image_id), store.erofs(image_id))
    assert first == second
    content = first.read_bytes()
    assert content[1024:1028] == b"\xe2\xe1\xf5\xe0"
    assert store.erofs_digest(image_id) == "sha256:" + hashlib.sha256(content).hexdigest()
    if compression == "none":
        assert b"hello" in content
    check = shutil.which("fsck.erofs")
    if check is not None:
        await asyncio.to_thread(subprocess.run, [check, str(first)], check=True, capture_output=True)
    changed = first.stat().st_mtime_ns
    store = await open_store(erofs_compression=compression)
    assert (await store.erofs(image_id)).stat().st_mtime_ns == changed
    await store.remove(image_id)
    assert not first.exists()


@needs_erofs
async def test_an_erofs_file_is_capped(odd: OddRegistry, open_store: Open) -> None:
    store = await open_store(max_erofs_bytes=1 << 20)
    big = Image(layers=[Layer.plain(Tree().file("big", os.urandom(3 << 20)).tar())])
    pulled = await store.pull(odd.put("big", "v1", big), None)
    with pytest.raises(OutOfResources, match=r"mkfs\.erofs"):
        await store.erofs(pulled.id)
    assert [name for name in files(store) if name.startswith(("tmp", "erofs"))] == []


async def test_the_layout_shares_its_blobs_with_the_store(store: OciImages, image_id: ImageId) -> None:
    layout = await store.oci_dir(image_id)
    assert layout == await store.oci_dir(image_id)
    index = json.loads((layout / "index.json").read_text())
    blob = layout / "blobs/sha256" / index["manifests"][0]["digest"].removeprefix("sha256:")
    assert blob.read_bytes() == IMAGE.manifest
    assert blob.stat().st_nlink == 2
    await store.remove(image_id)
    assert not layout.exists()


def test_sizes_in_archives_are_right_beyond_octal() -> None:
    """A layer above 8 GiB needs the binary form of the size field."""
    from dispatcher_images.worker import _header

    block = _header("x.tar", 9 << 30)
    assert len(block) == 512
    assert tarfile.TarInfo.frombuf(block, "utf-8", "strict").size == 9 << 30
    assert io.BytesIO(block).read(5) == b"x.tar"
