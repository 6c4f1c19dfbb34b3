"""Unpacking: honest layers give the tree that they describe, hostile ones nothing outside it and no endless work."""

from __future__ import annotations

import gzip
import os
import stat
import struct
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import zstandard

from dispatcher_images.hostile import BadImage
from dispatcher_images.rootfs import resolve_in_root
from tests.images.tars import Bench, Tar, header

pytestmark = [
    pytest.mark.lab,
    pytest.mark.skipif(os.geteuid() != 0, reason="unpacking changes its root folder: needs root"),
]


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    """A bench whose surroundings must be untouched afterwards."""
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "file").write_text("untouched")
    (outside / "file").chmod(0o640)
    work = tmp_path / "work"
    work.mkdir()
    yield Bench(work)
    assert sorted(item.name for item in tmp_path.iterdir()) == ["outside", "work"]
    assert [item.name for item in outside.iterdir()] == ["file"]
    assert (outside / "file").read_text() == "untouched"
    status = (outside / "file").stat()
    assert (stat.S_IMODE(status.st_mode), status.st_uid, status.st_nlink) == (0o640, 0, 1)


# ------------------------------------------------------------------------------------------------------------- honest
async def test_owners_modes_times_and_kinds_are_kept(bench: Bench) -> None:
    root = await bench.unpack(
        Tar()
        .folder("etc", mode=0o700, mtime=1_000_000)
        .add("etc/shadow", b"secret", mode=0o640, uid=1, gid=42, mtime=2_000_000.5)
        .add("bin/su", b"x", mode=0o4755)
        .folder("tmp", mode=0o1777)
        .link("etc/same", "etc/shadow")
        .symlink("etc/link", "/absolute/dangling")
        .add("run/fifo", kind=tarfile.FIFOTYPE, mode=0o600)
    )
    shadow = (root / "etc/shadow").stat()
    assert (stat.S_IMODE(shadow.st_mode), shadow.st_uid, shadow.st_gid) == (0o640, 1, 42)
    assert shadow.st_mtime_ns == 2_000_000_500_000_000
    assert (root / "etc/same").stat().st_ino == shadow.st_ino
    assert stat.S_IMODE((root / "bin/su").stat().st_mode) == 0o4755
    assert stat.S_IMODE((root / "tmp").stat().st_mode) == 0o1777
    assert (root / "etc").stat().st_mtime == 1_000_000
    assert (root / "etc/link").readlink() == Path("/absolute/dangling")
    assert stat.S_ISFIFO((root / "run/fifo").stat().st_mode)


@pytest.mark.parametrize("compress", [bytes, gzip.compress, zstandard.ZstdCompressor().compress])
async def test_every_compression_gives_the_same_tree(bench: Bench, compress: Callable[[bytes], bytes]) -> None:
    root = await bench.unpack(compress(Tar().add("a", b"content" * 1000).bytes()))
    assert (root / "a").read_bytes() == b"content" * 1000


async def test_gzip_members_in_a_row_are_one_layer(bench: Bench) -> None:
    tar = Tar().add("a", b"1" * 3000).add("b", b"2").bytes()
    root = await bench.unpack(gzip.compress(tar[:1000]) + gzip.compress(tar[1000:]) + bytes(100))
    assert (root / "b").read_bytes() == b"2"


async def test_upper_layers_replace_and_hide_what_is_below(bench: Bench) -> None:
    lower = Tar().folder("d").add("d/old", b"1").add("d/sub/deep", b"1").add("file", b"1").add("gone", b"1")
    upper = Tar().add("d/.wh..wh..opq").add("d/new", b"2").add(".wh.gone").folder("file").add("file/inner", b"2")
    root = await bench.unpack(lower, upper)
    assert sorted(os.listdir(root / "d")) == ["new"]
    assert not (root / "gone").exists()
    assert (root / "file/inner").read_bytes() == b"2"


async def test_whiteouts_spare_what_their_own_layer_made_in_any_order(bench: Bench) -> None:
    lower = Tar().add("d/old", b"1").add("e/old", b"1").add("f", b"1")
    upper = (
        Tar()
        .add("d/new", b"2").add("d/deep/er", b"2").add("d/.wh..wh..opq")
        .add("e/new", b"2").add(".wh.e")
        .add("f", b"2").add(".wh.f")
    )  # fmt: skip
    root = await bench.unpack(lower, upper)
    assert sorted(os.listdir(root / "d")) == ["deep", "new"]
    assert os.listdir(root / "e") == ["new"]
    assert (root / "f").read_bytes() == b"2"


