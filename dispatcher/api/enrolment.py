"""How a plugin enrols: the object behind its entry point, the registrar that it talks to, and the routing hook.

A distribution declares an entry point in the group `dispatcher.plugins`; its value is an object with

    API = (1, 0)                          # the range of this interface that it was written for
    name = "docker_shim"                  # equals the entry point's name and its section in dispatcher.yaml
    def register(registrar): ...          # offers factories; must not do any work

Nothing is imported that `plugins.enabled` does not list. A plugin that raises while loading is reported by
`dispatcher plugins` and in the node's conditions; the others go on.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol

import pluggy

from dispatcher.api.providers import ImageProvider, NetworkProvider, Services, Sizer, StreamingProvider
from dispatcher.api.runtimes import Runtime
from dispatcher.model import PodSpec

API_VERSION = (1, 0)
ENTRY_POINT_GROUP = "dispatcher.plugins"

Section = Mapping[str, Any]  # the plugin's part of dispatcher.yaml, already parsed; its schema is the plugin's own


class Registrar(Protocol):
    """What `register` is given. Each offer is a name and a factory `(section, services)`.

    A factory validates its section and raises `ValueError` (pydantic's ValidationError is one) for a bad one; it must
    not start anything: work begins in the object's `start`.
    """

    def runtime(self, name: str, factory: Callable[[Section, Services], Runtime]) -> None:
        """Offer a runtime. Any number may be active."""

    def network(self, name: str, factory: Callable[[Section, Services], NetworkProvider]) -> None:
        """Offer a network provider; `providers.network` chooses one."""

    def images(self, name: str, factory: Callable[[Section, Services], ImageProvider]) -> None:
        """Offer an image provider; `providers.images` chooses one."""

    def sizer(self, name: str, factory: Callable[[Section, Services], Sizer]) -> None:
        """Offer a sizer; `providers.sizer` chooses one."""

    def streaming(self, name: str, factory: Callable[[Section, Services], StreamingProvider]) -> None:
        """Offer a streaming provider; `providers.streaming` chooses one."""

    def route_hook(self, hooks: object) -> None:
        """Offer an object with `hookimpl` methods of `RoutingHooks`."""

    def check_section(self, check: Callable[[Section], None]) -> None:
        """Offer the schema check of the plugin's section, for `dispatcher config check`."""


class Plugin(Protocol):
    """The object behind an entry point."""

    API: tuple[int, int]
    name: str

    def register(self, registrar: Registrar) -> None:
        """Offer factories. Called once per daemon."""


hookspec = pluggy.HookspecMarker("dispatcher")
hookimpl = pluggy.HookimplMarker("dispatcher")


class RoutingHooks:
    """Hooks that take part in a decision. Synchronous, no I/O: a hook has a time limit and is disabled after repeated
    failures. `versionadded: 1.0`.
    """

    @hookspec
    def route_pod(self, pod: PodSpec) -> tuple[str, str] | None:
        """Vote on the runtime of a pod, before the file's ordered rules are read.

        Return (runtime, reason), or None to abstain. Hooks are asked in order of their plugin's name; all votes are
        recorded, and the first one that the file's `hooks.may_override` allows wins over the rules. It never lowers
        isolation below a floor. A hook may accept no argument, or `pod`.

        Example:
            @hookimpl
            def route_pod(pod):
                return ("hyper_vm", "tenant label") if pod.labels.get("tenant") else None
        """
