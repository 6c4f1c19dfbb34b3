"""Layers as attackers write them: any tar entry, any bytes."""

from __future__ import annotations

import gzip
import hashlib
import io
import tarfile
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from dispatcher_images.exec import Workers
from dispatcher_images.hostile import Limits

LIMITS = Limits(
    max_bytes=64 << 20,
    max_file_bytes=32 << 20,
    max_entries=5000,
    max_ratio=200,
    ratio_floor_bytes=1 << 20,
    max_cpu_s=20,
)


class Tar:
    """A tar under construction; entries stand in the order in which they were added."""

    def __init__(self, form: int = tarfile.PAX_FORMAT) -> None:
        self._out = io.BytesIO()
        self._tar = tarfile.open(fileobj=self._out, mode="w", format=form)  # noqa: SIM115

    def add(self, name: str, content: bytes = b"", *, kind: bytes = tarfile.REGTYPE, **fields: Any) -> Tar:
        """Add one entry."""
        info = tarfile.TarInfo(name)
        info.type, info.size = kind, len(content)
        info.mode = 0o755 if kind == tarfile.DIRTYPE else 0o644
        for field, value in fields.items():
            setattr(info, field, value)
        self._tar.addfile(info, io.BytesIO(content))
        return self

    def folder(self, name: str, **fields: Any) -> Tar:
        """Add a folder."""
        return self.add(name, kind=tarfile.DIRTYPE, **fields)

    def symlink(self, name: str, target: str) -> Tar:
        """Add a symbolic link."""
        return self.add(name, kind=tarfile.SYMTYPE, linkname=target)

    def link(self, name: str, target: str) -> Tar:
        """Add a hard link."""
        return self.add(name, kind=tarfile.LNKTYPE, linkname=target)

    def raw(self, data: bytes) -> Tar:
        """Add bytes as they are; padded to a block."""
        self._out.write(data + bytes(-len(data) % 512))
        self._tar.offset += len(data) + -len(data) % 512
        return self

    def bytes(self) -> bytes:
        """The finished archive."""
        self._tar.close()
        return self._out.getvalue()


def header(name: str, *, kind: bytes = b"0", size: bytes = b"00000000000\0", **fields: Any) -> bytes:
    """One 512-byte header with a right checksum but any size field."""
    info = tarfile.TarInfo(name)
    info.type = kind
    for field, value in fields.items():
        setattr(info, field, value)
    block = bytearray(info.tobuf(tarfile.USTAR_FORMAT))
    block[124:136] = size
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


class Bench:
    """Runs the real worker on hostile layers, in a folder of its own."""

    def __init__(self, folder: Path, limits: Limits = LIMITS) -> None:
        self.folder = folder
        self.limits = limits
        self.root = folder / "root"
        self.reply: dict[str, Any] = {}

    def limited(self, **changes: int) -> Bench:
        """The same with other limits."""
        return Bench(self.folder, replace(self.limits, **changes))

    async def job(self, job: str, *layers: bytes, **details: Any) -> dict[str, Any]:
        """Run any job on layers; diff ids are computed for what can be inflated."""
        described = []
        for number, layer in enumerate(layers):
            path = self.folder / f"layer{number}"
            path.write_bytes(layer)
            described.append({"path": str(path), "diff_id": details.get("diff_id") or diff_id(layer)})
        empty = self.folder / "empty"
        empty.mkdir(exist_ok=True)
        return await Workers(1, 60).run(
            {"job": job, "layers": described, "limits": asdict(self.limits), "empty": str(empty), **details}
        )

    async def unpack(self, *layers: Tar | bytes) -> Path:
        """Unpack layers and return the root folder."""
        self.root.mkdir(mode=0o755)
        content = [layer.bytes() if isinstance(layer, Tar) else layer for layer in layers]
        self.reply = await self.job("unpack", *content, target=str(self.root))
        return self.root


def diff_id(layer: bytes) -> str:
    """The digest of a layer's uncompressed bytes."""
    import zstandard

    if layer.startswith(b"\x1f\x8b"):
        try:
            layer = gzip.decompress(layer)
        except (OSError, EOFError):
            layer = b""
    elif layer.startswith(b"\x28\xb5\x2f\xfd"):
        try:
            layer = zstandard.ZstdDecompressor().decompressobj().decompress(layer)
        except zstandard.ZstdError:
            layer = b""
    return "sha256:" + hashlib.sha256(layer).hexdigest()
