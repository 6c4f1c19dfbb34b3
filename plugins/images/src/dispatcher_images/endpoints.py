"""Where a reference is asked for: mirrors, then the registry itself; and which certificates and scheme each needs.

The only I/O is reading certificate folders.
"""

from __future__ import annotations

import ssl
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from dispatcher.errors import PullFailed
from dispatcher_images.config import ImagesConfig, Mirrored, is_loopback
from dispatcher_images.reference import Reference

_DOCKER_HUB_HOST = "registry-1.docker.io"


@dataclass(frozen=True, slots=True, kw_only=True)
class Endpoint:
    """One place that may hold an image. `is_trusted` says that the pull's credentials may go there."""

    url: str
    repository: str
    is_trusted: bool

    @property
    def host(self) -> str:
        """HOST[:PORT], which names the certificate folder."""
        return urlsplit(self.url).netloc

    @property
    def is_plain(self) -> bool:
        """Whether it speaks HTTP without TLS."""
        return self.url.startswith("http://")


class Endpoints:
    """Works out endpoints from the configuration."""

    def __init__(self, config: ImagesConfig) -> None:
        self._config = config
        self._certs = Path(config.certs_dir) if config.certs_dir else None
        self._contexts: dict[str, tuple[tuple[tuple[str, int], ...], ssl.SSLContext]] = {}

    def of(self, reference: Reference) -> tuple[Endpoint, ...]:
        """Return the endpoints of a reference, in the order in which they are asked; never empty."""
        found = _longest_match(self._config.mirrors, reference)
        endpoints: list[Endpoint] = []
        if found is not None:
            prefix, mirrored = found
            rest = reference.name.removeprefix(prefix).lstrip("/")
            for mirror in mirrored.mirrors:
                parts = urlsplit(mirror.url)
                repository = "/".join(part for part in (parts.path.strip("/"), rest) if part)
                url = f"{parts.scheme}://{parts.netloc}"
                endpoints.append(Endpoint(url=url, repository=repository, is_trusted=mirror.send_credentials))
            if not mirrored.origin and endpoints:
                return tuple(endpoints)
        host = _DOCKER_HUB_HOST if reference.registry == "docker.io" else reference.registry
        scheme = "http" if self.may_be_plain(host) else "https"
        return (*endpoints, Endpoint(url=f"{scheme}://{host}", repository=reference.repository, is_trusted=True))

    def may_be_plain(self, host: str) -> bool:
        """Whether HTTP without TLS is configured for a host."""
        if host in self._config.plain_http:
            return True
        return self._config.plain_http_loopback and is_loopback(host) and not self._files(host)

    def tls(self, host: str) -> ssl.SSLContext:
        """The TLS context for a host: the system's authorities, its certificate folder's, and a client certificate.

        Blocking: reads certificates. Raises PullFailed for files that cannot be used.
        """
        files = self._files(host)
        state = tuple((str(file), file.stat().st_mtime_ns) for file in files)
        known = self._contexts.get(host)
        if known is not None and known[0] == state:
            return known[1]
        context = ssl.create_default_context()
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        # Python 3.13 refuses authorities that lack formal extensions, which many private ones do; engines take them.
        context.verify_flags &= ~ssl.VERIFY_X509_STRICT
        for file in files:
            try:
                if file.suffix == ".crt":
                    context.load_verify_locations(cafile=file)
                elif file.suffix == ".cert":
                    context.load_cert_chain(file, file.with_suffix(".key"))
            except (OSError, ssl.SSLError) as error:
                raise PullFailed(f"The certificate {file} cannot be used.") from error
        if len(self._contexts) >= 256:  # redirect targets are named by registries: bounded
            self._contexts.clear()
        self._contexts[host] = (state, context)
        return context

    def _files(self, host: str) -> list[Path]:
        if self._certs is None or "/" in host or host in {"", ".", ".."}:
            return []
        folder = self._certs / host
        if not folder.is_dir():
            return []
        return sorted(file for file in folder.iterdir() if file.suffix in {".crt", ".cert"})


def _longest_match(mirrors: Mapping[str, Mirrored], reference: Reference) -> tuple[str, Mirrored] | None:
    matches = [
        prefix.rstrip("/")
        for prefix in mirrors
        if reference.name == prefix.rstrip("/") or reference.name.startswith(prefix.rstrip("/") + "/")
    ]
    if not matches:
        return None
    best = max(matches, key=len)
    return best, next(value for key, value in mirrors.items() if key.rstrip("/") == best)
