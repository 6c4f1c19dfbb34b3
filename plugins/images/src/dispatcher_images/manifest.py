"""Manifests, indexes and image configs: from hostile JSON to typed values. Pure.

OCI and Docker media types mean the same here. Schema 1, foreign layers and artifacts that are no container images are
refused by name. Numbers of layers, sizes and nesting are bounded before anything is fetched.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from dispatcher.errors import PullFailed
from dispatcher.model import ImageConfig
from dispatcher_images.reference import is_digest

MAX_MANIFEST_BYTES = 4 << 20
MAX_CONFIG_BYTES = 4 << 20
MAX_LAYERS = 127  # what overlay file systems of engines can stack
MAX_INDEX_ENTRIES = 1024

OCI_MANIFEST = "application/vnd.oci.image.manifest.v1+json"
OCI_INDEX = "application/vnd.oci.image.index.v1+json"
DOCKER_MANIFEST = "application/vnd.docker.distribution.manifest.v2+json"
DOCKER_INDEX = "application/vnd.docker.distribution.manifest.list.v2+json"
ACCEPT = (OCI_MANIFEST, OCI_INDEX, DOCKER_MANIFEST, DOCKER_INDEX)
_INDEXES = frozenset({OCI_INDEX, DOCKER_INDEX})
_MANIFESTS = frozenset({OCI_MANIFEST, DOCKER_MANIFEST})
_CONFIGS = frozenset(
    {"application/vnd.oci.image.config.v1+json", "application/vnd.docker.container.image.v1+json"},
)
_LAYER_PREFIXES = (
    "application/vnd.oci.image.layer.v1.tar",
    "application/vnd.docker.image.rootfs.diff.tar",
)
_LAYER_SUFFIXES = frozenset({"", ".gzip", "+gzip", "+zstd", ".zstd"})


@dataclass(frozen=True, slots=True, kw_only=True)
class Descriptor:
    """A pointer to content: its digest and exact size are checked while it streams in."""

    media_type: str
    digest: str
    size: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """One image's manifest for one platform."""

    config: Descriptor
    layers: tuple[Descriptor, ...]
    media_type: str
    annotations: Mapping[str, str] = field(default_factory=dict)

    @property
    def descriptors(self) -> tuple[Descriptor, ...]:
        """Everything that the manifest points to, each digest once."""
        return tuple({item.digest: item for item in (self.config, *self.layers)}.values())


@dataclass(frozen=True, slots=True, kw_only=True)
class ConfigFile:
    """An image's config blob: what runtimes need, and the digests that its layers must unpack to."""

    config: ImageConfig
    diff_ids: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Platform:
    os: str
    architecture: str
    variant: str

    @classmethod
    def parse(cls, text: str) -> _Platform:
        os, architecture, *variant = text.split("/")
        return cls(os=os, architecture=architecture, variant=variant[0] if variant else "")


def parse_document(content: bytes, media_type: str) -> Manifest | tuple[tuple[Descriptor, Mapping[str, str]], ...]:
    """Parse a manifest, or an index into (descriptor, platform) pairs.

    `media_type` is what the registry said; the document's own `mediaType` wins where it has one, as the digest covers
    only that one.

    Raises:
        PullFailed: it is neither, or breaks a bound.
    """
    document = _object(content, "manifest")
    kind = _text(document, "mediaType") or media_type.partition(";")[0].strip().lower()
    if kind in _INDEXES or (kind not in _MANIFESTS and "manifests" in document):
        if "layers" in document or "config" in document:
            raise PullFailed("The registry sent a document that is an index and a manifest at once.")
        return _index(document)
    if kind in _MANIFESTS or (document.get("schemaVersion") == 2 and "config" in document):
        if "manifests" in document:
            raise PullFailed("The registry sent a document that is an index and a manifest at once.")
        return _manifest(document, kind if kind in _MANIFESTS else OCI_MANIFEST)
    if document.get("schemaVersion") == 1:
        raise PullFailed("The image has a schema 1 manifest, which is no longer supported: push it anew.")
    raise PullFailed(f"The registry sent a manifest of an unknown kind ({kind[:80] or 'none'}).")


