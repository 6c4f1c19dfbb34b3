"""Manifests, indexes and configs: what is taken, what is chosen, what is refused."""

from __future__ import annotations

import contextlib
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dispatcher.errors import PullFailed
from dispatcher_images import manifest as manifests
from dispatcher_images.manifest import Descriptor, Manifest, choose, parse_config, parse_document

D = ["sha256:" + f"{number:x}" * 64 for number in range(1, 10)]
AMD64 = ("linux/amd64",)


def document(**changes: object) -> dict[str, object]:
    return {
        "schemaVersion": 2,
        "mediaType": manifests.OCI_MANIFEST,
        "config": {"mediaType": "application/vnd.oci.image.config.v1+json", "size": 2, "digest": D[0]},
        "layers": [{"mediaType": "application/vnd.oci.image.layer.v1.tar+gzip", "size": 5, "digest": D[1]}],
        "annotations": {"com.urunc.unikernel.binary": "/kernel"},
    } | changes


def parse(value: object, media_type: str = "") -> object:
    return parse_document(json.dumps(value).encode(), media_type)


def entry(digest: str, os: str = "linux", architecture: str = "amd64", **more: str) -> dict[str, object]:
    platform = {"os": os, "architecture": architecture, **more}
    return {"mediaType": manifests.OCI_MANIFEST, "size": 9, "digest": digest, "platform": platform}


def index(*entries: object, kind: str = manifests.OCI_INDEX) -> dict[str, object]:
    return {"schemaVersion": 2, "mediaType": kind, "manifests": list(entries)}


def chosen(entries: list[object], platforms: tuple[str, ...] = AMD64) -> str:
    parsed = parse(index(*entries))
    assert isinstance(parsed, tuple)
    return choose(parsed, platforms).digest


@pytest.mark.parametrize("layer", ["gzip", "zstd", ""])
def test_oci_layers_of_each_kind_are_taken(layer: str) -> None:
    kind = "application/vnd.oci.image.layer.v1.tar" + (f"+{layer}" if layer else "")
    parsed = parse(document(layers=[{"mediaType": kind, "size": 5, "digest": D[1]}]))
    assert isinstance(parsed, Manifest)
    assert parsed.layers[0] == Descriptor(media_type=kind, digest=D[1], size=5)


def test_docker_manifests_mean_the_same() -> None:
    config = {"mediaType": "application/vnd.docker.container.image.v1+json", "size": 2, "digest": D[0]}
    layer = {"mediaType": "application/vnd.docker.image.rootfs.diff.tar.gzip", "size": 5, "digest": D[1]}
    parsed = parse(document(mediaType=manifests.DOCKER_MANIFEST, config=config, layers=[layer]))
    assert isinstance(parsed, Manifest)


def test_annotations_reach_the_image_config() -> None:
    manifest = parse(document())
    assert isinstance(manifest, Manifest)
    config = {"architecture": "amd64", "os": "linux", "rootfs": {"diff_ids": [D[2]]}, "config": {"User": "a:b"}}
    file = parse_config(json.dumps(config).encode(), manifest, AMD64)
    assert file.config.annotations == {"com.urunc.unikernel.binary": "/kernel"}
    assert file.config.user == "a:b"
    assert file.diff_ids == (D[2],)


def test_an_index_is_resolved_by_platform_in_order_of_preference() -> None:
    entries: list[object] = [
        entry(D[0], architecture="arm64", variant="v8"),
        entry(D[1], os="unknown", architecture="unknown"),  # an attestation
        entry(D[2]),
        entry(D[3], os="windows"),
    ]
    assert chosen(entries) == D[2]
    assert chosen(entries, ("linux/arm64", "linux/amd64")) == D[0]
    assert chosen(entries, ("linux/riscv64", "linux/amd64")) == D[2]


def test_an_exact_variant_wins_over_a_plain_one() -> None:
    entries: list[object] = [entry(D[0], architecture="arm"), entry(D[1], architecture="arm", variant="v7")]
    assert chosen(entries, ("linux/arm/v7",)) == D[1]
    older: list[object] = [
        entry(D[0], architecture="arm", variant="v5"),
        entry(D[1], architecture="arm", variant="v6"),
    ]
    assert chosen(older, ("linux/arm/v7",)) == D[1]


