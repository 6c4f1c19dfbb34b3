"""A CRI client that behaves as a kubelet does: its deadlines, its log folders, its order of calls.

Blocking on purpose: a test reads as a sequence, and load comes from threads. Every reply is the generated message
itself; errors are `grpc.RpcError`, which `refused` turns into an assertion.
"""

from __future__ import annotations

import itertools
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import grpc

from dispatcher.cri import api_pb2 as pb
from tests.lab.child import lab_folder, patient, wait_until
from tests.lab.images import BUSYBOX

REQUEST_TIMEOUT_S = 120.0
_MESSAGE_LIMIT = 16 * 1024 * 1024
_numbers = itertools.count(1)
_SESSION = f"{os.getpid():x}{time.time_ns() & 0xFFFFFF:x}"


def unique(prefix: str) -> str:
    """A name that no other test of this or a parallel session uses."""
    return f"{prefix}-{_SESSION}-{next(_numbers)}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Ran:
    """What ExecSync brought."""

    stdout: str
    stderr: str
    exit_code: int


@dataclass(frozen=True, slots=True, kw_only=True)
class LogLine:
    """One record of a container's log file. `partial` is the P tag."""

    time: str
    stream: str
    partial: bool
    content: str


@dataclass(slots=True)
class Refusal:
    """The error that a `refused` block ended with."""

    code: grpc.StatusCode = grpc.StatusCode.OK
    details: str = ""


@contextmanager
def refused(*codes: grpc.StatusCode) -> Iterator[Refusal]:
    """Assert that the block's RPC fails, with one of the codes where any is given."""
    refusal = Refusal()
    try:
        yield refusal
    except grpc.RpcError as error:
        refusal.code, refusal.details = error.code(), error.details() or ""
        assert not codes or refusal.code in codes, f"expected {codes}, got {refusal.code}: {refusal.details}"
    else:
        raise AssertionError(f"the call succeeded; expected {codes or 'an error'}")


