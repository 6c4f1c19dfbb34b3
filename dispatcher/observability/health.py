"""Answers /metrics, /healthz and /readyz on a loopback port, in the daemon's own loop.

That it answers at all is the liveness test: the loop turns. Readiness is a list of named checks that the composition
root adds. Only GET and HEAD, one request per connection, small bounds everywhere: any local user can connect.
"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import json
import logging
from collections.abc import Callable, Mapping

import h11

from dispatcher.observability.metrics import CONTENT_TYPE, Metrics

_log = logging.getLogger(__name__)

Check = Callable[[], tuple[bool, str]]

_MAX_REQUEST = 8 * 1024
_MAX_CONNECTIONS = 32
_DEADLINE_S = 5.0


class Health:
    """Named checks behind /readyz and /healthz. A check answers from memory: (is well, a sentence)."""

    def __init__(self) -> None:
        self._ready: dict[str, Check] = {}
        self._live: dict[str, Check] = {}

    def add_readiness(self, name: str, check: Check) -> None:
        """Pods can be served only when this holds."""
        self._ready[name] = check

    def add_liveness(self, name: str, check: Check) -> None:
        """The daemon has to be restarted when this does not hold."""
        self._live[name] = check

    def readiness(self) -> tuple[bool, Mapping[str, str]]:
        """Run the readiness checks; returns whether all hold, and a sentence for each."""
        return _run(self._ready)

    def liveness(self) -> tuple[bool, Mapping[str, str]]:
        """Run the liveness checks."""
        return _run(self._live)


def _run(checks: Mapping[str, Check]) -> tuple[bool, Mapping[str, str]]:
    well, said = True, {}
    for name, check in checks.items():
        try:
            holds, sentence = check()
        except Exception as error:  # noqa: BLE001 - a broken check is a failed check, and must not take the endpoint with it
            holds, sentence = False, f"the check itself failed: {type(error).__name__}"
        well = well and holds
        said[name] = sentence or ("ok" if holds else "failed")
    return well, said


class HealthServer:
    """A small HTTP server for one daemon.

    Args:
        metrics: rendered at /metrics.
        health: asked at /healthz and /readyz.
        host: a loopback address; others are refused, because nothing here is authenticated.
        port: 0 picks a free one; see `address` after `start`.
    """

    def __init__(self, metrics: Metrics, health: Health, *, host: str = "127.0.0.1", port: int = 0) -> None:
        if not ipaddress.ip_address(host).is_loopback:
            raise ValueError(f"metrics are served on a loopback address only, not on {host}")
        self._metrics = metrics
        self._health = health
        self._host = host
        self._port = port
        self._server: asyncio.Server | None = None
        self._writers: set[asyncio.StreamWriter] = set()

    @property
    def address(self) -> tuple[str, int]:
        """Where it listens: (host, port). Valid after `start`."""
        assert self._server is not None
        host, port = self._server.sockets[0].getsockname()[:2]
        return str(host), int(port)

    async def start(self) -> None:
        """Listen. Raises OSError where the port is taken."""
        self._server = await asyncio.start_server(self._serve, self._host, self._port, limit=_MAX_REQUEST)

    async def aclose(self) -> None:
        """Stop listening and end open connections. Idempotent."""
        if self._server is not None:
            server, self._server = self._server, None
            server.close()
            for writer in self._writers:
                writer.transport.abort()
            await server.wait_closed()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if len(self._writers) >= _MAX_CONNECTIONS:
            writer.close()
            return
        self._writers.add(writer)
        try:
            async with asyncio.timeout(_DEADLINE_S):
                await self._answer(reader, writer)
        except (TimeoutError, OSError, h11.RemoteProtocolError):
            pass  # a slow, silent or odd client is its own problem; nothing was changed on its behalf
        finally:
            self._writers.discard(writer)
            writer.close()
            with contextlib.suppress(OSError):
                await writer.wait_closed()

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        connection = h11.Connection(h11.SERVER, max_incomplete_event_size=_MAX_REQUEST)
        request = None
        while not isinstance(request, h11.Request):
            request = connection.next_event()
            if request is h11.NEED_DATA:
                connection.receive_data(await reader.read(_MAX_REQUEST))
            elif not isinstance(request, h11.Request):
                return
        status, kind, body = self._page(request.method, request.target)
        headers = [("content-type", kind), ("content-length", str(len(body))), ("connection", "close")]
        writer.write(connection.send(h11.Response(status_code=status, headers=headers)) or b"")
        if request.method != b"HEAD":
            writer.write(connection.send(h11.Data(data=body)) or b"")
        await writer.drain()

    def _page(self, method: bytes, target: bytes) -> tuple[int, str, bytes]:
        path, _, query = target.partition(b"?")
        if method not in (b"GET", b"HEAD"):
            return 405, "text/plain; charset=utf-8", b"only GET and HEAD\n"
        if path == b"/metrics":
            return 200, CONTENT_TYPE, self._metrics.render()
        if path in (b"/healthz", b"/livez", b"/readyz"):
            well, said = self._health.readiness() if path == b"/readyz" else self._health.liveness()
            if well and b"verbose" not in query:
                return 200, "text/plain; charset=utf-8", b"ok\n"
            body = json.dumps({"ok": well, "checks": said}, indent=2).encode() + b"\n"
            return 200 if well else 503, "application/json", body
        return 404, "text/plain; charset=utf-8", b"/metrics, /healthz or /readyz\n"
