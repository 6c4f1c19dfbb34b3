"""The decision itself: from a policy and the facts of a pod to a runtime or a refusal. Pure, and always explained.

Theory of operation. Steps, in order; the first that decides ends it:

    1. the floor     the highest level that `floors` names for the pod's namespace; whatever decides is held against it
    2. refusals      rules with `refuse`, in the file's order: they hold for handlers and hooks as well
    3. handler       a RuntimeClass handler is an explicit wish: it is followed or refused, never changed
    4. hooks         the first vote of a plugin that the file lets override, unless it would weaken the pod
    5. rules         in the file's order, the first that matches
    6. default

What users write may raise a pod's isolation but not lower it: outside trusted namespaces, the pod is also decided as
if it had no labels and no annotations, and what would be weaker than that is passed over. Nothing falls back silently:
a result below the floor, or one that contradicts the pod (host namespaces in a VM), is refused with its reason.
Whether the runtime is loaded is not asked here; a route to one that is missing must stay visible as just that.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from dispatcher.model import Isolation, Vote
from dispatcher.policy.facts import ContainerFacts, PodFacts
from dispatcher.policy.matching import Alternatives, Clause, Failure, Subject, shorten

DEFAULT = "default"


@dataclass(frozen=True, slots=True, kw_only=True)
class RuntimeTraits:
    """What a policy has to know of a runtime. `option_keys` of None means: not loaded, so nobody can tell."""

    isolation: Isolation
    option_keys: frozenset[str] | None = frozenset()
    is_loaded: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class Destination:
    """A runtime with the options of whatever chose it."""

    runtime: str
    options: Mapping[str, Any] = field(default_factory=dict)
    trusted_only: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class CompiledRule:
    """A rule: exactly one of `destination` and `refusal` is set."""

    name: str
    match: Alternatives
    destination: Destination | None = None
    refusal: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Floor:
    """The lowest isolation for the namespaces that a pattern covers."""

    pattern: str
    covers: Callable[[str], bool]
    level: Isolation


@dataclass(frozen=True, slots=True, kw_only=True)
class Policy:
    """A checked policy file, ready to decide. `default` is a destination or the text of a refusal."""

    runtimes: Mapping[str, RuntimeTraits]
    default: Destination | str
    handlers: Mapping[str, Destination] = field(default_factory=dict)
    floors: tuple[Floor, ...] = ()
    trusted: tuple[Callable[[str], bool], ...] = ()
    may_override: frozenset[str] = frozenset()
    refusals: tuple[CompiledRule, ...] = ()
    rules: tuple[CompiledRule, ...] = ()
    container_rules: tuple[CompiledRule, ...] = ()
    hash: str = ""

    def isolation_of(self, runtime: str) -> Isolation:
        """The level of a runtime that the policy knows."""
        return self.runtimes[runtime].isolation

    def is_trusted(self, namespace: str) -> bool:
        """True where labels and annotations may lower isolation."""
        return any(covers(namespace) for covers in self.trusted)

    def floor_for(self, namespace: str) -> Floor | None:
        """The highest floor for a namespace."""
        return max((floor for floor in self.floors if floor.covers(namespace)), key=lambda f: f.level, default=None)


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """The outcome: a runtime, or a refusal (then `runtime` is "").

    `rule` names what decided ("handler:NAME", "hook:PLUGIN", "default", "floor", or a rule), `reason` is a sentence.
    `is_bad_request` marks a refusal of what the request names, as opposed to what the policy forbids.
    """

    rule: str
    reason: str
    runtime: str = ""
    isolation: Isolation = Isolation.SHARED_KERNEL
    options: Mapping[str, Any] = field(default_factory=dict)
    votes: tuple[Vote, ...] = ()
    passed_over: tuple[tuple[str, str], ...] = ()
    is_bad_request: bool = False

    @property
    def is_refused(self) -> bool:
        """True when the pod may not run."""
        return not self.runtime


@dataclass(frozen=True, slots=True, kw_only=True)
class RuleTrace:
    """How one rule was met: `outcome` is "matched", "no match", "passed over" or "not reached".

    `failures` holds the first failing condition of each alternative.
    """

    rule: str
    phase: str
    leads_to: str
    outcome: str
    failures: tuple[Failure, ...] = ()
    note: str = ""


# -------------------------------------------------------------------------------------------------------------- decide
def decide(policy: Policy, pod: PodFacts, ask_hooks: Callable[[], Sequence[Vote]] = tuple) -> Verdict:
    """Decide one pod. `ask_hooks` is called at most once, and only where hooks have a say."""
    subject = Subject(pod=pod)
    for rule in policy.refusals:
        clause = rule.match.first_match(subject)
        if clause is not None:
            return Verdict(
                rule=rule.name, reason=f'Rule "{rule.name}" refuses it ({_because(clause, subject)}): {rule.refusal}'
            )
    if pod.handler:
        return _by_handler(policy, pod)

    base = _baseline(policy, pod)
    votes, winner = _count_votes(policy, pod, base, ask_hooks())
    if winner is not None:
        return _hold(
            policy,
            pod,
            Verdict(
                rule=f"hook:{winner.plugin}",
                reason=f'The plugin "{winner.plugin}" voted for it: {shorten(winner.reason) or "no reason given"}',
                runtime=winner.runtime,
                votes=votes,
            ),
        )
    return _hold(policy, pod, _by_rules(policy, pod, base, votes))


def _by_handler(policy: Policy, pod: PodFacts) -> Verdict:
    destination = policy.handlers.get(pod.handler)
    rule = f"handler:{shorten(pod.handler)}"
    if destination is None:
        known = ", ".join(sorted(policy.handlers)) or "none"
        return Verdict(
            rule=rule,
            reason=f"The policy file maps no RuntimeClass handler {shorten(pod.handler)!r}; it maps: {known}.",
            is_bad_request=True,
        )
    if destination.trusted_only and not policy.is_trusted(pod.namespace):
        return Verdict(
            rule=rule,
            reason=f'The handler "{pod.handler}" is for trusted namespaces, and {shorten(pod.namespace)} is none.',
        )
    verdict = Verdict(
        rule=rule,
        reason=f'The RuntimeClass handler "{pod.handler}" asks for it.',
        runtime=destination.runtime,
        options=destination.options,
    )
    return _hold(policy, pod, verdict)


def _count_votes(
    policy: Policy, pod: PodFacts, base: Isolation, cast: Sequence[Vote]
) -> tuple[tuple[Vote, ...], Vote | None]:
    winner: Vote | None = None
    votes = []
    for vote in cast:
        objection = _objection(policy, pod, base, vote)
        if not objection and winner is not None:
            objection = f"{winner.plugin} was first"
        if not objection:
            winner = vote
        reason = f"{shorten(vote.reason)} (not counted: {objection})" if objection else shorten(vote.reason)
        votes.append(Vote(plugin=vote.plugin, runtime=vote.runtime, reason=reason, counted=not objection))
    return tuple(votes), winner


def _objection(policy: Policy, pod: PodFacts, base: Isolation, vote: Vote) -> str:
    if vote.plugin not in policy.may_override:
        return "hooks.may_override does not list the plugin"
    traits = policy.runtimes.get(vote.runtime)
    if traits is None or not traits.is_loaded:
        return "the runtime is not loaded"
    floor = policy.floor_for(pod.namespace)
    if floor is not None and traits.isolation < floor.level:
        return f"below the floor {floor.level.label}"
    if traits.isolation < base and not policy.is_trusted(pod.namespace):
        return f"it lowers isolation below {base.label} in a namespace that is not trusted"
    return _conflict(traits.isolation, pod)


def _by_rules(policy: Policy, pod: PodFacts, base: Isolation, votes: tuple[Vote, ...]) -> Verdict:
    subject = Subject(pod=pod)
    passed_over: list[tuple[str, str]] = []
    for rule in policy.rules:
        clause = rule.match.first_match(subject)
        if clause is None or rule.destination is None:
            continue
        objection = _pass_over(policy, pod, rule.destination, base)
        if objection:
            passed_over.append((rule.name, objection))
            continue
        return Verdict(
            rule=rule.name,
            reason=f'Rule "{rule.name}" matches ({_because(clause, subject)}).{_and_passed(passed_over)}',
            runtime=rule.destination.runtime,
            options=rule.destination.options,
            votes=votes,
            passed_over=tuple(passed_over),
        )
    if isinstance(policy.default, str):
        reason = f"No rule matches, and the default is to refuse: {policy.default}{_and_passed(passed_over)}"
        return Verdict(rule=DEFAULT, reason=reason, votes=votes, passed_over=tuple(passed_over))
    destination, reason = policy.default, "No rule matches, so the default applies."
    if _pass_over(policy, pod, destination, base):
        # Labels or annotations kept a stronger rule from matching: then the pod is decided as if it had none.
        plain = _by_rules(policy, pod.without_user_input(), base, votes)
        passed_over.append((DEFAULT, f"it is weaker than {base.label}, which the pod gets without its annotations"))
        return Verdict(
            rule=plain.rule,
            reason=f"{plain.reason} Labels and annotations do not count here:{_and_passed(passed_over)}",
            runtime=plain.runtime,
            options=plain.options,
            votes=votes,
            passed_over=tuple(passed_over),
        )
    return Verdict(
        rule=DEFAULT,
        reason=reason + _and_passed(passed_over),
        runtime=destination.runtime,
        options=destination.options,
        votes=votes,
        passed_over=tuple(passed_over),
    )


def _baseline(policy: Policy, pod: PodFacts) -> Isolation:
    """The isolation that rules and default give the pod without its labels and annotations; the lowest if trusted."""
    if policy.is_trusted(pod.namespace):
        return Isolation.SHARED_KERNEL
    subject = Subject(pod=pod.without_user_input())
    for rule in policy.rules:
        if rule.destination is None or rule.destination.trusted_only:
            continue
        if rule.match.first_match(subject) is not None:
            return policy.isolation_of(rule.destination.runtime)
    # With a default that refuses, there is nothing to be lowered.
    return Isolation.SHARED_KERNEL if isinstance(policy.default, str) else policy.isolation_of(policy.default.runtime)


def _pass_over(policy: Policy, pod: PodFacts, destination: Destination, base: Isolation) -> str:
    if policy.is_trusted(pod.namespace):
        return ""
    if destination.trusted_only:
        return f"it is for trusted namespaces, and {shorten(pod.namespace)} is none"
    if policy.isolation_of(destination.runtime) < base:
        return f"it would lower isolation below {base.label}, and the namespace {shorten(pod.namespace)} is not trusted"
    return ""


def _hold(policy: Policy, pod: PodFacts, verdict: Verdict) -> Verdict:
    """Hold a result against the floor and against the pod itself."""
    if verdict.is_refused:
        return verdict
    isolation = policy.isolation_of(verdict.runtime)
    floor = policy.floor_for(pod.namespace)
    problem, rule = "", verdict.rule
    if floor is not None and isolation < floor.level:
        rule = "floor"
        problem = (
            f"namespace {shorten(pod.namespace)} has the floor {floor.level.label}, "
            f"and {verdict.runtime} gives {isolation.label}"
        )
    elif conflict := _conflict(isolation, pod):
        problem = f"{conflict}, and {verdict.runtime} is one"
    if problem:
        return Verdict(
            rule=rule,
            reason=f"{verdict.reason} But {problem}.",
            votes=verdict.votes,
            passed_over=verdict.passed_over,
        )
    return Verdict(
        rule=verdict.rule,
        reason=verdict.reason,
        runtime=verdict.runtime,
        isolation=isolation,
        options=verdict.options,
        votes=verdict.votes,
        passed_over=verdict.passed_over,
    )


def _conflict(isolation: Isolation, pod: PodFacts) -> str:
    """A guest kernel has namespaces of its own: sharing the node's cannot be had, and must not be pretended."""
    shared = pod.host_namespaces
    if isolation is Isolation.VM and shared:
        return f"{' and '.join(shared)} cannot be had in a virtual machine"
    return ""


