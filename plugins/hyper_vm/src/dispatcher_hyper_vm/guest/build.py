"""Building a guest: kernel, initramfs and manifest in a folder, in one act."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import stat
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from dispatcher.api import effect
from dispatcher_hyper_vm.guest.debian import Package, read_files, unpack_kernel
from dispatcher_hyper_vm.guest.exec import BuildFailed, compile_agent
from dispatcher_hyper_vm.guest.initramfs import Entry, folder, make_initramfs
from dispatcher_hyper_vm.guest.modules import load_order, module_name

MANIFEST_SCHEMA = 1
KERNEL, INITRAMFS, MANIFEST = "vmlinux", "initramfs", "manifest.json"
# Where a kernel keeps what guests may need; the rest of its modules is not even looked at.
_PLACES = ("kernel/crypto/", "kernel/fs/", "kernel/lib/", "kernel/net/", "kernel/arch/", "kernel/block/", "kernel/mm/")
_DRIVERS = ("virtio/", "scsi/", "block/", "net/", "char/", "crypto/", "nvdimm/")


@dataclass(frozen=True, slots=True, kw_only=True)
class KernelParts:
    """A kernel as it is found: its image (bzImage or ELF), its modules by name, and what it has built in."""

    image: bytes
    modules: Mapping[str, bytes]
    built_in: frozenset[str]
    release: str
    origin: Mapping[str, str]  # for the manifest


def _wants(path: str) -> bool:
    _, found, rest = path.partition("/kernel/drivers/")
    if found:
        return rest.startswith(_DRIVERS)
    return any(f"/{place}" in path for place in _PLACES)


def kernel_of_package(package: Package) -> KernelParts:
    """Read a kernel from a Debian package.

    Raises:
        BuildFailed: it holds none.
    """
    image, release, built_in = b"", "", frozenset[str]()
    modules: dict[str, bytes] = {}
    for path, reader in read_files(package.path):
        if path.startswith("boot/vmlinuz-"):
            image, release = reader.read(), path.removeprefix("boot/vmlinuz-")
        elif path.endswith("/modules.builtin"):
            built_in = _names(reader)
        elif path.endswith(".ko") and _wants("/" + path):
            modules[module_name(path)] = reader.read()
    if not image:
        raise BuildFailed(f"The package {package.name} holds no kernel.")
    origin = {"package": package.name, "version": package.version, "sha256": package.sha256}
    return KernelParts(image=image, modules=modules, built_in=built_in, release=release, origin=origin)


def kernel_of_files(image: Path, modules: Path | None) -> KernelParts:
    """Read a kernel that an operator gives: an image, and its folder of modules (`/lib/modules/RELEASE`), if any.

    Raises:
        BuildFailed: one of them cannot be read.
    """
    found: dict[str, bytes] = {}
    built_in = frozenset[str]()
    try:
        data = image.read_bytes()
        if modules is not None:
            for path in sorted(modules.rglob("*.ko")):
                if _wants(f"{path}"):
                    found[module_name(path.name)] = path.read_bytes()
            with (modules / "modules.builtin").open("rb") as listing:
                built_in = _names(listing)
    except OSError as error:
        raise BuildFailed(f"The kernel cannot be read: {error.filename}.") from error
    origin = {"image": str(image), "modules": str(modules or ""), "sha256": hashlib.sha256(data).hexdigest()}
    release = modules.resolve().name if modules is not None else ""
    return KernelParts(image=data, modules=found, built_in=built_in, release=release, origin=origin)


def _names(listing: IO[bytes]) -> frozenset[str]:
    return frozenset(module_name(line) for line in listing.read().decode("utf-8", "replace").split())


def make_guest(kernel: KernelParts, agent: bytes) -> dict[str, bytes]:
    """Return the files of a guest by their names. Equal inputs give equal bytes.

    Without any modules the kernel is taken to have all built in.

    Raises:
        BuildFailed: the kernel is not usable.
    """
    order = load_order(kernel.modules, kernel.built_in) if kernel.modules else ()
    entries = [folder(path) for path in ("dev", "lib", "lib/modules", "proc", "run", "sys")]
    entries.append(Entry(path="dev/console", mode=stat.S_IFCHR | 0o600, device=(5, 1)))
    entries.append(Entry(path="init", mode=stat.S_IFREG | 0o755, data=agent))
    listing = "".join(f"/lib/modules/{name}.ko\n" for name in order).encode()
    entries.append(Entry(path="lib/modules/load", mode=stat.S_IFREG | 0o644, data=listing))
    entries += [
        Entry(path=f"lib/modules/{name}.ko", mode=stat.S_IFREG | 0o644, data=kernel.modules[name]) for name in order
    ]
    files = {KERNEL: unpack_kernel(kernel.image), INITRAMFS: make_initramfs(entries)}
    manifest = {
        "schema": MANIFEST_SCHEMA,
        "kernel": {"release": kernel.release, **kernel.origin},
        "agent": {"sha256": hashlib.sha256(agent).hexdigest(), "bytes": len(agent)},
        "modules": list(order),
        "files": {
            name: {"sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)}
            for name, data in sorted(files.items())
        },
    }
    files[MANIFEST] = (json.dumps(manifest, indent=2, sort_keys=True) + "\n").encode()
    return files


def build_agent(compiler: str = "gcc") -> bytes:
    """Compile the agent and return its binary.

    Raises:
        BuildFailed: the compiler is missing, or refused.
    """
    with tempfile.TemporaryDirectory(prefix="agent-") as place:
        target = Path(place) / "agent"
        compile_agent(target, compiler=compiler)
        return target.read_bytes()


@effect("guest.place")
def place_guest(files: Mapping[str, bytes], target: Path) -> None:
    """Put a guest's files into the folder `target`, replacing what is there as one act.

    Virtual machines that run, and templates, have the old files open and go on.

    Raises:
        OSError: there is no room, or no right.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    fresh = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    try:
        for name, data in files.items():
            path = fresh / name
            path.write_bytes(data)
            path.chmod(0o644)
        fresh.chmod(0o755)
        if target.exists():
            old = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
            target.rename(old / "old")
            fresh.rename(target)
            shutil.rmtree(old)
        else:
            fresh.rename(target)
        descriptor = os.open(target.parent, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)
    except BaseException:
        shutil.rmtree(fresh, ignore_errors=True)
        raise