class CriClient:
    """Calls over one socket. `rpc` takes any method by name; the methods below cover what tests use most."""

    def __init__(self, socket: Path | str, *, handler: str = "", timeout_s: float = REQUEST_TIMEOUT_S) -> None:
        """Open a channel lazily.

        Args:
            socket: Path of the endpoint's socket.
            handler: RuntimeClass handler of every pod that `run_pod` makes.
            timeout_s: Deadline of a call that names none, as the kubelet's runtimeRequestTimeout.
        """
        self.socket = Path(socket)
        self.handler = handler
        self.timeout_s = timeout_s
        self._channel: grpc.Channel | None = None
        self._calls: dict[str, Callable[..., Any]] = {}
        self._folder: Path | None = None
        self._lock = threading.Lock()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the channel and remove the log folders. The client may be used again afterwards."""
        with self._lock:
            if self._channel is not None:
                self._channel.close()
            self._channel = None
            self._calls.clear()
            if self._folder is not None:
                shutil.rmtree(self._folder, ignore_errors=True)
            self._folder = None

    @property
    def folder(self) -> Path:
        """A temporary folder of this client, for pod logs and host mounts."""
        with self._lock:
            if self._folder is None:
                self._folder = lab_folder("client")
            return self._folder

    def rpc(self, method: str, request: Any = None, *, timeout_s: float | None = None) -> Any:
        """Call a unary method of either service. A missing request is the method's empty one."""
        call, empty = self._call(method)
        return call(empty() if request is None else request, timeout=self._limit(timeout_s), wait_for_ready=True)

    def _limit(self, timeout_s: float | None) -> float:
        return patient(self.timeout_s if timeout_s is None else timeout_s)

    def future(self, method: str, request: Any, *, timeout_s: float | None = None) -> Any:
        """Start a unary call; the result has `cancel`, `result`, `code` and `details`."""
        call, _empty = self._call(method)
        return call.future(request, timeout=self._limit(timeout_s), wait_for_ready=True)  # type: ignore[attr-defined]

    def stream(self, method: str, request: Any = None, *, timeout_s: float | None = None) -> Any:
        """Open a streaming method; iterate over the result, `cancel` it in the end."""
        call, empty = self._call(method)
        limit = None if timeout_s is None else patient(timeout_s)
        return call(empty() if request is None else request, timeout=limit, wait_for_ready=True)

    def unimplemented(self, method: str, request: Any = None) -> bool:
        """Whether the endpoint answers UNIMPLEMENTED to a method."""
        try:
            self.rpc(method, request)
        except grpc.RpcError as error:
            return bool(error.code() is grpc.StatusCode.UNIMPLEMENTED)
        return False

    # ------------------------------------------------------------------------------------------------------- node

    def version(self, version: str = "0.1.0") -> pb.VersionResponse:
        """Version, as a kubelet asks it."""
        reply: pb.VersionResponse = self.rpc("Version", pb.VersionRequest(version=version))
        return reply

    def status(self, *, verbose: bool = False) -> pb.StatusResponse:
        """Status."""
        reply: pb.StatusResponse = self.rpc("Status", pb.StatusRequest(verbose=verbose))
        return reply

    def wait_ready(self, *, timeout_s: float = 30) -> None:
        """Wait until the endpoint serves and its runtimes and network are ready, as a kubelet does before any pod."""
        told = ""

        def ready() -> bool:
            nonlocal told
            try:
                conditions = self.status().status.conditions
            except grpc.RpcError as error:
                told = str(error.details())
                return False
            told = "; ".join(
                f"{found.type}: {found.message}"
                for found in conditions
                if not found.status and found.type.startswith(("Runtime", "Network"))
            )
            return not told

        try:
            wait_until(ready, timeout_s=timeout_s, what="the node is not ready", interval_s=0.05)
        except TimeoutError as error:
            raise TimeoutError(f"{error}: {told}") from None

    def handler_features(self) -> pb.RuntimeHandlerFeatures:
        """The features of this client's runtime handler."""
        for entry in self.status().runtime_handlers:
            if entry.name == self.handler:
                return entry.features
        return pb.RuntimeHandlerFeatures()

    # ------------------------------------------------------------------------------------------------------ images

    def pull(self, image: str, *, auth: pb.AuthConfig | None = None, timeout_s: float | None = None) -> str:
        """PullImage; returns the image reference."""
        request = pb.PullImageRequest(image=pb.ImageSpec(image=image), auth=auth)
        reference: str = self.rpc("PullImage", request, timeout_s=timeout_s).image_ref
        return reference

    def ensure_image(self, image: str) -> str:
        """Pull unless present, as a kubelet does under IfNotPresent; returns the image id."""
        found = self.image(image)
        return found.id if found else self.pull(image)

    def image(self, image: str) -> pb.Image | None:
        """ImageStatus; None when it is absent."""
        reply = self.rpc("ImageStatus", pb.ImageStatusRequest(image=pb.ImageSpec(image=image)))
        return reply.image if reply.HasField("image") else None

    def images(self, image: str = "") -> list[pb.Image]:
        """ListImages, filtered when a name is given."""
        filter_ = pb.ImageFilter(image=pb.ImageSpec(image=image)) if image else None
        return list(self.rpc("ListImages", pb.ListImagesRequest(filter=filter_)).images)

    def remove_image(self, image: str) -> None:
        """RemoveImage."""
        self.rpc("RemoveImage", pb.RemoveImageRequest(image=pb.ImageSpec(image=image)))

    # -------------------------------------------------------------------------------------------------------- pods

    def pod_config(
        self,
        name: str = "",
        *,
        security: pb.LinuxSandboxSecurityContext | None = None,
        sysctls: Mapping[str, str] | None = None,
        cgroup_parent: str = "",
        **fields: Any,
    ) -> pb.PodSandboxConfig:
        """A sandbox config with unique metadata and a log folder; `fields` go to PodSandboxConfig as they are."""
        name = name or unique("pod")
        logs = self.folder / name
        logs.mkdir(parents=True, exist_ok=True)
        fields.setdefault("log_directory", str(logs))
        fields.setdefault("hostname", "lab-host")
        fields.setdefault("metadata", pb.PodSandboxMetadata(name=name, uid=unique("uid"), namespace="lab"))
        linux = pb.LinuxPodSandboxConfig(
            cgroup_parent=cgroup_parent,
            security_context=security or pb.LinuxSandboxSecurityContext(namespace_options=pod_namespaces()),
            sysctls=dict(sysctls or {}),
        )
        return pb.PodSandboxConfig(linux=linux, **fields)

    def run_pod(self, config: pb.PodSandboxConfig | None = None, **fields: Any) -> Pod:
        """RunPodSandbox with a kubelet's double deadline. Use the pod in a `with` block to have it removed."""
        config = config or self.pod_config(**fields)
        request = pb.RunPodSandboxRequest(config=config, runtime_handler=self.handler)
        reply = self.rpc("RunPodSandbox", request, timeout_s=2 * self.timeout_s)
        return Pod(self, reply.pod_sandbox_id, config)

    def pods(self, **filters: Any) -> list[pb.PodSandbox]:
        """ListPodSandbox; `filters` are fields of PodSandboxFilter."""
        filter_ = pb.PodSandboxFilter(**filters) if filters else None
        return list(self.rpc("ListPodSandbox", pb.ListPodSandboxRequest(filter=filter_)).items)

    def containers(self, **filters: Any) -> list[pb.Container]:
        """ListContainers; `filters` are fields of ContainerFilter."""
        filter_ = pb.ContainerFilter(**filters) if filters else None
        return list(self.rpc("ListContainers", pb.ListContainersRequest(filter=filter_)).containers)

    def stop_pod(self, pod_id: str) -> None:
        """StopPodSandbox."""
        self.rpc("StopPodSandbox", pb.StopPodSandboxRequest(pod_sandbox_id=pod_id))

    def remove_pod(self, pod_id: str) -> None:
        """RemovePodSandbox."""
        self.rpc("RemovePodSandbox", pb.RemovePodSandboxRequest(pod_sandbox_id=pod_id))

    def stop_container(self, container_id: str, *, grace_s: int = 0) -> None:
        """StopContainer with a kubelet's deadline: the grace on top of the usual one."""
        request = pb.StopContainerRequest(container_id=container_id, timeout=grace_s)
        self.rpc("StopContainer", request, timeout_s=grace_s + self.timeout_s)

    def remove_container(self, container_id: str) -> None:
        """RemoveContainer."""
        self.rpc("RemoveContainer", pb.RemoveContainerRequest(container_id=container_id))

    def remove_all_pods(self) -> None:
        """Stop and remove every sandbox of the endpoint."""
        for pod in self.pods():
            self.stop_pod(pod.id)
            self.remove_pod(pod.id)

    def _call(self, method: str) -> tuple[Callable[..., Any], Callable[[], Any]]:
        with self._lock:
            if self._channel is None:
                self._channel = _open_channel(self.socket)
            service, descriptor = _METHODS[method]
            request_type = getattr(pb, descriptor.input_type.name)
            if method not in self._calls:
                reply_type = getattr(pb, descriptor.output_type.name)
                factory = self._channel.unary_stream if descriptor.server_streaming else self._channel.unary_unary
                self._calls[method] = factory(
                    f"/{service}/{method}",
                    request_serializer=request_type.SerializeToString,
                    response_deserializer=reply_type.FromString,
                )
            return self._calls[method], request_type


