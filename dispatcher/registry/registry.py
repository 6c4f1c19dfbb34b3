"""What is loaded and active: runtimes by name, one provider of each other kind, their health, and what went wrong.

Life: `Registry.load` imports and constructs (nothing starts), `start` begins images, network and runtimes and keeps an
eye on them, `aclose` ends all in reverse. What fails to start is tried again with each probe, and says so meanwhile.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypedDict, TypeVar, cast

from dispatcher.api import (
    CanAttach,
    CanConnect,
    CanDetailedStats,
    CanExec,
    CanPodStats,
    CanPrepare,
    CanReportFootprint,
    CanStats,
    CanTrimOutput,
    CanUpdatePod,
    CanUpdateResources,
    ImageProvider,
    NetworkProvider,
    Runtime,
    RuntimeHealth,
    Services,
    Sizer,
    StreamingProvider,
    StreamTarget,
    effect,
)
from dispatcher.api.providers import Observe
from dispatcher.config import Config, LoadedConfig
from dispatcher.errors import DispatcherError, NoRuntime, NotSupported
from dispatcher.model import ImageId, Isolation, PodSpec, Vote
from dispatcher.registry.absent import AbsentImages, AbsentNetwork, AbsentStreaming
from dispatcher.registry.guard import Guard, OnCall, guard_object, missing_methods
from dispatcher.registry.hooks import HookRefusedError, RoutingVotes
from dispatcher.registry.loading import KINDS, Factory, LoadedPlugin, error_words, load_plugin
from dispatcher.yaml_marks import Problem, did_you_mean

_log = logging.getLogger(__name__)

A = TypeVar("A")
Condition = tuple[str, bool, str, str]  # type, status, reason, message
Leases = tuple[tuple[str, ImageId], ...]

_ABILITIES: Mapping[type, str] = {
    CanExec: "run commands in its containers",
    CanAttach: "attach to its containers",
    CanConnect: "forward ports",
    CanUpdateResources: "change the limits of a running container",
    CanUpdatePod: "follow a resize of a pod",
    CanStats: "measure its containers",
    CanDetailedStats: "measure its containers in every detail",
    CanPodStats: "measure its pods by itself",
    CanPrepare: "prepare pods",
    CanTrimOutput: "free buffered output",
    CanReportFootprint: "report its disk use",
}


_NOUNS = {
    "images": "an image provider",
    "network": "a network provider",
    "sizer": "a sizer",
    "streaming": "a streaming provider",
}


class PluginReport(TypedDict):
    """One line of `dispatcher plugins`. `state` is "active", "idle" (nothing of it is chosen) or "failed"."""

    name: str
    version: str
    distribution: str
    api: str
    state: str
    offers: dict[str, list[str]]
    active: list[str]
    abilities: dict[str, list[str]]
    hooks: bool
    error: str
    message: str


@dataclass(slots=True)
class _Entry:
    """One active object: guarded, with the plugin that brought it."""

    plugin: str
    guarded: Any
    guard: Guard
    begin: Callable[[], Awaitable[None]] | None = None
    started: bool = False
    refused: bool = False  # must not start at all, for the reason in `guard.blocked`
    health: RuntimeHealth = field(default_factory=lambda: RuntimeHealth(ready=False, reason="NotProbed"))
    down_since: float | None = None


@effect("registry.make_folder")
def _make_folder(path: Path) -> Path:
    path.mkdir(mode=0o700, parents=True, exist_ok=True)
    return path


class Registry:
    """See the module. Reads are answered from memory, on the loop."""

    def __init__(self, config: Config, *, on_call: OnCall) -> None:
        self._config = config
        self._on_call = on_call
        self._plugins: dict[str, LoadedPlugin] = {}
        self._runtimes: dict[str, _Entry] = {}
        self._providers: dict[str, _Entry] = {}
        self._notices: dict[str, tuple[str, str]] = {}
        self._watchers: list[asyncio.Task[None]] = []
        self._absent: dict[str, Any] = {}
        self._began = time.monotonic()
        self._votes = RoutingVotes(
            time_limit_s=config.hooks.time_limit_s,
            failures_before_disabled=config.hooks.failures_before_disabled,
            on_call=lambda plugin, seconds, error: on_call("hook", plugin, "route_pod", seconds, error),
        )

    # --------------------------------------------------------------------------------------------------------- loading
    @classmethod
    def load(
        cls,
        config: Config,
        *,
        node_uuid: str,
        now_ns: Callable[[], int] = time.time_ns,
        on_call: OnCall = lambda _kind, _provider, _method, _seconds, _error: None,
        observe: Observe = lambda _what, _value, _labels: None,
    ) -> Registry:
        """Load what `plugins.enabled` lists and construct what is active. Starts nothing, raises for no plugin.

        `on_call(kind, provider, method, seconds, error)` hears of each call into a plugin, `observe` of measurements
        that plugins make themselves.
        """
        registry = cls(config, on_call=on_call)
        for name in config.plugins.enabled:
            registry._plugins[name] = load_plugin(name)
        registry._refuse_duplicates()

        def services(plugin: str) -> Services:
            images = registry._providers.get("images")
            sizer = registry._providers.get("sizer")
            return Services(
                state_dir=_make_folder(config.state_dir / "plugins" / plugin),
                run_dir=_make_folder(config.run_dir / "plugins" / plugin),
                node_uuid=node_uuid,
                now_ns=now_ns,
                images=images.guarded if images else registry._absent.get("images"),
                sizer=sizer.guarded if sizer else None,
                notify=lambda reason, message: registry._note(plugin, reason, message),
                observe=observe,
            )

        # Images and sizer first: the others are given them.
        for kind in ("images", "sizer", "network", "streaming"):
            registry._choose(kind, services)
        for plugin, name, factory in registry._offers("runtime"):
            entry = registry._construct("runtime", plugin, name, factory, services)
            if entry is not None:
                registry._runtimes[name] = entry
        for plugin in registry._plugins.values():
            for hooks in plugin.hooks:
                try:
                    registry._votes.add(plugin.name, hooks)
                except HookRefusedError as error:
                    plugin.fail("register", f"its routing hooks are refused: {error}")
        return registry

    def _offers(self, kind: str) -> list[tuple[LoadedPlugin, str, Factory]]:
        return [
            (plugin, name, factory)
            for plugin in self._plugins.values()
            for offered, name, factory in plugin.offers
            if offered == kind
        ]

    def _refuse_duplicates(self) -> None:
        """Two plugins that offer the same name are ambiguous: neither offer stands, or pods would change hands."""
        for kind in KINDS:
            owners: dict[str, list[LoadedPlugin]] = {}
            for plugin, name, _ in self._offers(kind):
                owners.setdefault(name, []).append(plugin)
            for name, plugins in owners.items():
                if len(plugins) < 2:
                    continue
                for plugin in plugins:
                    others = ", ".join(other.name for other in plugins if other is not plugin)
                    plugin.fail("register", f'offers {kind} "{name}", and so does {others}; disable one of them')
                    plugin.offers = [offer for offer in plugin.offers if offer[:2] != (kind, name)]

    def _choose(self, kind: str, services: Callable[[str], Services]) -> None:
        wanted: str | None = getattr(self._config.providers, kind)
        offers = self._offers(kind)
        names = [name for _, name, _ in offers]
        only = wanted is None and len(offers) == 1
        chosen = [offer for offer in offers if only or offer[1] == wanted]
        if chosen:
            entry = self._construct(kind, *chosen[0], services)
            if entry is not None:
                self._providers[kind] = entry
                return
            why = f"The plugin {chosen[0][0].name} has {_NOUNS[kind]} that failed: {chosen[0][0].failure}."
        elif wanted is not None:
            why = f"providers.{kind} names {wanted!r}, which no loaded plugin offers.{did_you_mean(wanted, names)}"
        elif names:
            why = f"More than {_NOUNS[kind]} is loaded ({', '.join(names)}): choose one as providers.{kind}."
        else:
            why = f"No loaded plugin offers {_NOUNS[kind]}." + self._failures()
        stand_in = {"images": AbsentImages, "network": AbsentNetwork, "streaming": AbsentStreaming}.get(kind)
        if stand_in is not None:
            self._absent[kind] = stand_in(why)
        if kind in ("images", "network") or wanted is not None:
            _log.error("provider is missing", extra={"kind": kind, "why": why})
            self._notices[f"providers.{kind}"] = ("NoProvider", why)

    def _failures(self) -> str:
        failed = [f"{plugin.name}: {plugin.failure}" for plugin in self._plugins.values() if plugin.failure]
        return f" Failed plugins: {'; '.join(failed)}." if failed else ""

    def _construct(
        self,
        kind: str,
        plugin: LoadedPlugin,
        name: str,
        factory: Factory,
        services: Callable[[str], Services],
    ) -> _Entry | None:
        section = self._config.plugins.section(plugin.name)
        try:
            inner = factory(section, services(plugin.name))
            properties = _properties(kind, name, inner)
        except (Exception, SystemExit) as error:  # noqa: BLE001 - a plugin's failure is its own
            plugin.fail("configure", f'{kind} "{name}": {error_words(error)}')
            return None
        deadlines = getattr(self._config.deadlines, kind, None)
        guard = Guard(
            kind=kind,
            plugin=plugin.name,
            provider=name,
            deadlines=deadlines.model_dump() if deadlines is not None else {},
            on_call=self._on_call,
        )
        return _Entry(plugin.name, guard_object(inner, guard, properties), guard)

    def refuse_newer_facts(self, stamps: Iterable[tuple[str, int]]) -> None:
        """Keep runtimes from starting that would not understand what a newer version of theirs put on record.

        `stamps` are (runtime, facts schema) of the pods on record; call it before `start`. Such pods run on untouched.
        """
        for name, facts_schema in stamps:
            entry = self._runtimes.get(name)
            if entry is not None and facts_schema > entry.guarded.facts_schema and not entry.refused:
                entry.refused = True
                entry.guard.blocked = (
                    f"its pods on record were made by a newer version (facts schema {facts_schema}, and this one reads "
                    f"up to {entry.guarded.facts_schema}): install that version of the plugin {entry.plugin} again."
                )
                _log.error("runtime refused", extra={"runtime": name, "why": entry.guard.blocked})

    # ------------------------------------------------------------------------------------------------ start and end
    async def start(self, leases: Callable[[], Leases]) -> None:
        """Start images (with the leases that records imply), network and runtimes, probe them, and go on probing.

        Never raises for a plugin: what does not start is unavailable, is shown by a condition, and is tried again.
        """
        if (images := self._providers.get("images")) is not None:
            images.begin = lambda: images.guarded.start(leases())
        if (network := self._providers.get("network")) is not None:
            network.begin = network.guarded.start
        for entry in self._runtimes.values():
            entry.begin = entry.guarded.start
        for kind in ("images", "network"):
            if kind in self._providers:
                await self._begin(self._providers[kind])
        await asyncio.gather(*(self._begin_runtime(entry) for entry in self._runtimes.values()))
        self._began = time.monotonic()
        self._watchers = [
            asyncio.create_task(self._watch_runtime(entry), name=f"probe {name}")
            for name, entry in self._runtimes.items()
        ]
        self._watchers.append(asyncio.create_task(self._watch_providers(), name="start providers"))

    async def start_streaming(self, target: StreamTarget) -> None:
        """Start the streaming provider, last: it serves what the others do."""
        if (entry := self._providers.get("streaming")) is not None:
            entry.begin = lambda: entry.guarded.start(target)
            await self._begin(entry)

    async def aclose(self) -> None:
        """Stop probing and close all, streaming first and images last. Pods go on running. Idempotent."""
        for task in self._watchers:
            task.cancel()
        if self._watchers:
            await asyncio.wait(self._watchers)
        self._watchers = []
        await self._end([self._providers.get("streaming")])
        await self._end(self._runtimes.values())
        await self._end([self._providers.get("network")])
        await self._end([self._providers.get("images")])

    async def _end(self, entries: Iterable[_Entry | None]) -> None:
        async def end(entry: _Entry) -> None:
            entry.started = False
            with contextlib.suppress(DispatcherError):  # logged by the guard; there is nobody left to tell
                await entry.guarded.aclose()

        await asyncio.gather(*(end(entry) for entry in entries if entry is not None and entry.started))

    async def _begin(self, entry: _Entry) -> None:
        if entry.started or entry.refused or entry.begin is None:
            return
        try:
            await entry.begin()
        except DispatcherError as error:
            entry.guard.blocked = error.message
            _log.error("provider did not start", extra={"provider": entry.guard.provider, "why": error.message})
        else:
            entry.guard.blocked = ""
            entry.started = True

    async def _begin_runtime(self, entry: _Entry) -> None:
        await self._begin(entry)
        await self._probe(entry)

    async def _watch_runtime(self, entry: _Entry) -> None:
        while True:
            await asyncio.sleep(self._config.health.probe_interval_s)
            await self._begin_runtime(entry)

    async def _watch_providers(self) -> None:
        while True:
            await asyncio.sleep(self._config.health.probe_interval_s)
            for entry in self._providers.values():
                await self._begin(entry)

    async def _probe(self, entry: _Entry) -> None:
        if not entry.started:
            reason = "NewerRecords" if entry.refused else "StartFailed"
            health = RuntimeHealth(ready=False, reason=reason, message=entry.guard.blocked)
        else:
            try:
                health = await entry.guarded.probe()
            except DispatcherError as error:  # the deadline passed, or it raised, which it must not
                health = RuntimeHealth(ready=False, reason="ProbeFailed", message=error.message)
        if health.ready != entry.health.ready or health.reason != entry.health.reason:
            _log.log(
                logging.INFO if health.ready else logging.WARNING,
                "runtime is ready" if health.ready else "runtime is not ready",
                extra={"runtime": entry.guard.provider, "reason": health.reason, "detail": health.message},
            )
        entry.health = health
        if health.ready:
            entry.down_since = None
        elif entry.down_since is None:
            entry.down_since = time.monotonic()

    async def probe_now(self, name: str) -> RuntimeHealth:
        """Probe a runtime outside its turn and return what it said. Raises NoRuntime."""
        entry = self._entry(name)
        await self._begin_runtime(entry)
        return entry.health

    # --------------------------------------------------------------------------------------------------------- runtimes
    def _entry(self, name: str) -> _Entry:
        entry = self._runtimes.get(name)
        if entry is None:
            why = next(
                (
                    f" Its plugin {plugin.name} failed: {plugin.failure}."
                    for plugin in self._plugins.values()
                    if plugin.failure and name in (plugin.name, *(offer[1] for offer in plugin.offers))
                ),
                "",
            )
            raise NoRuntime(f'The runtime "{name}" is not loaded.{why}', runtime=name)
        return entry

    def runtime(self, name: str) -> Runtime:
        """Return a runtime, guarded. Raises NoRuntime where no loaded plugin has one of this name."""
        return cast("Runtime", self._entry(name).guarded)

    def runtimes(self) -> tuple[Runtime, ...]:
        """Return all runtimes that were loaded, whether they are ready or not."""
        return tuple(entry.guarded for entry in self._runtimes.values())

    def ability(self, name: str, ability: Callable[..., A]) -> A:
        """Return a runtime as something that has an ability, such as `CanExec`.

        Raises:
            NoRuntime: no such runtime.
            NotSupported: it lacks this ability.
        """
        runtime = self._entry(name).guarded
        if not isinstance(runtime, cast("type", ability)):
            what = _ABILITIES.get(cast("type", ability), cast("type", ability).__name__)
            raise NotSupported(f'The runtime "{name}" cannot {what}.', runtime=name)
        return cast("A", runtime)

    def find_ability(self, name: str, ability: Callable[..., A]) -> A | None:
        """Return a runtime as something that has an ability, or None where it lacks it. Raises NoRuntime."""
        runtime = self._entry(name).guarded
        return cast("A", runtime) if isinstance(runtime, cast("type", ability)) else None

    def health(self, name: str) -> RuntimeHealth:
        """Return what a runtime's last probe said. Raises NoRuntime."""
        return self._entry(name).health

    def all_health(self) -> dict[str, RuntimeHealth]:
        """Return what the last probe of each loaded runtime said."""
        return {name: entry.health for name, entry in self._runtimes.items()}

    def overdue(self, required: Iterable[str]) -> tuple[str, ...]:
        """Return those of these runtimes that have been down, or missing, for longer than `health.required_grace_s`."""
        limit = time.monotonic() - self._config.health.required_grace_s
        late = []
        for name in required:
            entry = self._runtimes.get(name)
            since = self._began if entry is None else entry.down_since
            if since is not None and since <= limit:
                late.append(name)
        return tuple(late)

    # --------------------------------------------------------------------------------------------------------- providers
    @property
    def images(self) -> ImageProvider:
        """The active image provider, or a stand-in that refuses with the reason."""
        return cast("ImageProvider", self._provider("images"))

    @property
    def network(self) -> NetworkProvider:
        """The active network provider, or a stand-in that refuses with the reason."""
        return cast("NetworkProvider", self._provider("network"))

    @property
    def streaming(self) -> StreamingProvider:
        """The active streaming provider, or a stand-in that refuses with the reason."""
        return cast("StreamingProvider", self._provider("streaming"))

    @property
    def sizer(self) -> Sizer | None:
        """The active sizer, or None."""
        entry = self._providers.get("sizer")
        return cast("Sizer", entry.guarded) if entry else None

    def _provider(self, kind: str) -> Any:
        entry = self._providers.get(kind)
        return entry.guarded if entry is not None else self._absent[kind]

    def vote(self, pod: PodSpec) -> tuple[Vote, ...]:
        """Ask the routing hooks of all plugins, in the order of their names. `counted` is False in all of them.

        Blocks while a hook thinks: for commands. The daemon uses `ask_hooks`.
        """
        return self._votes.vote(pod)

    async def ask_hooks(self, pod: PodSpec) -> tuple[Vote, ...]:
        """Do the same without holding the event loop."""
        return await self._votes.ask(pod)

    # --------------------------------------------------------------------------------------------------------- reports
    def _note(self, plugin: str, reason: str, message: str) -> None:
        """Take a plugin's word for operators: one at a time per plugin; an empty message takes it back."""
        if message:
            self._notices[plugin] = (reason, message)
        else:
            self._notices.pop(plugin, None)

    def extra_conditions(self) -> tuple[Condition, ...]:
        """Return what is wrong beside the health of runtimes, as (type, status, reason, message) for the node."""
        found: list[Condition] = [
            (f"Plugin/{plugin.name}", False, f"{plugin.stage.capitalize()}Failed", plugin.failure)
            for plugin in self._plugins.values()
            if plugin.failure
        ]
        found += [
            (f"Provider/{kind}", False, "StartFailed", entry.guard.blocked)
            for kind, entry in self._providers.items()
            if entry.guard.blocked
        ]
        found += [(f"Hooks/{plugin}", False, "Disabled", why) for plugin, why in self._votes.disabled().items()]
        found += [
            (f"Notice/{source}", False, reason or "Notice", message)
            for source, (reason, message) in sorted(self._notices.items())
        ]
        return tuple(found)

    def failures(self) -> tuple[tuple[str, str], ...]:
        """Return (plugin, stage) of each plugin that failed, for metrics."""
        return tuple((plugin.name, plugin.stage) for plugin in self._plugins.values() if plugin.failure)

    def report(self) -> list[PluginReport]:
        """Return what is known of each enabled plugin, for `dispatcher plugins`."""
        reports: list[PluginReport] = []
        disabled = self._votes.disabled()
        for plugin in self._plugins.values():
            offers: dict[str, list[str]] = {}
            for kind, name, _ in plugin.offers:
                offers.setdefault(kind, []).append(name)
            active = [
                f"{entry.guard.kind} {entry.guard.provider}"
                for entry in (*self._runtimes.values(), *self._providers.values())
                if entry.plugin == plugin.name
            ]
            has_hooks = plugin.name in self._votes.names()
            blocked = [
                entry.guard.blocked
                for entry in (*self._runtimes.values(), *self._providers.values())
                if entry.plugin == plugin.name and entry.guard.blocked
            ]
            message = "; ".join(
                [
                    *blocked,
                    *([f"routing hooks disabled: {disabled[plugin.name]}"] if plugin.name in disabled else []),
                    *([self._notices[plugin.name][1]] if plugin.name in self._notices else []),
                ]
            )
            reports.append(
                PluginReport(
                    name=plugin.name,
                    version=plugin.version,
                    distribution=plugin.distribution,
                    api=".".join(map(str, plugin.api)) if plugin.api else "",
                    state="failed" if plugin.failure else "active" if active or has_hooks else "idle",
                    offers=offers,
                    active=active,
                    abilities={
                        name: [kind.__name__ for kind in _ABILITIES if isinstance(entry.guarded, kind)]
                        for name, entry in self._runtimes.items()
                        if entry.plugin == plugin.name
                    },
                    hooks=has_hooks,
                    error=plugin.failure,
                    message=message,
                )
            )
        return reports


