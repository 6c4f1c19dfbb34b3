"""One HTTP request over TCP or a UNIX socket, with the standard library: what fixtures need to talk to real parts."""

from __future__ import annotations

import http.client
import json
import socket
import ssl
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True, slots=True, kw_only=True)
class Reply:
    """Status, headers with lower-case names, and the whole body."""

    status: int
    headers: Mapping[str, str]
    body: bytes

    def json(self) -> Any:
        """The body as JSON; None when it is empty."""
        return json.loads(self.body) if self.body else None


class _UnixConnection(http.client.HTTPConnection):
    def __init__(self, path: str, timeout_s: float) -> None:
        super().__init__("localhost", timeout=timeout_s)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(self.timeout)
        try:
            self.sock.connect(self._path)
        except OSError:
            self.sock.close()
            raise


def request(
    where: str | Path,
    method: str,
    path: str,
    *,
    headers: Mapping[str, str] | None = None,
    body: bytes = b"",
    tls: ssl.SSLContext | None = None,
    timeout_s: float = 60,
) -> Reply:
    """Send one request and read the whole reply.

    Args:
        where: `host:port`, or the path of a UNIX socket.
        method: HTTP method.
        path: Path with query.
        headers: Extra headers.
        body: Body to send.
        tls: Speak TLS with this context (TCP only).
        timeout_s: Limit for each socket operation.

    Raises:
        OSError: Nobody answers there.
    """
    connection: http.client.HTTPConnection
    if isinstance(where, Path):
        connection = _UnixConnection(str(where), timeout_s)
    elif tls is not None:
        connection = http.client.HTTPSConnection(where, timeout=timeout_s, context=tls)
    else:
        connection = http.client.HTTPConnection(where, timeout=timeout_s)
    try:
        connection.request(method, path, body=body, headers=dict(headers or {}))
        reply = connection.getresponse()
        return Reply(
            status=reply.status,
            headers={name.lower(): value for name, value in reply.getheaders()},
            body=reply.read(),
        )
    except http.client.HTTPException as exc:
        raise ConnectionError(f"no HTTP answer from {where}: {exc!r}") from exc
    finally:
        connection.close()
