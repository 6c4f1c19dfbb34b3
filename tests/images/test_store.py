"""What the store answers, keeps, hides and frees; and that it starts whole after any crash."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from dispatcher.errors import InvalidRequest, NotFound, RuntimeDown
from dispatcher.model import FilesystemUsage, GroupsPolicy, ImageId
from dispatcher.model import Image as StoredImage
from dispatcher_images.provider import OciImages
from tests.images.conftest import Open, files, settle
from tests.images.odd_registry import OddRegistry
from tests.lab.images import Image, Layer, Tree

BASE = Layer.gzip(Tree().file("etc/passwd", "root:x:0:0::/:/bin/sh\nwww:x:33:33::/:/bin/sh\n").tar())


def image(name: str, **process: object) -> Image:
    return Image(layers=[BASE, Layer.gzip(Tree().file(name, name).tar())], process=process)


@pytest.fixture
async def one(odd: OddRegistry, store: OciImages) -> StoredImage:
    """A store with one image under two tags of one repository and one of another."""
    for reference in (odd.put("a", "1", image("x")), odd.put("a", "2", image("x")), odd.put("b", "1", image("x"))):
        pulled = await store.pull(reference, None)
    return pulled


def every_reference(one: StoredImage) -> list[str]:
    digits = one.id.removeprefix("sha256:")
    return [one.id, digits, digits[:12], digits[:13], f"sha256:{digits[:20]}", *one.repo_tags, *one.repo_digests,
            f"{one.repo_tags[0]}@{one.repo_digests[0].partition('@')[2]}", one.repo_digests[0].partition("@")[2]]  # fmt: skip


async def test_every_kind_of_reference_gives_the_very_same_image(store: OciImages, one: StoredImage) -> None:
    assert len(one.repo_tags) == 3
    assert len(one.repo_digests) == 2
    for reference in every_reference(one):
        assert store.find(reference) == one, reference
    assert store.list() == (one,)


async def test_what_nobody_has_is_not_found(store: OciImages, one: StoredImage) -> None:
    digits = one.id.removeprefix("sha256:")
    for reference in (
        "",
        "nothing",
        "no:where",
        "UPPER",
        digits[:11],
        digits[1:20],
        "sha256:",
        "sha256:" + "0" * 64,
        "::",
    ):
        assert store.find(reference) is None, reference
        await store.remove(reference)
    with pytest.raises(NotFound):
        store.get(ImageId("sha256:" + "0" * 64))


async def test_a_name_wins_over_an_id_that_begins_alike(odd: OddRegistry, store: OciImages) -> None:
    """An attacker who crafts an id must not answer for somebody else's image name."""
    first = await store.pull(odd.put("a", "1", image("x")), None)
    prefix = first.id.removeprefix("sha256:")[:12]
    store._store._names[f"docker.io/library/{prefix}:latest"] = ImageId("sha256:" + "f" * 64)
    assert store._store._resolve(prefix) == "sha256:" + "f" * 64
    del store._store._names[f"docker.io/library/{prefix}:latest"]


async def test_an_ambiguous_prefix_is_not_found(store: OciImages, one: StoredImage) -> None:
    twin = ImageId(one.id[:-1] + ("0" if one.id[-1] != "0" else "1"))
    store._store._images[twin] = store._store._images[one.id]
    assert store.find(one.id[7:27]) is None
    del store._store._images[twin]


@pytest.mark.parametrize("which", range(11))
async def test_removing_by_any_reference_removes_all_names(store: OciImages, one: StoredImage, which: int) -> None:
    references = every_reference(one)
    await store.remove(references[which])
    assert store.list() == ()
    assert all(store.find(reference) is None for reference in references)
    assert files(store) == []
    await store.remove(references[which])


async def test_removals_at_once_all_succeed(store: OciImages, one: StoredImage) -> None:
    async def remove() -> None:
        await store.remove(one.id)
        assert store.find(one.id) is None

    await asyncio.gather(*(remove() for _ in range(5)))


