"""What stands between the core and a plugin's object: deadlines, errors of ours only, and no nonsense as a result.

Theory of operation. `guard` builds, per object, a class that has exactly those protocol methods which the object has,
so that `isinstance(guarded, CanExec)` says the truth. An async method runs in a task of its own: when its deadline
passes it is cancelled, and when it does not even end then, it is abandoned and the caller goes on. Errors of
`dispatcher.errors` pass; anything else is a bug of the plugin and becomes Internal with the plugin's name. Results are
checked for their type, because the next layer trusts them. What this cannot cover: a method that blocks the loop.
"""

from __future__ import annotations

import asyncio
import inspect
import json
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from dispatcher.api import ContainerUsage, ImageDisk, NetworkStatus, PodUsage, RuntimeHealth, VmSize
from dispatcher.errors import (
    DispatcherError,
    Internal,
    NetworkFailed,
    NotSupported,
    RuntimeDown,
    TimedOut,
    Unsupported,
)
from dispatcher.model import (
    Attachment,
    Change,
    ContainerUser,
    CreatedContainer,
    CreatedPod,
    Image,
    NetworkPlan,
    ObservedContainer,
    OutputChunk,
    Resources,
    Snapshot,
)
from dispatcher.spans import step

_log = logging.getLogger(__name__)

# How long a cancelled call may take to end before it is left behind. A method that ignores cancellation is a bug.
CANCEL_GRACE_S: Final = 10.0

OnCall = Callable[[str, str, str, float, BaseException | None], None]
Check = Callable[[Any, tuple[Any, ...]], bool]


def _is(kind: type | tuple[type, ...]) -> Check:
    return lambda result, _arguments: isinstance(result, kind)


def _tuple_of(kind: type) -> Check:
    return lambda result, _arguments: isinstance(result, tuple) and all(isinstance(item, kind) for item in result)


def _anything(_result: Any, _arguments: tuple[Any, ...]) -> bool:
    return True


def _is_plain_json(value: Any) -> bool:
    """Facts go into the record and must come back as they were."""
    try:
        return isinstance(value, Mapping) and bool(json.loads(json.dumps(dict(value))) == dict(value))
    except (TypeError, ValueError):
        return False


def _is_created(kind: type) -> Check:
    return lambda result, _arguments: isinstance(result, kind) and _is_plain_json(result.facts)  # type: ignore[attr-defined]


def _is_same_container(result: Any, arguments: tuple[Any, ...]) -> bool:
    return isinstance(result, ObservedContainer) and result.id == arguments[0].id


def _is_process(result: Any, _arguments: tuple[Any, ...]) -> bool:
    return all(callable(getattr(result, name, None)) for name in _PROCESS_METHODS)


_PROCESS_METHODS = ("output", "write_stdin", "close_stdin", "resize", "wait", "kill", "aclose")


@dataclass(frozen=True, slots=True)
class _Method:
    """How a protocol's method is called: "async", "plain" or "stream", and what a sensible result is."""

    kind: str
    check: Check = _anything


_ASYNC = _Method("async")
_PLAIN = _Method("plain")

