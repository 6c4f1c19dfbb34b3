"""Typed commands for the agent of one guest.

Every method waits for a session and for the answer, for as long as the caller lets it: deadlines are the caller's, and
a guest may be silent for ever. AgentAway means that the session ended before the answer: what was asked may have been
done. Asking again is safe wherever a method says "idempotent". Errors of the guest are classes of `dispatcher.errors`
with its words made fit to be shown; RemoteProtocolError means that it broke the protocol.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Any

from dispatcher.errors import (
    AlreadyExists,
    DispatcherError,
    InvalidRequest,
    NotFound,
    NotSupported,
    OutOfResources,
    WrongState,
)
from dispatcher.model import OutputChunk, Stream
from dispatcher_hyper_vm.agent.channel import AgentAway, Channel, GuestStream, Session, StreamReset
from dispatcher_hyper_vm.agent.protocol import WINDOW, Message, RemoteProtocolError, Source, printable
from dispatcher_hyper_vm.agent.values import (
    AgentInfo,
    Answer,
    ContainerSetup,
    ContainerState,
    GuestFigures,
    GuestFile,
    IdMapping,
    Owner,
    PodSetup,
    read_figures,
    read_info,
    read_state,
)

_FILES_PER_REQUEST = 2 << 20  # bytes of files; see protocol.MAX_REQUEST
_MOST_EVENTS = 4096
_NAMES = {Source.STDOUT: "stdout", Source.STDERR: "stderr", Source.NONE: "stdout"}
_STREAMS = {Source.STDOUT: Stream.STDOUT, Source.STDERR: Stream.STDERR, Source.NONE: Stream.STDOUT}


class GuestFailed(DispatcherError):
    """The guest tried and failed; the message is its own."""


_ERRORS: Mapping[str, type[DispatcherError]] = {
    "invalid": InvalidRequest,
    "not_found": NotFound,
    "exists": AlreadyExists,
    "state": WrongState,
    "limit": OutOfResources,
    "unsupported": NotSupported,
    "failed": GuestFailed,
}


class AgentProcess:
    """An executed command, an attachment or a connection, with its streams. See dispatcher.api.Process.

    `signal_target` names it to the agent ({"exec": stream}), or is None for what can only be let go.
    """

    def __init__(self, session: Session, stream: GuestStream, target: Mapping[str, Any] | None) -> None:
        self._session = session
        self._stream = stream
        self._target = target
        self._killed = False

    async def output(self) -> AsyncIterator[tuple[str, bytes]]:
        """Yield ("stdout" | "stderr", bytes) until the process ended and all was read."""
        while (data := await self._receive()) is not None:
            yield data

    async def write_stdin(self, data: bytes) -> None:
        """Write all of `data`. Raises BrokenPipeError when the process closed it, or is gone."""
        await self._stream.write(data)

    async def close_stdin(self) -> None:
        """Half-close. Idempotent."""
        await self._stream.end()

    async def resize(self, width: int, height: int) -> None:
        """Set the terminal's size. Ignored without a terminal and after the end."""
        if self._target is not None:
            with contextlib.suppress(DispatcherError):
                await _ask(self._session, {"command": "resize", "width": width, "height": height, **self._target})

    async def wait(self) -> int:
        """Wait for the end and return the exit code; 0 for an attachment or a connection.

        Raises:
            AgentAway: the guest went away before it told.
        """
        if self._killed:
            while await self._receive() is not None:
                pass  # what it still had to say; nobody reads it any more
        await self._stream.wait_ended()
        return self._stream.exit_code or 0

    async def kill(self) -> None:
        """Kill the process with its children, or let go. Idempotent."""
        if self._target is None:
            self._stream.reset()
            return
        self._killed = True
        with contextlib.suppress(NotFound, AgentAway):
            await _ask(self._session, {"command": "signal", "signal": 9, "all": True, **self._target})

    async def aclose(self) -> None:
        """Let go of the streams. What runs goes on."""
        self._stream.reset()

    async def _receive(self) -> tuple[str, bytes] | None:
        try:
            data = await self._stream.receive()
        except StreamReset:
            return None
        return None if data is None else (_NAMES[data.source], data.data)


