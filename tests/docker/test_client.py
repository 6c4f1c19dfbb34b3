"""The client of the engine's unary calls, with many callers at once."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator

import pytest
import pytest_asyncio

from dispatcher_docker_shim.docker_client import DockerClient
from tests.docker.kit import World

pytestmark = [pytest.mark.lab, pytest.mark.asyncio(loop_scope="session")]


@pytest_asyncio.fixture(loop_scope="session")
async def client(world: World) -> AsyncIterator[DockerClient]:
    """A client with as many threads as calls come at once."""
    client = DockerClient(str(world.engine.socket), threads=16, deadline_s=30, load_deadline_s=30)
    client.revive((1, 41))
    yield client
    client.close()


async def test_calls_at_once_do_not_take_the_connection_from_each_other(client: DockerClient) -> None:
    """Each call has an address of its own; not one of them may find its connection closed by another's."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        for _round in range(20):
            found = await asyncio.gather(*(client.find(f"nobody-{number}") for number in range(64)))
            assert found == [None] * 64
    finally:
        sys.setswitchinterval(interval)
