"""What the worker process and its parent agree on about bad images: error kinds and limits.

Standard library only, since the worker imports it. An image is attacker-written: every limit here bounds something
that an image can otherwise make grow without end.
"""

from __future__ import annotations

from dataclasses import dataclass


class BadImage(Exception):
    """The image itself is wrong or hostile. The message is one sentence for a person; retrying does not help."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """Bounds on unpacking one image. Exceeding one is `BadImage`.

    `max_bytes` counts logical bytes of all files of all layers, holes included, since a later reader of the tree
    reads holes too. `max_ratio` is only looked at once `ratio_floor_bytes` came out of a layer: small files of zeros
    compress well in honest images. `max_depth` bounds the real depth of any folder, symbolic links resolved, so that
    the tree can always be removed again.
    """

    max_bytes: int = 64 << 30
    max_file_bytes: int = 32 << 30
    max_entries: int = 1_000_000
    max_depth: int = 128
    max_ratio: int = 300
    ratio_floor_bytes: int = 64 << 20
    max_header_bytes: int = 256 << 10
    max_account_bytes: int = 4 << 20
    max_memory_bytes: int = 1 << 30
    max_cpu_s: int = 3600
