"""How a registry wants to be asked: challenges, credentials, token requests. Pure; the client does the I/O.

The rule that this module guards: a secret goes to the registry that it was given for, or to the token service which
that registry names over an equally safe connection, and nowhere else.
"""

from __future__ import annotations

import base64
import binascii
import re
from dataclasses import dataclass, field
from urllib.parse import urlsplit

from dispatcher.errors import InvalidRequest
from dispatcher.model import Credentials

_DOCKER_HUB = frozenset({"docker.io", "index.docker.io", "registry-1.docker.io", "www.docker.io"})
_SCHEME = re.compile(r"\s*,?\s*([A-Za-z][A-Za-z0-9._-]*)(?:\s+|$)")
_PARAMETER = re.compile(r"\s*([A-Za-z0-9_-]+)\s*=\s*(?:\"((?:[^\"\\]|\\.)*)\"|([^\s,\"]+))\s*(?:,|$)")


@dataclass(frozen=True, slots=True, kw_only=True)
class Login:
    """Credentials in one form. At most one of password, identity token and registry token is used, in that order
    of rising strength. The repr shows nothing.
    """

    username: str = field(default="", repr=False)
    password: str = field(default="", repr=False)
    identity_token: str = field(default="", repr=False)
    registry_token: str = field(default="", repr=False)

    @property
    def basic(self) -> str:
        """The Basic authorization header, or "" without a user name."""
        if not self.username:
            return ""
        return "Basic " + base64.b64encode(f"{self.username}:{self.password}".encode()).decode()


ANONYMOUS = Login()


@dataclass(frozen=True, slots=True, kw_only=True)
class Challenge:
    """One way in that a registry offers: scheme "basic" or "bearer", with its parameters."""

    scheme: str
    realm: str = ""
    service: str = ""
    scope: str = ""


def login_for(credentials: Credentials | None, registry: str) -> Login:
    """The login to use for a registry: nothing when the credentials were given for another one.

    Raises:
        InvalidRequest: the `auth` field is not base64 of user:password.
    """
    if credentials is None or not _is_for(credentials.server_address, registry):
        return ANONYMOUS
    username, password = credentials.username, credentials.password
    if credentials.auth and not username:
        try:
            decoded = base64.b64decode(credentials.auth, validate=True).decode()
        except (binascii.Error, UnicodeDecodeError) as error:
            raise InvalidRequest("The pull secret's auth field is not base64 of USER:PASSWORD.") from error
        username, colon, password = decoded.partition(":")
        if not colon:
            raise InvalidRequest("The pull secret's auth field is not base64 of USER:PASSWORD.")
        password = password.strip("\0")
    return Login(
        username=username,
        password=password,
        identity_token=credentials.identity_token,
        registry_token=credentials.registry_token,
    )


def parse_challenges(headers: list[str]) -> tuple[Challenge, ...]:
    """Parse WWW-Authenticate headers, leniently: what cannot be read is no challenge."""
    challenges = []
    for header in headers:
        rest = header[:8192]
        while match := _SCHEME.match(rest):
            scheme, rest = match[1].lower(), rest[match.end() :]
            parameters: dict[str, str] = {}
            while parameter := _PARAMETER.match(rest):
                value = re.sub(r"\\(.)", r"\1", parameter[2]) if parameter[2] is not None else parameter[3]
                parameters[parameter[1].lower()] = value
                rest = rest[parameter.end() :]
            if scheme in {"basic", "bearer"}:
                known = {key: parameters.get(key, "") for key in ("realm", "service", "scope")}
                challenges.append(Challenge(scheme=scheme, **known))
    return tuple(challenges)


def realm_problem(realm: str, *, registry_is_plain: bool) -> str:
    """Why a token service must not be asked, or ""."""
    parts = urlsplit(realm)
    if parts.scheme not in {"http", "https"} or not parts.hostname:
        return "its token service has no usable address"
    if parts.username or parts.password:
        return "its token service's address holds a user name"
    if parts.scheme == "http" and not registry_is_plain:
        return "its token service would get the secret without TLS"
    return ""


def _is_for(server_address: str, registry: str) -> bool:
    if not server_address:
        return True
    address = server_address if "//" in server_address else f"//{server_address}"
    host = urlsplit(address).netloc.rpartition("@")[2].lower()
    return _alias(host) == _alias(registry.lower())


def _alias(host: str) -> str:
    return "docker.io" if host in _DOCKER_HUB else host
