"""Runs one pod over the CRI socket as a kubelet would: pull, sandbox, init containers, sidecars, containers, restarts.

Theory of operation. A session owns the pod from `start` to `remove`. Containers of a pod run as tasks: an init
container's task ends when it has succeeded, a sidecar's and a main container's when it is not to be restarted any more.
Every attempt has a log file of its own, which the session follows. An interrupt is an event, not a cancellation: it
stops the containers in order, and what runs ends by itself, so that output and exit codes are still collected.

Calls are made the way a kubelet makes them: with deadlines, and again after an answer of UNAVAILABLE or
DEADLINE_EXCEEDED, where the daemon joins the second call to the first. So a session outlives a restart of the daemon.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from dispatcher.commands.log_reader import LogReader
from dispatcher.commands.logs import LogWriter
from dispatcher.commands.output import Console, Exit, Failure
from dispatcher.commands.pod_folders import remove_folders
from dispatcher.manifest import (
    ContainerKind,
    Node,
    Placement,
    PodManifest,
    container_config,
    plan_container_files,
    plan_volumes,
    pull_policy,
    run_request,
    write_volumes,
)

if TYPE_CHECKING:
    from dispatcher.cri.client import CriClient
    from dispatcher.manifest.schema import Container

_EXITED = 2  # CONTAINER_EXITED; UNKNOWN is above it and is the end, too
_RUNNING = 1
_RETRIED = frozenset({"UNAVAILABLE", "DEADLINE_EXCEEDED"})
_PATIENCE_S = 60.0
_SANDBOX_DEADLINE_S = 240.0
_POLL_FIRST_S = 0.05
_POLL_LAST_S = 0.5
_BACKOFF_FIRST_S = 1.0
_BACKOFF_LAST_S = 60.0
_LOG_POLL_S = 0.1


@dataclass(frozen=True, slots=True, kw_only=True)
class SessionOptions:
    """What the user chose. `grace_s` is the time that containers get to end, None for what the manifest says."""

    pods_dir: str
    pull: str = ""  # "always", "missing", "never", or "" for what the manifest says
    grace_s: int | None = None
    follow: bool = True
    prefix: bool = False
    auth_for: Callable[[str], Any] = field(default=lambda _image: None)


@dataclass(slots=True)
class _Attempt:
    """One run of a container: what `ContainerStatus` said of its end, None while it runs."""

    name: str
    container_id: str
    exit_code: int | None = None


class PodSession:
    """One pod. Call `start`, then `run` or `launch`, then `stop` and `remove`."""

    def __init__(
        self,
        client: CriClient,
        manifest: PodManifest,
        *,
        placement: Placement,
        node: Node,
        console: Console,
        options: SessionOptions,
    ) -> None:
        self._client = client
        self._manifest = manifest
        self._placement = placement
        self._node = node
        self._console = console
        self._options = options
        self._request = run_request(manifest, placement, node)
        self._ips: tuple[str, ...] = ()
        self._attempts: dict[str, _Attempt] = {}
        self._stopping = asyncio.Event()
        self._images: dict[str, Any] = {}
        self.pod_id = ""

    @property
    def name(self) -> str:
        """The pod's name with its namespace."""
        metadata = self._manifest.pod.metadata
        return f"{metadata.namespace}/{metadata.name}"

    async def start(self) -> None:
        """Pull the images that are missing, and make the sandbox.

        Raises:
            Failure: with what the daemon said. Nothing of the pod is left but what `remove` takes away.
        """
        for _, container in self._manifest.containers:
            await self._ensure_image(container)
        write_volumes(plan_volumes(self._manifest, self._placement.pod_dir))
        reply = await self._call(
            "RunPodSandbox",
            timeout_s=_SANDBOX_DEADLINE_S,
            config=self._request.config,
            runtime_handler=self._request.runtime_handler,
        )
        self.pod_id = reply.pod_sandbox_id
        status = (await self._call("PodSandboxStatus", pod_sandbox_id=self.pod_id)).status
        self._ips = tuple(ip for ip in (status.network.ip, *(item.ip for item in status.network.additional_ips)) if ip)

    async def launch(self) -> None:
        """Run the init containers, start all others once, and return; nothing is restarted afterwards."""
        for kind, container in self._manifest.containers:
            if kind is ContainerKind.INIT:
                code = await self._keep_running(container, restart_on_failure=self._restarts_failures)
                if code != 0:
                    raise Failure(f"init container {container.name} ended with {code}", code=Exit.NO_RESULT)
            else:
                await self._begin(container, 0)

    async def run(self) -> int:
        """Run all containers to their end and return the pod's exit code: that of the first one that failed, else 0.

        With restartPolicy Always this ends by `interrupt` only.
        """
        sidecars: list[tuple[Container, asyncio.Task[int]]] = []
        try:
            for kind, container in self._manifest.containers:
                if self._stopping.is_set():
                    return Exit.INTERRUPTED
                if kind is ContainerKind.SIDECAR:
                    started = asyncio.Event()
                    task = asyncio.create_task(self._keep_running(container, always=True, started=started))
                    sidecars.append((container, task))
                    await _first(started.wait(), task)
                elif kind is ContainerKind.INIT:
                    code = await self._keep_running(container, restart_on_failure=self._restarts_failures)
                    if code != 0:
                        self._console.say(f"init container {container.name} ended with {code}")
                        return code
            policy = self._manifest.spec.restart_policy
            async with asyncio.TaskGroup() as group:
                mains = [
                    group.create_task(
                        self._keep_running(
                            container, always=policy == "Always", restart_on_failure=self._restarts_failures
                        )
                    )
                    for kind, container in self._manifest.containers
                    if kind is ContainerKind.MAIN
                ]
            return next((task.result() for task in mains if task.result() != 0), Exit.OK)
        except* Failure as failures:
            raise failures.exceptions[0] from None
        finally:
            # Sidecars outlive the containers that they serve, and end in the reverse order of their start.
            self._stopping.set()
            for container, task in reversed(sidecars):
                with contextlib.suppress(Failure):
                    await self._stop_container(container.name, self._grace_s)
                with contextlib.suppress(Failure):
                    await task

    @property
    def _restarts_failures(self) -> bool:
        return self._manifest.spec.restart_policy != "Never"

    @property
    def _grace_s(self) -> int:
        chosen = self._options.grace_s
        return self._manifest.spec.termination_grace_period_seconds if chosen is None else chosen

    async def interrupt(self, *, now: bool = False) -> None:
        """Ask all main and init containers to end; `run` returns when they have. `now` kills them."""
        self._stopping.set()
        names = [item.name for kind, item in self._manifest.containers if now or kind is not ContainerKind.SIDECAR]
        stops = (self._stop_container(name, 0 if now else self._grace_s) for name in names)
        await asyncio.gather(*stops, return_exceptions=True)

    async def stop(self) -> None:
        """Stop the sandbox with everything in it, which frees its addresses. Idempotent."""
        if self.pod_id:
            await self._call("StopPodSandbox", pod_sandbox_id=self.pod_id)

    async def remove(self) -> None:
        """Remove the pod and its folders. Idempotent; `stop` is part of it."""
        if self.pod_id:
            await self.stop()
            await self._call("RemovePodSandbox", pod_sandbox_id=self.pod_id)
        remove_folders(self._options.pods_dir, self._placement.uid)

    # -------------------------------------------------------------------------------------------------------- images
    async def _ensure_image(self, container: Container) -> None:
        policy = {"always": "Always", "missing": "IfNotPresent", "never": "Never"}.get(self._options.pull)
        policy = policy or pull_policy(container)
        spec = {"image": container.image}
        if policy != "Always":
            found = (await self._call("ImageStatus", image=spec)).image
            if found.id:
                self._images[container.image] = found
                return
            if policy == "Never":
                raise Failure(f"image {container.image} is not on this node", hint="--pull missing fetches it")
        if container.image in self._images:
            return
        self._console.say(f"pulling {container.image}")
        began = time.monotonic()
        # A pull has no deadline, as with a kubelet: it ends when it ends, and an interrupt cancels the command.
        pull = self._call(
            "PullImage",
            timeout_s=0,
            image=spec,
            auth=self._options.auth_for(container.image),
            sandbox_config=self._request.config,
        )
        await _with_progress(pull, lambda: self._console.say(f"  ... {time.monotonic() - began:.0f} s"))
        self._images[container.image] = (await self._call("ImageStatus", image=spec)).image

    # ---------------------------------------------------------------------------------------------------- containers
    async def _keep_running(
        self,
        container: Container,
        *,
        always: bool = False,
        restart_on_failure: bool = False,
        started: asyncio.Event | None = None,
    ) -> int:
        """Run a container again and again as its restart rule says; return the last exit code."""
        backoff_s, attempt = _BACKOFF_FIRST_S, 0
        while True:
            began = time.monotonic()
            code = await self._run_once(container, attempt, started)
            if self._stopping.is_set() or not (always or (restart_on_failure and code != 0)):
                return code
            if time.monotonic() - began > 10 * _BACKOFF_LAST_S:
                backoff_s = _BACKOFF_FIRST_S
            self._console.say(f"container {container.name} ended with {code}, starting again in {backoff_s:.0f} s")
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._stopping.wait(), backoff_s)
            if self._stopping.is_set():
                return code
            await self._forget_attempt(container.name)
            backoff_s, attempt = min(2 * backoff_s, _BACKOFF_LAST_S), attempt + 1

    async def _begin(self, container: Container, attempt: int) -> tuple[str, Failure | None]:
        """Create and start one attempt. A container that cannot be started exists, and its failure is returned."""
        write_volumes(plan_container_files(self._manifest, container, self._placement.pod_dir, attempt))
        config = container_config(
            self._manifest,
            container,
            self._placement,
            self._node,
            image=self._images.get(container.image),
            pod_ips=self._ips,
            attempt=attempt,
        )
        reply = await self._call(
            "CreateContainer", pod_sandbox_id=self.pod_id, config=config, sandbox_config=self._request.config
        )
        container_id = reply.container_id
        self._attempts[container.name] = _Attempt(container.name, container_id)
        try:
            await self._call("StartContainer", container_id=container_id)
        except Failure as failure:
            # Not idempotent: when the first answer was lost, the second one complains of a container that runs.
            status = (await self._call("ContainerStatus", container_id=container_id)).status
            if status.state < _RUNNING:
                raise
            if status.state >= _EXITED and status.reason == "StartError":
                return container_id, failure
        return container_id, None

    async def _run_once(self, container: Container, attempt: int, started: asyncio.Event | None) -> int:
        container_id, failure = await self._begin(container, attempt)
        if started is not None:
            started.set()
        if failure is not None:
            self._console.complain(failure)
        if self._stopping.is_set():  # the interrupt came before there was anything to stop
            await self._stop_container(container.name, self._grace_s)
        ended = asyncio.Event()
        follower = asyncio.create_task(self._follow(container.name, attempt, ended))
        try:
            status = await self._wait(container_id)
        finally:
            ended.set()
            await follower
        self._attempts[container.name].exit_code = status.exit_code
        if status.reason not in ("", "Completed", "Error", "StartError"):
            self._console.say(f"container {container.name}: {status.reason} {status.message}".rstrip())
        return int(status.exit_code) if status.state == _EXITED else Exit.NO_RESULT

    async def _wait(self, container_id: str) -> Any:
        """Wait for the end of a container; polled, because events are optional in CRI."""
        pause_s = _POLL_FIRST_S
        while True:
            status = (await self._call("ContainerStatus", container_id=container_id)).status
            if status.state >= _EXITED:
                return status
            await asyncio.sleep(pause_s)
            pause_s = min(pause_s * 1.5, _POLL_LAST_S)

    async def _follow(self, name: str, attempt: int, ended: asyncio.Event) -> None:
        if not self._options.follow or not self._placement.log_dir:
            return
        reader = LogReader(f"{self._placement.log_dir}/{name}/{attempt}.log")
        prefix = f"[{self.name.partition('/')[2]}/{name}] ".encode() if self._options.prefix else b""
        writer = LogWriter(prefix=prefix)
        try:
            while not ended.is_set():
                writer.write_all(reader)
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(ended.wait(), _LOG_POLL_S)
            writer.write_all(reader)
        finally:
            reader.close()

    async def _stop_container(self, name: str, grace_s: int) -> None:
        attempt = self._attempts.get(name)
        if attempt is not None and attempt.exit_code is None:
            await self._call(
                "StopContainer", timeout_s=grace_s + 60, container_id=attempt.container_id, timeout=grace_s
            )

    async def _forget_attempt(self, name: str) -> None:
        attempt = self._attempts.pop(name, None)
        if attempt is not None:
            with contextlib.suppress(Failure):
                await self._call("RemoveContainer", container_id=attempt.container_id)

    async def _call(self, rpc: str, *, timeout_s: float | None = None, **fields: Any) -> Any:
        from dispatcher.commands.connection import as_failure
        from dispatcher.cri.client import CallFailed

        patient_until = time.monotonic() + _PATIENCE_S
        told = False
        while True:
            try:
                return await self._client.call(rpc, timeout_s=timeout_s, **fields)
            except CallFailed as error:
                if error.code not in _RETRIED or time.monotonic() > patient_until:
                    raise as_failure(error) from error
                if not told:
                    self._console.say(f"{rpc}: {error.message}; trying again")
                    told = True
            await asyncio.sleep(_POLL_LAST_S)


async def _first(waiting: Coroutine[Any, Any, object], task: asyncio.Task[int]) -> None:
    """Wait until either is done; a failed task raises here."""
    waiter = asyncio.ensure_future(waiting)
    done, _ = await asyncio.wait({waiter, task}, return_when=asyncio.FIRST_COMPLETED)
    waiter.cancel()
    if task in done:
        task.result()


async def _with_progress(work: Coroutine[Any, Any, Any], tell: Callable[[], None], every_s: float = 5.0) -> None:
    task = asyncio.ensure_future(work)
    try:
        while not task.done():
            await asyncio.wait({task}, timeout=every_s)
            if not task.done():
                tell()
        task.result()
    finally:
        task.cancel()


def first_failure(codes: Sequence[int]) -> int:
    """Return the first code that is not zero, else 0."""
    return next((code for code in codes if code != 0), Exit.OK)
