"""The agent, compiled once with sanitizers and once as it ships, and running for each test."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from dispatcher_hyper_vm.agent.client import AgentClient
from dispatcher_hyper_vm.agent.values import PodSetup
from tests.lab.agent import HostAgent, build_agent, running
from tests.lab.child import PartMissingError


@pytest.fixture(scope="session")
def checked_agent(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The agent with sanitizers."""
    try:
        return build_agent(tmp_path_factory.mktemp("agent"), checked=True)
    except PartMissingError as exc:
        pytest.skip(str(exc))


@pytest.fixture
def agent(checked_agent: Path) -> Iterator[HostAgent]:
    """A running agent."""
    with running(checked_agent) as agent:
        yield agent


@pytest.fixture
async def client(agent: HostAgent) -> AsyncIterator[AgentClient]:
    """A client of it, in a pod that is set up."""
    client = AgentClient(agent.socket)
    client.start()
    await client.setup(PodSetup(hostname="pod", entropy=bytes(32)))
    yield client
    await client.aclose()
