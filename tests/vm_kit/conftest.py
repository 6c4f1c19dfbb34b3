"""Real namespaces, cgroups and processes for the kit; root only."""

from __future__ import annotations

import shutil
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from dispatcher_vm_kit.launcher import NodePrograms
from tests.lab.child import PartMissingError, lab_folder, require_root
from tests.lab.wire import Wire, make_wire


@pytest.fixture(scope="session")
def programs(tmp_path_factory: pytest.TempPathFactory) -> NodePrograms:
    """The kit's C programs, compiled once."""
    if shutil.which("gcc") is None:
        pytest.skip("gcc is not installed")
    return NodePrograms(tmp_path_factory.mktemp("programs"))


@pytest.fixture
def folder() -> Iterator[Path]:
    """A folder with a short path."""
    try:
        require_root()
    except PartMissingError as exc:
        pytest.skip(str(exc))
    path = lab_folder("vmkit")
    yield path
    shutil.rmtree(path, ignore_errors=True)


@pytest.fixture
async def wire(folder: Path) -> AsyncIterator[Wire]:
    """A pod's namespace, as a network plugin leaves it."""
    async with make_wire(folder / "ns") as made:
        yield made
