"""Logins: which secret goes where, and what registries ask for."""

from __future__ import annotations

import base64

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dispatcher.errors import InvalidRequest
from dispatcher.model import Credentials
from dispatcher_images.registry_auth import ANONYMOUS, Challenge, login_for, parse_challenges, realm_problem


def test_the_auth_field_is_user_and_password() -> None:
    login = login_for(Credentials(auth=base64.b64encode(b"me:pass:word").decode()), "r.io")
    assert (login.username, login.password) == ("me", "pass:word")
    assert login.basic == "Basic " + base64.b64encode(b"me:pass:word").decode()


@pytest.mark.parametrize("auth", ["%%%", base64.b64encode(b"nocolon").decode(), base64.b64encode(b"\xff:").decode()])
def test_a_malformed_auth_field_is_refused_without_showing_it(auth: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        login_for(Credentials(auth=auth), "r.io")
    assert auth not in str(caught.value)


@pytest.mark.parametrize(
    ("address", "registry", "is_used"),
    [
        ("", "r.io", True),
        ("r.io", "r.io", True),
        ("https://r.io/v2/", "r.io", True),
        ("R.io", "r.io", True),
        ("https://index.docker.io/v1/", "docker.io", True),
        ("r.io:5000", "r.io", False),
        ("https://evil.io/r.io", "r.io", False),
        ("https://r.io@evil.io/", "r.io", False),
        ("other.io", "r.io", False),
    ],
)
def test_a_secret_for_one_registry_is_not_shown_to_another(address: str, registry: str, is_used: bool) -> None:
    login = login_for(Credentials(username="u", password="p", server_address=address), registry)
    assert (login != ANONYMOUS) == is_used


def test_secrets_are_in_no_repr() -> None:
    credentials = Credentials(username="u1", password="p1", identity_token="i1", registry_token="t1")
    shown = repr(credentials) + repr(login_for(credentials, "r.io"))
    assert not any(secret in shown for secret in ("u1", "p1", "i1", "t1"))


def test_challenges_of_all_spellings_are_read() -> None:
    headers = [
        'Bearer realm="https://auth.io/token",service="reg, istry",scope="repository:a/b:pull,push"',
        'basic Realm="x\\"y", Bearer realm=https://b.io/t , service=s',
        "Negotiate",
    ]
    assert parse_challenges(headers) == (
        Challenge(
            scheme="bearer", realm="https://auth.io/token", service="reg, istry", scope="repository:a/b:pull,push"
        ),
        Challenge(scheme="basic", realm='x"y'),
        Challenge(scheme="bearer", realm="https://b.io/t", service="s"),
    )


@given(st.lists(st.text(max_size=60), max_size=3))
def test_any_header_is_read_without_an_error(headers: list[str]) -> None:
    parse_challenges(headers)


def test_a_token_service_must_be_as_safe_as_its_registry() -> None:
    assert realm_problem("http://auth.io/token", registry_is_plain=False)
    assert not realm_problem("http://127.0.0.1:1/token", registry_is_plain=True)
    assert not realm_problem("https://auth.io/token", registry_is_plain=False)
    for realm in ("", "file:///etc/passwd", "https://", "https://u:p@auth.io/", "//auth.io/"):
        assert realm_problem(realm, registry_is_plain=True)
