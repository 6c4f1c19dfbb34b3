"""SPDY/3 header blocks: one compressor and one decompressor per connection and direction, with the preset dictionary.

A block is a zlib stream cut by Z_SYNC_FLUSH; both ends keep their window from block to block, so that a connection on
which one block failed cannot go on. Sizes are bounded after inflation: a bomb costs MAX_BLOCK bytes.
Source: the SPDY/3 draft, sections 2.6.10 and 2.6.10.1.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator, Mapping

MAX_BLOCK = 64 * 1024  # inflated; what a kubelet sends is under 100 bytes
MAX_HEADERS = 100

# One word after the other, each with its length in front; "_" stands for a blank.
_WORDS = """
options head post put delete trace accept accept-charset accept-encoding accept-language accept-ranges age
allow authorization cache-control connection content-base content-encoding content-language content-length
content-location content-md5 content-range content-type date etag expect expires from host if-match
if-modified-since if-none-match if-range if-unmodified-since last-modified location max-forwards pragma
proxy-authenticate proxy-authorization range referer retry-after server te trailer transfer-encoding upgrade
user-agent vary via warning www-authenticate method get status 200_OK version HTTP/1.1 url public set-cookie
keep-alive origin
""".split()  # noqa: SIM905 - sixty words, one to a line, would hide what they are
_TAIL = (
    "100101201202205206300302303304305306307402405406407408409410411412413414415416417502504505"
    "203 Non-Authoritative Information204 No Content301 Moved Permanently400 Bad Request401 Unauthorized"
    "403 Forbidden404 Not Found500 Internal Server Error501 Not Implemented503 Service Unavailable"
    "Jan Feb Mar Apr May Jun Jul Aug Sept Oct Nov Dec 00:00:00 Mon, Tue, Wed, Thu, Fri, Sat, Sun, GMT"
    "chunked,text/html,image/png,image/jpg,image/gif,application/xml,application/xhtml+xml,text/plain,"
    "text/javascript,publicprivatemax-age=gzip,deflate,sdchcharset=utf-8charset=iso-8859-1,utf-,*,enq=0."
)
DICTIONARY = (
    b"".join(struct.pack(">I", len(word)) + word.replace("_", " ").encode() for word in _WORDS) + _TAIL.encode()
)


class HeaderError(ValueError):
    """A header block that is none. The connection's compression state is lost with it."""


class HeaderCompressor:
    """Makes the blocks of one direction of one connection, in order."""

    def __init__(self) -> None:
        self._deflate = zlib.compressobj(9, zlib.DEFLATED, 15, 9, zlib.Z_DEFAULT_STRATEGY, DICTIONARY)

    def compress(self, headers: Mapping[str, str]) -> bytes:
        """Return the block for these headers. Names become lower case."""
        plain = [struct.pack(">I", len(headers))]
        for name, value in headers.items():
            for text in (name.lower().encode(), value.encode()):
                plain += [struct.pack(">I", len(text)), text]
        return self._deflate.compress(b"".join(plain)) + self._deflate.flush(zlib.Z_SYNC_FLUSH)


class HeaderDecompressor:
    """Reads the blocks of one direction of one connection, in order."""

    def __init__(self, max_block: int = MAX_BLOCK) -> None:
        self._inflate = zlib.decompressobj(zdict=DICTIONARY)
        self._max_block = max_block

    def decompress(self, block: bytes) -> dict[str, str]:
        """Return the headers of a block, names in lower case.

        Raises:
            HeaderError: not deflated with our dictionary, too large when inflated, or not a header block.
        """
        try:
            plain = self._inflate.decompress(block, self._max_block + 1)
        except zlib.error as error:
            raise HeaderError("a header block cannot be inflated") from error
        if len(plain) > self._max_block or self._inflate.unconsumed_tail:
            raise HeaderError("a header block is too large")
        headers: dict[str, str] = {}
        texts = _texts(plain)
        for name in texts:
            lower = name.decode("utf-8", "replace").lower()
            if not lower or lower in headers:
                raise HeaderError("a header's name is empty or stands twice")
            headers[lower] = next(texts).decode("utf-8", "replace")
        return headers


def _texts(plain: bytes) -> Iterator[bytes]:
    """Names and values in turn."""
    if len(plain) < 4:
        raise HeaderError("a header block is cut short")
    (count,) = struct.unpack_from(">I", plain)
    if count > MAX_HEADERS:
        raise HeaderError("a header block has too many headers")
    position = 4
    for _ in range(2 * count):
        if position + 4 > len(plain):
            raise HeaderError("a header block is cut short")
        (length,) = struct.unpack_from(">I", plain, position)
        position += 4
        if position + length > len(plain):
            raise HeaderError("a header block is cut short")
        yield plain[position : position + length]
        position += length
    if position != len(plain):
        raise HeaderError("a header block has bytes left over")
