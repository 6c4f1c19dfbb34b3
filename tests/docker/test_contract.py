"""The contract of all runtimes, kept by the Docker runtime on a real engine."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio

from dispatcher.api import ContainerRef, PodRef, Runtime, ensure_namespace, remove_namespace
from dispatcher.model import Attachment, ContainerSpec, PodSpec, make_pod_id
from dispatcher.testing.contract import *  # noqa: F403
from dispatcher_docker_shim.naming import NODE_LABEL
from tests.docker.kit import World

pytestmark = [pytest.mark.lab, pytest.mark.asyncio(loop_scope="session")]  # type: ignore[assignment]


class DockerCase:
    """The session's runtime and engine as the contract asks for them."""

    deadline_s = 25.0

    def __init__(self, world: World, busybox: str) -> None:
        self._world = world
        self._busybox = busybox

    @property
    def runtime(self) -> Runtime:
        return self._world.runtime

    async def restart(self) -> None:
        await self._world.restart_runtime()
        await self.silence()

    async def silence(self) -> None:
        """End the world's own watcher: a runtime has one, and the contract's tests are it."""
        if self._world._watcher is not None:
            self._world._watcher.cancel()
            await asyncio.wait({self._world._watcher})

    async def make_pod(self, spec: PodSpec) -> PodRef:
        pod_id = make_pod_id()
        netns = self._world.folder / "run" / "netns" / pod_id
        await ensure_namespace(netns)
        folder = self._world.folder / "pods" / pod_id
        folder.mkdir(parents=True)
        return PodRef(id=pod_id, spec=spec, attachment=Attachment(netns_path=str(netns)), state_dir=str(folder))

    async def release_pod(self, pod: PodRef) -> None:
        await remove_namespace(self._world.folder / "run" / "netns" / pod.id)
        Path(pod.state_dir).rmdir()

    async def make_container(self, pod: PodRef, spec: ContainerSpec) -> ContainerRef:
        return await self._world.refer(pod, self._busybox, spec)

    async def leftovers(self) -> list[str]:
        """Containers that are labelled as this node's, and namespaces that were not given back by the runtime."""
        kept = {f"/cri_{pod.id}" for pod in self._world.pods}
        return [
            container["Names"][0]
            for container in self._world.engine.containers()
            if container["Labels"].get(NODE_LABEL) == self._world.services.node_uuid
            and not kept.intersection(container["Names"])
        ]


@pytest_asyncio.fixture(loop_scope="session")
async def case(world: World, busybox: str) -> AsyncIterator[DockerCase]:
    """The Docker runtime."""
    found = DockerCase(world, busybox)
    await found.silence()
    yield found


@pytest_asyncio.fixture(loop_scope="session", scope="module", autouse=True)
async def _listen_again(world: World) -> AsyncIterator[None]:
    """Give the world its watcher back."""
    yield
    await world.restart_runtime()
