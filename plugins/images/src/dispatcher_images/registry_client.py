"""The registry protocol over HTTP: manifests and blobs, with mirrors, logins and redirects. The only user of aiohttp.

Theory of operation. A `Remote` serves one pull with one caller's credentials, so that a token of one pod's secret is
never used for another pod. It asks the endpoints of its reference in turn. Redirects are followed by hand: the
authorization header stays with the host that it was made for, TLS is never left, and each host gets its own
certificates. Bodies arrive as sent (no content decoding), since digests are over those bytes.

aiohttp is imported where it is used: that takes longer than everything else of this plugin, and a daemon that starts again
has pods to take over first.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import logging
import ssl
import urllib.request
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal
from urllib.parse import urljoin, urlsplit

from dispatcher.errors import PullFailed
from dispatcher.model import Credentials
from dispatcher_images import manifest as manifests
from dispatcher_images.config import ImagesConfig, is_loopback
from dispatcher_images.endpoints import Endpoint, Endpoints
from dispatcher_images.manifest import Descriptor
from dispatcher_images.reference import Reference
from dispatcher_images.registry_auth import ANONYMOUS, Challenge, Login, login_for, parse_challenges, realm_problem

if TYPE_CHECKING:
    import aiohttp

log = logging.getLogger(__name__)

UNAVAILABLE = "RegistryUnavailable"
_MAX_REDIRECTS = 5
_MAX_TOKEN_BYTES = 1 << 20
_CHUNK = 256 << 10
_USER_AGENT = "cri-dispatcher"
_TRANSIENT = frozenset({408, 425, 429, 500, 502, 503, 504})

_Kind = Literal["unavailable", "missing", "denied", "refused"]


class EndpointFailed(Exception):
    """One endpoint could not serve. `kind` decides what the caller is told; `is_transient` whether to try again."""

    def __init__(self, kind: _Kind, message: str, *, is_transient: bool = False) -> None:
        super().__init__(message)
        self.kind = kind
        self.is_transient = is_transient


@dataclass(frozen=True, slots=True, kw_only=True)
class Document:
    """A manifest or index as received; its bytes match `digest`."""

    content: bytes
    media_type: str
    digest: str


class BlobBody:
    """An open download. `offset` is where it really starts: 0 when the registry cannot resume."""

    def __init__(self, response: aiohttp.ClientResponse, offset: int) -> None:
        self._response = response
        self.offset = offset

    async def chunks(self) -> AsyncIterator[bytes]:
        """Yield the bytes as they arrive. Raises EndpointFailed (transient) when the connection breaks."""
        import aiohttp

        try:
            async for chunk in self._response.content.iter_chunked(_CHUNK):
                yield chunk
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            raise EndpointFailed("unavailable", "The connection broke.", is_transient=True) from error


class RegistryClient:
    """Shared connections. Use `remote` for each pull."""

    def __init__(self, config: ImagesConfig) -> None:
        self._config = config
        self._endpoints = Endpoints(config)
        self._session: aiohttp.ClientSession | None = None

    async def aclose(self) -> None:
        """Close all connections."""
        if self._session is not None:
            await self._session.close()
            self._session = None

    def remote(self, reference: Reference, credentials: Credentials | None) -> Remote:
        """A client for one pull. Raises InvalidRequest for credentials that cannot be read."""
        login = login_for(credentials, reference.registry)
        return Remote(self, self._endpoints, self._config, reference, login)

    def session(self) -> aiohttp.ClientSession:
        """The shared session, made at first use, on the loop that uses it."""
        import aiohttp

        if self._session is None:
            self._session = aiohttp.ClientSession(
                timeout=aiohttp.ClientTimeout(
                    total=None, sock_connect=self._config.connect_timeout_s, sock_read=self._config.stall_timeout_s
                ),
                connector=aiohttp.TCPConnector(limit=64, limit_per_host=16),
                cookie_jar=aiohttp.DummyCookieJar(),
                auto_decompress=False,
                headers={"User-Agent": _USER_AGENT, "Accept-Encoding": "identity"},
            )
        return self._session


class Remote:
    """Everything that one pull asks of registries."""

    def __init__(
        self, client: RegistryClient, endpoints: Endpoints, config: ImagesConfig, reference: Reference, login: Login
    ) -> None:
        self._client = client
        self._tls = endpoints
        self._attempts = config.attempts
        self._reference = reference
        self._login = login
        self._endpoints = list(endpoints.of(reference))
        self._authorization: dict[str, str] = {}  # endpoint url -> header, for this pull only

    @property
    def endpoint_count(self) -> int:
        """How many places may have it: as many times wrong content is worth another try."""
        return len(self._endpoints)

    async def manifest(self, selector: str) -> Document:
        """Fetch a manifest or index by tag or digest, from the first endpoint that has it.

        The endpoint that served is asked first from now on. Raises PullFailed.
        """
        failures: list[EndpointFailed] = []
        for endpoint in self._endpoints:
            try:
                document = await self._manifest_with_retry(endpoint, selector)
            except EndpointFailed as failure:
                log.info("registry %s did not serve %s: %s", endpoint.host, self._reference, failure)
                failures.append(failure)
                continue
            self._endpoints.remove(endpoint)
            self._endpoints.insert(0, endpoint)
            return document
        raise self._pull_failed(failures)

    @contextlib.asynccontextmanager
    async def blob(self, descriptor: Descriptor, offset: int, attempt: int) -> AsyncIterator[BlobBody]:
        """Open a blob from `offset` on. Later attempts begin with another endpoint, where there are several.

        Raises EndpointFailed; the caller counts attempts, as only it knows whether bytes arrived.
        """
        shift = attempt % len(self._endpoints)
        last: EndpointFailed | None = None
        async with contextlib.AsyncExitStack() as stack:
            for endpoint in (*self._endpoints[shift:], *self._endpoints[:shift]):
                path = f"/v2/{endpoint.repository}/blobs/{descriptor.digest}"
                headers = {"Range": f"bytes={offset}-"} if offset else {}
                try:
                    response = await stack.enter_async_context(self._get(endpoint, path, headers))
                    body = BlobBody(response, _start(response, offset))
                except EndpointFailed as failure:
                    last = failure
                    continue
                yield body
                return
        assert last is not None
        raise last

    def give_up(self, failure: EndpointFailed) -> PullFailed:
        """The caller's error for a download that failed for good."""
        return self._pull_failed([failure])

    # ------------------------------------------------------------------------------------------------- manifests
    async def _manifest_with_retry(self, endpoint: Endpoint, selector: str) -> Document:
        for attempt in range(self._attempts):
            try:
                return await self._manifest(endpoint, selector)
            except EndpointFailed as failure:
                if not failure.is_transient or attempt == self._attempts - 1:
                    raise
            await asyncio.sleep(backoff_s(attempt))
        raise AssertionError("unreachable")

    async def _manifest(self, endpoint: Endpoint, selector: str) -> Document:
        path = f"/v2/{endpoint.repository}/manifests/{selector}"
        async with self._get(endpoint, path, {"Accept": ", ".join(manifests.ACCEPT)}) as response:
            content = await _read(response, manifests.MAX_MANIFEST_BYTES)
            media_type = response.headers.get("Content-Type", "")
        digest = f"sha256:{hashlib.sha256(content).hexdigest()}"
        if selector.startswith("sha256:") and digest != selector:
            raise EndpointFailed("refused", f"The registry {endpoint.host} sent other content than {selector}.")
        return Document(content=content, media_type=media_type, digest=digest)

    # ------------------------------------------------------------------------------------------- requests, login
    @contextlib.asynccontextmanager
    async def _get(
        self, endpoint: Endpoint, path: str, headers: Mapping[str, str]
    ) -> AsyncIterator[aiohttp.ClientResponse]:
        """GET from an endpoint, logging in when it asks. Yields a response with status 200 or 206."""
        async with contextlib.AsyncExitStack() as stack:
            url = endpoint.url + path
            if endpoint.url not in self._authorization and self._login_for(endpoint).registry_token:
                self._authorization[endpoint.url] = f"Bearer {self._login_for(endpoint).registry_token}"
            response = await stack.enter_async_context(self._follow(endpoint, url, headers))
            if response.status == 401:
                challenges = parse_challenges(response.headers.getall("WWW-Authenticate", []))
                response.release()
                self._authorization[endpoint.url] = await self._answer(endpoint, challenges)
                response = await stack.enter_async_context(self._follow(endpoint, url, headers))
            _raise_for_status(response, endpoint)
            yield response

    @contextlib.asynccontextmanager
    async def _follow(
        self, endpoint: Endpoint, url: str, headers: Mapping[str, str]
    ) -> AsyncIterator[aiohttp.ClientResponse]:
        home = _origin(url)
        for _ in range(_MAX_REDIRECTS + 1):
            sent = dict(headers)
            authorization = self._authorization.get(endpoint.url)
            if authorization and _origin(url) == home:
                sent["Authorization"] = authorization
            async with self._request("GET", url, sent) as response:
                if response.status not in {301, 302, 303, 307, 308}:
                    yield response
                    return
                url = self._redirected(endpoint, url, response.headers.get("Location", ""))
        raise EndpointFailed("unavailable", f"The registry {endpoint.host} redirects without end.")

    def _redirected(self, endpoint: Endpoint, url: str, location: str) -> str:
        target = urljoin(url, location)
        parts = urlsplit(target)
        if parts.scheme not in {"http", "https"} or not parts.hostname or parts.username or not location:
            raise EndpointFailed("refused", f"The registry {endpoint.host} redirects to an unusable address.")
        if parts.scheme == "http" and not url.startswith("http://") and not self._tls.may_be_plain(parts.netloc):
            raise EndpointFailed("refused", f"The registry {endpoint.host} redirects away from TLS.")
        if is_loopback(parts.netloc) and not is_loopback(endpoint.host):
            raise EndpointFailed("refused", f"The registry {endpoint.host} redirects to this node itself.")
        return target

    @contextlib.asynccontextmanager
    async def _request(
        self, method: str, url: str, headers: Mapping[str, str], form: Mapping[str, str] | None = None
    ) -> AsyncIterator[aiohttp.ClientResponse]:
        import aiohttp
        from yarl import URL

        parts = urlsplit(url)
        tls: ssl.SSLContext | bool = True
        if parts.scheme == "https":
            tls = await asyncio.to_thread(self._tls.tls, parts.netloc)
        try:
            # The address is the registry's own spelling: signatures of redirected storage cover it byte by byte.
            response = await self._client.session().request(
                method,
                URL(url, encoded=True),
                headers=headers,
                data=form,
                ssl=tls,
                allow_redirects=False,
                proxy=_proxy_for(parts.scheme, parts.netloc),
            )
        except aiohttp.ClientConnectorCertificateError as error:
            raise EndpointFailed(
                "unavailable", f"The certificate of {parts.netloc} is not trusted: see `certs_dir`."
            ) from error
        except aiohttp.ClientConnectorError as error:
            raise EndpointFailed("unavailable", f"The registry {parts.netloc} cannot be reached.") from error
        except (aiohttp.ClientError, TimeoutError, OSError, ValueError) as error:
            raise EndpointFailed(
                "unavailable", f"The registry {parts.netloc} does not answer.", is_transient=True
            ) from error
        try:
            yield response
        finally:
            response.close()

    async def _answer(self, endpoint: Endpoint, challenges: tuple[Challenge, ...]) -> str:
        """Return the authorization header that satisfies a registry's challenges."""
        login = self._login_for(endpoint)
        for challenge in challenges:
            if challenge.scheme == "bearer" and not login.registry_token:
                return f"Bearer {await self._token(endpoint, challenge, login)}"
        for challenge in challenges:
            if challenge.scheme == "basic" and login.basic:
                return login.basic
        raise EndpointFailed("denied", f"The registry {endpoint.host} asks for a login: check the pull secret.")

    async def _token(self, endpoint: Endpoint, challenge: Challenge, login: Login) -> str:
        if problem := realm_problem(challenge.realm, registry_is_plain=endpoint.is_plain):
            raise EndpointFailed("refused", f"The registry {endpoint.host} cannot be used: {problem}.")
        scope = challenge.scope or f"repository:{endpoint.repository}:pull"
        if login.identity_token:
            form = {
                "grant_type": "refresh_token",
                "service": challenge.service,
                "scope": scope,
                "client_id": _USER_AGENT,
                "refresh_token": login.identity_token,
            }
            request = self._request("POST", challenge.realm, {}, form)
        else:
            from yarl import URL

            query = {"scope": scope} | ({"service": challenge.service} if challenge.service else {})
            url = str(URL(challenge.realm).update_query(query))
            request = self._request("GET", url, {"Authorization": login.basic} if login.basic else {})
        async with request as response:
            if response.status in {400, 401, 403}:
                raise EndpointFailed(
                    "denied", f"The registry {endpoint.host} rejects the login: check the pull secret."
                )
            _raise_for_status(response, endpoint)
            content = await _read(response, _MAX_TOKEN_BYTES)
        return _token_in(content, endpoint)

    def _login_for(self, endpoint: Endpoint) -> Login:
        return self._login if endpoint.is_trusted else ANONYMOUS

    # ---------------------------------------------------------------------------------------------------- errors
    def _pull_failed(self, failures: list[EndpointFailed]) -> PullFailed:
        """What the caller is told: the last endpoint's word (the registry's own), with what the mirrors said."""
        last = failures[-1]
        said = " ".join(dict.fromkeys(str(failure) for failure in failures))
        reason = UNAVAILABLE if last.kind == "unavailable" else ""
        error = PullFailed(f"The image {self._reference} cannot be pulled. {said}", reason=reason)
        error.__cause__ = last
        return error


