"""Enrolment of the sizer."""

from __future__ import annotations

from dispatcher.api import Registrar, Section, Services
from dispatcher_vm_sizing.config import SizingConfig
from dispatcher_vm_sizing.provider import NAME, VmSizer


class VmSizingPlugin:
    """The object behind the entry point `vm_sizing`."""

    API = (1, 0)
    name = NAME

    def register(self, registrar: Registrar) -> None:
        """Offer the sizer and the check of its section."""
        registrar.sizer(NAME, _make_sizer)
        registrar.check_section(_check_section)


def _make_sizer(section: Section, _services: Services) -> VmSizer:
    return VmSizer(SizingConfig.from_section(section))


def _check_section(section: Section) -> None:
    SizingConfig.from_section(section)


plugin = VmSizingPlugin()
