"""Identifier types. An id is 64 lower-case hex digits, chosen by the dispatcher before the act that it names."""

from __future__ import annotations

import secrets
from typing import NewType

PodId = NewType("PodId", str)
ContainerId = NewType("ContainerId", str)
ImageId = NewType("ImageId", str)  # "sha256:" + 64 hex digits: the digest of the image's config blob

ID_LENGTH = 64


def make_pod_id() -> PodId:
    """Return a fresh random pod id (256 bits, so a collision needs no handling)."""
    return PodId(secrets.token_hex(ID_LENGTH // 2))


def make_container_id() -> ContainerId:
    """Return a fresh random container id (256 bits, so a collision needs no handling)."""
    return ContainerId(secrets.token_hex(ID_LENGTH // 2))