async def test_removing_one_image_spares_the_layers_of_another(odd: OddRegistry, store: OciImages) -> None:
    first = await store.pull(odd.put("a", "1", image("x")), None)
    second = await store.pull(odd.put("b", "1", image("y")), None)
    await store.remove(first.id)
    await store.unpacked(second.id)
    assert store.list() == (second,)


@pytest.mark.parametrize(
    ("user", "uid", "name"),
    [("1002", 1002, ""), ("www-data", None, "www-data"), ("1003:1004", 1003, ""), ("www-data:100", None, "www-data"),
     ("", None, ""), ("4294967296", None, "4294967296")],
)  # fmt: skip
async def test_the_images_user_is_told(
    odd: OddRegistry, store: OciImages, user: str, uid: int | None, name: str
) -> None:
    pulled = await store.pull(odd.put("a", "1", image("x", User=user)), None)
    assert (pulled.uid, pulled.username) == (uid, name)


async def test_pinned_images_are_marked_and_still_removable(odd: OddRegistry, open_store: Open) -> None:
    reference = odd.put("pause", "3.9", image("x"))
    store = await open_store(pinned=[reference])
    assert (await store.pull(reference, None)).pinned
    assert not (await store.pull(odd.put("b", "1", image("y")), None)).pinned
    await store.remove(reference)
    assert store.find(reference) is None


async def test_images_survive_a_restart(odd: OddRegistry, open_store: Open) -> None:
    store = await open_store()
    before = await store.pull(odd.put("a", "1", image("x", Cmd=["run"])), None)
    tree = await store.unpacked(before.id)
    store = await open_store()
    assert store.list() == (before,)
    assert await store.unpacked(before.id) == tree
    assert (tree / "x").read_text() == "x"


# ------------------------------------------------------------------------------------------------------------- leases
async def test_a_leased_image_is_hidden_and_freed_at_its_last_release(store: OciImages, one: StoredImage) -> None:
    store.lease("c1", one.id)
    store.lease("c1", one.id)
    store.lease("c2", one.id)
    await store.remove(one.id)
    assert store.list() == ()
    assert store.find(one.id) is None
    assert store.get(one.id).config == one.config
    assert (await store.unpacked(one.id) / "x").exists()
    store.release("c1")
    store.release("c1")
    assert files(store) != []
    store.release("c2")
    await settle(store)
    assert files(store) == []
    with pytest.raises(NotFound):
        store.get(one.id)
    with pytest.raises(NotFound):
        store.lease("c3", one.id)


async def test_a_hidden_image_that_is_pulled_again_is_back_without_a_download(
    odd: OddRegistry, store: OciImages
) -> None:
    reference = odd.put("a", "1", image("x"))
    before = await store.pull(reference, None)
    store.lease("c1", before.id)
    await store.remove(reference)
    fetched = len(odd.requests("/blobs/"))
    assert await store.pull(reference, None) == before
    assert len(odd.requests("/blobs/")) == fetched
    store.release("c1")
    await settle(store)
    assert store.list() == (before,)


async def test_leases_come_from_the_core_at_start(odd: OddRegistry, open_store: Open) -> None:
    store = await open_store()
    leased = await store.pull(odd.put("a", "1", image("x")), None)
    store.lease("c1", leased.id)
    await store.remove(leased.id)
    store = await open_store((("c1", leased.id), ("c9", ImageId("sha256:" + "0" * 64))))
    assert store.list() == ()
    assert store.get(leased.id).id == leased.id
    store = await open_store()  # the container is gone, and so is the lease
    assert files(store) == []


