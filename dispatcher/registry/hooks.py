"""Routing hooks of plugins: asked one by one, in a thread each, within a time limit, and no more after failures.

pluggy checks signatures and calls; the typed façade `RoutingVotes.vote` is all that the rest sees. Each plugin has one
daemon thread: a hook that blocks for ever costs that thread, and its own callers the time limit a few times. The event
loop waits for no hook.
"""

from __future__ import annotations

import inspect
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pluggy

from dispatcher.api import RoutingHooks
from dispatcher.bounded_thread import BoundedThread
from dispatcher.model import PodSpec, Vote

_log = logging.getLogger(__name__)

MAX_REASON = 500


class HookRefusedError(ValueError):
    """An object offered as hooks is not fit to be one; the message says why."""


@dataclass(slots=True)
class _Voter:
    call: pluggy.HookCaller
    thread: BoundedThread
    failures: int = 0
    disabled: str = ""


class RoutingVotes:
    """The hooks of all plugins behind one typed method."""

    def __init__(
        self,
        *,
        time_limit_s: float,
        failures_before_disabled: int,
        on_failure: Callable[[str, str], None] = lambda _plugin, _why: None,
        on_call: Callable[[str, float, BaseException | None], None] = lambda _plugin, _seconds, _error: None,
    ) -> None:
        self._time_limit_s = time_limit_s
        self._limit = failures_before_disabled
        self._on_failure = on_failure
        self._on_call = on_call
        self._pluggy = pluggy.PluginManager("dispatcher")
        self._pluggy.add_hookspecs(RoutingHooks)
        self._voters: dict[str, _Voter] = {}

    def add(self, plugin: str, hooks: object) -> None:
        """Take the hooks of a plugin.

        Raises:
            HookRefusedError: it has none, a misspelt one, an async one, or one with an argument that does not exist.
        """
        if plugin in self._voters:
            raise HookRefusedError("a plugin can offer one object with hooks")
        try:
            self._pluggy.register(hooks, name=plugin)
            self._pluggy.check_pending()
            callers = self._pluggy.get_hookcallers(hooks) or []
            if not callers:
                raise HookRefusedError("the object offered as hooks has none; mark its methods with hookimpl")
            if any(
                inspect.iscoroutinefunction(implementation.function)
                for caller in callers
                for implementation in caller.get_hookimpls()
                if implementation.plugin is hooks
            ):
                raise HookRefusedError("hooks are plain functions, not async")
        except (pluggy.PluginValidationError, ValueError) as error:
            if self._pluggy.has_plugin(plugin):
                self._pluggy.unregister(name=plugin)
            if isinstance(error, HookRefusedError):
                raise
            raise HookRefusedError(" ".join(str(error).split())) from error
        others = [other for name, other in self._pluggy.list_name_plugin() if name != plugin]
        self._voters[plugin] = _Voter(
            self._pluggy.subset_hook_caller("route_pod", others), BoundedThread(f"hook-{plugin}")
        )
        # Hooks are asked in the order of their plugins' names, and each caller knows its own plugin only.
        self._voters = dict(sorted(self._voters.items()))
        for name, voter in self._voters.items():
            others = [other for known, other in self._pluggy.list_name_plugin() if known != name]
            voter.call = self._pluggy.subset_hook_caller("route_pod", others)

    def vote(self, pod: PodSpec) -> tuple[Vote, ...]:
        """Ask every hook that is not disabled; `counted` is left False, for the policy to decide. Blocks: no loop may."""
        votes: list[Vote] = []
        for plugin, voter in self._voters.items():
            if voter.disabled:
                continue
            began = time.perf_counter()
            try:
                answers = voter.thread.call(lambda voter=voter: voter.call(pod=pod), self._time_limit_s)  # type: ignore[misc]
                vote = _read(plugin, answers)
            except (Exception, SystemExit) as error:  # noqa: BLE001 - a hook's failure is an abstention
                self._failed(plugin, voter, error, began)
                continue
            self._answered(plugin, voter, vote, began, votes)
        return tuple(votes)

    async def ask(self, pod: PodSpec) -> tuple[Vote, ...]:
        """Do the same without holding the event loop. Concurrent decisions take turns at each hook."""
        votes: list[Vote] = []
        for plugin, voter in tuple(self._voters.items()):
            if voter.disabled:
                continue
            began = time.perf_counter()
            try:
                answers = await voter.thread.ask(lambda voter=voter: voter.call(pod=pod), self._time_limit_s)  # type: ignore[misc]
                vote = _read(plugin, answers)
            except (Exception, SystemExit) as error:  # noqa: BLE001 - a hook's failure is an abstention
                self._failed(plugin, voter, error, began)
                continue
            self._answered(plugin, voter, vote, began, votes)
        return tuple(votes)

    def _answered(self, plugin: str, voter: _Voter, vote: Vote | None, began: float, votes: list[Vote]) -> None:
        voter.failures = 0
        self._on_call(plugin, time.perf_counter() - began, None)
        if vote is not None:
            votes.append(vote)

    def disabled(self) -> dict[str, str]:
        """Return why the hooks of a plugin are no longer asked, by plugin."""
        return {plugin: voter.disabled for plugin, voter in self._voters.items() if voter.disabled}

    def names(self) -> tuple[str, ...]:
        """Return the plugins with hooks, in the order in which they are asked."""
        return tuple(self._voters)

    def _failed(self, plugin: str, voter: _Voter, error: BaseException, began: float) -> None:
        self._on_call(plugin, time.perf_counter() - began, error)
        if voter.disabled:  # by another decision, while this one waited for its turn
            return
        voter.failures += 1
        why = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
        _log.warning("routing hook failed", extra={"plugin": plugin, "why": why, "failures": voter.failures})
        if voter.failures >= self._limit:
            voter.disabled = f"failed {voter.failures} times in a row, last with {why[:MAX_REASON]}"
            _log.error("routing hook disabled", extra={"plugin": plugin, "why": voter.disabled})
        self._on_failure(plugin, why)


def _read(plugin: str, answers: Any) -> Vote | None:
    if not isinstance(answers, list) or len(answers) > 1:
        raise TypeError("a hook gave more than one answer")
    if not answers:
        return None
    answer = answers[0]
    if inspect.iscoroutine(answer):
        answer.close()
    match answer:
        case (str() as runtime, str() as reason) if runtime and isinstance(answer, tuple):
            return Vote(plugin=plugin, runtime=runtime, reason=reason[:MAX_REASON], counted=False)
    raise TypeError(f"a hook returned {type(answer).__name__} instead of (runtime, reason) or None")