def backoff_s(attempt: int) -> float:
    """How long to wait before the next attempt, in seconds."""
    return float(min(5.0, 0.2 * 2**attempt))


def _start(response: aiohttp.ClientResponse, offset: int) -> int:
    if not offset or response.status == 200:
        return 0
    if not response.headers.get("Content-Range", "").startswith(f"bytes {offset}-"):
        raise EndpointFailed("unavailable", "The registry resumed at another place.", is_transient=True)
    return offset


def _raise_for_status(response: aiohttp.ClientResponse, endpoint: Endpoint) -> None:
    host, status = endpoint.host, response.status
    if status in {200, 206}:
        return
    if status in {401, 403}:
        raise EndpointFailed("denied", f"The registry {host} denies access: check the pull secret.")
    if status in {404, 410}:
        raise EndpointFailed("missing", f"The registry {host} does not have it.")
    if status in _TRANSIENT or status >= 500:
        raise EndpointFailed("unavailable", f"The registry {host} answers with status {status}.", is_transient=True)
    raise EndpointFailed("refused", f"The registry {host} answers with status {status}.")


async def _read(response: aiohttp.ClientResponse, limit: int) -> bytes:
    import aiohttp

    content = bytearray()
    try:
        async for chunk in response.content.iter_chunked(_CHUNK):
            content += chunk
            if len(content) > limit:
                raise EndpointFailed("refused", f"The registry sent more than {limit} bytes where little was expected.")
    except (aiohttp.ClientError, TimeoutError, OSError) as error:
        raise EndpointFailed("unavailable", "The connection broke.", is_transient=True) from error
    return bytes(content)


def _token_in(content: bytes, endpoint: Endpoint) -> str:
    import json

    try:
        document = json.loads(content)
        token = document.get("token") or document.get("access_token")
    except (ValueError, AttributeError, RecursionError):
        token = None
    if not isinstance(token, str) or not token or not token.isascii() or not token.isprintable():
        raise EndpointFailed("unavailable", f"The token service of {endpoint.host} sent no token.")
    return token


def _origin(url: str) -> tuple[str, str]:
    parts = urlsplit(url)
    return parts.scheme, parts.netloc


def _proxy_for(scheme: str, host: str) -> str | None:
    """The proxy of the daemon's environment. Loopback is never sent through one."""
    if is_loopback(host) or urllib.request.proxy_bypass_environment(host):  # type: ignore[attr-defined]
        return None
    return urllib.request.getproxies_environment().get(scheme)
