"""One runtime on the session's engine for most tests; those that kill engines make a world of their own."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio

from tests.docker.kit import World
from tests.lab.engine import Engine
from tests.lab.images import BUSYBOX, TestImages
from tests.lab.registry import Registry


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def world(
    engine: Engine,
    registry: Registry,
    test_images: TestImages,
    tmp_path_factory: pytest.TempPathFactory,
) -> AsyncIterator[World]:
    """The session's runtime."""
    world = await World.open(engine, registry, tmp_path_factory.mktemp("docker"))
    yield world
    await world.close()


@pytest.fixture(scope="session")
def busybox(test_images: TestImages) -> str:
    """The reference of the shell image."""
    return test_images.need(BUSYBOX)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder for host mounts that everybody may enter."""
    tmp_path.chmod(0o755)
    return tmp_path