RUNTIME_METHODS: Mapping[str, _Method] = {
    "start": _ASYNC,
    "aclose": _ASYNC,
    "probe": _Method("async", _is(RuntimeHealth)),
    "create_pod": _Method("async", _is_created(CreatedPod)),
    "stop_pod": _ASYNC,
    "remove_pod": _ASYNC,
    "create_container": _Method("async", _is_created(CreatedContainer)),
    "start_container": _Method("async", _is_same_container),
    "stop_container": _Method("async", _is_same_container),
    "remove_container": _ASYNC,
    "inspect": _Method("async", _is(Snapshot)),
    "output": _Method("stream", _is(OutputChunk)),
    "watch": _Method("stream", _is((Snapshot, Change))),
}
ABILITY_METHODS: Mapping[str, _Method] = {
    "prepare_pod": _Method("async", lambda result, _arguments: _is_plain_json(result)),
    "exec": _Method("async", _is_process),
    "attach": _Method("async", _is_process),
    "connect": _Method("async", _is_process),
    "update_resources": _Method("async", _is(Resources)),
    "update_pod_resources": _ASYNC,
    "stats": _Method("async", _tuple_of(ContainerUsage)),
    "detailed_stats": _Method("async", _tuple_of(ContainerUsage)),
    "pod_stats": _Method("async", _tuple_of(PodUsage)),
    "trim_output": _ASYNC,
    "disk_usage": _Method("async", _is(Mapping)),
}
NETWORK_METHODS: Mapping[str, _Method] = {
    "start": _ASYNC,
    "aclose": _ASYNC,
    "status": _Method("plain", _is(NetworkStatus)),
    "set_pod_cidr": _PLAIN,
    "plan": _Method("plain", lambda result, _: isinstance(result, NetworkPlan) and _is_plain_json(result.content)),
    "add": _Method("async", lambda result, _: isinstance(result, Attachment) and _is_plain_json(result.result)),
    "check": _Method("async", _tuple_of(str)),
    "delete": _ASYNC,
    "gc": _ASYNC,
}
IMAGE_METHODS: Mapping[str, _Method] = {
    "start": _ASYNC,
    "aclose": _ASYNC,
    "pull": _Method("async", _is(Image)),
    "list": _Method("plain", _is(tuple)),
    "find": _Method("plain", _is((Image, type(None)))),
    "remove": _ASYNC,
    "get": _Method("plain", _is(Image)),
    "lease": _PLAIN,
    "release": _PLAIN,
    "disk": _Method("async", _is(ImageDisk)),
    "add_engine": _PLAIN,
    "oci_dir": _Method("async", _is(Path)),
    "docker_archive": _Method("async", _is(Path)),
    "unpacked": _Method("async", _is(Path)),
    "sub_path": _Method("async", _is(Path)),
    "erofs": _Method("async", _is(Path)),
    "resolve_user": _Method("async", _is(ContainerUser)),
}
SIZER_METHODS: Mapping[str, _Method] = {"size": _Method("plain", _is(VmSize))}
STREAMING_METHODS: Mapping[str, _Method] = {
    "start": _ASYNC,
    "aclose": _ASYNC,
    "exec_url": _Method("plain", _is(str)),
    "attach_url": _Method("plain", _is(str)),
    "port_forward_url": _Method("plain", _is(str)),
}
REQUIRED_METHODS: Mapping[str, Mapping[str, _Method]] = {
    "runtime": RUNTIME_METHODS,
    "network": NETWORK_METHODS,
    "images": IMAGE_METHODS,
    "sizer": SIZER_METHODS,
    "streaming": STREAMING_METHODS,
}