def choose(entries: Sequence[tuple[Descriptor, Mapping[str, str]]], platforms: Sequence[str]) -> Descriptor:
    """Choose from an index the first entry of the most preferred platform.

    An entry without a platform is taken only when nothing else fits. Raises PullFailed, naming what there is.
    """
    for wanted in (_Platform.parse(item) for item in platforms):
        fitting = [
            (rank, position, descriptor)
            for position, (descriptor, found) in enumerate(entries)
            if (rank := _rank(wanted, found)) is not None
        ]
        if fitting:
            return min(fitting, key=lambda item: item[:2])[2]
    unnamed = [descriptor for descriptor, found in entries if not found.get("os") and not found.get("architecture")]
    if unnamed:
        return unnamed[0]
    offered = sorted({f"{found.get('os')}/{found.get('architecture')}" for _, found in entries})
    raise PullFailed(f"The image has no {' or '.join(platforms)}; it offers {', '.join(offered)[:200] or 'nothing'}.")


def parse_config(content: bytes, manifest: Manifest, platforms: Sequence[str]) -> ConfigFile:
    """Parse an image's config blob and hold it against its manifest.

    Raises:
        PullFailed: it is malformed, for another platform, or has another number of layers.
    """
    document = _object(content, "image config")
    rootfs = document.get("rootfs")
    diff_ids = rootfs.get("diff_ids") if isinstance(rootfs, dict) else None
    diff_ids = [] if diff_ids is None else diff_ids
    if not isinstance(diff_ids, list) or not all(isinstance(item, str) and is_digest(item) for item in diff_ids):
        raise PullFailed("The image's config has malformed diff_ids.")
    if len(diff_ids) != len(manifest.layers):
        raise PullFailed(f"The image's config names {len(diff_ids)} layers, its manifest {len(manifest.layers)}.")
    os, architecture = _text(document, "os") or "linux", _text(document, "architecture")
    offered = {"os": os, "architecture": architecture, "variant": _text(document, "variant")}
    if platforms and architecture and all(_rank(_Platform.parse(item), offered) is None for item in platforms):
        raise PullFailed(f"The image is for {os}/{architecture}, this node runs {' or '.join(platforms)}.")
    return ConfigFile(config=_image_config(document, manifest, os, architecture), diff_ids=tuple(diff_ids))


def _image_config(document: Mapping[str, Any], manifest: Manifest, os: str, architecture: str) -> ImageConfig:
    config = document.get("config") or {}
    if not isinstance(config, dict):
        raise PullFailed("The image's config is malformed.")
    volumes = config.get("Volumes") or {}
    return ImageConfig(
        entrypoint=_texts(config, "Entrypoint"),
        cmd=_texts(config, "Cmd"),
        env=_texts(config, "Env"),
        working_dir=_text(config, "WorkingDir"),
        user=_text(config, "User"),
        stop_signal=_text(config, "StopSignal"),
        volumes=tuple(sorted(item for item in volumes if isinstance(item, str))) if isinstance(volumes, dict) else (),
        labels=_strings(config, "Labels"),
        annotations=manifest.annotations,
        architecture=architecture,
        os=os,
    )


def _index(document: Mapping[str, Any]) -> tuple[tuple[Descriptor, Mapping[str, str]], ...]:
    manifests = document.get("manifests")
    if not isinstance(manifests, list) or len(manifests) > MAX_INDEX_ENTRIES:
        raise PullFailed(f"The registry sent an index without, or with more than {MAX_INDEX_ENTRIES}, manifests.")
    entries = []
    for item in manifests:
        descriptor = _descriptor(item, MAX_MANIFEST_BYTES)
        platform = item.get("platform") or {}
        if not isinstance(platform, dict):
            raise PullFailed("The registry sent an index with a malformed platform.")
        if descriptor.media_type in _INDEXES | _MANIFESTS:
            entries.append((descriptor, {key: _text(platform, key) for key in ("os", "architecture", "variant")}))
    return tuple(entries)


