"""The only module that knows the docker SDK: the engine's unary calls, in a bounded pool of threads, with deadlines.

A call that the engine does not answer is EngineAway, and so is every later one, at once, until `revive` says that the
engine answers its ping: a stuck engine costs its callers nothing. `on_doubt` is called, on the loop, to have it pinged
now. Errors are translated by HTTP code.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

from dispatcher.api import effect
from dispatcher.errors import DispatcherError, NotFound
from dispatcher_docker_shim.errors import EngineAway, EngineConflict, from_status

T = TypeVar("T")
Json = dict[str, Any]

_SIZE_PAUSE_S = 0.02


class DockerClient:
    """Unary calls to one engine. Methods may be called concurrently; cancelling one abandons its thread's answer."""

    def __init__(self, path: str, *, threads: int, deadline_s: float, load_deadline_s: float) -> None:
        self._socket = path
        self._threads = threads
        self._deadline_s = deadline_s
        self._load_deadline_s = load_deadline_s
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="docker")
        self._slow_pool = ThreadPoolExecutor(2, thread_name_prefix="docker-load")
        self._lock = threading.Lock()
        self._clients: dict[float, Any] = {}
        self._api = ""
        self._away = self._closed = False
        self.on_doubt: Callable[[], None] = lambda: None
        self._creating: dict[str, asyncio.Future[Any]] = {}
        self._sizing = asyncio.Semaphore(1)

    @property
    def api(self) -> str:
        """The API version in use, such as "1.41"; "" before the first ping."""
        return self._api

    def revive(self, api: tuple[int, int]) -> None:
        """The engine answered its ping with this API version: calls may go to it (again)."""
        version = f"{api[0]}.{api[1]}"
        with self._lock:
            if version != self._api:
                for client in self._clients.values():
                    client.close()
                self._clients.clear()
                self._api = version
            self._away = self._closed

    def suspend(self) -> None:
        """The engine went away: calls fail at once until `revive`."""
        self._away = True

    def close(self) -> None:
        """Drop connections. Calls in flight end at their deadline."""
        self._away = self._closed = True
        self._pool.shutdown(wait=False, cancel_futures=True)
        self._slow_pool.shutdown(wait=False, cancel_futures=True)
        with self._lock:
            for client in self._clients.values():
                with contextlib.suppress(Exception):
                    client.close()
            self._clients.clear()

    # ------------------------------------------------------------------------------------------------------- questions
    async def info(self) -> Json:
        """The engine's own description."""
        return await self._call("describe itself", lambda c: c.info())

    async def inspect(self, name: str) -> Json:
        """Everything about a container. Raises EngineLacks."""
        return await self._call("inspect a container", lambda c: c.inspect_container(name))

    async def find(self, name: str) -> Json | None:
        """`inspect`, or None for what does not exist."""
        try:
            return await self.inspect(name)
        except NotFound:
            return None

    async def list_by_labels(self, labels: Mapping[str, str], *, size: bool = False) -> list[Json]:
        """Containers in any state that carry all of these labels."""
        wanted = [f"{key}={value}" for key, value in labels.items()]
        return await self._call(
            "list containers",
            lambda c: c.containers(all=True, size=size, filters={"label": wanted}),
            slow=size,
        )

    async def find_image(self, reference: str) -> Json | None:
        """An image of the engine, or None."""
        try:
            found: Json = await self._call("inspect an image", lambda c: c.inspect_image(reference))
        except NotFound:
            return None
        return found

    async def list_images(self, repository: str) -> list[Json]:
        """Images with a tag in `repository`."""
        return await self._call("list images", lambda c: c.images(filters={"reference": repository}))

    async def inspect_exec(self, exec_id: str) -> Json:
        """State of an exec."""
        return await self._call("inspect an exec", lambda c: c.exec_inspect(exec_id))

    # ------------------------------------------------------------------------------------------------------------ acts
    @effect("docker.create_container")
    async def create(self, name: str, config: Mapping[str, Any]) -> Json:
        """Create a container from a complete configuration. Raises EngineConflict when the name is taken."""
        attempt = asyncio.ensure_future(
            self._call("create a container", lambda c: c.create_container_from_config(dict(config), name)),
        )
        self._creating[name] = attempt
        attempt.add_done_callback(lambda _: self._creating.pop(name, None))
        return await asyncio.shield(attempt)

    @effect("docker.start_container")
    async def start(self, name: str) -> None:
        """Start a container. Starting one that runs is no error."""
        await self._call("start a container", lambda c: c.start(name))

    @effect("docker.kill_container")
    async def kill(self, name: str, signal: str) -> None:
        """Signal a container's first process. One that is gone or does not run is no error."""
        with contextlib.suppress(NotFound, EngineConflict):
            await self._call("signal a container", lambda c: c.kill(name, signal))

    @effect("docker.remove_container")
    async def remove(self, name: str) -> None:
        """Remove a container with its anonymous volumes, killing it if it runs. Idempotent.

        Waits for a creation of the same name that was cancelled but may still succeed, and for a removal in progress.
        """
        creating = self._creating.get(name)
        if creating is not None:
            await asyncio.wait({creating}, timeout=self._deadline_s)
        pause_s = 0.02
        while True:
            try:
                await self._call("remove a container", lambda c: c.remove_container(name, v=True, force=True))
            except NotFound:
                return
            except EngineConflict:
                if pause_s > 5:
                    raise
            else:
                return
            await asyncio.sleep(pause_s)
            pause_s *= 2

    @effect("docker.update_container")
    async def update(self, name: str, limits: Mapping[str, Any]) -> None:
        """Change limits; the keys are those of the SDK's update_container."""
        await self._call("update a container", lambda c: c.update_container(name, **limits))

    async def resize(self, name: str, width: int, height: int) -> None:
        """Resize a container's terminal. Raises EngineConflict when it does not run."""
        await self._size(lambda c: c.resize(name, height=height, width=width))

    @effect("docker.create_exec")
    async def create_exec(self, name: str, command: tuple[str, ...], *, stdin: bool, tty: bool) -> str:
        """Prepare a command in a container; returns the exec's id."""
        made = await self._call(
            "prepare an exec",
            lambda c: c.exec_create(name, list(command), stdout=True, stderr=True, stdin=stdin, tty=tty),
        )
        return str(made["Id"])

    async def resize_exec(self, exec_id: str, width: int, height: int) -> None:
        """Resize an exec's terminal."""
        await self._size(lambda c: c.exec_resize(exec_id, height=height, width=width))

    async def _size(self, function: Callable[[Any], None]) -> None:
        """One terminal at a time, with a pause: clients may send sizes without end, and no other call may wait for that."""
        async with self._sizing:
            await self._call("resize a terminal", function)
            await asyncio.sleep(_SIZE_PAUSE_S)

    @effect("docker.load_image")
    async def load(self, archive: Path) -> None:
        """Load a tar of images."""

        def upload(client: Any) -> None:
            with archive.open("rb") as tar:
                for _ in client.load_image(tar):
                    pass

        await self._call("load an image", upload, slow=True)

    @effect("docker.remove_image")
    async def remove_image(self, reference: str) -> None:
        """Remove a name and, when it was the last one, the image. Idempotent. Raises EngineConflict when in use."""
        with contextlib.suppress(NotFound):
            await self._call("remove an image", lambda c: c.remove_image(reference), slow=True)

    # ------------------------------------------------------------------------------------------------------------ calls
    async def _call(self, doing: str, function: Callable[[Any], T], *, slow: bool = False) -> T:
        if self._away or not self._api:
            raise EngineAway(f"Docker Engine does not answer; it was not asked to {doing}")
        deadline_s = self._load_deadline_s if slow else self._deadline_s
        loop = asyncio.get_running_loop()
        pool = self._slow_pool if slow else self._pool
        work = loop.run_in_executor(pool, self._run, doing, function, deadline_s)
        try:
            async with asyncio.timeout(deadline_s + 0.5):
                return await work
        except EngineAway:
            self._doubt()
            raise
        except TimeoutError as error:
            if not slow:
                self._doubt()
            raise EngineAway(f"Docker Engine did not answer within {deadline_s:g} s when asked to {doing}") from error

    def _doubt(self) -> None:
        self.suspend()
        self.on_doubt()

    def _run(self, doing: str, function: Callable[[Any], T], deadline_s: float) -> T:
        """Runs in a thread: call the SDK and translate what it raises."""
        import docker.errors
        import requests.exceptions

        try:
            return function(self._client(deadline_s))
        except docker.errors.APIError as error:
            raise from_status(error.status_code or 500, str(error.explanation or ""), doing=doing) from error
        except (OSError, requests.exceptions.Timeout, requests.exceptions.ConnectionError) as error:
            raise EngineAway(f"Docker Engine went away or did not answer when asked to {doing}") from error
        except (docker.errors.DockerException, requests.exceptions.RequestException, ValueError) as error:
            if isinstance(error, DispatcherError):
                raise
            raise EngineAway(f"Docker Engine's answer cannot be read when asked to {doing}") from error

    def _client(self, deadline_s: float) -> Any:
        import docker

        with self._lock:
            client = self._clients.get(deadline_s)
            if client is None:
                client = docker.APIClient(
                    base_url=f"unix://{self._socket}",
                    version=self._api,
                    timeout=deadline_s,
                    num_pools=2,
                    max_pool_size=self._threads,
                )
                client.mount("http+docker://", _adapter(self._socket, deadline_s, self._threads))
                self._clients[deadline_s] = client
            return client


