"""The gRPC servicer, built from one table: RPC name to handler. Everything that all RPCs share happens here, once.

Each call gets a correlation id, is counted and timed, and has its errors mapped by `status_codes`. A handler returns a
message, or bytes that are one already. Cancellation passes through untouched.
"""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import grpc
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass

from dispatcher.cri import api_pb2 as pb
from dispatcher.cri.handlers import (
    container_create,
    container_run,
    exec_sync,
    images,
    list_streams,
    node,
    pod_end,
    pod_read,
    pod_run,
    streams,
    topics,
)
from dispatcher.cri.handlers.events import EventFeed
from dispatcher.cri.handlers.list_streams import Stream
from dispatcher.cri.handlers.stats import StatsHandlers
from dispatcher.cri.lists import Lists
from dispatcher.cri.status_codes import code_for, text_for
from dispatcher.cri.statuses import Statuses
from dispatcher.deps import Deps
from dispatcher.effects import effect
from dispatcher.errors import DispatcherError
from dispatcher.observability.logformat import log_context, make_correlation_id

log = logging.getLogger(__name__)

MAX_MESSAGE_BYTES = 16 * 1024 * 1024  # the kubelet's own limit
Handler = Callable[[Any, Deps], Awaitable[Message | bytes]]


class Observer(Protocol):
    """Who counts RPCs; `dispatcher.observability.metrics.Metrics` is one."""

    def rpc_began(self, rpc: str) -> None:
        """A call arrived."""

    def rpc_finished(self, rpc: str, code: str, seconds: float) -> None:
        """A call was answered with this gRPC code."""


# A checkpoint of a pod of any runtime is not something this node can restore honestly. A client that knows how to do
# without gets the one code on which it does.
UNIMPLEMENTED = frozenset({"CheckpointContainer", "CheckpointPod", "RestorePod"})


def streamed(lists: Lists, stats: StatsHandlers, events: EventFeed) -> dict[str, Stream]:
    """The table of all served RPCs whose reply is a stream."""
    return {"GetContainerEvents": events.handle, **list_streams.streams(lists, stats)}


def handlers(lists: Lists, statuses: Statuses, stats: StatsHandlers) -> dict[str, Handler]:
    """The table of all served RPCs."""
    return {
        "Version": node.version,
        "Status": node.status,
        "UpdateRuntimeConfig": node.update_runtime_config,
        "RuntimeConfig": node.runtime_config,
        "RunPodSandbox": pod_run.handle,
        "StopPodSandbox": pod_end.stop,
        "RemovePodSandbox": pod_end.remove,
        "PodSandboxStatus": statuses.pod,
        "ListPodSandbox": lists.pods,
        "UpdatePodSandboxResources": pod_read.update_resources,
        "CreateContainer": container_create.handle,
        "StartContainer": container_run.start,
        "StopContainer": container_run.stop,
        "RemoveContainer": container_run.remove,
        "ListContainers": lists.containers,
        "ContainerStatus": statuses.container,
        "UpdateContainerResources": container_run.update_resources,
        "ReopenContainerLog": container_run.reopen_log,
        "ExecSync": exec_sync.handle,
        "Exec": streams.exec_,
        "Attach": streams.attach,
        "PortForward": streams.port_forward,
        "ContainerStats": stats.container,
        "ListContainerStats": stats.containers,
        "PodSandboxStats": stats.pod,
        "ListPodSandboxStats": stats.pods,
        "ListMetricDescriptors": stats.metric_descriptors,
        "ListPodSandboxMetrics": stats.metrics,
        "ListImages": images.list_images,
        "ImageStatus": images.status,
        "PullImage": images.pull,
        "RemoveImage": images.remove,
        "ImageFsInfo": images.fs_info,
    }


def _serialise(reply: Message | bytes) -> bytes:
    return reply if isinstance(reply, bytes) else reply.SerializeToString()


_NAMED_IN_LOG = ("pod_sandbox_id", "container_id")


def _unary(
    name: str, handler: Handler, deps: Deps, observer: Observer, log_fields: tuple[str, ...] = ()
) -> Callable[..., Awaitable[Message | bytes]]:
    is_traced = deps.traces.wants(name)

    async def call(request: Any, context: grpc.aio.ServicerContext[Any, Any]) -> Message | bytes:
        began = time.monotonic()
        observer.rpc_began(name)
        code = grpc.StatusCode.OK
        correlation_id = make_correlation_id()
        named = {field: getattr(request, field)[:64] for field in log_fields}
        try:
            with log_context(correlation_id=correlation_id, rpc=name, **named):
                chosen = _choose(name, handler, request, context)
                if not is_traced:
                    return await chosen(request, deps)
                with deps.traces.record(name, remote=_remote(context), correlation_id=correlation_id):
                    return await chosen(request, deps)
        except asyncio.CancelledError:
            code = grpc.StatusCode.CANCELLED
            raise
        except Exception as error:  # noqa: BLE001 - the one place where every error ends
            code = code_for(error)
            _log_end(name, error, code, correlation_id)
            await context.abort(code, text_for(error, correlation_id))
        finally:
            observer.rpc_finished(name, code.name, time.monotonic() - began)
        raise AssertionError("abort raises")

    return call


