"""An engine that exists in memory only, with real behaviour: containers run scripts, produce output, obey signals.

It plays the part of dockerd or of a hypervisor: it goes on living when the runtime object, as the daemon's part, is
thrown away and made anew, and keeps the output of each container like a durable buffer. `faults` lets a test plant
what a plugin may do wrong; see `Fault`.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from dispatcher.api import ContainerRef, ExecSpec, PodRef
from dispatcher.errors import InvalidRequest, RuntimeDown
from dispatcher.model import (
    Change,
    ContainerUser,
    Liveness,
    ObservedContainer,
    ObservedPod,
    OutputChunk,
    Resources,
    Snapshot,
    Stream,
)
from dispatcher.testing.shell import CannotExecuteError, Program, Stdin, signal_number

MAX_CHUNK = 16 * 1024
MAX_UNREAD = 256 * 1024


class Bell:
    """Wakes everybody who waits for news."""

    def __init__(self) -> None:
        self._event = asyncio.Event()

    def ring(self) -> None:
        """Wake those who wait now."""
        event, self._event = self._event, asyncio.Event()
        event.set()

    async def wait(self) -> None:
        """Wait for the next ring."""
        await self._event.wait()


@dataclass(frozen=True, slots=True)
class Fault:
    """What a call does instead of its work: raise, hang for ever, hang and ignore cancellation, or return something."""

    error: BaseException | None = None
    hang: bool = False
    stubborn: bool = False
    result: Any = None
    times: int = -1  # how often, -1 for always

    async def happen(self) -> Any:
        """Do it."""
        if self.error is not None:
            raise self.error
        while self.stubborn:
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.Event().wait()
        if self.hang:
            await asyncio.Event().wait()
        return self.result


@dataclass(slots=True, eq=False)
class FakePod:
    """A sandbox in the engine."""

    ref: PodRef
    liveness: Liveness = Liveness.RUNNING
    reason: str = ""
    ports: dict[int, str] = field(default_factory=dict)  # port: the container that listens

    def observe(self) -> ObservedPod:
        """Return what is to be seen of it."""
        return ObservedPod(id=self.ref.id, liveness=self.liveness, reason=self.reason)


@dataclass(slots=True, eq=False)
class FakeContainer:
    """A container in the engine, with its durable buffer of output."""

    ref: ContainerRef
    liveness: Liveness = Liveness.CREATED
    started_at_ns: int = 0
    finished_at_ns: int = 0
    exit_code: int | None = None
    oom_killed: bool = False
    reason: str = ""
    message: str = ""
    granted: Resources | None = None
    chunks: list[OutputChunk] = field(default_factory=list)
    stdin: Stdin = field(default_factory=Stdin)
    program: Program | None = None
    task: asyncio.Task[None] | None = None
    kill_at: float | None = None
    bell: Bell = field(default_factory=Bell)
    attached: list[FakeProcess] = field(default_factory=list)

    def observe(self) -> ObservedContainer:
        """Return what is to be seen of it."""
        return ObservedContainer(
            id=self.ref.id,
            liveness=self.liveness,
            started_at_ns=self.started_at_ns,
            finished_at_ns=self.finished_at_ns,
            exit_code=self.exit_code,
            oom_killed=self.oom_killed,
            reason=self.reason,
            message=self.message,
            granted=self.granted,
            user=ContainerUser(uid=self.ref.spec.security.run_as_user or 0, gid=0),
        )

    @property
    def command(self) -> tuple[str, ...]:
        """The arguments of the first process, as CRI defines them from the spec and the image."""
        spec, image = self.ref.spec, self.ref.image
        arguments = spec.args or (() if spec.command else image.cmd)
        return (spec.command or image.entrypoint) + arguments

    @property
    def env(self) -> dict[str, str]:
        """The environment: the image's, overlaid by the spec's."""
        env = dict(entry.partition("=")[::2] for entry in self.ref.image.env)
        return env | {entry.key: entry.value.decode(errors="replace") for entry in self.ref.spec.envs}

    async def write(self, stream: str, data: bytes) -> None:
        """Take output of the first process."""
        if self.ref.spec.tty:
            stream, data = "stdout", data.replace(b"\n", b"\r\n")
        for start in range(0, len(data), MAX_CHUNK):
            part = data[start : start + MAX_CHUNK]
            seq = (self.chunks[-1].seq if self.chunks else 0) + len(part)
            self.chunks.append(OutputChunk(stream=Stream(stream), time_ns=time.time_ns(), seq=seq, data=part))
            for process in tuple(self.attached):
                process.emit_nowait(stream, part)
        self.bell.ring()
        await asyncio.sleep(0)


class FakeProcess:
    """A process beside a container's first one, an attachment, or a connection: see `dispatcher.api.Process`."""

    def __init__(
        self,
        *,
        on_stdin: Callable[[bytes], None],
        on_close: Callable[[], None],
        on_kill: Callable[[], None] = lambda: None,
        tty: bool = False,
    ) -> None:
        self.tty = tty
        self.size: tuple[int, int] | None = None
        self._on_stdin = on_stdin
        self._on_close = on_close
        self._on_kill = on_kill
        self._chunks: deque[tuple[str, bytes]] = deque()
        self._unread = 0
        self._code: int | None = None
        self._bell = Bell()

    def emit_nowait(self, stream: str, data: bytes) -> None:
        """Put output in front of the reader."""
        if self._code is None:
            self._chunks.append((stream, data))
            self._unread += len(data)
            self._bell.ring()

    async def emit(self, stream: str, data: bytes) -> None:
        """As `emit_nowait`, waiting while the reader is far behind."""
        while self._unread > MAX_UNREAD:
            await self._bell.wait()
        if self.tty:
            stream, data = "stdout", data.replace(b"\n", b"\r\n")
        self.emit_nowait(stream, data)

    def end(self, code: int) -> None:
        """The process is gone; what it wrote can still be read."""
        if self._code is None:
            self._code = code
            self._bell.ring()

    async def output(self) -> AsyncIterator[tuple[str, bytes]]:
        """See Process.output."""
        while True:
            if self._chunks:
                stream, data = self._chunks.popleft()
                self._unread -= len(data)
                self._bell.ring()
                yield stream, data
            elif self._code is not None:
                return
            else:
                await self._bell.wait()

    async def write_stdin(self, data: bytes) -> None:
        """See Process.write_stdin."""
        if self._code is not None:
            raise BrokenPipeError
        self._on_stdin(data)

    async def close_stdin(self) -> None:
        """See Process.close_stdin."""
        self._on_close()

    async def resize(self, width: int, height: int) -> None:
        """See Process.resize."""
        if self.tty and self._code is None:
            self.size = (width, height)

    async def wait(self) -> int:
        """See Process.wait."""
        while self._code is None:
            await self._bell.wait()
        return self._code

    async def kill(self) -> None:
        """See Process.kill."""
        self._on_kill()

    async def aclose(self) -> None:
        """See Process.aclose."""


