"""A client of any CRI v1 socket, with its methods made from the descriptors of our own contract.

The command line and the benchmarks use it; the daemon does not. What comes back as an error is `CallFailed`, so that
callers need not know gRPC.
"""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

import grpc
import grpc.aio
from google.protobuf import message_factory
from google.protobuf.message import Message

from dispatcher.cri import api_pb2
from dispatcher.errors import DispatcherError

MAX_MESSAGE_BYTES = 16 << 20
Metadata = Sequence[tuple[str, str]]
_OPTIONS = (
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    # Without it the authority is the escaped socket path, which some servers refuse (the kubelet sets the same).
    ("grpc.default_authority", "localhost"),
    # A command must reach the node's socket whatever proxy its shell is set up for.
    ("grpc.enable_http_proxy", 0),
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 1000),
    # Each client has its own connection: a pool shared within the process would hide a restart of the server.
    ("grpc.use_local_subchannel_pool", 1),
)


class CallFailed(DispatcherError):
    """An RPC was answered with an error.

    `code` is the status code's name, such as "NOT_FOUND"; `message` is what the server said.
    """

    def __init__(self, rpc: str, code: str, message: str) -> None:
        super().__init__(message or code, rpc=rpc, code=code)
        self.rpc = rpc
        self.code = code


class Endpoint:
    """The address of a CRI socket.

    Args:
        address: a path, or `unix://PATH`.

    Raises:
        ValueError: another scheme, or a relative path.
    """

    def __init__(self, address: str) -> None:
        path = address.removeprefix("unix://") if address.startswith("unix:///") else address
        if not path.startswith("/") or "\0" in path:
            raise ValueError(f"{address!r} is not the address of a UNIX socket; write unix:///path/to.sock")
        self.path = path
        self.target = f"unix:{path}"

    def why_unreachable(self) -> str:
        """Return a sentence on why nobody can connect, "" where nothing speaks against it."""
        if not os.path.exists(self.path):
            return f"{self.path} does not exist: the daemon is not running, or listens elsewhere"
        if not os.access(self.path, os.W_OK):
            return f"{self.path} is not open to this user: run the command as root"
        return ""


@dataclass(frozen=True, slots=True)
class _Method:
    path: str
    request: type[Message]
    response: type[Message]


def _methods() -> dict[str, _Method]:
    """Return what there is to know per RPC of the contract."""
    found = {}
    for service in api_pb2.DESCRIPTOR.services_by_name.values():
        for method in service.methods:
            found[method.name] = _Method(
                f"/{service.full_name}/{method.name}",
                message_factory.GetMessageClass(method.input_type),
                message_factory.GetMessageClass(method.output_type),
            )
    return found


def _failed(rpc: str, error: Any) -> CallFailed:
    # Typed as Any: a grpc.RpcError has code() and details() only where it is a call at the same time.
    code, details = error.code(), error.details()
    return CallFailed(rpc, code.name if code is not None else "UNKNOWN", str(details or ""))


class _Client:
    """What both clients share: the methods of the contract, bound to one channel when they are first called."""

    def __init__(self, address: str, timeout_s: float) -> None:
        self.endpoint = Endpoint(address)
        self._timeout_s = timeout_s
        self._methods = _methods()
        self._bound: dict[str, Any] = {}

    def _bind(self, connect: Any, rpc: str) -> Any:
        bound = self._bound.get(rpc)
        if bound is None:
            method = self._methods[rpc]
            bound = self._bound[rpc] = connect(
                method.path,
                request_serializer=method.request.SerializeToString,
                response_deserializer=method.response.FromString,
            )
        return bound

    def _deadline(self, timeout_s: float | None) -> float | None:
        return self._timeout_s if timeout_s is None else (timeout_s or None)


class CriClient(_Client):
    """Calls RPCs by name, in an event loop. `async with` closes the connection.

    Args:
        address: see `Endpoint`.
        timeout_s: deadline of each call that does not say another.
    """

    def __init__(self, address: str, *, timeout_s: float = 120.0) -> None:
        super().__init__(address, timeout_s)
        self._channel = grpc.aio.insecure_channel(self.endpoint.target, options=_OPTIONS)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """Close the connection; calls in flight end with CANCELLED."""
        await self._channel.close()

    async def call(self, rpc: str, *, timeout_s: float | None = None, metadata: Metadata = (), **fields: Any) -> Any:
        """Call a unary RPC and return its response message.

        Args:
            rpc: its name in the contract, such as "Version".
            timeout_s: deadline, 0 for none, None for the client's default.
            metadata: pairs that travel beside the request.
            fields: the fields of the request message.

        Raises:
            CallFailed: the server answered with an error, or cannot be reached (UNAVAILABLE).
        """
        bound = self._bind(self._channel.unary_unary, rpc)
        request = self._methods[rpc].request(**fields)
        try:
            return await bound(request, timeout=self._deadline(timeout_s), metadata=metadata or None)
        except grpc.RpcError as error:
            raise _failed(rpc, error) from error

    async def stream(self, rpc: str, *, timeout_s: float | None = None, **fields: Any) -> AsyncIterator[Any]:
        """Call a streaming RPC and yield its messages; no deadline unless one is given. Raises CallFailed."""
        bound = self._bind(self._channel.unary_stream, rpc)
        try:
            async for message in bound(self._methods[rpc].request(**fields), timeout=timeout_s or None):
                yield message
        except grpc.RpcError as error:
            raise _failed(rpc, error) from error


class BlockingCriClient(_Client):
    """The same for threads and benchmarks: each call blocks, and costs less than one through an event loop."""

    def __init__(self, address: str, *, timeout_s: float = 120.0) -> None:
        super().__init__(address, timeout_s)
        self._raw: dict[str, Any] = {}
        self._channel = grpc.insecure_channel(self.endpoint.target, options=_OPTIONS)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the connection."""
        self._channel.close()

    def call(self, rpc: str, *, timeout_s: float | None = None, **fields: Any) -> Any:
        """Call a unary RPC; see `CriClient.call`."""
        bound = self._bind(self._channel.unary_unary, rpc)
        try:
            return bound(self._methods[rpc].request(**fields), timeout=self._deadline(timeout_s))
        except grpc.RpcError as error:
            raise _failed(rpc, error) from error

    def call_bytes(self, rpc: str, request: bytes = b"") -> bytes:
        """Call a unary RPC with a serialised request and return the serialised response, for measuring servers."""
        bound = self._raw.get(rpc)
        if bound is None:
            bound = self._raw[rpc] = self._channel.unary_unary(self._methods[rpc].path)
        try:
            return bytes(bound(request, timeout=self._timeout_s))
        except grpc.RpcError as error:
            raise _failed(rpc, error) from error

    def stream(self, rpc: str, *, timeout_s: float | None = None, **fields: Any) -> Iterator[Any]:
        """Call a streaming RPC and yield its messages; no deadline unless one is given. Raises CallFailed."""
        bound = self._bind(self._channel.unary_stream, rpc)
        try:
            yield from bound(self._methods[rpc].request(**fields), timeout=timeout_s or None)
        except grpc.RpcError as error:
            raise _failed(rpc, error) from error