class Pod:
    """A sandbox that a test made. Leaving its `with` block stops and removes it."""

    def __init__(self, client: CriClient, pod_id: str, config: pb.PodSandboxConfig) -> None:
        self.client = client
        self.id = pod_id
        self.config = config

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        # A failed clean-up must not hide why the test failed.
        with suppress(*([grpc.RpcError] if exc is not None else [])):
            self.stop()
            self.remove()

    def status(self, *, verbose: bool = False) -> pb.PodSandboxStatus:
        """PodSandboxStatus."""
        reply = self.status_reply(verbose=verbose)
        return reply.status

    def status_reply(self, *, verbose: bool = False) -> pb.PodSandboxStatusResponse:
        """The whole reply of PodSandboxStatus."""
        request = pb.PodSandboxStatusRequest(pod_sandbox_id=self.id, verbose=verbose)
        reply: pb.PodSandboxStatusResponse = self.client.rpc("PodSandboxStatus", request)
        return reply

    @property
    def ip(self) -> str:
        """The pod's first address."""
        return self.status().network.ip

    def stop(self) -> None:
        """StopPodSandbox."""
        self.client.stop_pod(self.id)

    def remove(self) -> None:
        """RemovePodSandbox."""
        self.client.remove_pod(self.id)

    def create(self, config: pb.ContainerConfig | None = None, **fields: Any) -> ContainerHandle:
        """CreateContainer; the fields are those of `container_config`. The image is pulled when absent."""
        config = config or container_config(**fields)
        config.image.image = self.client.ensure_image(config.image.image)
        request = pb.CreateContainerRequest(pod_sandbox_id=self.id, config=config, sandbox_config=self.config)
        return ContainerHandle(self, self.client.rpc("CreateContainer", request).container_id, config)

    def run(self, config: pb.ContainerConfig | None = None, **fields: Any) -> ContainerHandle:
        """Create and start a container."""
        container = self.create(config, **fields)
        container.start()
        return container

    def run_to_end(self, *command: str, **fields: Any) -> ContainerHandle:
        """Run a container until it exits."""
        container = self.run(command=command, **fields)
        container.wait_exited()
        return container