def _stream(
    name: str, handler: Stream, deps: Deps, observer: Observer
) -> Callable[..., AsyncIterator[Message | bytes]]:
    async def call(request: Any, context: grpc.aio.ServicerContext[Any, Any]) -> AsyncIterator[Message | bytes]:
        began = time.monotonic()
        observer.rpc_began(name)
        code = grpc.StatusCode.OK
        correlation_id = make_correlation_id()
        recording = deps.traces.record(name, remote=_remote(context)) if deps.traces.takes_all else None
        ended: BaseException | None = None
        try:
            async with aclosing(handler(request, deps)) as replies:  # type: ignore[type-var]
                async for reply in replies:
                    yield reply
        except (asyncio.CancelledError, GeneratorExit):
            code = grpc.StatusCode.CANCELLED
            raise
        except Exception as error:  # noqa: BLE001 - as for unary calls
            ended = error
            code = code_for(error)
            _log_end(name, error, code, correlation_id)
            await context.abort(code, text_for(error, correlation_id))
        finally:
            if recording is not None:
                recording.finish(ended)
            observer.rpc_finished(name, code.name, time.monotonic() - began)

    return call


def _choose(name: str, handler: Handler, request: Any, context: grpc.aio.ServicerContext[Any, Any]) -> Handler:
    """Return the handler of a call; what our commands ask for is told from a kubelet's call by its metadata."""
    if name == "RemovePodSandbox":
        asked = (pod_end.FORGET_KEY, request.pod_sandbox_id)
        return pod_end.forget if asked in (context.invocation_metadata() or ()) else handler
    if name == "Status":
        names = tuple(str(value) for key, value in context.invocation_metadata() or () if key == topics.TOPIC_KEY)
        return partial(topics.handle, names) if names else handler
    return handler


def _remote(context: grpc.aio.ServicerContext[Any, Any]) -> str:
    """The caller's trace, where it sent one, as a kubelet with tracing does."""
    for key, value in context.invocation_metadata() or ():
        if key == "traceparent":
            return str(value)[:64]
    return ""


def _log_end(name: str, error: Exception, code: grpc.StatusCode, correlation_id: str) -> None:
    facts = {"rpc": name, "code": code.name, "correlation_id": correlation_id}
    if code is grpc.StatusCode.INTERNAL:
        log.error("rpc failed: a bug", extra=facts, exc_info=error)
    elif isinstance(error, DispatcherError):
        cause = repr(error.__cause__) if error.__cause__ is not None else ""
        log.info("rpc refused", extra={**facts, "error": str(error), "cause": cause})


async def _refuse(_request: Any, context: grpc.aio.ServicerContext[Any, Any]) -> None:
    await context.abort(grpc.StatusCode.UNIMPLEMENTED, "This RPC is not implemented.")


def generic_handlers(deps: Deps, observer: Observer) -> list[grpc.GenericRpcHandler]:
    """Make the handlers of both CRI services from the descriptor and the table."""
    lists, stats = Lists(deps), StatsHandlers(deps)
    table = handlers(lists, Statuses(deps), stats)
    stream_table = streamed(lists, stats, EventFeed(deps))
    result = []
    for service in pb.DESCRIPTOR.services_by_name.values():
        methods = {}
        for method in service.methods:
            decode = GetMessageClass(method.input_type).FromString
            if method.name in table:
                fields = tuple(name for name in _NAMED_IN_LOG if name in method.input_type.fields_by_name)
                methods[method.name] = grpc.unary_unary_rpc_method_handler(
                    _unary(method.name, table[method.name], deps, observer, fields), decode, _serialise
                )
            elif method.name in stream_table:
                methods[method.name] = grpc.unary_stream_rpc_method_handler(
                    _stream(method.name, stream_table[method.name], deps, observer), decode, _serialise
                )
            else:
                make = (
                    grpc.unary_stream_rpc_method_handler
                    if method.server_streaming
                    else grpc.unary_unary_rpc_method_handler
                )
                methods[method.name] = make(_refuse, decode, _serialise)
        result.append(grpc.method_handlers_generic_handler(service.full_name, methods))
    return result


@effect("socket.bind")
def _prepare_socket(path: Path) -> None:
    """Make the socket's folder private, and clear away the socket of a daemon that is gone."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    if path.is_socket():
        path.unlink()


@effect("socket.remove")
def _remove_socket(path: Path) -> None:
    path.unlink(missing_ok=True)


class CriServer:
    """The CRI endpoint on its UNIX socket."""

    def __init__(self, deps: Deps, path: Path, observer: Observer) -> None:
        self._path = path
        self._server = grpc.aio.server(
            options=[
                ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
                ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
            ]
        )
        self._server.add_generic_rpc_handlers(generic_handlers(deps, observer))

    async def start(self, mode: int = 0o600) -> None:
        """Listen. Call when everything is ready: a client that connects is served at once."""
        _prepare_socket(self._path)
        mask = os.umask(0o777 & ~mode)
        try:
            self._server.add_insecure_port(f"unix:{self._path}")
            await self._server.start()
        finally:
            os.umask(mask)
        self._path.chmod(mode)

    async def aclose(self, grace_s: float = 2.0) -> None:
        """Refuse new calls, let those in flight end within the grace, and remove the socket."""
        await self._server.stop(grace_s)
        _remove_socket(self._path)