def _manifest(document: Mapping[str, Any], media_type: str) -> Manifest:
    config = _descriptor(document.get("config"), MAX_CONFIG_BYTES)
    if config.media_type not in _CONFIGS:
        raise PullFailed(f"This is no container image: its config is {config.media_type[:80] or 'unnamed'}.")
    layers = document.get("layers")
    if not isinstance(layers, list) or len(layers) > MAX_LAYERS:
        raise PullFailed(f"The image's manifest has no layers, or more than {MAX_LAYERS}.")
    parsed = tuple(_descriptor(item, None) for item in layers)
    for layer in parsed:
        _check_layer(layer)
    return Manifest(config=config, layers=parsed, media_type=media_type, annotations=_strings(document, "annotations"))


def _check_layer(layer: Descriptor) -> None:
    if "foreign" in layer.media_type or "nondistributable" in layer.media_type:
        raise PullFailed("The image has foreign layers, which are not fetched.")
    for prefix in _LAYER_PREFIXES:
        if layer.media_type.startswith(prefix) and layer.media_type.removeprefix(prefix) in _LAYER_SUFFIXES:
            return
    raise PullFailed(f"The image has a layer of an unknown kind ({layer.media_type[:80]}).")


def _descriptor(item: object, max_bytes: int | None) -> Descriptor:
    if not isinstance(item, dict):
        raise PullFailed("The registry sent a malformed manifest.")
    digest, size = _text(item, "digest"), item.get("size")
    if not is_digest(digest) or not isinstance(size, int) or isinstance(size, bool) or size < 0:
        raise PullFailed("The registry sent a manifest with a malformed descriptor.")
    if max_bytes is not None and size > max_bytes:
        raise PullFailed(f"A manifest or config of the image is larger than {max_bytes} bytes.")
    return Descriptor(media_type=_text(item, "mediaType"), digest=digest, size=size)


def _rank(wanted: _Platform, found: Mapping[str, str]) -> int | None:
    """How well an entry fits: 0 is exact, more is worse, None not at all."""
    if found.get("os") != wanted.os or found.get("architecture") != wanted.architecture:
        return None
    variant = found.get("variant") or ""
    if wanted.architecture == "amd64" and variant == "v1":
        variant = ""
    if variant == wanted.variant:
        return 0
    if wanted.architecture == "arm64" and {variant, wanted.variant} <= {"", "v8"}:
        return 0
    if not variant:
        return 1
    if wanted.architecture == "arm" and _version(variant) < _version(wanted.variant or "v7"):
        return 1 + _version(wanted.variant or "v7") - _version(variant)
    return None


def _version(variant: str) -> int:
    return int(variant[1:]) if variant[:1] == "v" and variant[1:].isdecimal() and len(variant) <= 3 else 99


def _object(content: bytes, what: str) -> dict[str, Any]:
    try:
        document = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise PullFailed(
            f"The registry sent an {what} that is no JSON.".replace("an manifest", "a manifest")
        ) from error
    if not isinstance(document, dict):
        raise PullFailed(f"The registry sent something else than the {what}.")
    return document


def _text(document: Mapping[str, Any], key: str) -> str:
    value = document.get(key)
    return value if isinstance(value, str) else ""


def _texts(document: Mapping[str, Any], key: str) -> tuple[str, ...]:
    value = document.get(key) or []
    if isinstance(value, str):  # how very old images write a list of one
        return (value,)
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise PullFailed(f"The image's config has a malformed {key}.")
    return tuple(value)


def _strings(document: Mapping[str, Any], key: str) -> dict[str, str]:
    value = document.get(key) or {}
    if not isinstance(value, dict):
        return {}
    return {name: text for name, text in value.items() if isinstance(text, str)}