@dataclass(slots=True)
class ContainerHandle:
    """A container that a test made; its pod's removal removes it."""

    pod: Pod
    id: str
    config: pb.ContainerConfig = field(repr=False)

    @property
    def _client(self) -> CriClient:
        return self.pod.client

    def start(self) -> None:
        """StartContainer."""
        self._client.rpc("StartContainer", pb.StartContainerRequest(container_id=self.id))

    def stop(self, *, grace_s: int = 0) -> None:
        """StopContainer."""
        self._client.stop_container(self.id, grace_s=grace_s)

    def remove(self) -> None:
        """RemoveContainer."""
        self._client.remove_container(self.id)

    def status_reply(self, *, verbose: bool = False) -> pb.ContainerStatusResponse:
        """The whole reply of ContainerStatus."""
        request = pb.ContainerStatusRequest(container_id=self.id, verbose=verbose)
        reply: pb.ContainerStatusResponse = self._client.rpc("ContainerStatus", request)
        return reply

    def status(self) -> pb.ContainerStatus:
        """ContainerStatus."""
        return self.status_reply().status

    def wait_exited(self, *, timeout_s: float = 30) -> pb.ContainerStatus:
        """Wait until the container is EXITED; returns that status."""
        wait_until(
            lambda: self.status().state == pb.CONTAINER_EXITED,
            timeout_s=timeout_s,
            what=f"container {self.config.metadata.name} has not exited",
        )
        return self.status()

    def exec(self, *command: str, timeout_s: int | None = None) -> Ran:
        """ExecSync."""
        timeout_s = int(patient(20)) if timeout_s is None else timeout_s
        request = pb.ExecSyncRequest(container_id=self.id, cmd=command, timeout=timeout_s)
        reply = self._client.rpc("ExecSync", request, timeout_s=timeout_s + self._client.timeout_s)
        return Ran(
            stdout=reply.stdout.decode(errors="replace"),
            stderr=reply.stderr.decode(errors="replace"),
            exit_code=reply.exit_code,
        )

    def sh(self, script: str) -> str:
        """Run a shell script that must succeed; returns its stripped stdout."""
        ran = self.exec("/bin/sh", "-c", script)
        assert ran.exit_code == 0, f"{script!r} ended with {ran.exit_code}: {ran.stdout}{ran.stderr}"
        return ran.stdout.strip()

    @property
    def log_path(self) -> Path:
        """Where the log must be, by what the kubelet asked for."""
        return Path(self.pod.config.log_directory) / self.config.log_path

    def log_lines(self) -> list[LogLine]:
        """The records of the log file; an unreadable record fails the test."""
        return parse_log(self.log_path.read_bytes())

    def output(self, stream: str = "stdout") -> str:
        """The text of one stream of the log, put together again."""
        return "".join(
            line.content + ("" if line.partial else "\n") for line in self.log_lines() if line.stream == stream
        )

    def wait_log(self, claim: Callable[[str], bool], *, stream: str = "stdout", timeout_s: float = 20) -> str:
        """Wait until the text of a stream satisfies a claim; returns the text."""
        wait_until(
            lambda: self.log_path.exists() and claim(self.output(stream)),
            timeout_s=timeout_s,
            what=f"log of {self.config.metadata.name} does not show what was expected",
        )
        return self.output(stream)