# --------------------------------------------------------------------------------------------------------------- disk
class Engine:
    def __init__(self, usage: tuple[FilesystemUsage, ...] = ()) -> None:
        self.usage = usage
        self.forgotten: list[ImageId] = []
        self.called = asyncio.Event()
        self.is_down = False

    async def forget_image(self, image_id: ImageId) -> None:
        self.called.set()
        if self.is_down:
            raise RuntimeDown("The engine is away.")
        self.forgotten.append(image_id)

    async def copies_disk_usage(self) -> tuple[FilesystemUsage, ...]:
        if self.is_down:
            raise RuntimeDown("The engine is away.")
        return self.usage


async def test_disk_figures_follow_what_is_there(odd: OddRegistry, store: OciImages, tmp_path: Path) -> None:
    empty = (await store.disk()).image_filesystems[0]
    assert Path(empty.mountpoint).is_dir()
    assert (await store.disk()).container_filesystems
    pulled = await store.pull(odd.put("a", "1", image("x")), None)
    with_blobs = (await store.disk()).image_filesystems[0]
    assert with_blobs.used_bytes >= empty.used_bytes + pulled.size_bytes
    assert with_blobs.inodes_used >= empty.inodes_used + 4
    await store.unpacked(pulled.id)
    with_tree = (await store.disk()).image_filesystems[0]
    assert with_tree.inodes_used == with_blobs.inodes_used + 4  # the root, etc, etc/passwd and x
    await store.oci_dir(pulled.id)
    here = FilesystemUsage(timestamp_ns=1, mountpoint=str(tmp_path), used_bytes=1 << 30, inodes_used=5)
    there = FilesystemUsage(timestamp_ns=1, mountpoint="/dev/shm", used_bytes=7, inodes_used=7)
    store.add_engine(Engine((here, there)))
    down = Engine()
    down.is_down = True
    store.add_engine(down)
    summed = (await store.disk()).image_filesystems
    assert summed[0].used_bytes >= with_tree.used_bytes + (1 << 30)
    if os.stat("/dev/shm").st_dev != os.stat(tmp_path).st_dev:
        assert summed[1:] == (there,)
    await store.remove(pulled.id)
    assert (await store.disk()).image_filesystems[0].inodes_used <= empty.inodes_used + 5 + 1


