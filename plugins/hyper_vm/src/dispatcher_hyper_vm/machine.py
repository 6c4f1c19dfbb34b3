"""One pod's machine while the daemon runs: the monitor, the agent, and what is known of its containers.

Theory of operation. Facts on containers come from the agent: all of them whenever a session begins, then each exit.
Facts on the machine come from the monitor's process. An exit is told only after what has to be on the host by then is
there: the termination message. What only the guest knows outlives it in the pod's folder (`exits`).

The guest is hostile: it can lie about its own containers and no others, and a guest that is silent holds up only those
who wait for it, each with a deadline.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from dispatcher.errors import DispatcherError, NotFound, RuntimeDown, WrongState
from dispatcher.model import (
    ContainerId,
    ContainerUser,
    Liveness,
    ObservedContainer,
    ObservedPod,
    OutputChunk,
    PodId,
    Resources,
)
from dispatcher_hyper_vm.agent.client import AgentClient
from dispatcher_hyper_vm.agent.values import ContainerState, Status
from dispatcher_hyper_vm.drivers import RunningVm, VmEnd
from dispatcher_hyper_vm.exits import keep_exits
from dispatcher_hyper_vm.mounts import REPORT_LIMIT
from dispatcher_hyper_vm.reports import write_report

log = logging.getLogger(__name__)

Tell = Callable[[ObservedPod | ObservedContainer], None]

VM_DIED = "VmDied"
_LIVENESS = {Status.CREATED: Liveness.CREATED, Status.RUNNING: Liveness.RUNNING, Status.EXITED: Liveness.EXITED}
_ID_LENGTH = 64
_CREATING_LOOK_S = 0.05
_HEX = frozenset("0123456789abcdef")


def layer_path(folder: Path, container: ContainerId) -> Path:
    """The writable layer of a container, in its pod's folder. Pure."""
    return folder / "layers" / f"{container}.ext4"


@dataclass(slots=True, kw_only=True)
class Report:
    """Where a container writes its termination message: in the guest (a set of files), and on the host."""

    name: str
    host_path: str


@dataclass(slots=True)
class _Known:
    """What the daemon remembers of a container beside the guest's own state."""

    report: Report | None = None
    user: ContainerUser | None = None
    granted: Resources | None = None
    told: int = 0  # output up to here was handed to the core
    readers: int = 0
    settled: bool = False
    observed: ObservedContainer | None = None
    changed: asyncio.Event = field(default_factory=asyncio.Event)