def parse_log(data: bytes) -> list[LogLine]:
    """Split a CRI log into its records.

    Raises:
        AssertionError: A record is not `TIME STREAM TAG CONTENT` with a final line feed.
    """
    assert not data or data.endswith(b"\n"), f"torn last record: {data[-80:]!r}"
    lines = []
    for raw in data.split(b"\n")[:-1]:
        parts = raw.decode(errors="replace").split(" ", 3)
        assert len(parts) == 4, f"not a log record: {raw!r}"
        assert parts[1] in {"stdout", "stderr"}, raw
        assert parts[2] in {"P", "F"}, raw
        lines.append(LogLine(time=parts[0], stream=parts[1], partial=parts[2] == "P", content=parts[3]))
    return lines


def pod_namespaces(**fields: Any) -> pb.NamespaceOption:
    """Namespace options as the kubelet sends them for an ordinary pod: pid CONTAINER, the rest POD."""
    return pb.NamespaceOption(**{"pid": pb.CONTAINER, **fields})


def container_config(
    *,
    name: str = "",
    image: str = BUSYBOX,
    attempt: int = 0,
    command: Sequence[str] = ("top",),
    envs: Mapping[str, str] | None = None,
    mounts: Iterable[pb.Mount] = (),
    security: pb.LinuxContainerSecurityContext | None = None,
    resources: pb.LinuxContainerResources | None = None,
    **fields: Any,
) -> pb.ContainerConfig:
    """A container config with a unique name and a log path; `fields` go to ContainerConfig as they are.

    `command` of () leaves the image's own.
    """
    name = name or unique("container")
    fields.setdefault("log_path", f"{name}_{attempt}.log")
    security = security or pb.LinuxContainerSecurityContext()
    if not security.HasField("namespace_options"):
        security.namespace_options.CopyFrom(pod_namespaces())
    return pb.ContainerConfig(
        metadata=pb.ContainerMetadata(name=name, attempt=attempt),
        image=pb.ImageSpec(image=image, user_specified_image=image),
        command=command,
        envs=[pb.KeyValue(key=key, value=value.encode()) for key, value in (envs or {}).items()],
        mounts=mounts,
        linux=pb.LinuxContainerConfig(security_context=security, resources=resources),
        **fields,
    )


def _open_channel(socket: Path) -> grpc.Channel:
    options = [
        ("grpc.max_receive_message_length", _MESSAGE_LIMIT),
        ("grpc.max_send_message_length", _MESSAGE_LIMIT),
        ("grpc.default_authority", "localhost"),
        ("grpc.initial_reconnect_backoff_ms", 100),
        ("grpc.min_reconnect_backoff_ms", 100),
        ("grpc.max_reconnect_backoff_ms", 1000),
        # Channels of one process share connections by address otherwise, across restarts of the server too.
        ("grpc.use_local_subchannel_pool", 1),
        ("grpc.enable_http_proxy", 0),
    ]
    return grpc.insecure_channel(f"unix:{socket}", options=options)


_METHODS: dict[str, tuple[str, Any]] = {
    method.name: (service.full_name, method)
    for service in pb.DESCRIPTOR.services_by_name.values()
    for method in service.methods
}
