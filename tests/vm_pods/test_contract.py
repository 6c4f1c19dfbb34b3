"""The contract of all runtimes, kept by virtual machines on real QEMU."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest
import pytest_asyncio

from dispatcher.api import ContainerRef, PodRef, Runtime
from dispatcher.model import ContainerSpec, PodSpec
from dispatcher.testing.contract import *  # noqa: F403
from tests.lab.child import patient
from tests.vm_pods.kit import VmWorld

pytestmark = [pytest.mark.lab, pytest.mark.vm, pytest.mark.timeout(200), pytest.mark.asyncio(loop_scope="session")]  # type: ignore[assignment]


class VmCase:
    """The session's runtime as the contract asks for it."""

    deadline_s = patient(40)

    def __init__(self, world: VmWorld, busybox: str) -> None:
        self._world = world
        self._busybox = busybox
        self._made: set[str] = set()

    @property
    def runtime(self) -> Runtime:
        return self._world.runtime

    async def restart(self) -> None:
        await self._world.restart()

    async def make_pod(self, spec: PodSpec) -> PodRef:
        return await self._world.make_pod(spec)

    async def release_pod(self, pod: PodRef) -> None:
        await self._world.release_pod(pod)

    async def make_container(self, pod: PodRef, spec: ContainerSpec) -> ContainerRef:
        return await self._world.refer(pod, self._busybox, spec)

    async def leftovers(self) -> list[str]:
        """Machines, and folders of pods."""
        folders = (self._world.folder / "vm" / "pods", self._world.folder / "run" / "vm")
        return [str(path) for folder in folders if folder.exists() for path in folder.iterdir() if len(path.name) == 64]


@pytest_asyncio.fixture(loop_scope="session")
async def case(vms: VmWorld, busybox: str) -> AsyncIterator[VmCase]:
    """The runtime of virtual machines."""
    yield VmCase(vms, busybox)
