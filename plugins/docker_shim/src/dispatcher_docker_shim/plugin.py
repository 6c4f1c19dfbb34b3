"""The entry point of the Docker runtime: enrolment only."""

from __future__ import annotations

from dispatcher.api import Registrar, Runtime, Section, Services
from dispatcher_docker_shim.config import parse


class DockerShimPlugin:
    """Offers the runtime "docker"."""

    API = (1, 0)
    name = "docker_shim"

    def register(self, registrar: Registrar) -> None:
        """Offer the runtime and the check of its section."""
        registrar.runtime("docker", _make)
        registrar.check_section(_check)


def _make(section: Section, services: Services) -> Runtime:
    from dispatcher_docker_shim.runtime import DockerRuntime

    return DockerRuntime(parse(section), services)


def _check(section: Section) -> None:
    parse(section)


plugin = DockerShimPlugin()
