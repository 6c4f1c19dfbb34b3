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


class Streaming:
    """Serves exec, attach and port-forward on one loopback port, by one-time URLs."""

    name = "streaming"

    def __init__(self, config: StreamingConfig) -> None:
        self._config = config
        self._tokens: Tokens[Granted] = Tokens(
            time.monotonic, lifetime_s=config.token_lifetime_s, limit=config.max_tokens
        )
        self._server: StreamServer | None = None

    async def start(self, target: StreamTarget) -> None:
        """Listen."""
        tls = None
        if self._config.tls_cert is not None and self._config.tls_key is not None:
            tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            tls.load_cert_chain(self._config.tls_cert, self._config.tls_key)
        server = StreamServer(
            host=self._config.host,
            port=self._config.port,
            tokens=self._tokens,
            target=target,
            idle_s=self._config.idle_s,
            max_connections=self._config.max_connections,
            tls=tls,
        )
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
        return f"{self._server.base_url}/{kind}/{self._tokens.grant(kind, request)}"
