"""Kernels from Debian packages: found and fetched by apt, read here, never installed."""

from __future__ import annotations

import hashlib
import io
import lzma
import re
import tarfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from dispatcher_hyper_vm.guest.exec import BuildFailed, run

_FETCH_S = 900.0
_AR_MAGIC = b"!<arch>\n"
_NAME = re.compile(r"[a-z0-9][a-z0-9+.-]*")


@dataclass(frozen=True, slots=True, kw_only=True)
class Package:
    """A package file: its name, version and digest as the manifest has them."""

    name: str
    version: str
    path: Path
    sha256: str


def fetch_kernel(wanted: str, folder: Path) -> Package:
    """Fetch a kernel's package with apt, which checks it against the archive's signature. A copy in `folder` is used.

    A metapackage such as "linux-image-amd64" stands for the kernel that it depends on.

    Raises:
        BuildFailed: there is no such package, or it cannot be fetched.
    """
    if not _NAME.fullmatch(wanted):
        raise BuildFailed(f"{wanted!r} is no name of a package.")
    name, version = _resolve(wanted)
    path = folder / f"{name}_{version.replace(':', '%3a')}_amd64.deb"
    if not path.exists():
        run(
            ["apt-get", "-q", "-o", "APT::Sandbox::User=root", "download", f"{name}={version}"],
            folder=folder,
            deadline_s=_FETCH_S,
        )
    if not path.exists():
        raise BuildFailed(f"apt-get fetched {name}, but not as {path.name}.")
    return Package(name=name, version=version, path=path, sha256=digest(path))


def read_package(path: Path) -> Package:
    """Describe a package file that somebody has fetched: `NAME_VERSION_ARCHITECTURE.deb`.

    Raises:
        BuildFailed: it cannot be read.
    """
    name, _, rest = path.name.removesuffix(".deb").partition("_")
    try:
        return Package(name=name, version=rest.rpartition("_")[0] or "unknown", path=path, sha256=digest(path))
    except OSError as error:
        raise BuildFailed(f"The package {path} cannot be read.") from error


def _resolve(wanted: str) -> tuple[str, str]:
    shown = run(["apt-cache", "--no-all-versions", "show", wanted], deadline_s=_FETCH_S)
    fields = dict(line.split(": ", 1) for line in shown.split("\n\n")[0].splitlines() if ": " in line[:40])
    if "Version" not in fields:
        raise BuildFailed(f"apt knows no package {wanted}.")
    kernel = re.search(r"\b(linux-image-[0-9][^ ,(]*)", fields.get("Depends", ""))
    if kernel and kernel[1] != wanted and not re.match(r"linux-image-[0-9]", wanted):
        return _resolve(kernel[1])
    return wanted, fields["Version"]


def digest(path: Path) -> str:
    """The SHA-256 of a file, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_files(package: Path) -> Iterator[tuple[str, IO[bytes]]]:
    """Yield the regular files of a package, in its order: the path without a leading "./", and a reader for it.

    Raises:
        BuildFailed: it is no package, or compressed in a way that is not known here.
    """
    with package.open("rb") as file:
        data = _data_member(file)
        with tarfile.open(fileobj=data, mode="r|") as archive:
            for member in archive:
                if member.isreg():
                    reader = archive.extractfile(member)
                    assert reader is not None
                    yield member.name.removeprefix("./"), reader


def _data_member(file: IO[bytes]) -> IO[bytes]:
    if file.read(len(_AR_MAGIC)) != _AR_MAGIC:
        raise BuildFailed("The package is no Debian package.")
    while header := file.read(60):
        name, size = header[:16].decode("ascii", "replace").strip().rstrip("/"), int(header[48:58])
        if name.startswith("data.tar"):
            part: IO[bytes] = _Part(file, size)  # type: ignore[assignment]
            if name.endswith(".xz"):
                return lzma.open(part)
            if name.endswith(".gz"):
                return io.BytesIO(zlib.decompress(part.read(), wbits=47))
            if name.endswith(".zst"):
                return io.BytesIO(_unzstd(part.read()))
            raise BuildFailed(f"The package's {name} is compressed in a way that is not known here.")
        file.seek(size + size % 2, io.SEEK_CUR)
    raise BuildFailed("The package holds no files.")


def _unzstd(data: bytes) -> bytes:
    try:
        import zstandard
    except ImportError as error:
        raise BuildFailed("The module `zstandard` is needed for this package.") from error
    return zstandard.ZstdDecompressor().decompressobj().decompress(data)


class _Part(io.RawIOBase):
    """The next `size` bytes of a file."""

    def __init__(self, file: IO[bytes], size: int) -> None:
        super().__init__()
        self._file = file
        self._left = size

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview | bytearray) -> int:  # type: ignore[override]
        data = self._file.read(min(self._left, len(buffer)))
        self._left -= len(data)
        buffer[: len(data)] = data
        return len(data)


def unpack_kernel(image: bytes) -> bytes:
    """Return the ELF file `vmlinux` in a bzImage (or as it is): a VMM that boots it by PVH saves its unpacking.

    Raises:
        BuildFailed: it is neither, or packed in a way that is not known here.
    """
    if image[:4] == b"\x7fELF":
        return image
    if image[0x202:0x206] != b"HdrS":
        raise BuildFailed("The kernel is neither a bzImage nor an ELF file.")
    setup = (image[0x1F1] or 4) + 1
    offset = int.from_bytes(image[0x248:0x24C], "little")
    length = int.from_bytes(image[0x24C:0x250], "little")
    packed = image[setup * 512 + offset : setup * 512 + offset + length]
    kernel = _unpack(packed)
    if kernel[:4] != b"\x7fELF":
        raise BuildFailed("What is packed in the kernel is no ELF file.")
    return kernel


def _unpack(packed: bytes) -> bytes:
    # Behind the packed data are four bytes with its size, which the decompressors leave alone.
    if packed.startswith(b"\xfd7zXZ\x00"):
        return lzma.LZMADecompressor(lzma.FORMAT_XZ).decompress(packed)
    if packed.startswith(b"\x1f\x8b"):
        return zlib.decompressobj(wbits=31).decompress(packed)
    if packed.startswith(b"\x28\xb5\x2f\xfd"):
        return _unzstd(packed)
    if packed.startswith(b"\x02\x21\x4c\x18"):
        return _unlz4(packed[4:-4])
    raise BuildFailed("The kernel is packed in a way that is not known here.")


def _unlz4(data: bytes) -> bytes:
    """The kernel's LZ4: blocks, each with its packed size in front."""
    out = bytearray()
    at = 0
    while at + 4 <= len(data):
        size = int.from_bytes(data[at : at + 4], "little")
        at += 4
        _unlz4_block(data, at, at + size, out)
        at += size
    return bytes(out)


def _unlz4_block(data: bytes, at: int, end: int, out: bytearray) -> None:
    while at < end:
        token = data[at]
        at += 1
        literal = token >> 4
        if literal == 15:
            while True:
                more = data[at]
                at += 1
                literal += more
                if more != 255:
                    break
        out += data[at : at + literal]
        at += literal
        if at >= end:
            return
        distance = data[at] | data[at + 1] << 8
        at += 2
        length = token & 15
        if length == 15:
            while True:
                more = data[at]
                at += 1
                length += more
                if more != 255:
                    break
        length += 4
        start = len(out) - distance
        if start < 0 or not distance:
            raise BuildFailed("The packed kernel is damaged.")
        if distance >= length:
            out += out[start : start + length]
        else:
            pattern = out[start:]
            out += (pattern * (length // distance + 1))[:length]
