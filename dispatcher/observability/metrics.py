"""Prometheus metrics of the daemon: what is counted, under which names, and how many series that can become.

Invariant: the number of series is bounded whatever pods, plugins and clients send. A label comes from a closed set
(RPC names, status codes, our error classes), or it passes a `_Bound`, which knows at most so many values and calls the
rest "other". Pod names, namespaces, images and addresses are never labels.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Mapping
from typing import Final

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    Info,
    PlatformCollector,
    ProcessCollector,
    generate_latest,
)
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

from dispatcher.errors import DispatcherError

CONTENT_TYPE: Final = "text/plain; version=0.0.4; charset=utf-8"

_FAST: Final = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 120.0)
_SLOW: Final = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0, 900.0)
_LAG: Final = (0.001, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 5.0)

_FAULTS: Final = frozenset({"Internal", "bug"})  # what a plugin must never raise

RecordCounts = Mapping[tuple[str, str], int]  # (kind, state) -> how many, such as ("pod", "ready"): 12
ReadyStates = Mapping[tuple[str, str], bool]  # (kind, provider), such as ("runtime", "docker"): True


def outcome_of(error: BaseException | None) -> str:
    """Return the label for how a call ended: "ok", the class of one of our errors, or what kind of end it was."""
    if error is None:
        return "ok"
    if isinstance(error, DispatcherError):  # a plugin's own class counts as the class of ours that it stands for
        return next(kind.__name__ for kind in type(error).__mro__ if kind.__module__ == DispatcherError.__module__)
    if isinstance(error, asyncio.CancelledError):
        return "cancelled"
    return "timeout" if isinstance(error, TimeoutError) else "bug"


class _Bound:
    """Lets at most `limit` different values through; later ones become "other"."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._known: dict[str, str] = {}

    def __call__(self, value: str) -> str:
        known = self._known.get(value)
        if known is not None:
            return known
        if len(self._known) >= self._limit:
            return "other"
        shown = "".join(char if char.isprintable() else "_" for char in value[:64]) or "none"
        self._known[value] = shown
        return shown


class _AtScrape(Collector):
    """Reads what is known in memory at the moment of the scrape, so that nothing can drift."""

    def __init__(self, name: Callable[[str], str]) -> None:
        self._name = name
        self.records: Callable[[], RecordCounts] = dict
        self.ready: Callable[[], ReadyStates] = dict
        self.in_flight: dict[str, int] = {}

    def collect(self) -> Iterable[GaugeMetricFamily]:
        records = GaugeMetricFamily("dispatcher_records", "Records by kind and state.", labels=("kind", "state"))
        for labels, count in sorted(self.records().items()):
            records.add_metric(labels, count)
        yield records
        ready = GaugeMetricFamily(
            "dispatcher_provider_ready", "1 when a runtime or the network can work.", labels=("kind", "provider")
        )
        for (kind, provider), holds in sorted(self.ready().items()):
            ready.add_metric((kind, self._name(provider)), float(holds))
        yield ready
        in_flight = GaugeMetricFamily("dispatcher_rpc_in_flight", "RPCs not answered yet.", labels=("rpc",))
        for rpc, count in sorted(self.in_flight.items()):
            in_flight.add_metric((rpc,), count)
        yield in_flight


