"""The fake runtime keeps the contract of runtimes, by itself and behind the guard of the plugin host."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any, cast

import pytest

from dispatcher.api import Runtime
from dispatcher.config import DeadlinesConfig
from dispatcher.registry.guard import Guard, guard_object
from dispatcher.testing import FakeCase, RuntimeCase
from dispatcher.testing.contract import *  # noqa: F403


class GuardedCase(FakeCase):
    """The fake as the core sees it."""

    @property
    def runtime(self) -> Runtime:
        guard = Guard(
            kind="runtime",
            plugin="fake",
            provider="fake",
            deadlines=DeadlinesConfig().runtime.model_dump(),
            on_call=lambda *_: None,
        )
        keys = ("name", "isolation", "version", "facts_schema", "option_keys")
        return cast("Runtime", guard_object(self._runtime, guard, {key: getattr(self._runtime, key) for key in keys}))


@pytest.fixture(params=[FakeCase, GuardedCase])
async def case(request: pytest.FixtureRequest) -> AsyncIterator[RuntimeCase]:
    case: Any = request.param()
    await case.runtime.start()
    yield case
    await case.runtime.aclose()
    await case.engine.aclose()
