"""Log lines: facts by name, context across tasks, and no secret by any way in."""

from __future__ import annotations

import asyncio
import io
import json
import logging
from collections.abc import Iterator

import pytest

from dispatcher.errors import RuntimeDown
from dispatcher.model import Credentials
from dispatcher.observability import configure_logging, current_context, log_context

log = logging.getLogger("dispatcher.test")


@pytest.fixture
def lines() -> Iterator[io.StringIO]:
    root = logging.getLogger()
    before, level, raising = root.handlers[:], root.level, logging.raiseExceptions
    stream = io.StringIO()
    configure_logging(style="json", level="debug", stream=stream)
    yield stream
    root.handlers[:] = before
    root.setLevel(level)
    logging.raiseExceptions = raising


def test_facts_and_context_are_fields(lines: io.StringIO) -> None:
    with log_context(correlation_id="c1", pod_id="p" * 64):
        log.info("pod is ready", extra={"data": {"runtime": "docker", "took_s": 0.25}})
    line = json.loads(lines.getvalue())
    assert line["message"] == "pod is ready"
    assert (line["runtime"], line["took_s"], line["correlation_id"]) == ("docker", 0.25, "c1")
    assert line["level"] == "info"
    assert line["time"].endswith("Z")


async def test_context_follows_the_task_and_no_other(lines: io.StringIO) -> None:
    async def work(name: str) -> None:
        with log_context(correlation_id=name):
            await asyncio.sleep(0)
            await asyncio.create_task(report())

    async def report() -> None:
        log.info("inner")

    await asyncio.gather(work("a"), work("b"))
    log.info("outer")
    seen = [json.loads(line) for line in lines.getvalue().splitlines()]
    assert {line["correlation_id"] for line in seen if line["message"] == "inner"} == {"a", "b"}
    assert "correlation_id" not in seen[-1]
    assert dict(current_context()) == {}


SECRET = "s3cr3t-value"


@pytest.mark.parametrize(
    "speak",
    [
        lambda: log.info("pull", extra={"data": {"auth": {"username": "u", "password": SECRET}}}),
        lambda: log.info("pull", extra={"data": {"deep": [{"identity_token": SECRET}]}}),
        lambda: log.info("header Authorization: Bearer %s", SECRET),
        lambda: log.info("GET https://user:%s@registry.example/v2/", SECRET),
        lambda: log.info('config {"password": "%s", "x": 1}', SECRET),
        lambda: log.info("login --password=%s", SECRET),
        lambda: log.info("credentials %s", Credentials(password=SECRET)),
        lambda: log.info("facts %s", {"registry_token": SECRET}),
        lambda: log.error("failed", exc_info=RuntimeError(f"https://u:{SECRET}@host refused")),
        lambda: log.error("failed", exc_info=RuntimeDown("engine is away", token=SECRET)),
        lambda: log.info("x", extra={"data": {"envs": {"DB": SECRET}}}),
    ],
)
@pytest.mark.parametrize("style", ["json", "text"])
def test_no_way_in_for_secrets(lines: io.StringIO, style: str, speak: object) -> None:
    configure_logging(style=style, level="debug", stream=lines)
    assert callable(speak)
    speak()
    assert lines.getvalue()
    assert SECRET not in lines.getvalue()


def test_text_escapes_what_a_terminal_would_obey(lines: io.StringIO) -> None:
    configure_logging(style="text", stream=lines)
    log.info("pod %s", "evil\x1b[2J\nfake line", extra={"data": {"name": "a\x07b"}})
    written = lines.getvalue()
    assert written.count("\n") == 1
    assert "\x1b" not in written
    assert "\x07" not in written


def test_our_errors_bring_their_facts(lines: io.StringIO) -> None:
    log.error("pod failed", exc_info=RuntimeDown("dockerd is away", runtime="docker"))
    line = json.loads(lines.getvalue())
    assert line["runtime"] == "docker"
    assert "RuntimeDown: dockerd is away" in line["traceback"]


def test_unknown_style_and_level_are_refused() -> None:
    with pytest.raises(ValueError, match="style"):
        configure_logging(style="xml")
    with pytest.raises(ValueError, match="level"):
        configure_logging(level="loud", stream=io.StringIO())
