"""The policy in effect: loaded, kept fresh, remembered over restarts, and asked for each pod.

Theory of operation. One task watches the folder of the file (a rename over it and a swapped link are seen like a
write) and one reloads; SIGHUP only wakes the second. A reload reads, checks, runs the file's own tests and then swaps
one reference, so a decision sees the old policy or the new one. A file that fails changes nothing but `status`: the
last policy that passed stays, and its text lies in the store, so that a restart with a broken file serves on. Without
either, pods on record go on and new ones are refused with the reason. Existing pods never move.

Deciding is pure (`decision`); this module adds what surrounds it: hooks, ids, the audit log, metrics.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import secrets
import time
from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from dispatcher.bounded_thread import BoundedThread
from dispatcher.errors import InvalidRequest, NoRuntime, PolicyRefused
from dispatcher.model import ContainerSpec, Image, Isolation, PodRecord, PodSpec, Route, Vote
from dispatcher.policy.decision import (
    Destination,
    Policy,
    RuleTrace,
    RuntimeTraits,
    Verdict,
    check_container,
    decide,
    trace,
)
from dispatcher.policy.facts import PodFacts, facts_of_container, facts_of_pod
from dispatcher.policy.load import Loaded, load_policy
from dispatcher.policy.matching import shorten
from dispatcher.yaml_marks import MAX_BYTES, Problem, YamlError

log = logging.getLogger(__name__)
audit = logging.getLogger("dispatcher.policy.audit")

SETTING = "policy"
_RETRY_S = 5.0
_PATHS_LIMIT_S = 5.0
_DEBOUNCE_MS, _STEP_MS, _LOOK_MS = 400, 100, 1000


class Settings(Protocol):
    """Where the last known good policy is kept; `dispatcher.store.Store` is one."""

    def get_setting(self, key: str) -> Any:
        """Return a stored JSON value, or None."""

    async def set_setting(self, key: str, value: Any) -> None:
        """Store a JSON value."""


class Observer(Protocol):
    """Who counts; `dispatcher.observability.metrics.Metrics` is one."""

    def route_decided(self, *, rule: str, runtime: str, phase: str = "pod", outcome: str = "routed") -> None:
        """Note a decision: `phase` is "pod" or "container", `outcome` "routed" or "refused"."""

    def policy_reloaded(self, *, ok: bool, generation: int) -> None:
        """Note an attempt to load the file, and the generation in effect after it."""


class _Nobody:
    def route_decided(self, *, rule: str, runtime: str, phase: str = "pod", outcome: str = "routed") -> None:
        pass

    def policy_reloaded(self, *, ok: bool, generation: int) -> None:
        pass


@dataclass(frozen=True, slots=True, kw_only=True)
class PolicyStatus:
    """Which policy is in effect, and whether that is what the file says.

    `source` is "file", "last known good" or "none". `problems` are those of the file when it was read last.
    """

    file: str
    source: str = "none"
    hash: str = ""
    generation: int = 0
    loaded_at_ns: int = 0
    problems: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()

    @property
    def is_in_sync(self) -> bool:
        """True when the file on disk is the policy in effect."""
        return self.source == "file" and not self.problems

    @property
    def reason(self) -> str:
        """A CamelCase reason for a condition, or "" when all is well."""
        if self.is_in_sync:
            return ""
        return "NoPolicy" if self.source == "none" else "PolicyFileRefused"

    @property
    def message(self) -> str:
        """A sentence for the condition, or ""."""
        if self.is_in_sync:
            return ""
        first = self.problems[0] if self.problems else "it was not read yet"
        more = f" (and {len(self.problems) - 1} more)" if len(self.problems) > 1 else ""
        serving = "new pods are refused" if self.source == "none" else f"policy {self.hash} stays in effect"
        return f"{first}{more}; {serving}."


@dataclass(frozen=True, slots=True, kw_only=True)
class Explanation:
    """Why a pod goes where it goes: every step and every rule. Plain values; `as_dict` is ready for JSON."""

    policy_hash: str
    namespace: str
    name: str
    handler: str
    is_trusted: bool
    floor: str
    runtime: str
    rule: str
    reason: str
    is_refused: bool
    is_loaded: bool
    isolation: str
    options: Mapping[str, Any] = field(default_factory=dict)
    votes: tuple[Mapping[str, Any], ...] = ()
    rules: tuple[RuleTrace, ...] = ()
    container_rules: tuple[str, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        """Return nested plain dicts and lists."""
        return asdict(self)


class _HooksWantedError(Exception):
    """Raised within `decide` where hooks have a say: they are asked outside of it, since that takes time."""


def _want_hooks() -> Sequence[Vote]:
    raise _HooksWantedError


async def _ask_nobody(_pod: PodSpec) -> Sequence[Vote]:
    return ()


class PolicyEngine:
    """Decides pods by the policy in effect. One per daemon; the methods that decide are synchronous and do not block
    but for hooks, whose time `ask_hooks` bounds.

    Args:
        path: the policy file.
        runtimes: the traits of every runtime that is loaded.
        settings: where the last known good policy is kept.
        ask_hooks: collects the votes of routing hooks, in order of their plugin's name.
        hook_plugins: names of the plugins with routing hooks, for warnings.
        observer: counts decisions and reloads.
        now_ns: the clock.
    """

    def __init__(
        self,
        path: Path,
        *,
        runtimes: Mapping[str, RuntimeTraits],
        settings: Settings,
        ask_hooks: Callable[[PodSpec], Awaitable[Sequence[Vote]]] = _ask_nobody,
        hook_plugins: Collection[str] = (),
        observer: Observer | None = None,
        now_ns: Callable[[], int] = time.time_ns,
    ) -> None:
        self._path = path
        self._loaded_runtimes = dict(runtimes)
        self._settings = settings
        self._ask_hooks = ask_hooks
        self._hook_plugins = tuple(hook_plugins)
        self._observer: Observer = observer or _Nobody()
        self._now_ns = now_ns
        self._policy: Policy | None = None
        self._status = PolicyStatus(file=str(path))
        self._last_read: bytes | str | None = None
        self._wake = asyncio.Event()
        self._stop = asyncio.Event()
        self._tasks: list[asyncio.Task[None]] = []
        self._reloading = asyncio.Lock()
        self._paths = BoundedThread("policy-paths")

    # -------------------------------------------------------------------------------------------------------- life
    async def start(self) -> None:
        """Load the file, or else what the store remembers, and begin to watch. Never raises for a bad file."""
        await self.reload()
        if self._policy is None:
            self._restore()
        self._tasks = [asyncio.create_task(self._watch()), asyncio.create_task(self._reload_when_woken())]

    async def aclose(self) -> None:
        """Stop watching. Decisions stay possible. Idempotent."""
        self._stop.set()
        for task in self._tasks:
            task.cancel()
        for task in self._tasks:
            with contextlib.suppress(asyncio.CancelledError):
                await task
        self._tasks = []

    def request_reload(self) -> None:
        """Read the file again soon, changed or not. For SIGHUP; may be called at any time."""
        self._last_read = None
        self._wake.set()

    async def reload(self) -> PolicyStatus:
        """Read the file now, and take it if it passes. Concurrent calls wait for each other."""
        async with self._reloading:
            text = self._read()
            if text == self._last_read:
                return self._status
            self._last_read = text
            loaded = self._try(text)
            if loaded is not None and isinstance(text, bytes):
                self._take(loaded, "file")
                await self._remember(text, loaded)
            self._observer.policy_reloaded(ok=loaded is not None, generation=self._status.generation)
            return self._status

    @property
    def status(self) -> PolicyStatus:
        """What is in effect."""
        return self._status

    # ------------------------------------------------------------------------------------------------------ decide
    async def decide(self, pod: PodSpec) -> Route:
        """Decide where a pod runs. Each call is one decision, with an id of its own, in the audit log.

        Waits for hooks only, within their limits; the policy in effect at the beginning decides.

        Raises:
            PolicyRefused: a rule, a floor or a contradiction forbids it, or no policy could be loaded.
            InvalidRequest: the RuntimeClass handler is not in the file.
            NoRuntime: the runtime that it has to run on is not loaded.
        """
        started = time.perf_counter_ns()
        policy = self._need_policy()
        facts = facts_of_pod(pod)
        try:
            verdict = decide(policy, facts, _want_hooks)
        except _HooksWantedError:
            votes = await self._ask_hooks(pod)
            verdict = decide(policy, facts, lambda: votes)
        is_missing = not verdict.is_refused and not policy.runtimes[verdict.runtime].is_loaded
        decision_id = secrets.token_hex(8)
        outcome = "refused" if verdict.is_refused else "no runtime" if is_missing else "routed"
        self._note(policy, facts, verdict, decision_id=decision_id, outcome=outcome, started=started)

        who = f"{shorten(facts.namespace)}/{shorten(facts.name)}"
        data = {"rule": verdict.rule, "decision_id": decision_id, "policy_hash": policy.hash}
        if verdict.is_bad_request:
            raise InvalidRequest(f"Pod {who} cannot be routed. {verdict.reason}", **data)
        if verdict.is_refused:
            raise PolicyRefused(f"Pod {who} is refused by the policy. {verdict.reason}", **data)
        if is_missing:
            raise NoRuntime(
                f'Pod {who} has to run on the runtime "{verdict.runtime}", which is not loaded: enable its plugin or '
                f"change {self._path.name}. {verdict.reason}",
                runtime=verdict.runtime,
                **data,
            )
        return Route(
            runtime=verdict.runtime,
            rule=verdict.rule,
            reason=verdict.reason,
            isolation=verdict.isolation,
            policy_hash=policy.hash,
            decision_id=decision_id,
            options=dict(verdict.options),
            votes=verdict.votes,
        )

    async def check_container(self, pod: PodRecord, container: ContainerSpec, image: Image) -> None:
        """Hold a container against the rules of phase container. They can only refuse.

        Links of host paths are followed in a thread of its own, since a path may lie on a file system that is dead.

        Raises:
            PolicyRefused: a rule refuses it, its paths cannot be looked at, or no policy could be loaded.
        """
        policy = self._need_policy()
        if not policy.container_rules:
            return
        # Links are followed here, since a rule about /etc has to hold for a link to it as well.
        resolve = partial(facts_of_container, container, image, pod.route.runtime, resolve=os.path.realpath)
        try:
            facts = await self._paths.ask(resolve, _PATHS_LIMIT_S)
        except TimeoutError as error:
            raise PolicyRefused(
                f'Container "{shorten(container.metadata.name)}" is refused: whether the policy allows its host paths '
                f"is not known, since looking at them, or at those of one before it, takes too long."
            ) from error
        verdict = check_container(policy, facts_of_pod(pod.spec), facts)
        outcome = "routed" if verdict is None else "refused"
        rule = "" if verdict is None else verdict.rule
        self._observer.route_decided(rule=rule, runtime=pod.route.runtime, phase="container", outcome=outcome)
        if verdict is not None:
            name = shorten(container.metadata.name)
            audit.info(
                "container refused",
                extra={"data": {"pod_id": pod.id, "container": name, "policy_hash": policy.hash, "rule": rule}},
            )
            raise PolicyRefused(
                f'Container "{name}" is refused by the policy. {verdict.reason}', rule=rule, policy_hash=policy.hash
            )

    async def explain(self, pod: PodSpec) -> Explanation:
        """Tell how a pod would be decided now. Not a decision: nothing is counted or logged.

        Raises:
            PolicyRefused: no policy could be loaded.
        """
        votes = await self._ask_hooks(pod)
        return explain(self._need_policy(), facts_of_pod(pod), votes)

    # -------------------------------------------------------------------------------------------------- what is in it
    @property
    def default_runtime(self) -> str | None:
        """The runtime of the default, or None when the default is to refuse or no policy is in effect."""
        default = self._policy.default if self._policy is not None else None
        return default.runtime if isinstance(default, Destination) else None

    def handlers(self) -> dict[str, tuple[str, ...]]:
        """RuntimeClass handlers and the loaded runtimes that each may lead to; "" stands for pods that name none."""
        policy = self._policy
        if policy is None:
            return {"": ()}
        reachable = [rule.destination.runtime for rule in policy.rules if rule.destination is not None]
        if isinstance(policy.default, Destination):
            reachable.append(policy.default.runtime)
        found = {"": tuple(sorted({name for name in reachable if policy.runtimes[name].is_loaded}))}
        for name, destination in sorted(policy.handlers.items()):
            if policy.runtimes[destination.runtime].is_loaded:
                found[name] = (destination.runtime,)
        return found

    def check_handler(self, handler: str) -> None:
        """Check a handler that a request names.

        Raises:
            InvalidRequest: the file does not map it.
        """
        if handler and handler not in self._need_policy().handlers:
            raise InvalidRequest(f"The policy file maps no RuntimeClass handler {shorten(handler)!r}.")

    # ------------------------------------------------------------------------------------------------------ inside
    def _need_policy(self) -> Policy:
        if self._policy is None:
            raise PolicyRefused(f"No policy is in effect. {self._status.message}")
        return self._policy

    def _read(self) -> bytes | str:
        """Return the file's contents, or why it cannot be read."""
        try:
            with self._path.open("rb") as file:
                return file.read(MAX_BYTES + 1)
        except OSError as error:
            return error.strerror or type(error).__name__

    def _try(self, text: bytes | str) -> Loaded | None:
        if isinstance(text, str):
            self._fail([Problem(str(self._path), 1, 1, f"the policy file cannot be read: {text}")])
            return None
        try:
            return load_policy(text, str(self._path), self._known_runtimes(), plugins=self._hook_plugins)
        except YamlError as error:
            self._fail(error.problems)
            return None

    def _known_runtimes(self) -> dict[str, RuntimeTraits]:
        """What is loaded, and what was loaded when the remembered policy was: a plugin that broke is no typo."""
        remembered = self._settings.get_setting(SETTING)
        known: dict[str, RuntimeTraits] = {}
        if isinstance(remembered, dict):
            for name, level in (remembered.get("runtimes") or {}).items():
                if level in Isolation._value2member_map_:
                    known[name] = RuntimeTraits(isolation=Isolation(level), option_keys=None, is_loaded=False)
        return {**known, **self._loaded_runtimes}

    def _take(self, loaded: Loaded, source: str) -> None:
        before = self._status
        problems = before.problems if source != "file" else ()
        self._policy = loaded.policy
        self._status = PolicyStatus(
            file=str(self._path),
            source=source,
            hash=loaded.policy.hash,
            generation=before.generation + (loaded.policy.hash != before.hash),
            loaded_at_ns=self._now_ns(),
            problems=problems,
            warnings=tuple(map(str, loaded.warnings)),
        )
        log.info(
            "policy in effect",
            extra={"data": {"hash": loaded.policy.hash, "source": source, "generation": self._status.generation}},
        )
        for warning in loaded.warnings:
            log.warning("policy: %s", warning)

    def _fail(self, problems: Sequence[Problem]) -> None:
        """Keep what is in effect; say what is wrong with the file."""
        before = self._status
        self._status = PolicyStatus(
            file=before.file,
            source=before.source,
            hash=before.hash,
            generation=before.generation,
            loaded_at_ns=before.loaded_at_ns,
            problems=tuple(map(str, problems)),
            warnings=before.warnings,
        )
        for problem in problems:
            log.error("policy file refused: %s", problem)

    def _restore(self) -> None:
        """Take the remembered policy."""
        remembered = self._settings.get_setting(SETTING)
        if not isinstance(remembered, dict) or not isinstance(remembered.get("text"), str):
            return
        try:
            loaded = load_policy(remembered["text"], "last known good policy", self._known_runtimes())
        except YamlError as error:
            log.error("the last known good policy is of no use either: %s", error)
            return
        self._take(loaded, "last known good")

    async def _remember(self, text: bytes, loaded: Loaded) -> None:
        isolations = {name: int(traits.isolation) for name, traits in loaded.policy.runtimes.items()}
        value = {"text": text.decode("utf-8-sig"), "hash": loaded.policy.hash, "runtimes": isolations}
        try:
            await self._settings.set_setting(SETTING, value)
        except Exception:
            # The policy is in effect all the same; only a restart with a broken file would miss it.
            log.exception("the policy could not be remembered")

    async def _watch(self) -> None:
        from watchfiles import awatch

        while not self._stop.is_set():
            # The file may be a link into a folder that is swapped as a whole, as ConfigMap volumes are.
            folders = {self._path.parent, self._path.resolve().parent}
            present = [folder for folder in folders if folder.is_dir()]
            if not present:
                await asyncio.sleep(_RETRY_S)
                self._wake.set()
                continue
            try:
                # The look at every timeout finds what changed before the watch began, and what gives no event.
                async for _changes in awatch(
                    *present,
                    stop_event=self._stop,
                    debounce=_DEBOUNCE_MS,
                    step=_STEP_MS,
                    rust_timeout=_LOOK_MS,
                    yield_on_timeout=True,
                    recursive=False,
                    watch_filter=None,
                ):
                    self._wake.set()
                    if {self._path.parent, self._path.resolve().parent} != folders:
                        break
            except (OSError, RuntimeError):
                log.exception("the folder of the policy file cannot be watched, trying again")
                await asyncio.sleep(_RETRY_S)

    async def _reload_when_woken(self) -> None:
        while True:
            await self._wake.wait()
            self._wake.clear()
            try:
                await self.reload()
            except Exception:
                log.exception("reloading the policy failed")

    def _note(
        self, policy: Policy, facts: PodFacts, verdict: Verdict, *, decision_id: str, outcome: str, started: int
    ) -> None:
        runtime = verdict.runtime or "none"
        counted = "routed" if outcome == "routed" else "refused"
        self._observer.route_decided(rule=verdict.rule, runtime=runtime, phase="pod", outcome=counted)
        audit.info(
            "pod %s",
            outcome,
            extra={
                "data": {
                    "decision_id": decision_id,
                    "policy_hash": policy.hash,
                    "namespace": shorten(facts.namespace),
                    "pod": shorten(facts.name),
                    "uid": shorten(facts.uid),
                    "handler": shorten(facts.handler),
                    "rule": verdict.rule,
                    "runtime": runtime,
                    "reason": verdict.reason,
                    "votes": [asdict(vote) for vote in verdict.votes],
                    "duration_us": (time.perf_counter_ns() - started) // 1000,
                }
            },
        )


def explain(policy: Policy, pod: PodFacts, votes: Sequence[Vote] = ()) -> Explanation:
    """Tell how a policy decides a pod. Pure; `PolicyEngine.explain` and offline checks share it."""
    verdict = decide(policy, pod, lambda: votes)
    floor = policy.floor_for(pod.namespace)
    return Explanation(
        policy_hash=policy.hash,
        namespace=shorten(pod.namespace),
        name=shorten(pod.name),
        handler=shorten(pod.handler),
        is_trusted=policy.is_trusted(pod.namespace),
        floor=floor.level.label if floor is not None else "",
        runtime=verdict.runtime,
        rule=verdict.rule,
        reason=verdict.reason,
        is_refused=verdict.is_refused,
        is_loaded=not verdict.is_refused and policy.runtimes[verdict.runtime].is_loaded,
        isolation="" if verdict.is_refused else verdict.isolation.label,
        options=dict(verdict.options),
        votes=tuple(asdict(vote) for vote in verdict.votes),
        rules=trace(policy, pod, verdict),
        container_rules=tuple(rule.name for rule in policy.container_rules),
    )
