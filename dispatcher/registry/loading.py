"""Finding plugins and letting them enrol. Each one is loaded alone: what fails is reported, and the others go on."""

from __future__ import annotations

import importlib.metadata
import inspect
import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from stevedore import NamedExtensionManager

from dispatcher.api import API_VERSION, ENTRY_POINT_GROUP, Section

_log = logging.getLogger(__name__)

KINDS = ("runtime", "network", "images", "sizer", "streaming")
Factory = Callable[..., Any]


@dataclass(slots=True, kw_only=True)
class LoadedPlugin:
    """What became of one enabled plugin. `failure` is "" while nothing went wrong; `stage` says where it did."""

    name: str
    distribution: str = ""
    version: str = ""
    api: tuple[int, int] | None = None
    offers: list[tuple[str, str, Factory]] = field(default_factory=list)  # (kind, name, factory)
    hooks: list[object] = field(default_factory=list)
    checks: list[Callable[[Section], None]] = field(default_factory=list)
    failure: str = ""
    stage: str = ""

    def fail(self, stage: str, failure: str) -> None:
        """Note a failure: `stage` is "find", "load", "register", "configure" or "start"."""
        if not self.failure:
            self.stage, self.failure = stage, failure
        _log.error("plugin failed", extra={"plugin": self.name, "stage": stage, "why": failure})


class _Collector:
    """The registrar that a plugin talks to. Collects; nothing is called here."""

    def __init__(self, plugin: LoadedPlugin) -> None:
        self._plugin = plugin

    def _offer(self, kind: str, name: str, factory: Factory) -> None:
        given: object = name  # a plugin may hand in anything
        if not isinstance(given, str) or not given or not callable(factory):
            raise TypeError(f"an offer of kind {kind} needs a name and a factory")
        if any((known, taken) == (kind, name) for known, taken, _ in self._plugin.offers):
            raise ValueError(f'offers {kind} "{name}" twice')
        self._plugin.offers.append((kind, name, factory))

    def runtime(self, name: str, factory: Factory) -> None:
        self._offer("runtime", name, factory)

    def network(self, name: str, factory: Factory) -> None:
        self._offer("network", name, factory)

    def images(self, name: str, factory: Factory) -> None:
        self._offer("images", name, factory)

    def sizer(self, name: str, factory: Factory) -> None:
        self._offer("sizer", name, factory)

    def streaming(self, name: str, factory: Factory) -> None:
        self._offer("streaming", name, factory)

    def route_hook(self, hooks: object) -> None:
        self._plugin.hooks.append(hooks)

    def check_section(self, check: Callable[[Section], None]) -> None:
        if not callable(check):
            raise TypeError("check_section takes a function")
        self._plugin.checks.append(check)


class _Finder(NamedExtensionManager[Any]):
    """Stevedore without its cache of entry points: that one lies below HOME and may be older than what is installed."""

    ENTRY_POINT_CACHE: dict[str, Any] = {}  # noqa: RUF012 - stevedore's, shadowed so that nothing is shared

    def list_entry_points(self) -> list[importlib.metadata.EntryPoint]:
        """Return the entry points of our group as they are installed now."""
        return list(importlib.metadata.entry_points(group=self.namespace))


def load_plugin(name: str) -> LoadedPlugin:
    """Find, import and enrol one plugin. Never raises for what the plugin does; see `failure`."""
    plugin = LoadedPlugin(name=name)
    found = list(importlib.metadata.entry_points(group=ENTRY_POINT_GROUP, name=name))
    if not found:
        plugin.fail("find", "no installed distribution has a plugin of this name")
        return plugin
    distribution = found[0].dist
    if distribution is not None:
        plugin.distribution, plugin.version = distribution.name, distribution.version
    if len({entry.value for entry in found}) > 1 or len(found) > 1:
        owners = sorted({entry.dist.name if entry.dist is not None else "?" for entry in found})
        plugin.fail("find", f"several distributions have a plugin of this name: {', '.join(owners)}; uninstall one")
        return plugin
    loaded = _import(plugin)
    if loaded is not None and _is_fit(plugin, loaded):
        _enrol(plugin, loaded)
    return plugin


def _import(plugin: LoadedPlugin) -> Any:
    failures: list[BaseException] = []
    try:
        finder = _Finder(
            ENTRY_POINT_GROUP,
            names=[plugin.name],
            on_load_failure_callback=lambda _manager, _entry, error: failures.append(error),
            on_missing_entrypoints_callback=None,
        )
    except (Exception, SystemExit) as error:  # noqa: BLE001 - an AssertionError, or an exit() at import
        plugin.fail("load", _words(error))
        return None
    if failures:
        plugin.fail("load", _words(failures[0]))
        return None
    return finder.extensions[0].plugin


def _is_fit(plugin: LoadedPlugin, loaded: Any) -> bool:
    match getattr(loaded, "API", None):
        case (int() as major, int() as minor):
            plugin.api = (major, minor)
        case _:
            plugin.fail("load", "the object behind the entry point has no API = (major, minor)")
            return False
    if (major, minor) > API_VERSION or major != API_VERSION[0]:
        ours = ".".join(map(str, API_VERSION))
        plugin.fail("load", f"was written for interface {major}.{minor}, and this is {ours}")
        return False
    if getattr(loaded, "name", None) != plugin.name:
        plugin.fail("load", f"calls itself {getattr(loaded, 'name', None)!r} and its entry point {plugin.name!r}")
        return False
    return True


def _enrol(plugin: LoadedPlugin, loaded: Any) -> None:
    try:
        result = loaded.register(_Collector(plugin))
        if inspect.iscoroutine(result):
            result.close()
            raise TypeError("register must not be async")  # noqa: TRY301 - reported like any other failure
    except (Exception, SystemExit) as error:  # noqa: BLE001 - a plugin's failure is its own
        plugin.offers.clear()
        plugin.hooks.clear()
        plugin.fail("register", _words(error))


def _words(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__


def error_words(error: BaseException) -> str:
    """Return an error in one line, for a report."""
    return " ".join(_words(error).split())[:1000]
