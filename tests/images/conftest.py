"""Image stores on fresh folders, and what they must leave behind."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from dispatcher.api import Services
from dispatcher_images.config import ImagesConfig
from dispatcher_images.provider import OciImages
from tests.images.odd_registry import OddRegistry
from tests.lab.child import PartMissingError
from tests.lab.registry import Auth, Registry

Open = Callable[..., Awaitable[OciImages]]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Everything here starts worker processes that change their root folder."""
    for item in items:
        if Path(__file__).parent in item.path.parents and os.geteuid() != 0:
            item.add_marker(pytest.mark.skip(reason="image workers change their root folder: needs root"))


def make_provider(
    folder: Path, notify: Callable[[str, str], None] = lambda _reason, _message: None, **section: Any
) -> OciImages:
    """A provider that is not started."""
    services = Services(state_dir=folder, run_dir=folder, node_uuid="node", now_ns=time.time_ns, notify=notify)
    return OciImages(ImagesConfig.model_validate(section), services)


@pytest.fixture
async def open_store(tmp_path: Path) -> AsyncIterator[Open]:
    """Opens stores on one folder; closes what is open at the end."""
    opened: list[OciImages] = []

    async def open_(leases: tuple[tuple[str, Any], ...] = (), **section: Any) -> OciImages:
        for earlier in opened:
            await earlier.aclose()
        opened.clear()
        folder = tmp_path / "state"
        folder.mkdir(mode=0o700, exist_ok=True)
        provider = make_provider(folder, **section)
        await provider.start(leases)
        opened.append(provider)
        await settle(provider)
        return provider

    yield open_
    for provider in opened:
        await provider.aclose()


@pytest.fixture
async def store(open_store: Open) -> OciImages:
    """An empty store with default settings."""
    return await open_store()


@pytest.fixture
async def odd() -> AsyncIterator[OddRegistry]:
    """A registry that misbehaves on demand."""
    async with OddRegistry() as registry:
        yield registry


@pytest.fixture(scope="module")
def registries() -> Iterator[Callable[..., Registry]]:
    """Makes real registries of any kind, one of each per module."""
    made: dict[tuple[Auth, bool], Registry] = {}

    def make(*, auth: Auth = Auth.NONE, tls: bool = False) -> Registry:
        if (auth, tls) not in made:
            try:
                registry = Registry(auth=auth, tls=tls)
                made[auth, tls] = registry
                registry.start()
            except PartMissingError as missing:
                pytest.skip(str(missing))
        return made[auth, tls]

    yield make
    for registry in made.values():
        registry.close()


async def settle(store: OciImages) -> None:
    """Wait for what the store does in the background after its start, or on a release."""
    await asyncio.gather(*(task for task in store._tasks if "forget_for_ever" not in repr(task.get_coro())))


def files(provider: OciImages) -> list[str]:
    """Every file of the store that holds content, relative to its folder."""
    folder = provider._folder
    kept = {"oci-layout", "index.db", "index.db-wal", "index.db-shm"}
    return sorted(
        str(path.relative_to(folder)) for path in folder.rglob("*") if not path.is_dir() and path.name not in kept
    )