async def test_entries_below_a_linked_folder_land_where_a_container_sees_them(bench: Bench) -> None:
    lower = Tar().folder("usr/bin").symlink("bin", "usr/bin").symlink("sbin", "/usr/bin")
    root = await bench.unpack(lower, Tar().add("bin/a", b"1").add("sbin/b", b"2").add("sbin/.wh.nothing"))
    assert sorted(os.listdir(root / "usr/bin")) == ["a", "b"]
    assert (root / "bin").is_symlink()
    assert (root / "sbin").is_symlink()


async def test_a_folder_takes_the_place_of_a_link_to_one(bench: Bench) -> None:
    lower = Tar().folder("real").add("real/x", b"1").symlink("d", "real")
    root = await bench.unpack(lower, Tar().folder("d").add("d/y", b"2"))
    assert not (root / "d").is_symlink()
    assert os.listdir(root / "real") == ["x"]


async def test_sparse_files_keep_their_holes(bench: Bench) -> None:
    # GNU's old format: 512 bytes at 8 MiB, 16 MiB in all.
    block = bytearray(header("sparse", kind=b"S", size=b"00000001000\0"))
    block[386:410] = b"%011o\0%011o\0" % (8 << 20, 512)
    block[483:495] = b"%011o\0" % (16 << 20)
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    root = await bench.unpack(Tar().raw(bytes(block)).raw(b"z" * 512))
    file = root / "sparse"
    assert file.stat().st_size == 16 << 20
    assert file.stat().st_blocks * 512 < 1 << 20
    assert file.read_bytes()[8 << 20 : (8 << 20) + 513] == b"z" * 512 + b"\0"


async def test_only_harmless_extended_attributes_are_kept(bench: Bench) -> None:
    capability = struct.pack("<IIIII", 0x02000001, 1 << 10, 0, 0, 0).decode("latin-1")
    root = await bench.unpack(
        Tar().add(
            "ping",
            b"x",
            pax_headers={
                "SCHILY.xattr.security.capability": capability,
                "SCHILY.xattr.user.note": "kept",
                "SCHILY.xattr.user.overlay.opaque": "y",
                "SCHILY.xattr.trusted.overlay.redirect": "/etc",
                "SCHILY.xattr.security.selinux": "system_u:object_r:shadow_t:s0",
                "SCHILY.xattr.security.ima": "x",
                "SCHILY.xattr.system.posix_acl_access": "x",
            },
        )
    )
    kept = set(os.listxattr(root / "ping"))
    assert kept <= {"security.capability", "user.note"}
    assert os.getxattr(root / "ping", "security.capability") == capability.encode("latin-1")
    assert bench.reply["skipped"]["xattr"] >= 5


async def test_names_that_are_no_utf8_survive(bench: Bench) -> None:
    name = b"caf\xe9".decode("utf-8", "surrogateescape")
    root = await bench.unpack(Tar(tarfile.GNU_FORMAT).add(name, b"1"))
    assert os.listdir(os.fsencode(root)) == [b"caf\xe9"]


async def test_metadata_of_aufs_is_left_out(bench: Bench) -> None:
    root = await bench.unpack(Tar().add(".wh..wh.plnk/1.2", b"x").add(".wh..wh.aufs").add("a", b"1"))
    assert os.listdir(root) == ["a"]
    assert bench.reply["skipped"] == {"aufs metadata": 2}


async def test_an_empty_layer_is_one(bench: Bench) -> None:
    assert os.listdir(await bench.unpack(b"", gzip.compress(bytes(1024)), Tar())) == []


async def test_figures_are_those_of_the_tree(bench: Bench) -> None:
    root = await bench.unpack(Tar().add("a/b", b"x" * 10_000).link("a/c", "a/b"))
    assert bench.reply["inodes"] == 3
    assert 10_000 <= bench.reply["bytes"] == sum(item.stat().st_blocks * 512 for item in (root / "a", root / "a/b"))


# ------------------------------------------------------------------------------------------------------------ hostile
@pytest.mark.parametrize(
    "layer",
    [
        Tar().add("../escape", b"x"),
        Tar().add("a/../../escape", b"x"),
        Tar().add("/../escape", b"x"),
        Tar().add("a/..", kind=tarfile.DIRTYPE),
        Tar().link("stolen", "../outside/file"),
        Tar().link("stolen", "/../../outside/file"),
        Tar().add("d/.wh.x/below", b"x"),
        Tar().folder("d/.wh.x/below"),
        Tar().add("d/.wh..."),
        Tar().add("d/.wh.."),
        Tar().add("d/.wh."),
        Tar().add("", kind=tarfile.REGTYPE),
        Tar().symlink(".", "/outside"),
        Tar().link("self", "self"),
        Tar().link("a", "missing"),
        Tar().symlink("loop", "loop").add("loop/x", b"x"),
        Tar().symlink("dangling", "nowhere/at/all").add("dangling/x", b"x"),
        Tar().add("f", b"x").add("f/below", b"x"),
        Tar().folder("d").link("e", "d"),
        Tar().add("huge-owner", uid=2**32 - 1),
        Tar().add("huge-owner", pax_headers={"uid": str(2**40)}),
        Tar().add("negative", pax_headers={"gid": "-1"}),
        Tar().add("n" * 300, b"x"),
        Tar().add("kind", kind=b"D"),
    ],
    ids=lambda layer: "",
)
async def test_what_no_honest_layer_holds_is_refused(bench: Bench, layer: Tar) -> None:
    with pytest.raises(BadImage):
        await bench.unpack(layer)


