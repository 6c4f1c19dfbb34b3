"""What goes into a support archive holds no secret, in whatever form it was written; the rest stays readable."""

from __future__ import annotations

import base64
import json
from urllib.parse import quote, quote_plus

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dispatcher.observability.scrubber import MIN_SECRET, Scrubber

SECRET = 'pl4nted+s3cret/"wörd" 9'


def forms(secret: str) -> list[str]:
    data = secret.encode()
    found = [secret, json.dumps(secret)[1:-1], json.dumps(json.dumps(secret)), quote(secret), quote_plus(secret)]
    found += [data.hex(), data.hex().upper(), base64.b64encode(data).decode(), base64.urlsafe_b64encode(data).decode()]
    found += [base64.b64encode(b"x" * shift + data + b"tail").decode() for shift in range(5)]
    found += [base64.b64encode(base64.b64encode(data)).decode(), json.dumps({"a": secret}, ensure_ascii=False)]
    return found


def hides(shown: str, secret: str) -> bool:
    """No form of the secret is in the text, with what surrounds it left aside."""
    data = secret.encode()
    cores = [secret, json.dumps(secret)[1:-1], data.hex(), data.hex().upper(), quote(secret), quote_plus(secret)]
    for shift in range(3):
        begin, end = (shift * 8 + 5) // 6, (shift + len(data)) * 8 // 6
        cores.append(base64.b64encode(bytes(shift) + data).decode()[begin:end])
    return not any(core in shown for core in cores)


@pytest.mark.parametrize("form", forms(SECRET))
def test_a_known_secret_goes_in_every_form(form: str) -> None:
    scrubber = Scrubber()
    scrubber.learn(SECRET)
    shown = scrubber.text(f"before {form} after")
    assert hides(shown, SECRET)
    assert shown.startswith("before ")
    assert shown.endswith(" after")
    assert hides(json.dumps(scrubber.value({"a": [{"b": form}]})), SECRET)


@settings(max_examples=200, deadline=None)
@given(
    st.text(st.characters(codec="utf-8"), min_size=MIN_SECRET, max_size=40), st.text(max_size=10), st.text(max_size=10)
)
def test_whatever_was_learnt_is_not_shown(secret: str, before: str, after: str) -> None:
    secret = secret.strip()
    scrubber = Scrubber()
    scrubber.learn(secret)
    if len(secret) >= MIN_SECRET and secret not in "***":
        assert secret not in scrubber.text(before + secret + after)
        assert secret not in json.dumps(scrubber.value({"x": before + secret + after}), ensure_ascii=False)


def docker_config(secret: str) -> str:
    auth = base64.b64encode(f"user:{secret}".encode()).decode()
    return json.dumps({"auths": {"registry.example.com": {"auth": auth}}})


@pytest.mark.parametrize(
    "value",
    [
        {"password": SECRET},
        {"deep": [{"er": {"db-password": {"value": SECRET}}}]},
        {"annotation": json.dumps({"db": {"password": SECRET}})},
        {"annotation": json.dumps({"inner": json.dumps({"token": SECRET})})},
        {"label": base64.b64encode(json.dumps({"password": SECRET}).encode()).decode()},
        {".dockerconfigjson": base64.b64encode(docker_config(SECRET).encode()).decode()},
        {"anything": docker_config(SECRET)},
        {"client-key-data": SECRET},
        {"env": {"PLAIN": SECRET}},
        {"environment": {"PLAIN": SECRET}},
        {"auth": {"username": "u", "identity_token": SECRET}},
    ],
)
def test_structure_tells_secrets_and_what_it_told_is_gone_elsewhere(value: dict[str, object]) -> None:
    scrubber = Scrubber()
    scrubber.learn_from(value)
    assert hides(json.dumps(scrubber.value(value), ensure_ascii=False), SECRET)
    if "env" not in value and "environment" not in value:
        elsewhere = scrubber.text(f"it said {SECRET}, or {base64.b64encode(SECRET.encode()).decode()}")
        assert hides(elsewhere, SECRET)


JWT = "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiJzZWNyZXQifQ.c2lnbmF0dXJl"


@pytest.mark.parametrize(
    ("text", "secret"),
    [
        ("Authorization: Bearer abcdef123456", "abcdef123456"),
        ("pulling https://user:hunter22@registry/v2/", "hunter22"),
        ("run --password hunter22 now", "hunter22"),
        ("run --token=hunter22 now", "hunter22"),
        ("registry_password: hunter22", "hunter22"),
        ("a JWT: " + JWT, "c2lnbmF0dXJl"),
        ('{"level":"info","data":{"access_token":"hunter22"}}', "hunter22"),
        ("-----BEGIN RSA PRIVATE KEY-----\nMIIE\nhunter22\n-----END RSA PRIVATE KEY-----\nend", "hunter22"),
        ("-----BEGIN PRIVATE KEY-----\nhunter22", "hunter22"),
        (
            "x " + base64.b64encode(b"password=hunter22 for you").decode() + " y",
            base64.b64encode(b"hunter22").decode()[:8],
        ),
    ],
)
def test_patterns_find_what_nobody_named(text: str, secret: str) -> None:
    assert secret not in Scrubber().text(text)


def test_what_is_no_secret_stays() -> None:
    scrubber = Scrubber()
    scrubber.learn("hunter22")
    shown = {
        "namespace": "shop",
        "rule": "default",
        "message": "The network plugin bridge failed at ADD: no space left on device",
        "sizes": [1, 2.5, None, True],
        "token_lifetime_s": 60,
        "max_tokens": 1000,
        "image": "registry.k8s.io/e2e-test-images/busybox@sha256:" + "ab" * 32,
    }
    assert scrubber.value({**shown, "token_lifetime_s": 0}) | {"token_lifetime_s": 60} == shown
    line = "2026-01-01 INFO    serving  socket=/run/dispatcher/cri.sock version=0.1.0 pod_id=0123456789ab"
    assert scrubber.text(line) == line


def test_short_and_ordinary_words_are_not_taken_for_secrets() -> None:
    scrubber = Scrubber()
    scrubber.learn_variable("LOG_LEVEL", "warning")
    scrubber.learn_variable("DEBUG", "true")
    scrubber.learn_variable("MODE_TOKEN", "abc")
    scrubber.learn_variable("DB_URL", "postgres://u:hunter22@db/x")
    scrubber.learn_variable("ODD", "a1b2c3d4")
    assert scrubber.text("warning true abc") == "warning true abc"
    assert "hunter22" not in scrubber.text("said hunter22")
    assert "a1b2c3d4" not in scrubber.text("said a1b2c3d4")


def test_hostile_texts_cost_no_more_than_others() -> None:
    """Runs of one character, deep nesting, endless base64: were one not linear, the test's timeout would end it."""
    scrubber = Scrubber()
    for number in range(3000):
        scrubber.learn(f"s3cret-{number}-{'x' * 20}")
    nested = "[" * 50_000 + "]" * 50_000
    deep = json.dumps("x")
    for _ in range(12):
        deep = json.dumps([deep])
    for text in (
        "a" * 100_000,
        "secret" * 15_000,
        "=" * 100_000,
        '"' * 100_000,
        "\\" * 100_000,
        nested,
        deep,
        "Pa55" * 25_000,
    ):
        assert scrubber.text(text)
        assert scrubber.value({"x": text})["x"]
