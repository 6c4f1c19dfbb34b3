"""The composition root: the only code that knows concrete classes, and the order in which they begin and end.

Order of a start: lock the run folder, records, plugins, policy, images, network, runtimes, recovery, watchers, streaming,
metrics, and the socket last: a client that can connect is served at once. The end is the reverse; pods go on running.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import logging
import os
import signal
import time
import uuid
from collections.abc import AsyncIterator, Awaitable
from dataclasses import asdict
from pathlib import Path

from dispatcher.calls import Calls
from dispatcher.cgroup_driver import choose_cgroup_driver
from dispatcher.config import Config, LoadedConfig
from dispatcher.cri.convert import as_json
from dispatcher.cri.handlers.streams import make_target
from dispatcher.cri.service import CriServer
from dispatcher.deps import Deps
from dispatcher.disclosure import disclose, known_secrets
from dispatcher.effects import effect
from dispatcher.errors import DispatcherError
from dispatcher.facts import FactKeeper
from dispatcher.locks import Locks
from dispatcher.logs.pumps import LogPumps
from dispatcher.model import ImageId
from dispatcher.observability.health import Health, HealthServer
from dispatcher.observability.logformat import recent_lines
from dispatcher.observability.loop_lag import LoopProbe
from dispatcher.observability.metrics import Metrics
from dispatcher.observability.otel import ExporterMissing, OtlpExporter
from dispatcher.observability.systemd import Notifier
from dispatcher.observability.traces import TraceLog
from dispatcher.policy import PolicyEngine, RuntimeTraits
from dispatcher.recovery import RecoveryReport, recover
from dispatcher.registry import Registry
from dispatcher.store import Store
from dispatcher.version import program_version
from dispatcher.watcher import watch_runtime

log = logging.getLogger(__name__)


class AlreadyRunning(DispatcherError):
    """Another daemon uses the same run folder."""


@effect("run_dir.lock")
def _lock_run_dir(folder: Path) -> int:
    """Make the run folder private and hold its lock for as long as the process lives. Returns the descriptor."""
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    fd = os.open(folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(fd)
        raise AlreadyRunning(f"Another dispatcher runs with the run folder {folder}: stop it first.") from None
    return fd


@effect("state_dir.make")
def _make_state_dir(folder: Path) -> None:
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)


async def _node_uuid(store: Store) -> str:
    """This node instance's own name, by which it knows its things in an engine. Made once."""
    known = store.get_setting("node_uuid")
    if known is None:
        known = str(uuid.uuid4())
        await store.set_setting("node_uuid", known)
    return str(known)