class Machine:
    """A machine with its agent. Made by `start` or adoption; `aclose` lets go of it, and it runs on."""

    def __init__(self, pod_id: PodId, vm: RunningVm, *, folder: Path, tell: Tell, agent_deadline_s: float) -> None:
        self.id = pod_id
        self.vm = vm
        self.agent = AgentClient(str(vm.agent_socket))
        self.folder = folder
        self.end: VmEnd | None = None
        self._tell = tell
        self._deadline_s = agent_deadline_s
        self._known: dict[ContainerId, _Known] = {}
        self._tasks: list[asyncio.Task[None]] = []
        self._stopping = False
        self._was_told = asyncio.Event()

    def start(self) -> None:
        """Begin to follow the agent and the monitor."""
        self.agent.start()
        self._tasks = [
            asyncio.create_task(self._follow_agent(), name=f"agent-{self.id[:12]}"),
            asyncio.create_task(self._follow_vm(), name=f"vm-{self.id[:12]}"),
        ]

    async def aclose(self) -> None:
        """Let go. Idempotent."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._tasks = []
        await self.agent.aclose()
        await self.vm.aclose()

    @property
    def is_alive(self) -> bool:
        """True while its monitor runs, as far as is known."""
        return self.end is None

    def deadline(self, seconds: float | None = None) -> asyncio.Timeout:
        """How long the agent may take for an answer."""
        return asyncio.timeout(self._deadline_s if seconds is None else seconds)

    # ------------------------------------------------------------------------------------------------------ containers
    def remember(
        self,
        container: ContainerId,
        *,
        report: Report | None = None,
        user: ContainerUser | None = None,
        granted: Resources | None = None,
    ) -> None:
        """Keep what the guest does not know of a container."""
        known = self._known.setdefault(container, _Known())
        known.report = report or known.report
        known.user = user or known.user
        known.granted = granted or known.granted

    def user_of(self, container: ContainerId) -> ContainerUser | None:
        """The identity of its first process, where this daemon made it."""
        known = self._known.get(container)
        return known.user if known else None

    async def delete(self, container: ContainerId) -> None:
        """Delete a container in the guest, and forget it. Idempotent. One that is still being made is waited for.

        Raises:
            RuntimeDown: the guest does not answer, or does not come to an end with making it.
        """
        try:
            async with self.deadline():
                while True:
                    try:
                        await self.agent.delete_container(container)
                        break
                    except WrongState:
                        await asyncio.sleep(_CREATING_LOOK_S)
        except TimeoutError as error:
            raise RuntimeDown(f"the guest of pod {self.id[:12]} does not let go of a container") from error
        known = self._known.pop(container, None)
        if known is not None:
            known.changed.set()

    def layer(self, container: ContainerId) -> Path:
        """Where the container's writable layer is. It exists for each container of this pod, and for no other."""
        return layer_path(self.folder, container)

    def owns(self, container: str) -> bool:
        """True for a container of this pod: what a guest says of others is not heard."""
        is_id = len(container) == _ID_LENGTH and set(container) <= _HEX
        return is_id and (container in self._known or self.layer(ContainerId(container)).exists())

    async def take(self, state: ContainerState) -> ObservedContainer:
        """Turn the guest's word on a container of its pod into a fact; an exit is settled first. Tells of news."""
        container = ContainerId(state.id)
        known = self._known.setdefault(container, _Known())
        if state.status is Status.EXITED and not known.settled:
            await self._fetch_report(container, known)
            known.settled = True
        observed = self._fact(container, state, known)
        is_news = observed != known.observed
        known.observed = observed
        if is_news:
            known.changed.set()
            self._tell(observed)
        return observed

    def _fact(self, container: ContainerId, state: ContainerState, known: _Known) -> ObservedContainer:
        ended = state.status is Status.EXITED
        return ObservedContainer(
            id=container,
            liveness=_LIVENESS[state.status],
            started_at_ns=state.started_at_ns,
            finished_at_ns=max(state.finished_at_ns, state.started_at_ns) if ended else 0,
            exit_code=state.exit_code if ended else None,
            oom_killed=ended and state.oom_killed,
            reason=state.reason if ended else "",
            message=state.message if ended else "",
            user=known.user,
            granted=known.granted,
        )

    async def _fetch_report(self, container: ContainerId, known: _Known) -> None:
        if known.report is None:
            return
        try:
            async with self.deadline():
                data = await self.agent.read_file(known.report.name, "file", REPORT_LIMIT)
            write_report(known.report.host_path, data)
        except (DispatcherError, TimeoutError, OSError) as error:
            log.warning("no termination message", extra={"container_id": container, "cause": str(error)})

    async def refresh(self) -> Mapping[ContainerId, ObservedContainer]:
        """Ask the guest about all of its containers.

        Raises:
            RuntimeDown: it does not answer in time.
        """
        try:
            async with self.deadline():
                states = await self.agent.containers()
        except TimeoutError as error:
            raise RuntimeDown(f"the guest of pod {self.id[:12]} does not answer") from error
        return {ContainerId(state.id): await self.take(state) for state in states if self.owns(state.id)}

    def last_facts(self) -> dict[ContainerId, ObservedContainer]:
        """What was last known of its containers."""
        return {container: known.observed for container, known in self._known.items() if known.observed is not None}

    async def wait_ended(self, container: ContainerId) -> None:
        """Wait until the container has ended, was deleted, or the machine is gone."""
        while self.is_alive:
            known = self._known.get(container)
            if known is None or (known.observed is not None and known.observed.liveness is Liveness.EXITED):
                return
            known.changed.clear()
            await known.changed.wait()

    # ---------------------------------------------------------------------------------------------------------- output
    async def output(self, container: ContainerId, after: int) -> AsyncIterator[OutputChunk]:
        """What the container wrote behind `after`; ends with it, or with the machine."""
        known = self._known.setdefault(container, _Known())
        known.told = max(known.told, after)
        known.readers += 1
        try:
            async with contextlib.aclosing(self.agent.output(container, after)) as chunks:  # type: ignore[type-var]
                async for chunk in self._until_end(chunks):
                    yield chunk
                    known.told = chunk.seq
                    self._was_told.set()
        finally:
            known.readers -= 1
            self._was_told.set()

    async def _until_end(self, chunks: AsyncIterator[OutputChunk]) -> AsyncIterator[OutputChunk]:
        """The chunks, until they end or the machine does: a dead guest never ends its streams."""
        vm_end = asyncio.ensure_future(self.vm.wait())
        try:
            while True:
                step = asyncio.ensure_future(anext(chunks, None))
                try:
                    await asyncio.wait({step, vm_end}, return_when=asyncio.FIRST_COMPLETED)
                    if not step.done():
                        return
                    chunk = step.result()
                finally:
                    if not step.done():
                        step.cancel()
                        await asyncio.gather(step, return_exceptions=True)
                if chunk is None:
                    return
                yield chunk
        finally:
            vm_end.cancel()

    async def drain(self, seconds: float) -> None:
        """Wait until the core has read all that ended containers wrote, for at most so long."""
        with contextlib.suppress(TimeoutError, DispatcherError):
            async with asyncio.timeout(seconds):
                ends = {ContainerId(state.id): state.output_end for state in await self.agent.containers()}
                while any(
                    known.readers and known.told < ends.get(container, 0) for container, known in self._known.items()
                ):
                    self._was_told.clear()
                    await self._was_told.wait()

    # ------------------------------------------------------------------------------------------------------------- end
    async def end_containers(self, seconds: float) -> None:
        """Kill all containers and learn how they ended. A guest that is silent loses what it did not tell."""
        with contextlib.suppress(TimeoutError, DispatcherError):
            async with asyncio.timeout(seconds):
                alive = [each for each, fact in (await self.refresh()).items() if fact.liveness is Liveness.RUNNING]
                for container in alive:
                    with contextlib.suppress(NotFound):
                        await self.agent.signal_container(container, signal.SIGKILL, everything=True)
                for container in alive:
                    await self.wait_ended(container)

    async def ask_to_power_off(self, seconds: float) -> None:
        """Let the guest write its file systems back and switch off. One that is silent is ended by its monitor."""
        with contextlib.suppress(TimeoutError, DispatcherError):
            async with asyncio.timeout(seconds):
                await self.agent.power_off()

    def keep_exits(self) -> None:
        """Write down how its containers ended, before the guest goes."""
        ended = [known.observed for known in self._known.values() if known.observed is not None]
        if any(item.liveness is Liveness.EXITED for item in ended):
            keep_exits(self.folder, ended)

    def is_being_stopped(self) -> None:
        """Its end is asked for from now on: it is no failure."""
        self._stopping = True

    async def _follow_agent(self) -> None:
        while True:
            try:
                async with contextlib.aclosing(self.agent.watch()) as facts:  # type: ignore[type-var]
                    async for item in facts:
                        for state in item if isinstance(item, tuple) else (item,):
                            if self.owns(state.id):
                                await self.take(state)
            except DispatcherError as error:
                log.warning("the guest misbehaves", extra={"pod_id": self.id, "cause": error.message})
                await asyncio.sleep(1)

    async def _follow_vm(self) -> None:
        end = await self.vm.wait()
        self.end = end
        for container, known in list(self._known.items()):
            if known.observed is not None and known.observed.liveness in (Liveness.RUNNING, Liveness.CREATED):
                known.observed = replace(
                    known.observed,
                    liveness=Liveness.EXITED if known.observed.liveness is Liveness.RUNNING else Liveness.ABSENT,
                    reason=VM_DIED,
                    message=f"the pod's virtual machine ended: {end.reason}",
                )
                if not self._stopping:
                    self._tell(known.observed)
            known.changed.set()
            log.debug("container ended with its machine", extra={"container_id": container})
        if not self._stopping:
            log.warning("a machine died", extra={"pod_id": self.id, "reason": end.reason, "cause": end.message})
            self._tell(self.pod_fact())

    def pod_fact(self) -> ObservedPod:
        """What is known of the sandbox."""
        if self.end is None:
            return ObservedPod(id=self.id, liveness=Liveness.RUNNING)
        return ObservedPod(
            id=self.id,
            liveness=Liveness.EXITED,
            reason=VM_DIED,
            message=f"the virtual machine ended: {self.end.reason}. {self.end.message}".strip(),
        )