async def test_engines_drop_their_copies_when_an_image_goes(
    odd: OddRegistry, open_store: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dispatcher_images.provider._FORGET_RETRY_S", 0.02)
    store = await open_store()
    engine = Engine()
    store.add_engine(engine)
    engine.is_down = True
    pulled = await store.pull(odd.put("a", "1", image("x")), None)
    await store.remove(pulled.id)
    await asyncio.wait_for(engine.called.wait(), 5)
    store = await open_store()  # also after a restart, when the engine comes back
    engine.is_down = False
    store.add_engine(engine)
    async with asyncio.timeout(5):
        while store._store.to_forget:
            await asyncio.sleep(0.01)
    assert engine.forgotten == [pulled.id]


async def test_an_image_pulled_again_is_not_forgotten(odd: OddRegistry, store: OciImages) -> None:
    reference = odd.put("a", "1", image("x"))
    pulled = await store.pull(reference, None)
    await store.remove(pulled.id)
    await store.pull(reference, None)
    engine = Engine()
    store.add_engine(engine)
    await asyncio.sleep(0)
    assert store._store.to_forget == set()
    assert engine.forgotten == []


async def test_the_user_is_resolved_from_the_images_own_files(odd: OddRegistry, store: OciImages) -> None:
    pulled = await store.pull(odd.put("a", "1", image("x")), None)
    found = await store.resolve_user(
        pulled.id, user="www", uid=None, gid=None, supplemental_groups=(5,), policy=GroupsPolicy.MERGE
    )
    assert (found.uid, found.gid, found.supplemental_groups) == (33, 33, (33, 5))


@pytest.mark.parametrize(
    ("tree", "uid"),
    [
        (Tree().file("nix/accounts", "www:x:44:44::/:/bin/sh\n").symlink("etc/passwd", "/nix/accounts"), 44),
        (Tree().file("real/passwd", "www:x:45:45::/:/bin/sh\n").symlink("etc", "../../real"), 45),
        (Tree().symlink("etc/passwd", "/../../../../../etc/passwd"), None),
        (Tree().symlink("etc/passwd", "/proc/self/environ"), None),
        (Tree().symlink("etc/passwd", "loop").symlink("etc/loop", "passwd"), None),
        (Tree().folder("etc/passwd"), None),
    ],
    ids=["link", "linked folder", "out", "host", "loop", "folder"],
)
async def test_account_files_behind_links_are_the_images_own(
    odd: OddRegistry, store: OciImages, tree: Tree, uid: int | None
) -> None:
    pulled = await store.pull(odd.put("a", "1", Image(layers=[Layer.gzip(tree.tar())])), None)

    async def resolve(user: str) -> int:
        found = await store.resolve_user(
            pulled.id, user=user, uid=None, gid=None, supplemental_groups=(), policy=GroupsPolicy.MERGE
        )
        return found.uid

    if uid is None:
        with pytest.raises(InvalidRequest):
            await resolve("www")
        with pytest.raises(InvalidRequest):
            await resolve("daemon")  # the host has one
    else:
        assert await resolve("www") == uid


# ------------------------------------------------------------------------------------------------------------- crashes
async def test_leftovers_and_damage_are_mended_at_start(odd: OddRegistry, open_store: Open) -> None:
    store = await open_store()
    kept = await store.pull(odd.put("a", "1", image("x")), None)
    hurt = await store.pull(odd.put("b", "1", image("y")), None)
    await store.unpacked(hurt.id)
    folder = store._folder
    own = next(
        item
        for item in store._store.stored(hurt.id).manifest.layers
        if item not in store._store.stored(kept.id).manifest.layers
    )
    await store.aclose()
    (folder / "blobs/sha256" / own.digest.removeprefix("sha256:")).unlink()
    for surplus in ("blobs/sha256/" + "0" * 64, "arriving/x.1", "tmp/y", "erofs/" + "1" * 64 + ".erofs"):
        (folder / surplus).write_text("left")
    (folder / "trees" / ("2" * 64) / "deep").mkdir(parents=True)
    store = await open_store()
    assert store.list() == (kept,)
    assert sorted(path.name for path in (folder / "trees").iterdir()) == []
    names = set(files(store))
    assert len(names) == 4
    assert all(name.startswith("blobs/") for name in names)
    assert (await store.pull(f"{odd.address}/b:1", None)).id == hurt.id


async def test_an_unreadable_index_is_set_aside(odd: OddRegistry, open_store: Open) -> None:
    store = await open_store()
    await store.pull(odd.put("a", "1", image("x")), None)
    await store.aclose()
    (store._folder / "index.db").write_bytes(b"no database" * 1000)
    told: list[str] = []
    store = await open_store(notify=lambda reason, _message: told.append(reason))
    assert told == ["ImageIndexUnreadable"]
    assert store.list() == ()
    assert (store._folder / "index.db.unreadable").exists()
    assert (await store.pull(f"{odd.address}/a:1", None)).repo_tags


CRASH = """
import asyncio, sys, time
from pathlib import Path
from dispatcher.api import Services
from dispatcher_images.config import ImagesConfig
from dispatcher_images.provider import OciImages

async def main():
    folder, reference = sys.argv[1:]
    services = Services(state_dir=Path(folder), run_dir=Path(folder), node_uuid="n", now_ns=time.time_ns)
    store = OciImages(ImagesConfig(), services)
    await store.start(())
    pulled = await store.pull(reference, None)
    await store.oci_dir(pulled.id)
    await store.unpacked(pulled.id)
    await store.remove(pulled.id)
    await store.aclose()

asyncio.run(main())
"""


def crash_run(folder: Path, reference: str, **environ: str) -> int:
    folder.mkdir(exist_ok=True)
    done = subprocess.run(
        [sys.executable, "-c", CRASH, str(folder), reference],
        env={**os.environ, **environ}, capture_output=True, text=True, check=False, timeout=50,
    )  # fmt: skip
    assert done.returncode in {0, -signal.SIGKILL}, done.stderr
    return done.returncode


def passages(points: list[str], *, every: bool) -> list[tuple[str, int]]:
    """Where to kill: each point at one of its passages, or at the first, a middle and the last one."""
    chosen = []
    for number, name in enumerate(sorted(set(points))):
        count = points.count(name)
        times = sorted({1, (count + 1) // 2, count})
        chosen += [(name, at) for at in times] if every else [(name, times[number % len(times)])]
    return chosen


async def killed_at_points(odd: OddRegistry, open_store: Open, tmp_path: Path, *, every: bool) -> int:
    reference = odd.put("a", "1", image("x"))
    trace, state = tmp_path / "trace", tmp_path / "state"
    passing = {"DISPATCHER_FAILPOINTS": "*:before=trace,*:after=trace", "DISPATCHER_FAILPOINT_TRACE": str(trace)}
    assert await asyncio.to_thread(crash_run, tmp_path / "traced", reference, **passing) == 0
    wanted = passages(trace.read_text().split(), every=every)
    for name, at in wanted:
        shutil.rmtree(state, ignore_errors=True)
        armed = {"DISPATCHER_FAILPOINTS": f"{name}=kill@{at}"}
        assert await asyncio.to_thread(crash_run, state, reference, **armed) == -signal.SIGKILL, armed
        store = await open_store()
        check_whole(store)
        pulled = await store.pull(reference, None)
        await store.remove(pulled.id)
        assert files(store) == [], armed
        await store.aclose()
    return len(wanted)


@pytest.mark.timeout(300)
async def test_killed_at_every_failpoint_the_store_starts_whole(
    odd: OddRegistry, open_store: Open, tmp_path: Path
) -> None:
    points = await killed_at_points(odd, open_store, tmp_path, every=False)
    print(f"killed at {points} failpoints of the image store")
    assert points >= 20


@pytest.mark.soak
@pytest.mark.timeout(1800)
async def test_killed_at_several_passages_of_every_failpoint_the_store_starts_whole(
    odd: OddRegistry, open_store: Open, tmp_path: Path
) -> None:
    await killed_at_points(odd, open_store, tmp_path, every=True)


def check_whole(store: OciImages) -> None:
    """Nothing unfinished lies about, and every image is complete."""
    needed = {digest.removeprefix("sha256:") for item in store._store._images.values() for digest in item.digests}
    found = files(store)
    assert {Path(name).name for name in found if name.startswith("blobs/")} == needed
    assert [name for name in found if re.match("arriving|tmp", name)] == []
    for item in store._store._images.values():
        for layer in item.manifest.layers:
            assert store._store.content.has(layer.digest, layer.size)


async def test_a_full_disk_is_said_so_and_leaves_nothing(odd: OddRegistry, tmp_path: Path) -> None:
    from dispatcher.errors import OutOfResources
    from tests.images.conftest import make_provider

    small = tmp_path / "small"
    small.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "none", str(small)], check=False)
    if mounted.returncode:
        pytest.skip("cannot mount a tmpfs here")
    try:
        store = make_provider(small)
        await store.start(())
        big = Image(layers=[Layer.plain(Tree().file("big", os.urandom(3 << 20)).tar())])
        with pytest.raises(OutOfResources, match="disk"):
            await store.pull(odd.put("big", "1", big), None)
        with contextlib.suppress(OutOfResources):
            store._puller._content.free_bytes = lambda: 1 << 40  # type: ignore[method-assign]
            await store.pull(f"{odd.address}/big:1", None)
        assert files(store) == []
        await store.aclose()
    finally:
        subprocess.run(["umount", str(small)], check=True)