class App:
    """One daemon. `run` is its life: from the lock to the last provider's end."""

    def __init__(self, loaded: LoadedConfig) -> None:
        self._config: Config = loaded.config
        self._metrics = Metrics(program_version())
        self._report = RecoveryReport()
        self._not_exported = ""

    async def run(self, stop: asyncio.Event) -> None:
        """Serve until `stop` is set.

        Raises:
            AlreadyRunning: another daemon holds the run folder.
            DispatcherError: something without which nothing works, in a sentence.
        """
        config = self._config
        notifier = Notifier.from_environment()
        async with contextlib.AsyncExitStack() as stack:
            stack.callback(os.close, _lock_run_dir(config.run_dir))
            _make_state_dir(config.state_dir)
            store = await Store.open(config.state_dir / "records.db", on_commit=self._metrics.committed)
            stack.push_async_callback(store.aclose)
            registry = Registry.load(
                config,
                node_uuid=await _node_uuid(store),
                on_call=self._metrics.provider_called,
                observe=self._metrics.observe,
            )
            for plugin, stage in registry.failures():
                self._metrics.plugin_failed(plugin, stage)
            registry.refuse_newer_facts((pod.route.runtime, pod.stamp.facts_schema) for pod in store.list_pods())
            traces = self._make_traces(stack, await _node_uuid(store))
            traces.start()
            stack.push_async_callback(asyncio.to_thread, traces.close)
            policy = self._make_policy(store, registry)
            await policy.start()
            stack.push_async_callback(policy.aclose)

            deps = self._make_deps(store, registry, policy, traces)
            stack.push_async_callback(deps.facts.aclose)
            stack.push_async_callback(registry.aclose)
            stack.push_async_callback(deps.logs.aclose)
            stack.push_async_callback(deps.calls.aclose)
            self._metrics.count_records_by(lambda: _count_records(store))
            self._metrics.read_readiness_by(lambda: _ready_states(registry))

            await registry.start(lambda: _leases(store))
            if cidr := store.get_setting("pod_cidr"):
                registry.network.set_pod_cidr(str(cidr))
            self._report = await recover(deps)
            self._metrics.recovered(self._report.duration_s, self._report.counts())

            probe = LoopProbe(self._metrics)
            await stack.enter_async_context(_background(probe.run(), "loop probe"))
            for runtime in registry.runtimes():
                await stack.enter_async_context(_background(watch_runtime(runtime, deps), f"watch {runtime.name}"))
            await registry.start_streaming(make_target(deps))
            await self._serve_metrics(stack, deps, probe)
            server = CriServer(deps, config.socket.path, self._metrics)
            await server.start(config.socket.mode_bits)
            stack.push_async_callback(server.aclose)

            loop = asyncio.get_running_loop()
            loop.add_signal_handler(signal.SIGHUP, policy.request_reload)
            notifier.ready(f"{len(store.list_pods())} pods on record")
            await stack.enter_async_context(
                _background(notifier.run_watchdog(probe.is_turning), "service manager watchdog")
            )
            log.info("serving", extra={"socket": str(config.socket.path), "version": program_version()})
            await stop.wait()
            notifier.stopping()
            log.info("stopping")

    def _make_traces(self, stack: contextlib.AsyncExitStack, node_uuid: str) -> TraceLog:
        config = self._config.tracing
        export = None
        if config.otlp_endpoint is not None:
            try:
                exporter = OtlpExporter(
                    config.otlp_endpoint,
                    sample_ratio=config.sample_ratio,
                    version=program_version(),
                    node_uuid=node_uuid,
                )
            except ExporterMissing as error:
                # Pods matter more than their traces: say so, and serve.
                log.error("traces are not sent", extra={"cause": error.message})
                self._not_exported = error.message
            else:
                stack.push_async_callback(asyncio.to_thread, exporter.close)
                export = exporter.export
        return TraceLog(self._config.state_dir / "traces.jsonl", keep=config.keep, export=export)

    def _make_policy(self, store: Store, registry: Registry) -> PolicyEngine:
        return PolicyEngine(
            self._config.policy,
            runtimes={
                runtime.name: RuntimeTraits(isolation=runtime.isolation, option_keys=runtime.option_keys)
                for runtime in registry.runtimes()
            },
            settings=store,
            ask_hooks=registry.ask_hooks,
            hook_plugins=tuple(report["name"] for report in registry.report() if report["hooks"]),
            observer=self._metrics,
        )

    def _make_deps(self, store: Store, registry: Registry, policy: PolicyEngine, traces: TraceLog) -> Deps:
        config = self._config
        logs = LogPumps(store)

        def required() -> tuple[str, ...]:
            if config.required_runtimes is not None:
                return config.required_runtimes
            return (policy.default_runtime,) if policy.default_runtime else ()

        return Deps(
            store=store,
            registry=registry,
            policy=policy,
            calls=Calls(keep_s=config.abandoned_call_s),
            locks=Locks(),
            logs=logs,
            facts=FactKeeper(store, logs, time.time_ns),
            now_ns=time.time_ns,
            pods_dir=config.state_dir / "pods",
            netns_dir=config.run_dir / "netns",
            cgroup_driver=lambda: choose_cgroup_driver(config.cgroup_driver, registry.all_health(), required()),
            overdue_runtimes=lambda: registry.overdue(required()),
            conditions=lambda: _conditions(store, policy, self._not_exported),
            info=lambda: self._info(store, registry, policy),
            traces=traces,
            topics={
                "traces": traces.render,
                "logs": recent_lines,
                "metrics": lambda: self._metrics.render().decode(),
                "records": lambda: disclose(store),
                "secrets": lambda: known_secrets(store),
            },
        )

    async def _serve_metrics(self, stack: contextlib.AsyncExitStack, deps: Deps, probe: LoopProbe) -> None:
        config = self._config.metrics
        if not config.enabled:
            return
        health = Health()
        health.add_liveness("loop", lambda: (probe.is_turning(), ""))
        health.add_readiness("network", lambda: (deps.network.status().ready, deps.network.status().message))
        health.add_readiness("runtimes", lambda: (not deps.overdue_runtimes(), ", ".join(deps.overdue_runtimes())))
        server = HealthServer(self._metrics, health, host=config.host, port=config.port)
        try:
            await server.start()
        except OSError as error:
            # Pods matter more than their metrics: say so, and serve.
            log.error("metrics are not served", extra={"listen": config.listen, "cause": str(error)})
            return
        stack.push_async_callback(server.aclose)
        log.info("metrics", extra={"listen": f"{server.address[0]}:{server.address[1]}"})

    def _info(self, store: Store, registry: Registry, policy: PolicyEngine) -> dict[str, str]:
        """The verbose info of Status, one JSON text per topic."""
        return {
            "config": self._config.model_dump_json(),
            "plugins": as_json(registry.report()),
            "runtimes": as_json({name: asdict(health) for name, health in registry.all_health().items()}),
            "policy": as_json(
                {**asdict(policy.status), "in_sync": policy.status.is_in_sync, "handlers": policy.handlers()}
            ),
            "recovery": as_json(asdict(self._report)),
            "node": as_json({"uuid": store.get_setting("node_uuid"), "version": program_version()}),
        }