@pytest.mark.parametrize("target", ["/", "/../../../../../..", "../../..", "/proc/self/root", "/tmp"])
async def test_links_that_lead_out_stay_inside(bench: Bench, target: str) -> None:
    """Writing, replacing, deleting and linking through a link never leaves the tree."""
    outside = str(bench.folder.parent / "outside")
    lower = Tar().symlink("out", target).symlink("abs", outside).folder(outside).folder("proc/self/root").folder("tmp")
    upper = (
        Tar()
        .add("out/planted", b"x")
        .add("abs/file", b"evil", mode=0o666, uid=7)
        .add("abs/.wh.other")
        .add("abs/.wh..wh..opq")
        .link("stolen", "abs/file")
        .folder("out/more/folders", mode=0o777)
    )
    root = await bench.unpack(lower, upper)
    assert (root / outside.lstrip("/") / "file").read_bytes() == b"evil"
    assert not Path("/planted").exists()
    assert not Path("/tmp/planted").exists()


async def test_a_link_swapped_in_between_entries_is_not_followed_out(bench: Bench) -> None:
    layer = Tar().folder("d").add("d/a", b"1").symlink("d", "/").add("d/b", b"2").folder("d").add("d/c", b"3")
    root = await bench.unpack(layer)
    assert sorted(os.listdir(root)) == ["b", "d"]
    assert os.listdir(root / "d") == ["c"]


async def test_device_nodes_are_left_out_and_counted(bench: Bench) -> None:
    root = await bench.unpack(
        Tar()
        .add("dev/sda", kind=tarfile.BLKTYPE, devmajor=8, devminor=0, mode=0o666)
        .add("dev/mem", kind=tarfile.CHRTYPE, devmajor=1, devminor=1)
        .link("dev/again", "dev/sda")
        .add("dev/zero-whiteout", kind=tarfile.CHRTYPE)
    )
    assert os.listdir(root / "dev") == []
    assert bench.reply["skipped"] == {"device": 4}


async def test_too_many_bytes_are_refused(bench: Bench) -> None:
    with pytest.raises(BadImage, match="more than"):
        await bench.limited(max_bytes=1 << 20).unpack(Tar().add("a", os.urandom(700_000)).add("b", os.urandom(700_000)))


async def test_a_compression_bomb_is_refused_long_before_it_is_unpacked(bench: Bench) -> None:
    zeros = Tar().add("zeros", bytes(30 << 20)).bytes()
    with pytest.raises(BadImage, match="200 times"):
        await bench.unpack(gzip.compress(zeros, 9))


async def test_a_zstd_bomb_is_refused(bench: Bench) -> None:
    bomb = zstandard.ZstdCompressor(level=19).compress(bytes(60 << 20))
    with pytest.raises(BadImage, match=r"times|more than"):
        await bench.job("verify", bomb, diff_id="sha256:" + "0" * 64)


async def test_a_sparse_bomb_is_refused(bench: Bench) -> None:
    with pytest.raises(BadImage, match="more than"):
        await bench.unpack(Tar().add("s", pax_headers={"GNU.sparse.map": "0,0", "GNU.sparse.size": str(1 << 60)}))


async def test_too_many_files_are_refused(bench: Bench) -> None:
    layer = Tar()
    for number in range(300):
        layer.folder(f"d{number}")
    with pytest.raises(BadImage, match="more than 200 files"):
        await bench.limited(max_entries=200).unpack(layer)


async def test_depth_is_bounded_also_when_links_chain_it(bench: Bench) -> None:
    deep = "/".join(["d"] * 100)
    with pytest.raises(BadImage, match="deeper"):
        await bench.unpack(Tar().folder(deep).symlink("s", deep).folder(f"s/{deep}"))


async def test_a_very_long_path_is_refused(bench: Bench) -> None:
    with pytest.raises(BadImage):
        await bench.unpack(Tar().add("/".join(["x"] * 3000), b"1"))