class Metrics:
    """All metrics of one daemon, in a registry of their own. Every method is cheap, never raises for odd labels."""

    def __init__(self, version: str) -> None:
        self.registry = CollectorRegistry(auto_describe=False)
        ProcessCollector(registry=self.registry)
        PlatformCollector(registry=self.registry)
        self._rules, self._names, self._cni_names = _Bound(200), _Bound(64), _Bound(64)
        self._at_scrape = _AtScrape(self._names)
        self.registry.register(self._at_scrape)
        self._in_flight = self._at_scrape.in_flight
        Info("dispatcher", "The running version.", registry=self.registry).info({"version": version})

        self._rpc_seconds = self._histogram("rpc_duration_seconds", "Time to answer an RPC.", ("rpc",), _FAST)
        self._rpc_total = self._counter("rpc", "RPCs answered.", ("rpc", "code"))
        call = ("kind", "provider", "method")
        self._call_seconds = self._histogram(
            "provider_call_duration_seconds", "Time of one call into a runtime or provider.", call, _FAST
        )
        self._call_total = self._counter("provider_calls", "Calls into runtimes and providers.", (*call, "outcome"))
        self._decisions = self._counter(
            "route_decisions", "Routing decisions.", ("rule", "runtime", "phase", "outcome")
        )
        self._plugin_failures = self._counter("plugin_failures", "Failures of plugins.", ("plugin", "stage"))
        cni = ("plugin", "command")
        self._cni_seconds = self._histogram("cni_step_duration_seconds", "Time of one CNI plugin.", cni, _SLOW)
        self._cni_total = self._counter("cni_steps", "CNI plugins run.", (*cni, "outcome"))
        self._pull_seconds = self._histogram("image_pull_duration_seconds", "Time of one image pull.", (), _SLOW)
        self._pulls = self._counter("image_pulls", "Image pulls that ended.", ("outcome",))
        self._pull_bytes = self._counter("image_pull_bytes", "Sizes of the images pulled, fetched or here already.", ())
        self._lag = self._histogram("loop_lag_seconds", "How late the event loop woke up.", (), _LAG)
        self._lag_alarms = self._counter("loop_lag_alarms", "Times at which the loop was late beyond the alarm.", ())
        self._reloads = self._counter("policy_reloads", "Attempts to load the policy file.", ("result",))
        self._generation = self._gauge("policy_generation", "Rises with every policy that took effect.", ())
        self._policy_ok = self._gauge("policy_in_sync", "1 when the file on disk is the policy in effect.", ())
        self._recovery_seconds = self._gauge("recovery_seconds", "Time that the last recovery took.", ())
        self._recovery = self._gauge("recovery_records", "What the last recovery did.", ("kind", "outcome"))
        self._commit_seconds = self._histogram("commit_duration_seconds", "Time until records are on disk.", (), _FAST)
        self._commit_operations = self._counter("commit_operations", "Changes of records that were committed.", ())
        # Bound children by label, because looking them up by label costs more than the observation itself.
        self._rpc_children: dict[str, tuple[Histogram, dict[str, Counter]]] = {}

    def _histogram(self, name: str, text: str, labels: tuple[str, ...], buckets: tuple[float, ...]) -> Histogram:
        return Histogram(f"dispatcher_{name}", text, labels, buckets=buckets, registry=self.registry)

    def _counter(self, name: str, text: str, labels: tuple[str, ...]) -> Counter:
        return Counter(f"dispatcher_{name}", text, labels, registry=self.registry)

    def _gauge(self, name: str, text: str, labels: tuple[str, ...]) -> Gauge:
        return Gauge(f"dispatcher_{name}", text, labels, registry=self.registry)

    def rpc_began(self, rpc: str) -> None:
        """Note that an RPC arrived; `rpc_finished` follows."""
        self._in_flight[rpc] = self._in_flight.get(rpc, 0) + 1

    def rpc_finished(self, rpc: str, code: str, seconds: float) -> None:
        """Note that an RPC was answered: a method name of the contract, a status code's name such as "OK"."""
        self._in_flight[rpc] = max(0, self._in_flight.get(rpc, 0) - 1)
        children = self._rpc_children.get(rpc)
        if children is None:
            children = self._rpc_children[rpc] = (self._rpc_seconds.labels(rpc), {})
        duration, by_code = children
        duration.observe(seconds)
        counter = by_code.get(code)
        if counter is None:
            counter = by_code[code] = self._rpc_total.labels(rpc, code)
        counter.inc()

    def provider_called(
        self, kind: str, provider: str, method: str, seconds: float, error: BaseException | None = None
    ) -> None:
        """Note one call into a runtime or provider.

        Args:
            kind: "runtime", "network", "images", "sizer", "streaming" or "hook".
            provider: its name, such as "docker".
            method: the protocol's method, such as "create_pod".
            seconds: how long it took.
            error: what it raised, or None.
        """
        labels, outcome = (kind, self._names(provider), method), outcome_of(error)
        self._call_seconds.labels(*labels).observe(seconds)
        self._call_total.labels(*labels, outcome).inc()
        if kind == "images" and method == "pull":
            self._pull_seconds.observe(seconds)
            self._pulls.labels(outcome).inc()
        if outcome in _FAULTS:
            self.plugin_failed(provider, "call")

    def route_decided(self, *, rule: str, runtime: str, phase: str = "pod", outcome: str = "routed") -> None:
        """Note a decision: `phase` is "pod" or "container", `outcome` is "routed" or "refused"."""
        self._decisions.labels(self._rules(rule), self._names(runtime), phase, outcome).inc()

    def plugin_failed(self, plugin: str, stage: str) -> None:
        """Note a failure: `stage` is "find", "load", "register", "configure", "start" or "call"."""
        self._plugin_failures.labels(self._names(plugin), stage).inc()

    def policy_reloaded(self, *, ok: bool, generation: int) -> None:
        """Note an attempt to load the policy file, and the generation in effect after it."""
        self._reloads.labels("ok" if ok else "refused").inc()
        self._generation.set(generation)
        self._policy_ok.set(1 if ok else 0)

    def loop_lagged(self, seconds: float, *, alarm: bool) -> None:
        """Note how late the event loop was."""
        self._lag.observe(seconds)
        if alarm:
            self._lag_alarms.inc()

    def recovered(self, seconds: float, counts: Mapping[tuple[str, str], int]) -> None:
        """Note the recovery at start-up: its time, and how many records of a kind met which outcome."""
        self._recovery_seconds.set(seconds)
        for (kind, outcome), count in counts.items():
            self._recovery.labels(kind, outcome).set(count)

    def count_records_by(self, read: Callable[[], RecordCounts]) -> None:
        """Say where the counts of records come from; called at each scrape, so it must answer from memory."""
        self._at_scrape.records = read

    def read_readiness_by(self, read: Callable[[], ReadyStates]) -> None:
        """Say where the readiness of runtimes and of the network comes from; called at each scrape, from memory."""
        self._at_scrape.ready = read

    def committed(self, seconds: float, operations: int) -> None:
        """Note that a batch of changes is on disk."""
        self._commit_seconds.observe(seconds)
        self._commit_operations.inc(operations)

    def observe(self, what: str, value: float, labels: Mapping[str, str]) -> None:
        """Take a measurement from a plugin (`Services.observe`). Names that are not known here are ignored.

        Known: "cni.step" (seconds; plugin, command, outcome), "image.bytes" (bytes of a pulled image).
        """
        outcome = labels.get("outcome", "ok")
        if what == "cni.step":
            key = (self._cni_names(labels.get("plugin", "")), labels.get("command", "")[:8])
            self._cni_seconds.labels(*key).observe(value)
            self._cni_total.labels(*key, "ok" if outcome == "ok" else "failed").inc()
        elif what == "image.bytes" and value > 0:
            self._pull_bytes.inc(value)

    def render(self) -> bytes:
        """Return the exposition in Prometheus' text format."""
        return generate_latest(self.registry)
