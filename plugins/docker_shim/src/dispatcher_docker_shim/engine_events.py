"""Keeps one subscription to the engine's events alive and turns it into wake-ups.

Theory of operation. An event is only a hint that something changed: whoever is woken asks the engine for full facts,
so a repeated event does no harm. A lost one would: after each new subscription `epoch` rises, and everything has to be
looked at again. While no event comes, the engine is pinged, so that a stuck one is noticed and left. What waits to be
looked at is a set of names, hence bounded by the number of our containers.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable
from typing import Any

from dispatcher.errors import DispatcherError
from dispatcher_docker_shim import naming
from dispatcher_docker_shim.engine_stream import EngineSocket, Pong
from dispatcher_docker_shim.errors import EngineAway

_log = logging.getLogger(__name__)

_PING_EVERY_S = 5.0
_BACKOFF_S = (0.1, 0.2, 0.5, 1.0, 2.0, 5.0)
_STEADY_S = 10.0
_FIRST_TRY_S = 3.0
_FACTS = frozenset({"create", "start", "die", "oom", "destroy", "pause", "unpause", "rename", "update"})
_MAX_EXECS = 4096


class EngineEvents:
    """The subscription. `on_connect` runs after each answered ping, `on_lost` when the engine went away."""

    def __init__(
        self,
        sockets: EngineSocket,
        *,
        node_uuid: str,
        on_connect: Callable[[Pong], Awaitable[None]],
        on_lost: Callable[[], None],
    ) -> None:
        self._sockets = sockets
        self._node_uuid = node_uuid
        self._on_connect = on_connect
        self._on_lost = on_lost
        self._task: asyncio.Task[None] | None = None
        self._execs: dict[str, asyncio.Event] = {}
        self._ends: dict[str, set[asyncio.Event]] = {}
        self._doubt = asyncio.Event()
        self.epoch = 0
        self.connected = False
        self.last_error = ""
        self.dirty: dict[str, None] = {}
        self.changed = asyncio.Event()
        self._tried = asyncio.Event()

    async def start(self) -> None:
        """Begin to subscribe, in a task of its own. Returns after the first try, or after a few seconds of it."""
        if self._task is None:
            self._task = asyncio.create_task(self._run(), name="docker-events")
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_FIRST_TRY_S):
                await self._tried.wait()

    async def aclose(self) -> None:
        """Stop."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
            self._task = None

    def ping_now(self) -> None:
        """Somebody doubts that the engine is there: find out now instead of at the next interval."""
        self._doubt.set()

    def touch(self, name: str) -> None:
        """Ask for a container or pod (by engine name) to be looked at."""
        self.dirty[name] = None
        self.changed.set()

    def exec_ended(self, exec_id: str) -> asyncio.Event:
        """The event that is set when the engine tells that an exec ended. Kept until then."""
        while len(self._execs) >= _MAX_EXECS:
            self._execs.pop(next(iter(self._execs)))
        return self._execs.setdefault(exec_id, asyncio.Event())

    def on_end(self, name: str, event: asyncio.Event) -> None:
        """Set `event` whenever a container may have ended, and after each new subscription."""
        self._ends.setdefault(name, set()).add(event)

    def off_end(self, name: str, event: asyncio.Event) -> None:
        """Undo `on_end`."""
        waiting = self._ends.get(name, set())
        waiting.discard(event)
        if not waiting:
            self._ends.pop(name, None)

    async def _run(self) -> None:
        failures = 0
        loop = asyncio.get_running_loop()
        while True:
            began = loop.time()
            try:
                await self._subscribe()
            except DispatcherError as error:
                if self.connected or not self.last_error:
                    _log.warning("lost the Docker Engine: %s", error.message)
                self.last_error = error.message
            except Exception:  # noqa: BLE001  an answer of another program, whatever it is, must not end this task
                _log.exception("the subscription to the Docker Engine's events failed")
                self.last_error = "an answer of the Docker Engine could not be handled; see the log"
            self.connected = False
            self._on_lost()
            self._tried.set()
            self.changed.set()
            failures = 0 if loop.time() - began > _STEADY_S else failures + 1
            await asyncio.sleep(_BACKOFF_S[min(failures, len(_BACKOFF_S) - 1)])

    async def _subscribe(self) -> None:
        pong = await self._sockets.ping()
        await self._on_connect(pong)
        filters = {"type": ["container"], "label": [f"{naming.NODE_LABEL}={self._node_uuid}"]}
        events = self._sockets.events(f"{pong.api[0]}.{pong.api[1]}", filters)
        pending: asyncio.Future[dict[str, object]] | None = None
        try:
            while True:
                pending = pending or asyncio.ensure_future(anext(events))
                await self._event_or_doubt(pending)
                if not pending.done():
                    self._doubt.clear()
                    await self._on_connect(await self._sockets.ping())
                    continue
                event, pending = pending.result(), None
                if event:
                    self._take(event)
                else:
                    self._begin()
        except StopAsyncIteration as error:
            raise EngineAway("Docker Engine closed its event stream") from error
        finally:
            if pending is not None:
                pending.cancel()
                await asyncio.gather(pending, return_exceptions=True)
            await events.aclose()

    async def _event_or_doubt(self, pending: asyncio.Future[Any]) -> None:
        doubt: asyncio.Future[object] = asyncio.ensure_future(self._doubt.wait())
        try:
            either: set[asyncio.Future[Any]] = {pending, doubt}
            await asyncio.wait(either, timeout=_PING_EVERY_S, return_when=asyncio.FIRST_COMPLETED)
        finally:
            doubt.cancel()

    def _begin(self) -> None:
        self.epoch += 1
        self.connected, self.last_error = True, ""
        self._tried.set()
        self.changed.set()
        for waiting in self._ends.values():
            for event in waiting:
                event.set()

    def _take(self, event: dict[str, object]) -> None:
        actor = event.get("Actor")
        attributes = actor.get("Attributes") if isinstance(actor, dict) else None
        if not isinstance(attributes, dict) or not naming.is_ours(attributes, self._node_uuid):
            return
        action = str(event.get("Action", ""))
        if action == "exec_die":
            ended = self._execs.pop(str(attributes.get("execID", "")), None)
            if ended is not None:
                ended.set()
        elif action in _FACTS:
            name = naming.engine_name(str(attributes[naming.ID_LABEL]))
            self.touch(name)
            if action in {"die", "destroy"}:
                for waiting in self._ends.get(name, ()):
                    waiting.set()