class AgentClient:
    """The agent of one guest, over the UNIX socket at `path`. Use `start` first, `aclose` last."""

    def __init__(self, path: str) -> None:
        self._channel = Channel(path, self._take_event, self._take_session)
        self._watchers: set[asyncio.Queue[ContainerState | Session]] = set()

    def start(self) -> None:
        """Begin to connect, in the background. Idempotent."""
        self._channel.start()

    async def aclose(self) -> None:
        """Disconnect. The guest goes on. Idempotent."""
        await self._channel.aclose()

    @property
    def is_connected(self) -> bool:
        """True while there is a session."""
        return self._channel.is_connected

    @property
    def fault(self) -> DispatcherError | None:
        """Why no session can be had, where that is more than "not yet"."""
        return self._channel.fault

    async def hello(self) -> AgentInfo:
        """Wait for a session and say who is there."""
        hello = (await self._channel.session()).hello
        return read_info(hello.version, Answer(hello.body))

    async def ping(self) -> None:
        """Wait for an answer, whatever it is."""
        await self._request({"command": "ping"})

    # ------------------------------------------------------------------------------------------------------------ pod
    async def setup(self, setup: PodSetup) -> None:
        """Make the guest this pod's. May be called again with new addresses, sysctls or limits: what is there stays.

        Raises:
            InvalidRequest, NotFound: a value is wrong, or a network device is not there.
            GuestFailed: the kernel refused something; the message says what.
        """
        body: dict[str, Any] = {
            "command": "setup",
            "hostname": setup.hostname,
            "interfaces": [
                {
                    "name": item.name,
                    "device": item.device,
                    "mac": item.mac,
                    "mtu": item.mtu,
                    "addresses": list(item.addresses),
                }
                for item in setup.interfaces
            ],
            "routes": [
                {
                    "to": item.to,
                    "device": item.device,
                    "via": item.via,
                    "source": item.source,
                    "metric": item.metric,
                    "mtu": item.mtu,
                }
                for item in setup.routes
            ],
            "sysctls": dict(setup.sysctls),
            "time_ns": setup.time_ns,
            "machine_id": setup.machine_id,
            "resources": dict(setup.resources),
            "shm_bytes": setup.shm_bytes,
            "pod_pid": setup.shares_pid_namespace,
            "uid_mappings": _mappings(setup.uid_mappings),
            "gid_mappings": _mappings(setup.gid_mappings),
        }
        await self._request(body, setup.entropy)

    async def write_files(self, name: str, files: Sequence[GuestFile], *, atomic: bool = False) -> None:
        """Write small files to /run/pod/files/NAME. Idempotent.

        With `atomic` the folder is like a kubelet's volume: files lie in a folder of their own behind the link
        "..data", which is swapped as one act; what is no longer among `files` disappears. Otherwise each file is
        written in place, so that mounts of single files see it, and others stay.

        Raises:
            InvalidRequest: a path leaves the folder.
            OutOfResources: the guest has no room.
        """
        batch: list[dict[str, Any]] = []
        blob = bytearray()
        first = True
        for item in files:
            if len(blob) + len(item.data) > _FILES_PER_REQUEST and batch:
                await self._write_batch(name, batch, bytes(blob), atomic=atomic, first=first, last=False)
                batch, blob, first = [], bytearray(), False
            batch.append(
                {
                    "path": item.path,
                    "mode": item.mode,
                    "uid": item.uid,
                    "gid": item.gid,
                    "link": item.link,
                    "size": len(item.data),
                }
            )
            blob += item.data
        await self._write_batch(name, batch, bytes(blob), atomic=atomic, first=first, last=True)

    async def _write_batch(
        self, name: str, batch: list[dict[str, Any]], blob: bytes, *, atomic: bool, first: bool, last: bool
    ) -> None:
        body = {"command": "files", "name": name, "files": batch, "atomic": atomic, "first": first, "last": last}
        await self._request(body, blob)

    async def read_file(self, name: str, path: str, limit: int) -> bytes:
        """Read at most `limit` bytes (up to 64 KiB) of a file of a set, which containers may have written. Idempotent.

        Raises:
            NotFound: there is none.
            InvalidRequest: it is no regular file.
        """
        answer = await self._request({"command": "read_file", "name": name, "path": path, "limit": limit})
        try:
            return bytes.fromhex(answer.text("data", 2 * limit))[:limit]
        except ValueError as error:
            raise RemoteProtocolError("The guest answered no bytes.") from error

    async def remove_files(self, name: str) -> None:
        """Remove a set of files. Idempotent."""
        await self._request({"command": "remove_files", "name": name})

    async def mount_disk(
        self,
        name: str,
        serial: str,
        *,
        filesystem: str = "ext4",
        read_only: bool = False,
        options: str = "",
        owner: Owner | None = None,
    ) -> None:
        """Mount the disk with this serial at /run/pod/vol/NAME, waiting for it to appear. Idempotent.

        With `owner` the root of what was mounted is given to it.
        """
        body: dict[str, Any] = {
            "command": "mount",
            "name": name,
            "kind": "disk",
            "serial": serial,
            "filesystem": filesystem,
            "read_only": read_only,
            "options": options,
        }
        if owner is not None:
            body |= {"mode": owner.mode, "uid": owner.uid, "gid": owner.gid}
        await self._request(body)

    async def mount_tmpfs(
        self, name: str, *, size_bytes: int = 0, mode: int = 0o1777, uid: int = 0, gid: int = 0
    ) -> None:
        """Mount a tmpfs at /run/pod/vol/NAME, charged to who writes. 0 bytes: half of the guest's memory. Idempotent."""
        await self._request(
            {
                "command": "mount",
                "name": name,
                "kind": "tmpfs",
                "size": size_bytes,
                "mode": mode,
                "uid": uid,
                "gid": gid,
            }
        )

    async def mount_share(self, tag: str) -> None:
        """Mount the 9p export with this tag at /run/pod/share. Idempotent."""
        await self._request({"command": "mount", "name": "share", "kind": "share", "tag": tag})

    async def unmount(self, name: str) -> None:
        """Unmount /run/pod/vol/NAME (or "share"); its disk can be detached afterwards. Idempotent.

        Raises:
            WrongState: it is in use.
        """
        await self._request({"command": "unmount", "name": name})

    async def update_pod(self, resources: Mapping[str, Any]) -> None:
        """Change the limits of all containers together. All or nothing; idempotent."""
        await self._request({"command": "update", "container": "", "resources": dict(resources)})

    async def online(self, cpus: int) -> int:
        """Bring `cpus` processors online and all memory that was plugged in; return how many are online. Idempotent."""
        return (await self._request({"command": "online", "cpus": cpus})).number("cpus", 4096)

    async def release_memory(self) -> None:
        """Drop what the kernel caches, before a template is saved. Best effort."""
        await self._request({"command": "release_memory"})

    async def stats(self) -> GuestFigures:
        """Measure everything in one pass."""
        return read_figures(await self._request({"command": "stats"}))

    async def power_off(self) -> None:
        """Kill what runs, write file systems back and switch off. The session ends with it; that is no error."""
        with contextlib.suppress(AgentAway):
            await self._request({"command": "power_off"})

    # ----------------------------------------------------------------------------------------------------- containers
    async def create_container(self, setup: ContainerSetup) -> ContainerState:
        """Make a container with everything but its command's execution. Waits for its disks to appear.

        Raises:
            AlreadyExists: one with this id exists. After AgentAway, look at `containers` first.
            InvalidRequest: the specification is wrong. NotFound: a disk does not appear, a path is not there.
            GuestFailed: the kernel refused something.
        """
        body = {
            "command": "create",
            "id": setup.id,
            "spec": setup.spec,
            "rootfs": {"lower": setup.rootfs.lower, "upper": setup.rootfs.upper, "folder": setup.rootfs.folder},
            "terminal": setup.terminal,
            "stdin": setup.stdin,
            "stdin_once": setup.stdin_once,
        }
        return read_state((await self._request(body, setup.seccomp)).object("container"))

    async def start_container(self, container: str) -> ContainerState:
        """Execute the command. EXITED with "StartError" and 128 where it cannot be executed. Idempotent.

        Raises:
            NotFound: no such container.
        """
        return read_state((await self._request({"command": "start", "id": container})).object("container"))

    async def containers(self) -> tuple[ContainerState, ...]:
        """Return all containers that were not deleted."""
        answer = await self._request({"command": "containers"})
        return tuple(read_state(item) for item in answer.objects("containers"))

    async def signal_container(self, container: str, signal: int, *, everything: bool = False) -> None:
        """Send a signal to the first process, or to all (KILL only then). One that has exited is no error.

        Raises:
            NotFound: no such container.
        """
        await self._request({"command": "signal", "container": container, "signal": signal, "all": everything})

    async def resize_container(self, container: str, width: int, height: int) -> None:
        """Set the size of the first process's terminal. Ignored without one."""
        await self._request({"command": "resize", "container": container, "width": width, "height": height})

    async def update_container(self, container: str, resources: Mapping[str, Any]) -> None:
        """Change limits, given as `linux.resources` of OCI. All or nothing; idempotent."""
        await self._request({"command": "update", "container": container, "resources": dict(resources)})

    async def delete_container(self, container: str) -> None:
        """Kill what runs in it, unmount its root and forget it with its output. Idempotent.

        Its disks can be detached afterwards.
        """
        await self._request({"command": "delete", "id": container})

    async def trim_output(self, container: str, position: int) -> None:
        """Free the output up to `position`. Idempotent; an unknown container is no error."""
        with contextlib.suppress(NotFound):
            await self._request({"command": "trim", "container": container, "position": position})

    async def output(self, container: str, after: int) -> AsyncIterator[OutputChunk]:
        """Yield the container's output behind the position `after`, following it to its end.

        Reconnects by itself and goes on where it stood.

        Raises:
            NotFound: no such container. InvalidRequest: what was asked for is trimmed already.
        """
        while True:
            session = await self._channel.session()
            stream = session.open_stream(after)
            try:
                await _ask(session, {"command": "output", "container": container, "stream": stream.id, "after": after})
                while (data := await stream.receive()) is not None:
                    yield OutputChunk(
                        stream=_STREAMS[data.source], time_ns=data.time_ns, seq=data.position, data=data.data
                    )
                    after = data.position
                return
            except AgentAway:
                continue
            finally:
                stream.reset()

    async def exec(
        self, container: str, process: Mapping[str, Any], *, terminal: bool = False, stdin: bool = False
    ) -> AgentProcess:
        """Run a command beside a container's first process. `process` is as in an OCI specification.

        The container's own seccomp filter and limits hold for it. It ends with the session.

        Raises:
            InvalidRequest: it cannot be executed. NotFound, WrongState: no such container, or not running.
        """
        return await self._open(
            {
                "command": "exec",
                "container": container,
                "process": process,
                "terminal": terminal,
                "stdin": stdin,
            },
            is_process=True,
        )

    async def attach(self, container: str, *, stdin: bool) -> AgentProcess:
        """Attach to the first process from now on. Several at once each get all output.

        Raises:
            NotFound, WrongState: no such container, or not running.
        """
        return await self._open({"command": "attach", "container": container, "stdin": stdin}, is_process=False)

    async def connect(self, port: int) -> AgentProcess:
        """Connect to localhost:`port`, IPv4 then IPv6.

        Raises:
            InvalidRequest: nothing listens there.
        """
        return await self._open({"command": "connect", "port": port}, is_process=False)

    async def _open(self, body: Mapping[str, Any], *, is_process: bool) -> AgentProcess:
        session = await self._channel.session()
        stream = session.open_stream()
        try:
            await _ask(session, {**body, "stream": stream.id})
        except BaseException:
            stream.reset()
            raise
        return AgentProcess(session, stream, {"exec": stream.id} if is_process else None)

    # --------------------------------------------------------------------------------------------------------- events
    async def watch(self) -> AsyncIterator[tuple[ContainerState, ...] | ContainerState]:
        """Yield all states (a tuple) at the beginning of every session, then each container that exits. For ever.

        An exit comes when all output of the container is in its buffer. While the agent is away nothing comes.
        """
        queue: asyncio.Queue[ContainerState | Session] = asyncio.Queue(_MOST_EVENTS)
        self._watchers.add(queue)
        try:
            if self._channel.is_connected:
                queue.put_nowait(await self._channel.session())
            while True:
                item = await queue.get()
                if not isinstance(item, Session):
                    yield item
                    continue
                try:
                    answer = await _ask(item, {"command": "containers"})
                except AgentAway:
                    continue
                yield tuple(read_state(state) for state in answer.objects("containers"))
        finally:
            self._watchers.discard(queue)

    def _take_session(self, session: Session) -> None:
        self._tell(session)

    def _take_event(self, message: Message) -> None:
        answer = Answer(message.body)
        if answer.text("event", 50) == "exit":
            self._tell(read_state(answer.object("container")))

    def _tell(self, item: ContainerState | Session) -> None:
        for queue in self._watchers:
            if queue.full():
                raise RemoteProtocolError("The guest reports more events than anybody can look at.")
            queue.put_nowait(item)

    async def _request(self, body: Mapping[str, Any], blob: bytes = b"") -> Answer:
        return await _ask(await self._channel.session(), body, blob)


def _mappings(mappings: tuple[IdMapping, ...]) -> list[list[int]]:
    return [[item.container_id, item.host_id, item.size] for item in mappings]


async def _ask(session: Session, body: Mapping[str, Any], blob: bytes = b"") -> Answer:
    answer = Answer((await session.request(body, blob)).body)
    if not answer.has("error"):
        return answer
    error = answer.object("error")
    raise _ERRORS.get(error.text("code", 20), GuestFailed)(printable(error.text("message")))


__all__ = ["WINDOW", "AgentClient", "AgentProcess", "GuestFailed"]
