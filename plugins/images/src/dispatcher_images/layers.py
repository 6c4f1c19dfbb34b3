"""Reading one layer blob: inflate, count, hash, and walk its tar entries strictly.

Theory of operation. `LayerReader` is a file object over the uncompressed tar: it bounds how much comes out, compares
that with what went in, and hashes everything, so that after `finish` the layer is known to be what the config's
`diff_ids` promise. `entries` walks it with the standard library's `tarfile` in stream mode, but with a `TarInfo` that
raises on each malformed header where `tarfile` would take it for the end of the archive, and that bounds extended
headers, which `tarfile` reads into memory whole. Nothing here touches the file system but the blob that it is given.
"""

from __future__ import annotations

import hashlib
import tarfile
import zlib
from collections.abc import Callable, Iterator
from typing import IO, Any, Protocol, Self, cast

from dispatcher_images.hostile import BadImage, Limits

_CHUNK = 256 << 10
_GZIP_MAGIC = b"\x1f\x8b"
_ZSTD_MAGIC = b"\x28\xb5\x2f\xfd"
_ZSTD_MAX_WINDOW = 128 << 20
_EXTENDED_TYPES = frozenset({tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE, b"L", b"K"})
_MAX_EXTENDED_IN_A_ROW = 8
# tarfile skips over a file block by block even behind the end: a size of 2**63 would keep it busy for years.
_MAX_READS_AT_END = 16
# What tarfile and the decoders raise on malformed input, beyond their own error classes.
_PARSE_ERRORS = (
    tarfile.TarError,
    zlib.error,
    EOFError,
    ValueError,
    OverflowError,
    LookupError,
    ArithmeticError,
    TypeError,
    AttributeError,
    RecursionError,
    MemoryError,
)


class _Source(Protocol):
    def read(self, size: int, /) -> bytes: ...


class _Counted:
    """The compressed side: remembers how many bytes went in."""

    def __init__(self, blob: IO[bytes]) -> None:
        self._blob = blob
        self.count = 0

    def read(self, size: int = -1, /) -> bytes:
        data = self._blob.read(size)
        self.count += len(data)
        return data


class _Gunzip:
    """Inflate gzip members one after the other, never more than asked for; zero padding behind them is allowed."""

    def __init__(self, source: _Counted) -> None:
        self._source = source
        self._pending = b""
        self._inflater: Any = None

    def read(self, size: int, /) -> bytes:
        while True:
            if not self._pending:
                self._pending = self._source.read(_CHUNK)
                if not self._pending:
                    if self._inflater is not None:
                        raise BadImage("a gzip layer ends in the middle")
                    return b""
            if self._inflater is None:
                self._pending = self._pending.lstrip(b"\0")
                if not self._pending:
                    continue
                self._inflater = zlib.decompressobj(wbits=31)
            data: bytes = self._inflater.decompress(self._pending, size)
            if self._inflater.eof:
                self._pending = self._inflater.unused_data
                self._inflater = None
            else:
                self._pending = self._inflater.unconsumed_tail
            if data:
                return data


def _unzstd(source: _Counted) -> _Source:
    import zstandard

    return zstandard.ZstdDecompressor(max_window_size=_ZSTD_MAX_WINDOW).stream_reader(
        cast("IO[bytes]", source), read_size=_CHUNK, read_across_frames=True
    )


def _is_zstd(magic: bytes) -> bool:
    # A zstd file may open with skippable frames, whose magic number ends in a free nibble.
    return magic == _ZSTD_MAGIC or (magic[1:4] == b"\x2a\x4d\x18" and magic[0] & 0xF0 == 0x50)


class LayerReader:
    """The uncompressed bytes of one layer, bounded and hashed. `blob` is seekable and stays the caller's."""

    def __init__(self, blob: IO[bytes], limits: Limits) -> None:
        magic = blob.read(4)
        blob.seek(0)
        self._limits = limits
        self._raw = _Counted(blob)
        self._source: _Source
        if magic.startswith(_GZIP_MAGIC):
            self._source = _Gunzip(self._raw)
        elif _is_zstd(magic):
            self._source = _unzstd(self._raw)
        else:
            self._source = self._raw
        self._hash = hashlib.sha256()
        self._reads_at_end = 0
        self.count = 0

    def read(self, size: int = _CHUNK) -> bytes:
        """Return up to `size` bytes, b"" at the end. Raises BadImage for a bomb or a damaged stream."""
        try:
            data = self._source.read(size)
        except BadImage:
            raise
        except Exception as error:
            if isinstance(error, OSError):
                raise
            raise BadImage("a layer cannot be decompressed") from error
        if not data:
            self._reads_at_end += 1
            if self._reads_at_end > _MAX_READS_AT_END:
                raise BadImage("a layer ends in the middle of a file")
        self.count += len(data)
        self._hash.update(data)
        if self.count > self._limits.max_bytes:
            raise BadImage(f"a layer unpacks to more than {self._limits.max_bytes} bytes")
        if self.count > self._limits.ratio_floor_bytes and self.count > self._raw.count * self._limits.max_ratio:
            raise BadImage(f"a layer unpacks to more than {self._limits.max_ratio} times its size")
        return data

    def finish(self) -> str:
        """Read to the end and return the digest of all that came out, as "sha256:<hex>"."""
        while self.read():
            pass
        return f"sha256:{self._hash.hexdigest()}"