def _adapter(path: str, deadline_s: float, connections: int) -> Any:
    """The SDK's transport, but for two faults.

    It leaves a socket open for each connection that is refused. And it keeps a pool of connections for each address
    that is asked, a few at a time: the next address closes a pool that a call in another thread is about to use, which
    then fails as if the engine were gone. Here all addresses share one pool, which also uses connections again.
    """
    from docker.transport.unixconn import UnixHTTPAdapter, UnixHTTPConnection, UnixHTTPConnectionPool

    class Connection(UnixHTTPConnection):  # type: ignore[misc]
        def connect(self) -> None:
            made = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            try:
                made.settimeout(self.timeout)
                made.connect(self.unix_socket)
            except OSError:
                made.close()
                raise
            self.sock = made

    class Pool(UnixHTTPConnectionPool):  # type: ignore[misc]
        def _new_conn(self) -> Any:
            return Connection(self.base_url, path, deadline_s)

    class Adapter(UnixHTTPAdapter):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__(f"http+unix://{path}", deadline_s, max_pool_size=connections)
            self._pool = Pool("http+docker://localhost", path, deadline_s, maxsize=connections)

        def get_connection(self, url: str, proxies: Any = None) -> Any:
            del url, proxies
            return self._pool

        def close(self) -> None:
            super().close()
            self._pool.close()

    return Adapter()
