"""Kernel modules: which ones a guest needs, and in which order they are loaded."""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence

from dispatcher_hyper_vm.guest.exec import BuildFailed

# What the machine has, what disks hold, what mounts need. Modules that a kernel has built in are left out. The order
# is that of loading: the port of the agent comes first, so that a host that waits for it hears it early.
WANTED: tuple[str, ...] = (
    "virtio_mmio",
    "virtio_pci",
    "virtio_console",
    "virtio_scsi",
    "sd_mod",
    "virtio_blk",
    "virtio_net",
    "virtio_rng",
    "virtio_balloon",
    "crc32c_generic",  # libcrc32c and ext4 ask for it by name, not as a dependency
    "overlay",
    "erofs",
    "ext4",
    "9pnet_virtio",
    "9p",
)
OPTIONAL = frozenset({"virtio_balloon", "virtio_rng", "virtio_blk", "9p", "9pnet_virtio", "virtio_pci", "virtio_mmio"})


def module_name(path: str) -> str:
    """The name of a module by its path: "virtio-rng.ko" is "virtio_rng"."""
    return path.rpartition("/")[2].removesuffix(".ko").replace("-", "_")


def dependencies(module: bytes) -> tuple[str, ...]:
    """What a module says that it needs, from its section `.modinfo`.

    Raises:
        BuildFailed: it is no module for 64 bits.
    """
    info = _section(module, b".modinfo")
    for entry in info.split(b"\0"):
        if entry.startswith(b"depends="):
            return tuple(name.replace("-", "_") for name in entry[8:].decode("ascii").split(",") if name)
    return ()


def _section(elf: bytes, wanted: bytes) -> bytes:
    if elf[:6] != b"\x7fELF\x02\x01":
        raise BuildFailed("A kernel module is no ELF file of 64 bits; is it compressed?")
    (table,) = struct.unpack_from("<Q", elf, 0x28)
    size, count, names_index = struct.unpack_from("<HHH", elf, 0x3A)

    def header(index: int) -> tuple[int, int, int]:
        name, _, _, _, offset, length = struct.unpack_from("<IIQQQQ", elf, table + index * size)
        return name, offset, length

    _, names, _ = header(names_index)
    for index in range(count):
        name, offset, length = header(index)
        if elf[names + name : names + name + len(wanted) + 1] == wanted + b"\0":
            return elf[offset : offset + length]
    return b""


def load_order(
    modules: Mapping[str, bytes], built_in: frozenset[str], wanted: Sequence[str] = WANTED
) -> tuple[str, ...]:
    """Return the wanted modules with all that they need, each behind what it needs.

    Raises:
        BuildFailed: one that cannot be done without is missing.
    """
    order: list[str] = []
    open_names: list[str] = []

    def visit(name: str, *, optional: bool) -> None:
        if name in order or name in built_in:
            return
        if name in open_names:
            raise BuildFailed(f"The module {name} needs itself.")
        if name not in modules:
            if optional:
                return
            raise BuildFailed(f"The kernel has no module {name}, and has it not built in.")
        open_names.append(name)
        for needed in dependencies(modules[name]):
            visit(needed, optional=False)
        open_names.pop()
        order.append(name)

    for name in wanted:
        visit(name, optional=name in OPTIONAL)
    return tuple(order)
