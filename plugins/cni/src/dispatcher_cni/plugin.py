"""Enrolment of the CNI network provider."""

from __future__ import annotations

from dispatcher.api import Registrar, Section, Services
from dispatcher_cni.config import CniConfig
from dispatcher_cni.plan import PROVIDER
from dispatcher_cni.provider import CniNetwork


class CniPlugin:
    """The object behind the entry point `cni`."""

    API = (1, 0)
    name = PROVIDER

    def register(self, registrar: Registrar) -> None:
        """Offer the network provider and the check of its section."""
        registrar.network(PROVIDER, _make_network)
        registrar.check_section(_check_section)


def _check_section(section: Section) -> None:
    CniConfig.from_section(section)


def _make_network(section: Section, services: Services) -> CniNetwork:
    return CniNetwork(CniConfig.from_section(section), services)


plugin = CniPlugin()
