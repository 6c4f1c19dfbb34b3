"""Building a guest: order of modules, the archive, equal bytes from equal inputs, and what is refused."""

from __future__ import annotations

import io
import json
import lzma
import struct
import subprocess
import tarfile
from pathlib import Path

import pytest

from dispatcher.errors import NotFound
from dispatcher_hyper_vm.guest.build import KernelParts, kernel_of_package, make_guest, place_guest
from dispatcher_hyper_vm.guest.debian import _unlz4, read_package, unpack_kernel
from dispatcher_hyper_vm.guest.exec import BuildFailed
from dispatcher_hyper_vm.guest.initramfs import Entry, folder, make_initramfs
from dispatcher_hyper_vm.guest.modules import dependencies, load_order, module_name
from dispatcher_hyper_vm.guest.registry import find_guest, list_guests


def module(*depends: str) -> bytes:
    """The smallest ELF file with a section .modinfo."""
    info = b"license=GPL\0depends=" + ",".join(depends).encode() + b"\0"
    names = b"\0.modinfo\0.shstrtab\0"
    table = 64 + len(info) + len(names)
    head = (
        b"\x7fELF\x02\x01\x01" + bytes(9) + struct.pack("<HHIQQQIHHHHHH", 1, 62, 1, 0, 0, table, 0, 64, 0, 0, 64, 3, 2)
    )
    sections = [(0, 0, 0), (1, 64, len(info)), (10, 64 + len(info), len(names))]
    rows = b"".join(struct.pack("<IIQQQQIIQQ", name, 1, 0, 0, at, size, 0, 0, 1, 0) for name, at, size in sections)
    return head + info + names + rows


NEEDED = ("virtio_console", "virtio_scsi", "sd_mod", "virtio_net", "overlay", "erofs", "crc32c_generic", "ext4")


def kernel() -> KernelParts:
    modules = {name: module("virtio") for name in NEEDED} | {"virtio": module()}
    return KernelParts(
        image=b"\x7fELFkernel", modules=modules, built_in=frozenset(), release="6.1-x", origin={"sha256": "0"}
    )


def test_each_module_comes_behind_what_it_needs() -> None:
    """Deeply, once each, and without what is built in."""
    modules = {"a": module("b", "c-d"), "b": module("e"), "c_d": module("b", "built"), "e": module()}
    assert load_order(modules, frozenset({"built"}), ("a", "e")) == ("e", "b", "c_d", "a")
    assert dependencies(modules["a"]) == ("b", "c_d")
    assert module_name("kernel/drivers/char/hw_random/virtio-rng.ko") == "virtio_rng"
    with pytest.raises(BuildFailed, match="itself"):
        load_order({"a": module("b"), "b": module("a")}, frozenset(), ("a",))
    with pytest.raises(BuildFailed, match="no module erofs"):
        load_order({}, frozenset(), ("erofs",))
    assert load_order({}, frozenset(), ("9p",)) == ()
    with pytest.raises(BuildFailed, match="ELF"):
        dependencies(b"\xfd7zXZ")


def test_the_archive_is_what_cpio_reads(tmp_path: Path) -> None:
    """Names, modes and contents; and the same bytes each time."""
    entries = [folder("d"), Entry(path="d/f", mode=0o100755, data=b"hello"), Entry(path="d/g", mode=0o100644)]
    data = make_initramfs(entries)
    assert data == make_initramfs(entries)
    assert data[:6] == b"070701"
    try:
        listed = subprocess.run(["busybox", "cpio", "-idm"], cwd=tmp_path, input=data, capture_output=True, check=True)
    except FileNotFoundError:
        pytest.skip("busybox is not installed")
    assert listed.returncode == 0
    assert (tmp_path / "d" / "f").read_bytes() == b"hello"
    assert (tmp_path / "d" / "f").stat().st_mode & 0o777 == 0o755


def test_equal_inputs_give_equal_bytes_and_a_manifest(tmp_path: Path) -> None:
    """The digest changes with the agent, and only with what is in the guest."""
    files = make_guest(kernel(), b"agent")
    assert files == make_guest(kernel(), b"agent")
    place_guest(files, tmp_path / "default")
    first = find_guest(tmp_path, "default")
    assert first.release == "6.1-x"
    assert first.modules[0] == "virtio"
    manifest = json.loads((tmp_path / "default" / "manifest.json").read_text(encoding="utf-8"))
    assert manifest["agent"]["bytes"] == 5
    place_guest(make_guest(kernel(), b"other"), tmp_path / "default")
    assert find_guest(tmp_path, "default").digest != first.digest
    assert [path.name for path in tmp_path.iterdir()] == ["default"]
    assert [guest.name for guest in list_guests(tmp_path)] == ["default"]
    for name in ("none", "../default", ""):
        with pytest.raises(NotFound):
            find_guest(tmp_path, name)


def deb(path: Path, files: dict[str, bytes]) -> Path:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:xz") as archive:
        for name, data in files.items():
            info = tarfile.TarInfo(f"./{name}")
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    members = [("debian-binary", b"2.0\n"), ("control.tar.xz", b"odd"), ("data.tar.xz", buffer.getvalue())]
    out = b"!<arch>\n"
    for name, data in members:
        out += f"{name:<16}{0:<12}{0:<6}{0:<6}{100644:<8}{len(data):<10}`\n".encode() + data + b"\n" * (len(data) % 2)
    path.write_bytes(out)
    return path


def test_a_kernel_is_read_from_a_package(tmp_path: Path) -> None:
    """Without dpkg, and without what guests never need."""
    place = "lib/modules/6.1-x/kernel"
    files = {
        "boot/vmlinuz-6.1-x": b"\x7fELF",
        f"{place}/fs/erofs/erofs.ko": module(),
        f"{place}/sound/core/snd.ko": module(),
        "lib/modules/6.1-x/modules.builtin": b"kernel/fs/ext4/ext4.ko\n",
    }
    parts = kernel_of_package(read_package(deb(tmp_path / "linux-image-6.1-x_6.1.9-1_amd64.deb", files)))
    assert (parts.release, list(parts.modules), sorted(parts.built_in)) == ("6.1-x", ["erofs"], ["ext4"])
    assert parts.origin["version"] == "6.1.9-1"
    with pytest.raises(BuildFailed, match="no kernel"):
        kernel_of_package(read_package(deb(tmp_path / "x_1_all.deb", {"usr/x": b""})))
    (tmp_path / "bad.deb").write_bytes(b"nothing")
    with pytest.raises(BuildFailed):
        kernel_of_package(read_package(tmp_path / "bad.deb"))


def bzimage(packed: bytes) -> bytes:
    head = bytearray(1024)
    head[0x1F1] = 1
    head[0x202:0x206] = b"HdrS"
    head[0x248:0x250] = struct.pack("<II", 16, len(packed))
    return bytes(head) + bytes(16) + packed


def test_the_kernel_is_unpacked() -> None:
    """As Debian packs it; and what is no kernel is refused."""
    elf = b"\x7fELF" + bytes(1000)
    assert unpack_kernel(elf) == elf
    assert unpack_kernel(bzimage(lzma.compress(elf) + struct.pack("<I", len(elf)))) == elf
    for bad in (b"", bytes(4096), bzimage(b"what"), bzimage(lzma.compress(b"no elf"))):
        with pytest.raises(BuildFailed):
            unpack_kernel(bad)
    block = b"\x12a" + b"\x01\x00" + b"\x50bcdef"  # "a", six more of it, and five letters
    assert _unlz4(struct.pack("<I", len(block)) + block) == b"aaaaaaabcdef"
