"""From output chunks to lines of the CRI log format. Pure: a chunk always gives the same bytes.

That is what makes "each line exactly once" possible over a restart: what the file already holds is skipped by length.

    2016-10-06T00:17:09.669794202Z stdout F a full line
    2016-10-06T00:17:09.669794203Z stderr P the first piece of a longer line

P means that the line goes on in the next record of the same stream; F ends it.
"""

from __future__ import annotations

import datetime as dt

from dispatcher.model import OutputChunk

MAX_CONTENT = 16384  # the kubelet's reader takes longer records, but its peers split here


def timestamp(time_ns: int) -> bytes:
    """Return RFC 3339 in UTC with nine digits: a fixed width, so that records compare and sort as text."""
    seconds, nanoseconds = divmod(time_ns, 1_000_000_000)
    moment = dt.datetime.fromtimestamp(seconds, dt.UTC)
    return f"{moment:%Y-%m-%dT%H:%M:%S}.{nanoseconds:09d}Z".encode()


def _pieces(line: bytes) -> list[bytes]:
    return [line[start : start + MAX_CONTENT] for start in range(0, len(line), MAX_CONTENT)]


def render(chunk: OutputChunk) -> bytes:
    """Return the records of one chunk, each ended by a line feed. An empty chunk gives none.

    A piece that no line feed ends becomes P: whether the line goes on is the next chunk's matter.
    """
    if not chunk.data:
        return b""
    head = b"%b %b " % (timestamp(chunk.time_ns), chunk.stream.value.encode())
    records = []
    *lines, rest = chunk.data.split(b"\n")
    for line in lines:
        *pieces, last = _pieces(line) or [b""]
        records += [b"%bP %b\n" % (head, piece) for piece in pieces]
        records.append(b"%bF %b\n" % (head, last))
    records += [b"%bP %b\n" % (head, piece) for piece in _pieces(rest)]
    return b"".join(records)