class FakeEngine:
    """See the module. `down` makes every call fail as if the engine were away; `come_back` ends that."""

    def __init__(self) -> None:
        self.down = False
        self.pods: dict[str, FakePod] = {}
        self.containers: dict[str, FakeContainer] = {}
        self.faults: dict[str, Fault] = {}
        self.calls: list[str] = []
        self._watchers: list[asyncio.Queue[Snapshot | ObservedPod | ObservedContainer]] = []
        self._tasks: set[asyncio.Task[Any]] = set()

    # ------------------------------------------------------------------------------------------------ what tests do
    def fail(self, method: str, error: BaseException, *, times: int = -1) -> None:
        """Have a method of the runtime raise."""
        self.faults[method] = Fault(error=error, times=times)

    def go_away(self) -> None:
        """The engine is away from now on; what runs in it runs on."""
        self.down = True

    def come_back(self) -> None:
        """The engine is there again: watchers get a snapshot."""
        self.down = False
        for queue in self._watchers:
            queue.put_nowait(self.snapshot())

    def kill_pod(self, pod_id: str, reason: str = "SandboxDied") -> None:
        """The sandbox dies by itself, with all of its containers."""
        pod = self.pods[pod_id]
        for container in self._containers_of(pod_id):
            self.kill(container)
        pod.liveness, pod.reason = Liveness.EXITED, reason
        self._publish(pod.observe())

    def leftovers(self) -> list[str]:
        """Return what exists, in words."""
        return [f"pod {pod_id}" for pod_id in self.pods] + [f"container {name}" for name in self.containers]

    async def aclose(self) -> None:
        """End everything that runs."""
        for task in self._tasks:
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks)

    # --------------------------------------------------------------------------------------------- what runtimes do
    async def enter(self, method: str) -> tuple[bool, Any]:
        """Note a call; return (True, result) where a planted fault replaces it."""
        self.calls.append(method)
        fault = self.faults.get(method)
        if fault is not None:
            if fault.times == 1:
                del self.faults[method]
            elif fault.times > 1:
                self.faults[method] = replace(fault, times=fault.times - 1)
            return True, await fault.happen()
        if self.down and method not in ("start", "aclose", "probe"):
            raise RuntimeDown("The fake engine is away.")
        return False, None

    async def create_pod(self, ref: PodRef) -> None:
        """Make a sandbox, in two steps between which a call can be cancelled."""
        await asyncio.sleep(0)
        pod = self.pods.setdefault(ref.id, FakePod(ref, Liveness.CREATED))
        await asyncio.sleep(0)
        pod.liveness = Liveness.RUNNING
        self._publish(pod.observe())
        await asyncio.sleep(0)

    async def stop_pod(self, pod_id: str) -> None:
        """Kill all that runs in a sandbox, and the sandbox."""
        for container in self._containers_of(pod_id):
            await self.stop(container, 0)
        pod = self.pods.get(pod_id)
        if pod is not None and pod.liveness is not Liveness.EXITED:
            pod.liveness = Liveness.EXITED
            self._publish(pod.observe())

    async def remove_pod(self, pod_id: str) -> None:
        """Remove a sandbox with its containers."""
        for container in self._containers_of(pod_id):
            await self.remove(container.ref.id)
        if self.pods.pop(pod_id, None) is not None:
            self._publish(ObservedPod(id=pod_id, liveness=Liveness.ABSENT))  # type: ignore[arg-type]

    async def create(self, ref: ContainerRef) -> FakeContainer:
        """Make a container."""
        pod = self.pods.get(ref.pod.id)
        if pod is None or pod.liveness is not Liveness.RUNNING:
            raise InvalidRequest(f"The sandbox {ref.pod.id} is not running.")
        await asyncio.sleep(0)
        container = self.containers.setdefault(ref.id, FakeContainer(ref, granted=ref.spec.resources))
        await asyncio.sleep(0)
        return container

    async def start(self, ref: ContainerRef) -> FakeContainer:
        """Start a container's first process."""
        container = self.find(ref)
        if container.task is not None or container.liveness is not Liveness.CREATED:
            return container
        pod = self.pods[ref.pod.id]
        await asyncio.sleep(0)
        container.program = Program(
            command=container.command,
            env=container.env,
            write=container.write,
            stdin=container.stdin,
            hostname=pod.ref.spec.hostname,
            listen=lambda port: pod.ports.__setitem__(port, ref.id),
        )
        container.started_at_ns = time.time_ns()
        try:
            container.program.check()
        except CannotExecuteError as error:
            self._finish(container, 128, reason="StartError", message=str(error))
            return container
        container.liveness = Liveness.RUNNING
        if not ref.spec.stdin:
            container.stdin.close()
        container.task = self._spawn(self._live(container))
        self._publish(container.observe())
        await asyncio.sleep(0)
        return container

    async def _live(self, container: FakeContainer) -> None:
        assert container.program is not None
        try:
            code = await container.program.run()
        except asyncio.CancelledError:
            code = 137
        self._finish(container, code)

    def _finish(self, container: FakeContainer, code: int, *, reason: str = "", message: str = "") -> None:
        container.exit_code = code
        container.reason, container.message = reason, message
        container.finished_at_ns = time.time_ns()
        container.liveness = Liveness.EXITED
        pod = self.pods.get(container.ref.pod.id)
        if pod is not None:
            pod.ports = {port: owner for port, owner in pod.ports.items() if owner != container.ref.id}
        for process in container.attached:
            process.end(code)
        container.bell.ring()
        self._publish(container.observe())

    def kill(self, container: FakeContainer) -> None:
        """SIGKILL."""
        if container.task is not None:
            container.task.cancel()

    async def stop(self, container: FakeContainer, grace_s: float) -> None:
        """Signal once, wait, kill; the earliest deadline of all callers counts."""
        loop = asyncio.get_running_loop()
        if container.liveness is Liveness.CREATED:
            self._finish(container, 137)
        deadline = loop.time() + grace_s
        if container.kill_at is None:
            container.kill_at = deadline
            if container.program is not None and grace_s > 0:
                name = container.ref.spec.stop_signal or container.ref.image.stop_signal or "SIGTERM"
                container.program.signal(name)
        else:
            container.kill_at = min(container.kill_at, deadline)
            container.bell.ring()
        while container.liveness is Liveness.RUNNING:
            left = container.kill_at - loop.time()
            if left <= 0:
                self.kill(container)
                left = 10
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(left):
                    await container.bell.wait()

    async def remove(self, container_id: str) -> None:
        """Remove a container, killing it first if need be."""
        container = self.containers.get(container_id)
        if container is None:
            return
        if container.liveness is Liveness.RUNNING:
            await self.stop(container, 0)
        if self.containers.pop(container_id, None) is not None:
            self._publish(ObservedContainer(id=container.ref.id, liveness=Liveness.ABSENT))

    def find(self, ref: ContainerRef) -> FakeContainer:
        """Return a container. Raises InvalidRequest where there is none."""
        container = self.containers.get(ref.id)
        if container is None:
            raise InvalidRequest(f"There is no container {ref.id}.")
        return container

    async def read(self, ref: ContainerRef, after: int) -> AsyncIterator[OutputChunk]:
        """Yield the buffer from a position on, following."""
        container = self.find(ref)
        at = 0
        while True:
            while at < len(container.chunks):
                chunk = container.chunks[at]
                at += 1
                if chunk.seq > after:
                    yield chunk
            if container.liveness is Liveness.EXITED or ref.id not in self.containers:
                return
            await container.bell.wait()

    async def execute(self, ref: ContainerRef, spec: ExecSpec) -> FakeProcess:
        """Run a command beside the first process."""
        container = self.find(ref)
        if container.liveness is not Liveness.RUNNING:
            raise InvalidRequest("The container is not running.")
        stdin = Stdin()
        if not spec.stdin:
            stdin.close()
        tasks: list[asyncio.Task[Any]] = []

        def kill() -> None:
            for task in tasks:
                task.cancel()

        process = FakeProcess(
            on_stdin=stdin.feed,
            on_close=stdin.close,
            on_kill=kill,
            tty=spec.tty,
        )
        pod = self.pods[ref.pod.id]
        program = Program(
            command=spec.command,
            env=container.env,
            write=process.emit,
            stdin=stdin,
            is_first=False,
            hostname=pod.ref.spec.hostname,
        )
        try:
            program.check()
        except CannotExecuteError as error:
            raise InvalidRequest(f"The command cannot be executed: {error}.") from None

        async def live() -> None:
            try:
                process.end(await program.run())
            except asyncio.CancelledError:
                process.end(128 + signal_number("KILL"))

        tasks.append(self._spawn(live()))
        return process

    async def attach(self, ref: ContainerRef, *, stdin: bool) -> FakeProcess:
        """Attach to the first process."""
        container = self.find(ref)
        process = FakeProcess(
            on_stdin=container.stdin.feed if stdin else lambda _data: None,
            on_close=container.stdin.close if stdin and ref.spec.stdin_once else lambda: None,
            on_kill=lambda: self._detach(container, process),
            tty=ref.spec.tty,
        )
        if container.liveness is Liveness.EXITED:
            process.end(container.exit_code or 0)
        else:
            container.attached.append(process)
        return process

    @staticmethod
    def _detach(container: FakeContainer, process: FakeProcess) -> None:
        if process in container.attached:
            container.attached.remove(process)
        process.end(0)

    async def connect(self, pod_id: str, port: int) -> FakeProcess:
        """Connect to an echo server of a pod."""
        pod = self.pods.get(pod_id)
        if pod is None or port not in pod.ports:
            raise InvalidRequest(f"Nothing listens on port {port} of the pod.")
        process = FakeProcess(
            on_stdin=lambda data: process.emit_nowait("stdout", data), on_close=lambda: process.end(0)
        )
        return process

    # ------------------------------------------------------------------------------------------------------------ events
    def snapshot(self) -> Snapshot:
        """Return all there is."""
        return Snapshot(
            pods=tuple(pod.observe() for pod in self.pods.values()),
            containers=tuple(container.observe() for container in self.containers.values()),
        )

    async def watch(self) -> AsyncIterator[Snapshot | Change]:
        """Yield a snapshot, then what happens."""
        queue: asyncio.Queue[Snapshot | ObservedPod | ObservedContainer] = asyncio.Queue()
        self._watchers.append(queue)
        sequence = 0
        try:
            if not self.down:
                queue.put_nowait(self.snapshot())
            while True:
                item = await queue.get()
                if isinstance(item, Snapshot):
                    yield item
                    continue
                sequence += 1
                if isinstance(item, ObservedPod):
                    yield Change(sequence=sequence, pod=item)
                else:
                    yield Change(sequence=sequence, container=item)
        finally:
            self._watchers.remove(queue)

    def _publish(self, fact: ObservedPod | ObservedContainer) -> None:
        if not self.down:
            for queue in self._watchers:
                queue.put_nowait(fact)

    def _containers_of(self, pod_id: str) -> list[FakeContainer]:
        return [container for container in self.containers.values() if container.ref.pod.id == pod_id]

    def _spawn(self, work: Any) -> asyncio.Task[Any]:
        task: asyncio.Task[Any] = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    def disk_usage(self) -> Mapping[str, tuple[int, int]]:
        """Return bytes and inodes per mount point."""
        return {"/": (4096 * len(self.containers), len(self.containers))}
