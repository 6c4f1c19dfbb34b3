"""The pytest side of the contract suite: the option `--runtime` and the fixture `case`. Loaded by pytest itself."""

from __future__ import annotations

import importlib
import importlib.metadata
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest

CASES = "dispatcher.testing.cases"


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add `--runtime`."""
    parser.getgroup("dispatcher").addoption(
        "--runtime",
        default="fake",
        metavar="NAME",
        help="runtime for the contract suite: fake, an entry point of dispatcher.testing.cases, or module:attribute",
    )


def find_case(name: str) -> Callable[[Path], Any]:
    """Return the function that yields a runtime's case.

    Raises:
        pytest.UsageError: nothing has this name.
    """
    if name == "fake":
        from dispatcher.testing.case import fake_case

        return fake_case
    if ":" in name:
        module, _, attribute = name.partition(":")
        found: Callable[[Path], Any] = getattr(importlib.import_module(module), attribute)
        return found
    entries = importlib.metadata.entry_points(group=CASES)
    if name not in entries.names:
        known = ", ".join(sorted({"fake", *entries.names}))
        raise pytest.UsageError(f"--runtime={name}: there is no such case; known are {known}, or module:attribute")
    loaded: Callable[[Path], Any] = entries[name].load()
    return loaded


try:
    import pytest_asyncio
except ImportError:  # without it the suite cannot run, but other suites must not notice
    pass
else:

    @pytest_asyncio.fixture
    async def case(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Any]:
        """The runtime under test, as `--runtime` says. A suite of its own defines a fixture of this name instead."""
        cases = find_case(request.config.getoption("--runtime"))(tmp_path)
        yield await anext(cases)
        await anext(cases, None)