@pytest.mark.parametrize(
    "layer",
    [
        b"this is no tar archive" * 100,
        gzip.compress(b"x" * 600),
        gzip.compress(Tar().add("a", b"x" * 5000).bytes())[:-30],
        b"\x1f\x8b" + os.urandom(100),
        b"\x28\xb5\x2f\xfd" + b"\xff" * 100,
        Tar().add("a", b"x" * 5000).bytes()[:2000],
        Tar().add("a", b"x").raw(b"garbage between entries" * 30).bytes(),
        header("big", size=b"77777777777\0"),
        header("endless", size=b"\x80\x00\x00\x00\x7f\xff\xff\xff\xff\xff\xff\xff"),
        header("negative", size=b"\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xfe\x00"),
        header("pax", kind=b"x", size=b"17777777777\0"),
        header("long", kind=b"L", size=b"17777777777\0"),
        header("pax", kind=b"x", size=b"00000000006\0") + b"0 a=b\n".ljust(512, b"\0") + header("a"),
        (header("pax", kind=b"x", size=b"00000000000\0")) * 100,
        header("ext", kind=b"L", size=b"00000000005\0") + b"name\0".ljust(512, b"\0"),
        header("dir", kind=b"5", size=b"\xff" * 12),
    ],
    ids=range(16),
)
async def test_malformed_archives_are_refused_not_half_read(bench: Bench, layer: bytes) -> None:
    with pytest.raises(BadImage):
        await bench.unpack(layer)


async def test_a_layer_that_is_not_what_the_config_promises_is_refused(bench: Bench) -> None:
    with pytest.raises(BadImage, match="promises"):
        await bench.job("verify", Tar().add("a").bytes(), diff_id="sha256:" + "0" * 64)


async def test_bytes_behind_the_archives_end_count(bench: Bench) -> None:
    tar = Tar().add("a", b"1").bytes()
    root = await bench.unpack(gzip.compress(tar + b"trailing junk"))
    assert os.listdir(root) == ["a"]


# ----------------------------------------------------------------------------------------------------- account files
async def accounts(bench: Bench, *layers: Tar) -> dict[str, str]:
    return await bench.job("accounts", *[layer.bytes() for layer in layers])


async def test_account_files_are_those_of_the_highest_layer(bench: Bench) -> None:
    import base64

    lower = Tar().add("etc/passwd", b"old").add("etc/group", b"group")
    found = await accounts(bench, lower, Tar().add("./etc/passwd", b"new"))
    assert {name: base64.b64decode(value) for name, value in found.items()} == {"passwd": b"new", "group": b"group"}


@pytest.mark.parametrize("hiding", ["etc/.wh.passwd", ".wh.etc", "etc/.wh..wh..opq", ".wh..wh..opq"])
async def test_hidden_account_files_do_not_count(bench: Bench, hiding: str) -> None:
    found = await accounts(bench, Tar().add("etc/passwd", b"old"), Tar().add(hiding))
    assert "passwd" not in found


@pytest.mark.parametrize(
    "layer",
    [
        Tar().symlink("etc/passwd", "/proc/self/environ"),
        Tar().add("etc/passwd", kind=tarfile.FIFOTYPE),
        Tar().symlink("etc", "elsewhere"),
        Tar().link("etc/passwd", "elsewhere"),
    ],
    ids=["link", "fifo", "linked folder", "hard link"],
)
async def test_account_files_behind_links_are_left_to_the_tree(bench: Bench, layer: Tar) -> None:
    assert await bench.job("accounts", layer.bytes()) == {"indirect": True}


async def test_a_huge_account_file_is_refused(bench: Bench) -> None:
    with pytest.raises(BadImage, match="larger than"):
        await accounts(bench, Tar().add("etc/passwd", bytes(5 << 20)))


# --------------------------------------------------------------------------------------------------------- sub paths
async def test_sub_paths_resolve_with_the_image_as_root(bench: Bench) -> None:
    outside = bench.folder.parent / "outside"
    root = await bench.unpack(
        Tar()
        .add("data/file", b"x")
        .symlink("abs", "/data")
        .symlink("up", "../../../../data")
        .symlink("steal", str(outside / "file"))
        .symlink("steal2", "../../outside/file")
        .symlink("magic", "/proc/self/root")
        .symlink("loop", "loop")
    )
    for path in ("data/file", "abs/file", "up/file", "./data//file"):
        assert resolve_in_root(root, path) == root / "data/file"
    assert resolve_in_root(root, "") == root
    from dispatcher.errors import InvalidRequest

    for path in (
        "steal",
        "steal2",
        "magic",
        "loop",
        "missing",
        "../outside/file",
        "/data",
        "data/../data",
        "data/file/x",
    ):
        with pytest.raises(InvalidRequest):
            resolve_in_root(root, path)
