"""A real image registry on a free loopback port: plain, with a password, with bearer tokens, or with TLS.

The registry program is Debian's docker-registry; the token server beside it is ours, since the registry only checks
tokens and never issues them.
"""

from __future__ import annotations

import base64
import json
import shutil
import socket
import ssl
import subprocess
import threading
import time
import urllib.parse
from collections.abc import Mapping
from contextlib import suppress
from enum import Enum
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from tests.lab.child import Child, PartMissingError, find_program, lab_folder
from tests.lab.http import Reply, request

USER = "puller"
PASSWORD = "s3cret:with colon"  # a colon and a blank, because naive splitting of basic credentials loses them
IDENTITY_TOKEN = "identity-of-puller"
_PASSWORD_HASH = "$2b$04$abcdefghijklmnopqrstuuqkd4zPhgDv/GzR0sIrJFDo0EXX1VO7a"


class Auth(Enum):
    """How the registry authenticates a client."""

    NONE = "none"
    BASIC = "basic"
    TOKEN = "token"


class Registry:
    """One registry with its data folder. `address` is `127.0.0.1:PORT`."""

    def __init__(self, *, auth: Auth = Auth.NONE, tls: bool = False, port: int = 0) -> None:
        """Prepare the folder; nothing runs yet.

        Args:
            auth: Which credentials it asks for (USER and PASSWORD; IDENTITY_TOKEN as well with tokens).
            tls: Serve HTTPS with a certificate of an own authority, in `ca`.
            port: Listen there instead of on a free port.

        Raises:
            PartMissingError: No docker-registry, or no openssl where certificates are needed.
        """
        program = find_program("docker-registry")
        if tls or auth is Auth.TOKEN:
            find_program("openssl")
        self.auth = auth
        self.tls = tls
        self.root = lab_folder("registry")
        self.port = port or free_port()
        self.address = f"127.0.0.1:{self.port}"
        self.ca = self.root / "ca.crt"
        self._tokens: TokenServer | None = None
        self._config = self.root / "config.yml"
        self._child = Child([program, "serve", str(self._config)], log=self.root / "registry.log")

    @property
    def url(self) -> str:
        """Base address with scheme."""
        return f"{'https' if self.tls else 'http'}://{self.address}"

    def start(self) -> None:
        """Start the registry and wait until it answers."""
        if self.tls:
            make_certificates(self.root)
        if self.auth is Auth.TOKEN and self._tokens is None:
            self._tokens = TokenServer(self.root)
        # JSON is YAML, and needs no quoting rules of ours.
        self._config.write_text(json.dumps(self._settings(), indent=1))
        self._child.start()
        self._child.wait_ready(self._answers, timeout_s=30)

    def stop(self) -> None:
        """Stop the registry; its data stays for the next start."""
        self._child.stop()

    def close(self) -> None:
        """Stop everything and remove the data. Idempotent."""
        self.stop()
        if self._tokens is not None:
            self._tokens.close()
            self._tokens = None
        shutil.rmtree(self.root, ignore_errors=True)

    def request(self, method: str, path: str, *, headers: Mapping[str, str] | None = None, body: bytes = b"") -> Reply:
        """Send one request with valid credentials."""
        context = ssl.create_default_context(cafile=str(self.ca)) if self.tls else None
        return request(
            self.address, method, path, headers={**self._credentials(path), **(headers or {})}, body=body, tls=context
        )

    def access_log(self) -> list[str]:
        """The request lines that the registry served so far (`GET /v2/name/manifests/tag`), oldest first."""
        lines = []
        for line in self._child.log_text().splitlines():
            _before, mark, rest = line.partition('] "')
            if mark:
                lines.append(rest.partition(" HTTP/")[0])
        return lines

    def _settings(self) -> dict[str, object]:
        http: dict[str, object] = {"addr": self.address}
        if self.tls:
            http["tls"] = {"certificate": str(self.root / "server.crt"), "key": str(self.root / "server.key")}
        settings: dict[str, object] = {
            "version": 0.1,
            "log": {"level": "warn", "accesslog": {"disabled": False}},
            "storage": {"filesystem": {"rootdirectory": str(self.root / "data")}, "delete": {"enabled": True}},
            "http": http,
        }
        if self.auth is Auth.BASIC:
            users = self.root / "htpasswd"
            users.write_text(f"{USER}:{_PASSWORD_HASH}\n")
            settings["auth"] = {"htpasswd": {"realm": "lab", "path": str(users)}}
        elif self._tokens is not None:
            settings["auth"] = {"token": self._tokens.registry_settings()}
        return settings

    def _credentials(self, path: str) -> dict[str, str]:
        if self.auth is Auth.BASIC:
            return {"Authorization": basic(USER, PASSWORD)}
        if self._tokens is not None:
            name = urllib.parse.urlsplit(path).path.removeprefix("/v2/")
            for mark in ("/blobs/", "/manifests/", "/tags/"):
                name = name.partition(mark)[0]
            actions = ["pull", "push", "delete"]
            scope: list[dict[str, object]] = [{"type": "repository", "name": name, "actions": actions}] if name else []
            return {"Authorization": f"Bearer {self._tokens.issue(scope)}"}
        return {}

    def _answers(self) -> bool:
        with suppress(OSError):
            return self.request("GET", "/v2/").status == 200
        return False


