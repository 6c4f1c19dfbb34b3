"""The streaming provider: grants URLs and owns the port."""

from __future__ import annotations

import ssl
import time

from dispatcher.api import ExecStream, StreamTarget
from dispatcher.errors import RuntimeDown
from dispatcher.model import PodId
from dispatcher_streaming.config import StreamingConfig
from dispatcher_streaming.server import Granted, PortForwardStream, StreamServer
from dispatcher_streaming.tokens import Tokens

_MAX_TOKEN_BYTES = 16 << 20  # of all commands that wait for their client; one alone may have as many as a gRPC message


class Streaming:
    """Serves exec, attach and port-forward on one loopback port, by one-time URLs."""

    name = "streaming"

    def __init__(self, config: StreamingConfig) -> None:
        self._config = config
        self._tokens: Tokens[Granted] = Tokens(
            time.monotonic, lifetime_s=config.token_lifetime_s, limit=config.max_tokens, max_bytes=_MAX_TOKEN_BYTES
        )
        self._server: StreamServer | None = None

    async def start(self, target: StreamTarget) -> None:
        """Listen."""
        tls = None
        if self._config.tls_cert is not None and self._config.tls_key is not None:
            tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            try:
                tls.load_cert_chain(self._config.tls_cert, self._config.tls_key)
            except OSError as error:  # an ssl.SSLError is one
                raise RuntimeDown(
                    f"The certificate of the streaming port cannot be used: {self._config.tls_cert} with "
                    f"{self._config.tls_key}: {error.strerror or error}."
                ) from error
        server = StreamServer(self._config, tokens=self._tokens, target=target, tls=tls)
        try:
            await server.start()
        except OSError as error:
            raise RuntimeDown(
                f"The streaming port {self._config.host}:{self._config.port} cannot be opened: {error.strerror}."
            ) from error
        self._server = server

    async def aclose(self) -> None:
        """End all sessions and stop listening."""
        if self._server is not None:
            await self._server.aclose()

    def exec_url(self, request: ExecStream) -> str:
        """An absolute URL for one exec session."""
        return self._url("exec", request)

    def attach_url(self, request: ExecStream) -> str:
        """An absolute URL for one attach session."""
        return self._url("attach", request)

    def port_forward_url(self, pod_id: PodId, ports: tuple[int, ...]) -> str:
        """An absolute URL for one port-forward session."""
        return self._url("portforward", PortForwardStream(pod_id, ports))

    def _url(self, kind: str, request: Granted) -> str:
        if self._server is None:
            raise RuntimeDown("The streaming port is not open.")
        owner = request.container_id if isinstance(request, ExecStream) else request.pod_id
        size = sum(map(len, request.command)) if isinstance(request, ExecStream) else 0
        return f"{self._server.base_url}/{kind}/{self._tokens.grant(kind, request, owner=owner, size=size)}"
