"""How the driver talks with a fresh guest while it makes a template: the agent's client behind the driver's protocol."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path

from dispatcher_hyper_vm.agent.client import AgentClient

_IDLE_S = 1.0


class AgentGate:
    """See `drivers.GuestGate`."""

    async def settle(self, agent_socket: Path) -> None:
        """Wait for the agent, leave one CPU online, and give back what booting has cached."""
        async with _connected(agent_socket) as agent:
            await agent.hello()
            await agent.online(1)
            await agent.release_memory()

    async def timer_rate(self, agent_socket: Path) -> float:
        """How many local timer interrupts per second the guest has while nothing runs in it."""
        async with _connected(agent_socket) as agent:
            before = await agent.stats()
            await asyncio.sleep(_IDLE_S)
            after = await agent.stats()
        elapsed_s = max((after.time_ns - before.time_ns) / 1e9, 0.001)
        return (after.timer_interrupts - before.timer_interrupts) / elapsed_s


@contextlib.asynccontextmanager
async def _connected(path: Path) -> AsyncIterator[AgentClient]:
    agent = AgentClient(str(path))
    agent.start()
    try:
        yield agent
    finally:
        await agent.aclose()