class TokenServer:
    """Issues the bearer tokens that the registry trusts, over HTTP as registries' token servers do."""

    service = "lab-registry"
    issuer = "lab-issuer"

    def __init__(self, root: Path) -> None:
        make_certificates(root)
        self._key, self._certificate = root / "server.key", root / "server.crt"
        self._bundle = root / "ca.crt"
        self.requests: list[str] = []
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True)
        self._thread.start()

    def registry_settings(self) -> dict[str, object]:
        """What the registry's `auth.token` section must hold."""
        return {
            "realm": f"http://127.0.0.1:{self._server.server_address[1]}/token",
            "service": self.service,
            "issuer": self.issuer,
            "rootcertbundle": str(self._bundle),
        }

    def issue(self, access: list[dict[str, object]]) -> str:
        """Sign a token that grants the access entries for five minutes."""
        certificate = _pem_body(self._certificate)
        now = int(time.time())
        header = {"typ": "JWT", "alg": "RS256", "x5c": [certificate]}
        claims = {
            "iss": self.issuer,
            "aud": self.service,
            "sub": USER,
            "nbf": now - 5,
            "iat": now - 5,
            "exp": now + 300,
            "jti": f"{time.monotonic_ns():x}",
            "access": access,
        }
        signed = ".".join(_base64url(json.dumps(part).encode()) for part in (header, claims))
        signature = subprocess.run(
            ["openssl", "dgst", "-sha256", "-sign", str(self._key)],
            input=signed.encode(),
            capture_output=True,
            check=True,
        ).stdout
        return f"{signed}.{_base64url(signature)}"

    def close(self) -> None:
        """Stop serving."""
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        tokens = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                query = urllib.parse.parse_qs(urllib.parse.urlsplit(self.path).query)
                allowed = self.headers.get("Authorization") == basic(USER, PASSWORD)
                self._reply(query, allowed=allowed)

            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0)).decode()
                form = urllib.parse.parse_qs(body)
                identity = form.get("grant_type") == ["refresh_token"] and form.get("refresh_token") == [IDENTITY_TOKEN]
                password = form.get("username") == [USER] and form.get("password") == [PASSWORD]
                self._reply(form, allowed=identity or password)

            def _reply(self, query: dict[str, list[str]], *, allowed: bool) -> None:
                tokens.requests.append(f"{self.command} {self.path}")
                if not allowed or query.get("service") != [tokens.service]:
                    self._send(401, {"details": "no"})
                    return
                access: list[dict[str, object]] = []
                for scope in " ".join(query.get("scope", [])).split():
                    kind, name, actions = scope.split(":")
                    access.append({"type": kind, "name": name, "actions": actions.split(",")})
                token = tokens.issue(access)
                self._send(200, {"token": token, "access_token": token, "expires_in": 300})

            def _send(self, status: int, document: object) -> None:
                body = json.dumps(document).encode()
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - the base class names it
                """Keep the test output quiet."""

        return Handler


def basic(user: str, password: str) -> str:
    """The value of an Authorization header for basic credentials."""
    return "Basic " + base64.b64encode(f"{user}:{password}".encode()).decode()


def free_port() -> int:
    """A TCP port on loopback that nobody listened on a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def make_certificates(root: Path) -> None:
    """Write ca.crt and a server key and certificate for 127.0.0.1, valid for a day. Idempotent.

    Raises:
        PartMissingError: There is no openssl.
    """
    if (root / "server.crt").exists():
        return
    openssl = find_program("openssl")
    subject = root / "subject.ext"
    subject.write_text("subjectAltName=IP:127.0.0.1,DNS:localhost\n")
    commands = [
        "req -x509 -newkey rsa:2048 -nodes -days 1 -subj /CN=lab-ca -keyout ca.key -out ca.crt",
        "req -newkey rsa:2048 -nodes -subj /CN=127.0.0.1 -keyout server.key -out server.csr",
        "x509 -req -days 1 -in server.csr -CA ca.crt -CAkey ca.key -CAcreateserial -extfile subject.ext -out server.crt",
    ]
    for command in commands:
        done = subprocess.run([openssl, *command.split()], cwd=root, capture_output=True, text=True, check=False)
        if done.returncode:
            raise PartMissingError(f"openssl cannot make certificates: {done.stderr[-300:]}")


def _pem_body(path: Path) -> str:
    return "".join(line for line in path.read_text().splitlines() if not line.startswith("-----"))


def _base64url(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()
