"""Image references: what people write, and the one canonical form behind it. Pure.

`busybox` is docker.io/library/busybox:latest. With both a tag and a digest the digest decides and the tag is dropped,
since it says nothing about what was pulled. References come from pods, so they are hostile until parsed here.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from dispatcher.errors import InvalidRequest

DEFAULT_REGISTRY = "docker.io"
_MAX_LENGTH = 4096
_MAX_REPOSITORY = 255
_LABEL = r"[a-zA-Z0-9](?:[a-zA-Z0-9-]*[a-zA-Z0-9])?"
_REGISTRY = re.compile(rf"(?:{_LABEL}(?:\.{_LABEL})*|\[[0-9a-fA-F:]+\])(?::[0-9]{{1,5}})?")
_COMPONENT = r"[a-z0-9]+(?:(?:\.|_|__|-+)[a-z0-9]+)*"
_REPOSITORY = re.compile(rf"{_COMPONENT}(?:/{_COMPONENT})*")
_TAG = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}")
_DIGEST = re.compile(r"sha256:[0-9a-f]{64}")
_HEX_64 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Reference:
    """A canonical reference: exactly one of `tag` and `digest` is set."""

    registry: str
    repository: str
    tag: str = ""
    digest: str = ""

    @property
    def name(self) -> str:
        """Registry and repository, as in repo digests."""
        return f"{self.registry}/{self.repository}"

    @property
    def selector(self) -> str:
        """What the registry is asked for: the digest or the tag."""
        return self.digest or self.tag

    def __str__(self) -> str:
        return f"{self.name}@{self.digest}" if self.digest else f"{self.name}:{self.tag}"


def parse(text: str) -> Reference:
    """Parse what a person or a pod wrote.

    Raises:
        InvalidRequest: it is no image reference; the message says which part is wrong.
    """
    if not text or len(text) > _MAX_LENGTH:
        raise InvalidRequest("An image reference is empty or too long.")
    rest, at, digest = text.partition("@")
    if at and not _DIGEST.fullmatch(digest):
        raise InvalidRequest(f"{_shown(text)} has a malformed digest: expected sha256: and 64 lower-case hex digits.")
    head, colon, tag = rest.rpartition(":")
    if colon and "/" not in tag:
        if not _TAG.fullmatch(tag):
            raise InvalidRequest(f"{_shown(text)} has a malformed tag.")
    else:
        head, tag = rest, ""
    if _HEX_64.fullmatch(head):
        raise InvalidRequest(f"{_shown(text)} is an image id, not a name that can be pulled.")
    registry, repository = _split_registry(head)
    if not _REGISTRY.fullmatch(registry):
        raise InvalidRequest(f"{_shown(text)} has a malformed registry.")
    if len(repository) > _MAX_REPOSITORY or not _REPOSITORY.fullmatch(repository):
        raise InvalidRequest(f"{_shown(text)} has a malformed repository: lower-case letters, digits and . _ - / only.")
    if digest:
        return Reference(registry=registry, repository=repository, digest=digest)
    return Reference(registry=registry, repository=repository, tag=tag or "latest")


def is_digest(text: str) -> bool:
    """Whether this is a digest by itself, such as `sha256:<hex>`."""
    return _DIGEST.fullmatch(text) is not None


def _split_registry(head: str) -> tuple[str, str]:
    first, slash, rest = head.partition("/")
    if not slash or not ("." in first or ":" in first or first == "localhost"):
        first, rest = DEFAULT_REGISTRY, head
    if first == "index.docker.io":
        first = DEFAULT_REGISTRY
    if first == DEFAULT_REGISTRY and "/" not in rest:
        rest = f"library/{rest}"
    return first, rest


def _shown(text: str) -> str:
    return repr(text if len(text) <= 200 else text[:200] + "...")