class _Headers:
    """Makes the `TarInfo` class of one walk; `at_end` tells an archive's end from what tarfile takes for one."""

    def __init__(self, limits: Limits) -> None:
        self._max_extended_bytes = limits.max_header_bytes
        self._extended_in_a_row = 0
        self.at_end = False

    def check(self, parse: Callable[[], tarfile.TarInfo]) -> tarfile.TarInfo:
        try:
            info = parse()
        except tarfile.HeaderError as error:
            if type(error).__name__ not in {"EOFHeaderError", "EmptyHeaderError"} or self._extended_in_a_row:
                raise BadImage("a layer holds a malformed tar header") from error
            self.at_end = True
            raise
        if info.size < 0:
            raise BadImage("a layer holds a file of negative size")
        if info.type in _EXTENDED_TYPES:
            self._extended_in_a_row += 1
            if self._extended_in_a_row > _MAX_EXTENDED_IN_A_ROW or info.size > self._max_extended_bytes:
                raise BadImage("a layer holds an oversized extended header")
        else:
            self._extended_in_a_row = 0
        return info

    def tarinfo(self) -> type[tarfile.TarInfo]:
        headers = self

        class StrictTarInfo(tarfile.TarInfo):
            @classmethod
            def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> Self:
                parse = super().frombuf
                return cast("Self", headers.check(lambda: parse(buf, encoding, errors)))

        if not hasattr(tarfile.TarInfo, "_frombuf"):
            return StrictTarInfo

        # Newer Pythons, and older ones with Debian's security updates, read headers by another method.
        class StrictTarInfoByUnderscore(tarfile.TarInfo):
            @classmethod
            def _frombuf(cls, buf: bytes, encoding: str, errors: str, **options: bool) -> Self:
                parse: Callable[..., tarfile.TarInfo] = super()._frombuf  # type: ignore[misc]
                return cast("Self", headers.check(lambda: parse(buf, encoding, errors, **options)))

        return StrictTarInfoByUnderscore


class Entries:
    """The tar entries of a layer, in order. `data(entry)` must be used before the next entry is asked for."""

    def __init__(self, reader: LayerReader, limits: Limits) -> None:
        self._headers = _Headers(limits)
        self._tar: tarfile.TarFile | None = None
        try:
            self._tar = tarfile.open(  # noqa: SIM115  # owns nothing: the reader is the caller's
                fileobj=cast("IO[bytes]", reader),
                mode="r|",
                bufsize=_CHUNK,
                tarinfo=self._headers.tarinfo(),
                encoding="utf-8",
                errors="surrogateescape",
            )
        except tarfile.ReadError as error:
            if reader.count:  # a layer of no bytes at all is an empty one
                raise BadImage("a layer is not a tar archive") from error
        except _PARSE_ERRORS as error:
            raise BadImage("a layer is not a tar archive") from error

    def __iter__(self) -> Iterator[tarfile.TarInfo]:
        """Yield each entry. Raises BadImage at the first malformed one."""
        while self._tar is not None:
            try:
                entry = self._tar.next()
            except _PARSE_ERRORS as error:
                raise BadImage("a layer holds a malformed tar entry") from error
            if entry is None:
                if not self._headers.at_end:
                    raise BadImage("a layer holds a malformed extended header")
                return
            self._tar.members = []  # type: ignore[attr-defined]  # or a million entries stay in memory
            if entry.size < 0:
                raise BadImage("a layer holds a file of negative size")
            yield entry

    def data(self, entry: tarfile.TarInfo) -> Iterator[tuple[int, bytes]]:
        """Yield (offset, bytes) of a regular file. Holes of sparse files are not yielded; offsets rise."""
        try:
            source = self._tar.extractfile(entry) if self._tar else None
            if source is None:
                return
            raw = source.raw  # type: ignore[attr-defined]  # the buffer around it asks our stream whether it can seek
            for start, size in _extents(entry):
                raw.seek(start)
                at, end = start, start + size
                while at < end:
                    chunk = raw.read(min(_CHUNK, end - at))
                    if not chunk:
                        raise BadImage("a layer ends in the middle of a file")
                    yield at, chunk
                    at += len(chunk)
        except _PARSE_ERRORS as error:
            raise BadImage("the content of a file in a layer is malformed") from error


def _extents(entry: tarfile.TarInfo) -> list[tuple[int, int]]:
    sparse = cast("list[tuple[int, int]] | None", entry.sparse)
    if sparse is None:
        return [(0, entry.size)]
    extents: list[tuple[int, int]] = []
    at = 0
    for start, size in sparse:
        if size == 0:
            continue
        if start < at or size < 0 or start + size > entry.size:
            raise BadImage("a layer holds a sparse file whose map is wrong")
        extents.append((start, size))
        at = start + size
    return extents
