"""The entry point of the plugin."""

from __future__ import annotations

from dispatcher.api import Registrar, Section, Services, StreamingProvider
from dispatcher_streaming.config import StreamingConfig


class Plugin:
    """Offers the streaming provider."""

    API = (1, 0)
    name = "streaming"

    def register(self, registrar: Registrar) -> None:
        """Offer it; heavy imports wait for the factory."""
        registrar.streaming("streaming", _make)
        registrar.check_section(_check)


def _make(section: Section, _services: Services) -> StreamingProvider:
    from dispatcher_streaming.provider import Streaming

    return Streaming(StreamingConfig.model_validate(dict(section)))


def _check(section: Section) -> None:
    StreamingConfig.model_validate(dict(section))


plugin = Plugin()
