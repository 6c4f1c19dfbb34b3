"""An attachment: the streams of a container's first process, of which the caller may want only some."""

from __future__ import annotations

from collections.abc import AsyncIterator

from dispatcher.model import ContainerId
from dispatcher_hyper_vm.agent.client import AgentClient, AgentProcess


class AttachedProcess:
    """See dispatcher.api.Process. `wait` returns when the attachment ends."""

    def __init__(
        self, agent: AgentClient, container: ContainerId, process: AgentProcess, wanted: frozenset[str]
    ) -> None:
        self._agent = agent
        self._container = container
        self._process = process
        self._wanted = wanted

    async def output(self) -> AsyncIterator[tuple[str, bytes]]:
        """Yield what is wanted; the rest is read and dropped."""
        async for stream, data in self._process.output():
            if stream in self._wanted:
                yield stream, data

    async def write_stdin(self, data: bytes) -> None:
        """Write to the first process."""
        await self._process.write_stdin(data)

    async def close_stdin(self) -> None:
        """Half-close; the guest knows whether the process is to see it."""
        await self._process.close_stdin()

    async def resize(self, width: int, height: int) -> None:
        """Set the size of the container's terminal."""
        await self._agent.resize_container(self._container, width, height)

    async def wait(self) -> int:
        """Wait for the end."""
        return await self._process.wait()

    async def kill(self) -> None:
        """Detach."""
        await self._process.kill()

    async def aclose(self) -> None:
        """Let go."""
        await self._process.aclose()
