"""Versions of the CNI specification: order, and which one a network speaks. Pure."""

from __future__ import annotations

import re
from collections.abc import Iterable

NEWEST = "1.1.0"  # what this client implements
OLDEST = "0.1.0"  # what a configuration without a version means
_FORM = re.compile(r"(0|[1-9][0-9]{0,5})\.(0|[1-9][0-9]{0,5})\.(0|[1-9][0-9]{0,5})")


def version_key(version: str) -> tuple[int, int, int]:
    """Return what versions compare by.

    Raises:
        ValueError: not of the form MAJOR.MINOR.PATCH.
    """
    match = _FORM.fullmatch(version)
    if match is None:
        raise ValueError(f"{version!r} is not a version of the form 1.0.0")
    return int(match[1]), int(match[2]), int(match[3])


def at_least(version: str, other: str) -> bool:
    """Tell whether `version` is `other` or newer."""
    return version_key(version) >= version_key(other)


def choose_version(single: str | None, several: Iterable[str]) -> str:
    """Choose what to speak from a configuration's `cniVersion` and `cniVersions`: the newest that this client knows.

    Where all of them are newer the single one is kept, so that the plugin's own refusal names it. A configuration
    that names none means the oldest.
    """
    known = [version for version in (*several, *([single] if single else ())) if at_least(NEWEST, version)]
    return max(known, key=version_key, default=single or OLDEST)