def check_sections(loaded: LoadedConfig) -> list[Problem]:
    """Have each enabled plugin check its section, for `dispatcher config check`. Imports them; starts nothing.

    Returns every problem, with the position in the file of the key that it is about, or of the section.
    """
    problems = []
    for name in loaded.config.plugins.enabled:
        plugin = load_plugin(name)
        if plugin.failure:
            problems.append(loaded.document.problem(("plugins", "enabled"), f"{name}: {plugin.failure}"))
            continue
        for check in plugin.checks:
            problems += _check_section(name, check, loaded)
    return problems


def _check_section(name: str, check: Callable[[Mapping[str, Any]], None], loaded: LoadedConfig) -> list[Problem]:
    path = ("plugins", name)
    try:
        check(loaded.config.plugins.section(name))
    except ValueError as error:
        findings = getattr(error, "errors", None)
        if not callable(findings):
            return [loaded.document.problem(path, str(error))]
        problems = []
        for finding in findings(include_url=False):  # pydantic's ValidationError
            where = _known_path(loaded, (*path, *finding["loc"]))
            text = finding["msg"].removeprefix("Value error, ")
            if finding["type"] == "extra_forbidden":
                text = "unknown key."
            problems.append(loaded.document.problem(where, text, key=finding["type"] == "extra_forbidden"))
        return problems
    except Exception as error:  # noqa: BLE001 - a plugin's failure is its own
        return [loaded.document.problem(path, f"the plugin's own check failed: {error_words(error)}")]
    return []


def _known_path(loaded: LoadedConfig, path: Sequence[str | int]) -> tuple[str | int, ...]:
    """Return the part of a path that the file really has; the rest names branches of a schema, or a missing key."""
    known: tuple[str | int, ...] = ()
    for part in path:
        if (*known, part) in loaded.document.marks:
            known = (*known, part)
    return known


def _properties(kind: str, name: str, inner: Any) -> dict[str, object]:
    """Read the fixed properties of an object once, and refuse nonsense.

    Raises:
        TypeError: a property or method is missing or of the wrong kind.
    """
    missing = missing_methods(kind, inner)
    if missing:
        raise TypeError(f"lacks {', '.join(missing)}")
    if inner.name != name:
        raise TypeError(f"calls itself {inner.name!r}")
    properties: dict[str, object] = {"name": name}
    if kind == "runtime":
        wanted: dict[str, type] = {
            "isolation": Isolation,
            "version": str,
            "facts_schema": int,
            "option_keys": frozenset,
        }
        for key, expected in wanted.items():
            value = getattr(inner, key)
            if not isinstance(value, expected):
                raise TypeError(f"{key} is {type(value).__name__} instead of {expected.__name__}")
            properties[key] = value
    return properties