def _conditions(store: Store, policy: PolicyEngine, not_exported: str) -> tuple[tuple[str, bool, str, str], ...]:
    """What is wrong with our own files, for the node's conditions. Nothing while all is well."""
    found = []
    if not policy.status.is_in_sync:
        found.append(("PolicyInSync", False, policy.status.reason, policy.status.message))
    if store.condition or store.set_aside:
        text = store.condition or f"{len(store.set_aside)} records could not be read and were set aside."
        found.append(("RecordsReadable", False, "RecordsDamaged", text))
    if not_exported:
        found.append(("TracesExported", False, "ExporterMissing", not_exported))
    return tuple(found)


def _leases(store: Store) -> tuple[tuple[str, ImageId], ...]:
    """The images that containers on record keep."""
    return tuple(
        (container.id, image_id) for container in store.list_containers() for image_id in container.leased_images
    )


def _count_records(store: Store) -> dict[tuple[str, str], int]:
    counts: dict[tuple[str, str], int] = {}
    for kind, records in (("pod", store.list_pods()), ("container", store.list_containers())):
        for record in records:
            key = (kind, str(record.state))
            counts[key] = counts.get(key, 0) + 1
    return counts


def _ready_states(registry: Registry) -> dict[tuple[str, str], bool]:
    states = {("runtime", name): health.ready for name, health in registry.all_health().items()}
    return {**states, ("network", registry.network.name): registry.network.status().ready}


@contextlib.asynccontextmanager
async def _background(work: Awaitable[None], name: str) -> AsyncIterator[None]:
    """Run something beside the block, and end it with the block."""
    task = asyncio.ensure_future(work)
    if isinstance(task, asyncio.Task):
        task.set_name(name)
    try:
        yield
    finally:
        task.cancel()
        await asyncio.wait({task})


async def serve(loaded: LoadedConfig) -> None:
    """Run the daemon until SIGTERM or SIGINT. Pods go on running afterwards."""
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    await App(loaded).run(stop)
