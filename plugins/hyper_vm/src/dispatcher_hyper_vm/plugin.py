"""The entry point of the runtime "hyper_vm": enrolment only."""

from __future__ import annotations

from dispatcher.api import Registrar, Runtime, Section, Services
from dispatcher_hyper_vm.config import parse


class HyperVmPlugin:
    """Offers the runtime "hyper_vm"."""

    API = (1, 0)
    name = "hyper_vm"

    def register(self, registrar: Registrar) -> None:
        """Offer the runtime and the check of its section."""
        registrar.runtime("hyper_vm", _make)
        registrar.check_section(_check)


def _make(section: Section, services: Services) -> Runtime:
    from dispatcher_hyper_vm.assembly import make_runtime

    return make_runtime(parse(section), services)


def _check(section: Section) -> None:
    parse(section)


plugin = HyperVmPlugin()
