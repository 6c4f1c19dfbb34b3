"""One runtime of virtual machines for the session, with a guest that is built once and kept between sessions."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio

from tests.lab.child import PartMissingError
from tests.lab.guest import ensure_guest
from tests.lab.images import BUSYBOX, TestImages
from tests.lab.registry import Registry
from tests.vm_pods.kit import VmWorld


@pytest.fixture(scope="session")
def guests() -> Path:
    """The folder with the guest "default"."""
    try:
        return ensure_guest()
    except PartMissingError as exc:
        pytest.skip(str(exc))


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def vms(
    registry: Registry, test_images: TestImages, guests: Path, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[VmWorld]:
    """The session's runtime."""
    world = await VmWorld.open(registry, tmp_path_factory.mktemp("vm"), guests)
    yield world
    await world.close()


@pytest.fixture(scope="session")
def busybox(test_images: TestImages) -> str:
    """The reference of the shell image."""
    return test_images.need(BUSYBOX)
