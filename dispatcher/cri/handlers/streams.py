"""Exec, Attach and PortForward: a one-time URL each. What the session then reaches is `make_target`."""

from __future__ import annotations

from dispatcher.api import CanAttach, CanConnect, CanExec, ExecSpec, ExecStream, Process, StreamTarget
from dispatcher.cri import api_pb2 as pb
from dispatcher.cri import validate
from dispatcher.cri.handlers.lookup import get_container, get_pod, require_ready, require_running
from dispatcher.deps import Deps
from dispatcher.errors import InvalidRequest
from dispatcher.model import ContainerId, PodId


async def exec_(request: pb.ExecRequest, deps: Deps) -> pb.ExecResponse:
    """Grant an exec session. Refused here where it cannot work, so that the client reads why."""
    validate.exec_streams(request)
    words = validate.command(request.cmd)
    record = require_running(get_container(request.container_id, deps))
    deps.registry.ability(deps.store.get_pod(record.pod_id).route.runtime, CanExec)

    url = deps.registry.streaming.exec_url(
        ExecStream(
            container_id=record.id,
            command=words,
            tty=request.tty,
            stdin=request.stdin,
            stdout=request.stdout,
            stderr=request.stderr,
        )
    )
    return pb.ExecResponse(url=url)


async def attach(request: pb.AttachRequest, deps: Deps) -> pb.AttachResponse:
    """Grant an attach session."""
    validate.exec_streams(request)
    record = require_running(get_container(request.container_id, deps))
    deps.registry.ability(deps.store.get_pod(record.pod_id).route.runtime, CanAttach)

    url = deps.registry.streaming.attach_url(
        ExecStream(
            container_id=record.id,
            tty=request.tty,
            stdin=request.stdin,
            stdout=request.stdout,
            stderr=request.stderr,
        )
    )
    return pb.AttachResponse(url=url)


async def port_forward(request: pb.PortForwardRequest, deps: Deps) -> pb.PortForwardResponse:
    """Grant a port-forward session. The request names ports for old WebSocket clients only."""
    for port in request.port:
        if not 0 < port < 65536:
            raise InvalidRequest(f"{port} is not a port.")
    record = require_ready(get_pod(request.pod_sandbox_id, deps))
    deps.registry.ability(record.route.runtime, CanConnect)

    return pb.PortForwardResponse(url=deps.registry.streaming.port_forward_url(record.id, tuple(request.port)))


def make_target(deps: Deps) -> StreamTarget:
    """What the streaming provider is given: three functions, which look everything up anew when a session begins."""

    async def start_exec(container_id: ContainerId, spec: ExecSpec) -> Process:
        record = require_running(get_container(container_id, deps))
        pod = deps.store.get_pod(record.pod_id)
        runtime = deps.registry.ability(pod.route.runtime, CanExec)
        return await runtime.exec(deps.container_ref(record, pod), spec)

    async def start_attach(
        container_id: ContainerId,
        tty: bool,
        stdin: bool,
        stdout: bool,
        stderr: bool,
    ) -> Process:
        record = require_running(get_container(container_id, deps))
        pod = deps.store.get_pod(record.pod_id)
        runtime = deps.registry.ability(pod.route.runtime, CanAttach)
        return await runtime.attach(deps.container_ref(record, pod), stdin=stdin, stdout=stdout, stderr=stderr)

    async def connect(pod_id: PodId, port: int) -> Process:
        record = require_ready(get_pod(pod_id, deps))
        runtime = deps.registry.ability(record.route.runtime, CanConnect)
        return await runtime.connect(deps.pod_ref(record), port)

    return StreamTarget(exec=start_exec, attach=start_attach, connect=connect)
