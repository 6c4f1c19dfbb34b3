"""The store of templates: one build for all who ask, bounds, failures with reasons. No guest runs here."""

from __future__ import annotations

import asyncio
import os
from typing import Any

import pytest

from dispatcher_hyper_vm.templates import (
    Template,
    TemplateKey,
    TemplateLimits,
    TemplateRefused,
    Templates,
    make_ram,
    seal_ram,
)

MB = 1 << 20


def key(name: str = "a") -> TemplateKey:
    return TemplateKey(digest=name * 64, memory_bytes=512 * MB, vcpus=1)


class Builder:
    """Builds at a word of the test, or fails."""

    def __init__(self, *, held: int = 4096, error: Exception | None = None) -> None:
        self.calls = 0
        self.go = asyncio.Event()
        self._held = held
        self._error = error

    async def __call__(self, key: TemplateKey) -> Template:
        self.calls += 1
        await self.go.wait()
        if self._error is not None:
            raise self._error
        ram = make_ram(64 * MB)
        os.pwrite(ram, b"x" * self._held, 0)
        seal_ram(ram)
        return Template(key=key, ram_fd=ram, state=b"state", build_seconds=0.0)


@pytest.fixture
async def store() -> Any:
    stores = []

    def make(available: int = 1 << 40, **limits: Any) -> Templates:
        stores.append(Templates(TemplateLimits(**limits), available_bytes=lambda: available))
        return stores[-1]

    yield make
    for each in stores:
        await each.aclose()


async def test_one_build_for_all_who_ask(store: Any) -> None:
    """Ten pods at once have one guest booted, and all start from it; a later one does not wait."""
    templates, build = store(), Builder()
    asking = [asyncio.create_task(templates.get(key(), build)) for _ in range(10)]
    await asyncio.sleep(0)
    build.go.set()
    answers = await asyncio.gather(*asking)
    assert {id(template) for template, _ in answers} == {id(answers[0][0])}
    assert answers[0][0] is not None
    assert build.calls == 1
    assert (await templates.get(key(), build))[1] == ""
    assert build.calls == 1


async def test_a_cancelled_caller_leaves_the_build(store: Any) -> None:
    """The build belongs to nobody's call."""
    templates, build = store(), Builder()
    asking = asyncio.create_task(templates.get(key(), build))
    while not build.calls:
        await asyncio.sleep(0)
    asking.cancel()
    await asyncio.gather(asking, return_exceptions=True)
    build.go.set()
    template, _ = await templates.get(key(), build)
    assert template is not None
    assert build.calls == 1


async def test_a_start_waits_no_longer_than_it_may(store: Any) -> None:
    """Then it boots cold and says why; the build goes on."""
    templates, build = store(wait_s=0.01), Builder()
    template, reason = await templates.get(key(), build)
    assert template is None
    assert "not ready within 0.01 s" in reason
    assert templates.report()["building"] == [key().digest[:12]]


async def test_a_failure_has_a_reason_and_is_not_repeated_at_once(store: Any) -> None:
    """Who asks meanwhile boots cold without waiting."""
    templates, build = store(), Builder(error=TemplateRefused("the guest's timer ticks 250 times a second"))
    build.go.set()
    for _ in range(2):
        template, reason = await templates.get(key(), build)
        assert template is None
        assert reason == "its template could not be made: the guest's timer ticks 250 times a second"
    assert build.calls == 1
    assert "ticks" in templates.report()["failures"][key().digest[:12]]


async def test_a_bug_in_a_build_names_itself_only(store: Any) -> None:
    """The text of a foreign error stays in the log."""
    templates, build = store(), Builder(error=ValueError("secret"))
    build.go.set()
    assert await templates.get(key(), build) == (None, "its template could not be made: an error of ours (ValueError)")


async def test_count_is_bounded(store: Any) -> None:
    """The least recently used goes; the newest stays."""
    templates, build = store(max_count=2), Builder()
    build.go.set()
    for name in "ab":
        await templates.get(key(name), build)
    templates.note_clone(key("a").digest, 1)
    await templates.get(key("c"), build)
    kept = {each["key"][0] for each in templates.report()["templates"]}
    assert kept == {"a", "c"}
    assert templates.report()["evicted"] == 1


async def test_bytes_are_bounded_and_told(store: Any) -> None:
    """What a guest has touched counts, not what it could touch."""
    templates, build = store(max_bytes=20 * MB), Builder(held=8 * MB)
    build.go.set()
    for name in "ab":
        await templates.get(key(name), build)
    assert templates.report()["bytes"] == 2 * (8 * MB + 5)
    await templates.get(key("c"), build)
    assert {each["key"][0] for each in templates.report()["templates"]} == {"b", "c"}


async def test_no_template_on_a_full_host(store: Any) -> None:
    """Memory for pods comes first."""
    templates, build = store(available=100 * MB), Builder()
    assert await templates.get(key(), build) == (None, "the host has too little memory for a template")
    assert build.calls == 0


async def test_templates_can_be_none(store: Any) -> None:
    """A count of 0 switches them off."""
    templates, build = store(max_count=0), Builder()
    assert await templates.get(key(), build) == (None, "no templates are kept")


async def test_a_bad_template_is_discarded(store: Any) -> None:
    """A template that no clone starts from is dropped, and its reason kept."""
    templates, build = store(), Builder()
    build.go.set()
    await templates.get(key(), build)
    templates.discard(key().digest, "a clone did not start")
    assert templates.report()["templates"] == []
    assert await templates.get(key(), build) == (None, "its template could not be made: a clone did not start")


def test_sealed_memory_cannot_change() -> None:
    """Not even through a descriptor that was opened for writing anew, as a taken-over monitor could."""
    ram = make_ram(MB)
    os.pwrite(ram, b"guest", 0)
    seal_ram(ram)
    again = os.open(f"/proc/self/fd/{ram}", os.O_RDWR)
    try:
        for descriptor in (ram, again):
            with pytest.raises(PermissionError):
                os.pwrite(descriptor, b"other", 0)
            with pytest.raises(PermissionError):
                os.ftruncate(descriptor, 0)
        assert os.pread(again, 5, 0) == b"guest"
    finally:
        os.close(again)
        os.close(ram)