def _because(clause: Clause, subject: Subject) -> str:
    if not clause:
        return "it matches every pod"
    return ", ".join(f"{check.matcher} {shorten(check.show(subject))}" for check in clause)


def _and_passed(passed_over: Sequence[tuple[str, str]]) -> str:
    return "".join(f' "{rule}" was passed over: {why}.' for rule, why in passed_over)


# ---------------------------------------------------------------------------------------------------------- containers
def check_container(policy: Policy, pod: PodFacts, container: ContainerFacts) -> Verdict | None:
    """Return the refusal of the first container rule that matches, or None."""
    subject = Subject(pod=pod, container=container)
    for rule in policy.container_rules:
        clause = rule.match.first_match(subject)
        if clause is not None:
            reason = f'Rule "{rule.name}" refuses it ({_because(clause, subject)}): {rule.refusal}'
            return Verdict(rule=rule.name, reason=reason)
    return None


# ------------------------------------------------------------------------------------------------------------- explain
def trace(policy: Policy, pod: PodFacts, verdict: Verdict) -> tuple[RuleTrace, ...]:
    """Tell of every sandbox rule how it was met, in the order in which they are asked."""
    subject = Subject(pod=pod)
    over = dict(verdict.passed_over)
    is_reached = True
    is_early = bool(pod.handler) or verdict.rule.startswith("hook:")
    traces = []
    for rule in (*policy.refusals, *policy.rules):
        leads_to = "refuse" if rule.destination is None else rule.destination.runtime
        failures = rule.match.failures(subject)
        is_match = rule.match.first_match(subject) is not None
        has_say = is_reached and (rule.destination is None or not is_early)
        outcome, note = "no match", ""
        if not has_say:
            outcome = "not reached"
            note = "it would match" if is_match else ""
        elif is_match and rule.name in over:
            outcome, note = "passed over", over[rule.name]
        elif is_match:
            outcome, is_reached = "matched", False
        traces.append(
            RuleTrace(rule=rule.name, phase="sandbox", leads_to=leads_to, outcome=outcome, failures=failures, note=note)
        )
    return tuple(traces)
