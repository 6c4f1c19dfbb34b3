"""References mean one canonical thing each, or are refused by name."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dispatcher.errors import InvalidRequest
from dispatcher_images.reference import Reference, parse

HEX = "0123456789abcdef" * 4


@pytest.mark.parametrize(
    ("text", "canonical"),
    [
        ("busybox", "docker.io/library/busybox:latest"),
        ("busybox:1.36", "docker.io/library/busybox:1.36"),
        ("docker.io/busybox", "docker.io/library/busybox:latest"),
        ("index.docker.io/library/busybox", "docker.io/library/busybox:latest"),
        ("team/app:v1", "docker.io/team/app:v1"),
        ("localhost/app", "localhost/app:latest"),
        ("localhost:5000/app", "localhost:5000/app:latest"),
        ("127.0.0.1:5000/a/b-c/d__e:T.a-g_1", "127.0.0.1:5000/a/b-c/d__e:T.a-g_1"),
        ("[::1]:5000/app:1", "[::1]:5000/app:1"),
        ("registry.k8s.io/pause:3.9", "registry.k8s.io/pause:3.9"),
        (f"registry.k8s.io/pause@sha256:{HEX}", f"registry.k8s.io/pause@sha256:{HEX}"),
        # The digest decides; the tag says nothing about what is pulled.
        (f"registry.k8s.io/pause:3.9@sha256:{HEX}", f"registry.k8s.io/pause@sha256:{HEX}"),
    ],
)
def test_every_spelling_has_one_canonical_form(text: str, canonical: str) -> None:
    assert str(parse(text)) == canonical
    assert parse(str(parse(text))) == parse(text)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "UPPER/case",
        "docker.io/Busybox",
        "busybox:",
        "busybox:-tag",
        "busybox:" + "t" * 129,
        "busybox@sha256:123",
        "busybox@sha512:" + HEX * 2,
        f"busybox@sha256:{HEX.upper()}",
        HEX,  # an id, never a repository
        "a//b",
        "/busybox",
        "busybox/",
        "../../etc/passwd",
        "registry.io/../x",
        "-oProxyCommand=x/y",
        "host:port/x",
        "host:123456/x",
        "a b",
        "busybox\n",
        "buśybox",
        "registry.io/" + "a" * 256,
        "http://registry.io/x",
        "x" * 5000,
    ],
)
def test_what_is_no_reference_is_refused(text: str) -> None:
    with pytest.raises(InvalidRequest):
        parse(text)


@given(st.text(max_size=80))
def test_any_text_is_parsed_or_refused(text: str) -> None:
    try:
        parsed = parse(text)
    except InvalidRequest:
        return
    assert isinstance(parsed, Reference)
    assert bool(parsed.tag) != bool(parsed.digest)
    assert ".." not in parsed.repository.split("/")
    assert parse(str(parsed)) == parsed
