"""Enrolment of the image plugin."""

from __future__ import annotations

from dispatcher.api import ImageProvider, Registrar, Section, Services


class ImagesPlugin:
    """The object behind the entry point. Heavy libraries are imported by the factory only."""

    API = (1, 0)
    name = "images"

    def register(self, registrar: Registrar) -> None:
        """Offer the provider "oci" and the check of its section."""
        registrar.images("oci", _make)
        registrar.check_section(_check)


def _make(section: Section, services: Services) -> ImageProvider:
    from dispatcher_images.config import ImagesConfig
    from dispatcher_images.provider import OciImages

    return OciImages(ImagesConfig.model_validate(dict(section)), services)


def _check(section: Section) -> None:
    from dispatcher_images.config import ImagesConfig

    ImagesConfig.model_validate(dict(section))


plugin = ImagesPlugin()
