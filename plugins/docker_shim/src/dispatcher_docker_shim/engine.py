"""The link to one engine: its clients, what is known of it, and its health.

A new process of the engine is met as a stranger: its abilities, its images and the pause are looked at again.
"""

from __future__ import annotations

from dispatcher.api import RuntimeFeatures, RuntimeHealth, Services
from dispatcher.errors import DispatcherError, NotSupported
from dispatcher_docker_shim import host
from dispatcher_docker_shim.config import Config
from dispatcher_docker_shim.docker_client import DockerClient
from dispatcher_docker_shim.engine_events import EngineEvents
from dispatcher_docker_shim.engine_stream import EngineSocket, Pong
from dispatcher_docker_shim.errors import EngineAway
from dispatcher_docker_shim.images import EngineImages
from dispatcher_docker_shim.observe import EngineAge
from dispatcher_docker_shim.pause_image import PauseImage
from dispatcher_docker_shim.traits import OLDEST_API, EngineTraits, from_engine


class EngineLink:
    """Everything that is shared by what talks to the engine. `copies` is None without an image provider."""

    def __init__(self, config: Config, services: Services) -> None:
        self._config = config
        self._services = services
        self.client = DockerClient(
            config.socket,
            threads=config.threads,
            deadline_s=config.call_deadline_s,
            load_deadline_s=config.load_deadline_s,
        )
        self.sockets = EngineSocket(config.socket, connect_deadline_s=config.ping_deadline_s)
        self.events = EngineEvents(
            self.sockets, node_uuid=services.node_uuid, on_connect=self._meet, on_lost=self.client.suspend
        )
        self.client.on_doubt = self.events.ping_now
        self.pause = PauseImage(
            self.client,
            folder=services.state_dir,
            repository=config.repository,
            compilers=config.compilers,
        )
        self.copies: EngineImages | None = None
        self.traits: EngineTraits | None = None
        self._age = EngineAge()
        self.notes: set[str] = set()
        self._process = (0, 0)
        self._pause_problem = ""

    async def start(self) -> None:
        """Begin to subscribe to the engine, which may be away."""
        images = self._services.images
        if images is not None:
            self.copies = EngineImages(
                self.client,
                images,
                repository=self._config.repository,
                node_uuid=self._services.node_uuid,
            )
            images.add_engine(self.copies)
        await self.events.start()

    async def aclose(self) -> None:
        """Let go of connections and threads."""
        await self.events.aclose()
        self.client.close()

    def need_traits(self) -> EngineTraits:
        """What the engine can do.

        Raises:
            EngineAway: it was never reached.
            NotSupported: it is one that cannot serve pods.
        """
        if self.traits is None:
            raise EngineAway(f"the Docker Engine at {self._config.socket} has not been reached yet")
        _, message = _refusal(self.traits)
        if message:
            raise NotSupported(message)
        return self.traits

    def need_copies(self) -> EngineImages:
        """The engine's copies of images. Raises NotSupported without an image provider."""
        if self.copies is None:
            raise NotSupported("the Docker runtime was given no image provider")
        return self.copies

    @property
    def age(self) -> EngineAge:
        """What facts are judged by.

        Raises:
            EngineAway: the engine's process is another one than was met: its answers cannot be judged yet.
        """
        if self._process[0] and not host.is_running(*self._process):
            raise EngineAway("the Docker Engine restarted and has not been met again yet")
        return self._age

    async def probe(self) -> RuntimeHealth:
        """Ping, and judge what is known of the engine. Answers within the ping's deadline; never raises.

        An engine that is away keeps what it was met with: its cgroup driver and features do not change by that.
        """
        try:
            pong = await self.sockets.ping()
        except DispatcherError as error:
            return self._health(self.traits, "EngineDown", error.message)
        traits = self.traits
        if traits is None or not self.events.connected or _identify(pong) != self._process:
            why = self.events.last_error or "the subscription to the engine's events is not open yet"
            return self._health(traits, "EngineStarting", why)
        reason, message = _refusal(traits)
        if not reason and self._pause_problem:
            reason, message = "PauseMissing", self._pause_problem
        return self._health(traits, reason, message)

    def _health(self, traits: EngineTraits | None, reason: str, message: str) -> RuntimeHealth:
        if traits is None:
            return RuntimeHealth(ready=not reason, reason=reason, message=message)
        return RuntimeHealth(
            ready=not reason,
            reason=reason,
            message=message,
            engine=f"Docker Engine {traits.version}, API {traits.api[0]}.{traits.api[1]}",
            cgroup_driver=traits.cgroup_driver,
            features=RuntimeFeatures(
                recursive_read_only_mounts=traits.recursive_read_only,
                supplemental_groups_policy=True,
            ),
            notes=(*_advice(traits), *sorted(self.notes)),
        )

    async def _meet(self, pong: Pong) -> None:
        """Learn about the engine before events are taken from it."""
        self.client.revive(pong.api)
        process = _identify(pong)
        pid = process[0]
        if self.traits is not None and pid and process == self._process:
            return
        self.traits = from_engine(
            await self.client.info(),
            pong.api,
            oci_runtime=self._config.oci_runtime,
            oom_floor=host.oom_floor(pid),
            rlimit_caps=host.rlimit_caps(pid) if pid else {},
        )
        self._process = process
        self._age = EngineAge(
            started_at_ns=host.started_at_ns(pid) if pid else 0,
            live_restore=self.traits.live_restore,
        )
        self.pause.forget()
        if self.copies is not None:
            self.copies.forget_all()
            self.copies.root_dir = self.traits.root_dir
        self._pause_problem = ""
        try:
            await self.pause.ensure()
        except NotSupported as error:
            self._pause_problem = error.message
            self._services.notify("PauseMissing", error.message)


def _identify(pong: Pong) -> tuple[int, int]:
    """The engine's process: its pid and its start in clock ticks; zeros where it cannot be told."""
    pid = host.engine_pid(pong.pid)
    stat = host.read_stat(pid) if pid else None
    return pid, stat.started if stat else 0


def _refusal(traits: EngineTraits) -> tuple[str, str]:
    """Why this engine cannot serve pods, and what to do; empty when it can."""
    if traits.api < OLDEST_API:
        oldest = f"{OLDEST_API[0]}.{OLDEST_API[1]}"
        return "EngineTooOld", f"Docker Engine {traits.version} speaks API {traits.api}; {oldest} or newer is needed"
    if traits.rootless:
        return "EngineRootless", "a rootless Docker Engine cannot enter the network namespaces of pods; run it as root"
    return "", ""


def _advice(traits: EngineTraits) -> tuple[str, ...]:
    """What an operator should know or mend."""
    notes = []
    if not traits.live_restore:
        notes.append('pods do not survive a restart of the engine: set "live-restore": true in daemon.json')
    if not traits.seccomp:
        notes.append("the engine has no seccomp: pods that ask for a profile are refused")
    if not traits.swap_limit:
        notes.append("the kernel does not account swap: containers with a memory limit may still swap")
    if traits.userns_remap:
        notes.append("the engine remaps users; pods run in the host's user namespace all the same")
    if traits.oom_floor is not None:
        notes.append(f"oom_score_adj cannot go below {traits.oom_floor}: the engine lacks CAP_SYS_RESOURCE")
    return tuple(notes)