class Guard:
    """Calls one object on behalf of the core. `blocked` says why it must not be called now ("" when it may)."""

    def __init__(
        self, *, kind: str, plugin: str, provider: str, deadlines: Mapping[str, float], on_call: OnCall
    ) -> None:
        self.kind = kind
        self.plugin = plugin
        self.provider = provider
        self.blocked = ""
        self._deadlines = deadlines
        self._on_call = on_call
        self._abandoned: set[asyncio.Task[Any]] = set()

    @property
    def noun(self) -> str:
        """How messages name the object, such as `runtime "docker"`."""
        word = {"images": "image", "streaming": "streaming"}.get(self.kind, self.kind)
        return f'{word}{"" if self.kind in ("runtime", "sizer") else " provider"} "{self.provider}"'

    def refuse_blocked(self, method: str) -> None:
        """Raise RuntimeDown where the object did not start; `start` and `aclose` may be called nevertheless."""
        if self.blocked and method not in ("start", "aclose", "status"):
            raise RuntimeDown(f"The {self.noun} did not start: {self.blocked}", provider=self.provider)

    def translate(self, method: str, error: BaseException) -> BaseException:
        """Return what the core sees of an error that a plugin raised."""
        if isinstance(error, TimedOut):  # its code is DEADLINE_EXCEEDED, which the kubelet reads on ExecSync only
            return RuntimeDown(error.message, **error.data)
        if isinstance(error, Unsupported):  # its code is UNIMPLEMENTED, which would say that the RPC does not exist
            return NotSupported(error.message, **error.data)
        if isinstance(error, DispatcherError):
            return error
        _log.error(
            "plugin raised an unexpected error",
            exc_info=error,
            extra={"plugin": self.plugin, "provider": self.provider, "method": method},
        )
        return Internal(
            f"The plugin {self.plugin} failed in {method}: {type(error).__name__}.", plugin=self.plugin, method=method
        )

    def nonsense(self, method: str, result: object) -> Internal:
        """Return the error for a result of the wrong kind."""
        return Internal(
            f"The plugin {self.plugin} returned nonsense ({type(result).__name__}) from {method}.",
            plugin=self.plugin,
            method=method,
        )

    def expired(self, method: str, deadline_s: float) -> DispatcherError:
        """Return the error for a call that took too long."""
        text = f"The {self.noun} did not finish {method} within {deadline_s:g} s."
        if self.kind == "network":
            return NetworkFailed(text, provider=self.provider, method=method)
        return RuntimeDown(text, provider=self.provider, method=method)

    def call_plain(self, method: str, function: Callable[..., Any], check: Check, *args: Any, **kwargs: Any) -> Any:
        """Call a method that answers at once."""
        self.refuse_blocked(method)
        began = time.perf_counter()
        error: BaseException | None = None
        try:
            with step(f"{self.kind}.{method}"):
                result = function(*args, **kwargs)
            if inspect.iscoroutine(result):
                result.close()
            if not check(result, args):
                raise self.nonsense(method, result)  # noqa: TRY301 - counted like any other failure
        except (Exception, SystemExit) as raised:
            error = self.translate(method, raised)
            if error is raised:
                raise
            raise error from raised
        else:
            return result
        finally:
            self._on_call(self.kind, self.provider, method, time.perf_counter() - began, error)

    async def call(self, method: str, function: Callable[..., Any], check: Check, *args: Any, **kwargs: Any) -> Any:
        """Call an async method within its deadline."""
        self.refuse_blocked(method)
        deadline_s = self._deadlines.get(method, 60.0)
        if method == "stop_container":
            deadline_s += max(0.0, kwargs.get("grace_s", args[1] if len(args) > 1 else 0.0))
        began = time.perf_counter()
        error: BaseException | None = None
        try:
            with step(f"{self.kind}.{method}"):
                result = await self._run(method, function, args, kwargs, deadline_s)
            if not check(result, args):
                raise self.nonsense(method, result)  # noqa: TRY301 - counted like any other failure
        except BaseException as raised:
            error = raised
            raise
        else:
            return result
        finally:
            self._on_call(self.kind, self.provider, method, time.perf_counter() - began, error)

    async def _run(
        self,
        method: str,
        function: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        deadline_s: float,
    ) -> Any:
        task = asyncio.ensure_future(self._translated(method, function, args, kwargs))
        try:
            await asyncio.wait({task}, timeout=deadline_s)
        except asyncio.CancelledError:
            # The caller will undo next: what is under way must have ended by then.
            await self._cancel(method, task)
            raise
        if task.done():
            if task.cancelled():
                raise Internal(f"The plugin {self.plugin} cancelled its own {method}.", plugin=self.plugin)
            return task.result()
        await self._cancel(method, task)
        raise self.expired(method, deadline_s)

    async def _translated(
        self, method: str, function: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> Any:
        try:
            pending = function(*args, **kwargs)
            if not isinstance(pending, Awaitable):
                raise self.nonsense(method, pending)  # noqa: TRY301 - translated like any other failure
            result = await pending
        except (Exception, SystemExit) as raised:
            error = self.translate(method, raised)
            if error is raised:
                raise
            raise error from raised
        if method in _GIVES_PROCESS and _is_process(result, args):
            return GuardedProcess(self, result)
        return result

    async def _cancel(self, method: str, task: asyncio.Task[Any]) -> None:
        """Cancel and wait for the end, even when we are cancelled again meanwhile; leave it behind if it never ends."""
        loop = asyncio.get_running_loop()
        ends = loop.time() + CANCEL_GRACE_S
        task.cancel()
        cancelled = False
        while not task.done() and (left := ends - loop.time()) > 0:
            try:
                await asyncio.wait({task}, timeout=left)
            except asyncio.CancelledError:
                cancelled = True
        if not task.done():
            _log.error("plugin ignores cancellation", extra={"plugin": self.plugin, "method": method})
            self._abandoned.add(task)
            task.add_done_callback(self._forget)
        elif not task.cancelled():
            task.exception()  # looked at, so that asyncio does not complain: the caller hears of the cancellation
        if cancelled:
            raise asyncio.CancelledError

    def _forget(self, task: asyncio.Task[Any]) -> None:
        self._abandoned.discard(task)
        if not task.cancelled():
            task.exception()

    async def stream(
        self, method: str, function: Callable[..., Any], check: Check, *args: Any, **kwargs: Any
    ) -> AsyncIterator[Any]:
        """Pass on what an async iterator yields. No deadline: silence is normal. Closing this closes that."""
        self.refuse_blocked(method)
        try:
            source = function(*args, **kwargs)
            if not hasattr(source, "__anext__"):
                if inspect.iscoroutine(source):
                    source.close()
                raise self.nonsense(method, source)  # noqa: TRY301 - translated like any other failure
            try:
                async for item in source:
                    if not check(item, args):
                        raise self.nonsense(method, item)
                    yield item
            finally:
                if hasattr(source, "aclose"):
                    await source.aclose()
        except (Exception, SystemExit) as raised:
            error = self.translate(method, raised)
            if error is raised:
                raise
            raise error from raised


_GIVES_PROCESS = frozenset({"exec", "attach", "connect"})


class GuardedProcess:
    """A plugin's Process whose unexpected errors become Internal. No deadlines: a session lasts as long as it lasts."""

    def __init__(self, guard: Guard, process: Any) -> None:
        self._guard = guard
        self._process = process

    def output(self) -> AsyncIterator[tuple[str, bytes]]:
        """See Process.output."""
        return self._guard.stream("Process.output", self._process.output, _is_output)

    async def write_stdin(self, data: bytes) -> None:
        """See Process.write_stdin."""
        try:
            await self._process.write_stdin(data)
        except (BrokenPipeError, DispatcherError):
            raise
        except Exception as error:
            raise self._guard.translate("Process.write_stdin", error) from error

    async def close_stdin(self) -> None:
        """See Process.close_stdin."""
        await self._translated("close_stdin", self._process.close_stdin())

    async def resize(self, width: int, height: int) -> None:
        """See Process.resize."""
        await self._translated("resize", self._process.resize(width, height))

    async def wait(self) -> int:
        """See Process.wait."""
        code = await self._translated("wait", self._process.wait())
        if not isinstance(code, int):
            raise self._guard.nonsense("Process.wait", code)
        return code

    async def kill(self) -> None:
        """See Process.kill."""
        await self._translated("kill", self._process.kill())

    async def aclose(self) -> None:
        """See Process.aclose."""
        await self._translated("aclose", self._process.aclose())

    async def _translated(self, method: str, pending: Awaitable[Any]) -> Any:
        try:
            return await pending
        except DispatcherError:
            raise
        except Exception as error:
            raise self._guard.translate(f"Process.{method}", error) from error


def _is_output(item: Any, _arguments: tuple[Any, ...]) -> bool:
    return (
        isinstance(item, tuple)
        and len(item) == 2
        and item[0] in ("stdout", "stderr")
        and isinstance(item[1], bytes | bytearray | memoryview)
    )


def guard_object(inner: object, guard: Guard, properties: Mapping[str, object]) -> Any:
    """Return an object with exactly the protocol methods of `inner`, each guarded, and these fixed properties."""
    methods = dict(REQUIRED_METHODS[guard.kind])
    if guard.kind == "runtime":
        methods |= {name: method for name, method in ABILITY_METHODS.items() if callable(getattr(inner, name, None))}
    body: dict[str, Any] = {"guard": guard, "__slots__": (), **properties}
    for name, method in methods.items():
        body[name] = _wrapped(name, getattr(inner, name), method, guard)
    body["__repr__"] = lambda _self: f"<guarded {guard.noun}>"
    return type("Guarded", (), body)()


def _wrapped(name: str, function: Callable[..., Any], method: _Method, guard: Guard) -> Callable[..., Any]:
    if method.kind == "async":

        async def call(_self: object, *args: Any, **kwargs: Any) -> Any:
            return await guard.call(name, function, method.check, *args, **kwargs)

        wrapped: Callable[..., Any] = call
    elif method.kind == "stream":

        def stream(_self: object, *args: Any, **kwargs: Any) -> AsyncIterator[Any]:
            return guard.stream(name, function, method.check, *args, **kwargs)

        wrapped = stream
    else:

        def plain(_self: object, *args: Any, **kwargs: Any) -> Any:
            return guard.call_plain(name, function, method.check, *args, **kwargs)

        wrapped = plain
    wrapped.__name__ = name
    return wrapped


def missing_methods(kind: str, inner: object) -> tuple[str, ...]:
    """Return the names of mandatory methods that an object lacks."""
    return tuple(name for name in REQUIRED_METHODS[kind] if not callable(getattr(inner, name, None)))