def test_a_processor_that_the_node_may_lack_is_not_chosen() -> None:
    with pytest.raises(PullFailed, match="linux/amd64"):
        chosen([entry(D[0], variant="v3")])
    assert chosen([entry(D[0], variant="v3"), entry(D[1])]) == D[1]


def test_a_missing_platform_is_named() -> None:
    with pytest.raises(PullFailed, match=r"has no linux/amd64; it offers linux/s390x"):
        chosen([entry(D[0], architecture="s390x")])


def test_an_entry_without_platform_is_taken_when_nothing_else_fits() -> None:
    bare = {"mediaType": manifests.OCI_MANIFEST, "size": 9, "digest": D[4]}
    assert chosen([entry(D[0], architecture="s390x"), bare]) == D[4]


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ([], "something else"),
        ({"schemaVersion": 1, "fsLayers": []}, "schema 1"),
        ({}, "unknown kind"),
        (document(manifests=[]), "index and a manifest"),
        (index() | {"layers": []}, "index and a manifest"),
        (document(config=None), "malformed"),
        (
            document(config={"mediaType": "application/vnd.oci.empty.v1+json", "size": 2, "digest": D[0]}),
            "no container",
        ),
        (document(layers=[{"mediaType": "x", "size": 5, "digest": D[1]}]), "unknown kind"),
        (
            document(
                layers=[
                    {
                        "mediaType": "application/vnd.docker.image.rootfs.foreign.diff.tar.gzip",
                        "size": 5,
                        "digest": D[1],
                        "urls": ["http://169.254.169.254/"],
                    }
                ]
            ),
            "foreign",
        ),
        (document(layers=[{"mediaType": "x", "size": -5, "digest": D[1]}]), "descriptor"),
        (document(layers=[{"mediaType": "x", "size": True, "digest": D[1]}]), "descriptor"),
        (document(layers=[{"mediaType": "x", "size": 5, "digest": "sha256:../../x"}]), "descriptor"),
        (document(layers=[document()["layers"][0]] * 128), "more than 127"),  # type: ignore[index]
        (document(config={"mediaType": "x", "size": 1 << 40, "digest": D[0]}), "larger than"),
        (index(*[entry(D[0])] * 1025), "more than 1024"),
        (index("x"), "malformed"),
    ],
)
def test_malformed_documents_are_refused_in_words(value: object, words: str) -> None:
    with pytest.raises(PullFailed, match=words):
        parse(value)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"architecture": "arm64"}, "linux/arm64"),
        ({"os": "windows"}, "windows/amd64"),
        ({"rootfs": {"diff_ids": []}}, "0 layers"),
        ({"rootfs": {"diff_ids": ["sha256:x"]}}, "diff_ids"),
        ({"config": {"Cmd": {"a": 1}}}, "Cmd"),
        ({"config": []}, ""),
    ],
)
def test_configs_that_do_not_fit_are_refused(changes: dict[str, object], words: str) -> None:
    manifest = parse(document())
    assert isinstance(manifest, Manifest)
    config = {"architecture": "amd64", "os": "linux", "rootfs": {"diff_ids": [D[2]]}} | changes
    if changes == {"config": []}:
        assert parse_config(json.dumps(config).encode(), manifest, AMD64).config.cmd == ()
        return
    with pytest.raises(PullFailed, match=words):
        parse_config(json.dumps(config).encode(), manifest, AMD64)


KEYS = ["schemaVersion", "mediaType", "config", "layers", "manifests", "platform", "digest", "size", "annotations",
        "rootfs", "diff_ids", "os", "architecture", "Cmd", "Volumes", "Labels"]  # fmt: skip
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5) | st.sampled_from([D[0], manifests.OCI_MANIFEST]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(KEYS), inner, max_size=6),
    max_leaves=20,
)


@given(JSON)
def test_any_json_is_parsed_or_refused(value: object) -> None:
    with contextlib.suppress(PullFailed):
        parse(value)
    manifest = parse(document())
    assert isinstance(manifest, Manifest)
    with contextlib.suppress(PullFailed):
        parse_config(json.dumps(value).encode(), manifest, AMD64)


def test_bytes_that_are_no_json_are_refused() -> None:
    for content in (b"", b"\xff", b"[" * 100_000, b"NaN"):
        with pytest.raises(PullFailed):
            parse_document(content, "")
