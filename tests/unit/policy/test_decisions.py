"""Each step of a decision, as a table: a small policy, a pod, and what comes out."""

from __future__ import annotations

from typing import Any

import pytest

from dispatcher.model import Isolation, Vote
from dispatcher.policy import RuntimeTraits, explain, load_policy
from dispatcher.policy.decision import Policy, Verdict, decide
from dispatcher.policy.facts import PodFacts

RUNTIMES = {
    "docker": RuntimeTraits(isolation=Isolation.SHARED_KERNEL, option_keys=frozenset({"init"})),
    "gvisor": RuntimeTraits(isolation=Isolation.SANDBOXED),
    "vm": RuntimeTraits(isolation=Isolation.VM, option_keys=frozenset({"cpus", "kernel"})),
}


def policy(text: str) -> Policy:
    return load_policy("apiVersion: dispatcher/v1\n" + text, "policy.yaml", RUNTIMES).policy


def outcome(verdict: Verdict) -> str:
    return f"{verdict.runtime or 'refused'} by {verdict.rule}"


MATCHERS: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    # (matcher, a pod that it matches, a pod that it does not match)
    ("namespace: kube-*", {"namespace": "kube-system"}, {"namespace": "default"}),
    ("namespace: [a, b]", {"namespace": "b"}, {"namespace": "ab"}),
    ("namespace: {other_than: [a, 'b*']}", {"namespace": "c"}, {"namespace": "bcd"}),
    ("name: 'web-?'", {"name": "web-1"}, {"name": "web-10"}),
    ("name: 'a[b]*'", {"name": "a[b]c"}, {"name": "abc"}),
    ("labels: {team: red}", {"labels": {"team": "red"}}, {"labels": {"team": "redder"}}),
    ("labels: {team: [red, blue], app: '*'}", {"labels": {"team": "blue", "app": ""}}, {"labels": {"team": "blue"}}),
    ("labels: {team: {exists: true}}", {"labels": {"team": ""}}, {"labels": {}}),
    ("labels: {team: {exists: false}}", {"labels": {}}, {"labels": {"team": ""}}),
    ("labels: {team: {other_than: [red]}}", {"labels": {"team": "blue"}}, {"labels": {"team": "red"}}),
    ("labels: {team: {other_than: [red]}}", {"labels": {"team": "blue"}}, {"labels": {}}),
    ("annotations: {a/b: 'x*'}", {"annotations": {"a/b": "xy"}}, {"annotations": {"a/b": "yx"}}),
    ("privileged: true", {"privileged": True}, {}),
    ("privileged: false", {}, {"privileged": True}),
    ("hostNetwork: true", {"host_network": True}, {"host_pid": True}),
    ("hostPID: true", {"host_pid": True}, {"host_ipc": True}),
    ("hostIPC: true", {"host_ipc": True}, {"host_network": True}),
    ("userns: true", {"userns": True}, {}),
    ("sysctls: 'net.*'", {"sysctls": ("kernel.sem", "net.ipv4.x")}, {"sysctls": ("kernel.sem",)}),
    ("sysctls: {other_than: ['net.*']}", {"sysctls": ("kernel.sem", "net.ipv4.x")}, {"sysctls": ("net.ipv4.x",)}),
    ("sysctls: {other_than: ['net.*']}", {"sysctls": ("kernel.sem",)}, {}),
    ("qos: [burstable, besteffort]", {"qos": "burstable"}, {"qos": ""}),
    ("cpu: {at_most: 500m}", {"cpu_millis": 500}, {"cpu_millis": 501}),
    ("cpu: {at_most: 2}", {"cpu_millis": 2000}, {}),
    ("cpu: {at_least: 0.5}", {}, {"cpu_millis": 499}),
    ("memory: {at_least: 1Gi, at_most: 2Gi}", {"memory_bytes": 1 << 30}, {"memory_bytes": (2 << 30) + 1}),
    ("not: {privileged: true}", {}, {"privileged": True}),
    ("not: [{privileged: true}, {hostPID: true}]", {}, {"host_pid": True}),
    ("privileged: true, hostPID: true", {"privileged": True, "host_pid": True}, {"privileged": True}),
]


@pytest.mark.parametrize(("matcher", "yes", "no"), MATCHERS)
def test_matchers(matcher: str, yes: dict[str, Any], no: dict[str, Any]) -> None:
    found = policy(f"rules: [{{name: r, match: {{{matcher}}}, refuse: no}}]\ndefault: docker")
    assert outcome(decide(found, PodFacts(**yes))) == "refused by r"
    assert outcome(decide(found, PodFacts(**no))) == "docker by default"
    traced = explain(found, PodFacts(**no)).rules[0]
    assert traced.outcome == "no match"
    assert len(traced.failures) == 1


def test_alternatives_are_or() -> None:
    found = policy("rules: [{name: r, match: [{privileged: true}, {hostPID: true}], refuse: no}]\ndefault: docker")
    assert decide(found, PodFacts(privileged=True)).is_refused
    assert decide(found, PodFacts(host_pid=True)).is_refused
    assert not decide(found, PodFacts()).is_refused
    failures = explain(found, PodFacts()).rules[0].failures
    assert [(f.matcher, f.wanted, f.found) for f in failures] == [
        ("privileged", "true", "false"),
        ("hostPID", "true", "false"),
    ]


ORDERED = """
handlers: {vm: vm, raw: {runtime: docker, trusted_only: true}, tuned: {runtime: vm, with: {cpus: 2}}}
floors: {"safe-*": sandboxed, "safe-vm": vm, "other": shared-kernel}
trusted: [kube-system]
hooks: {may_override: [good]}
rules:
- {name: user-docker, match: {annotations: {a: docker}}, runtime: docker}
- {name: user-vm, match: {annotations: {a: vm}}, runtime: vm, with: {kernel: custom}}
- {name: marked, match: {name: "dev-*"}, runtime: docker, trusted_only: true}
- {name: evil, match: {name: evil}, refuse: we do not serve you}
- {name: plain, match: {namespace: "plain*"}, runtime: docker}
default: {runtime: gvisor}
"""

STEPS = [
    ({}, "gvisor by default"),
    # refusals come before everything
    ({"name": "evil", "annotations": {"a": "docker"}, "namespace": "kube-system"}, "refused by evil"),
    ({"name": "evil", "handler": "vm"}, "refused by evil"),
    ({"name": "evil", "handler": "nope"}, "refused by evil"),
    # handlers
    ({"handler": "vm"}, "vm by handler:vm"),
    ({"handler": "vm", "annotations": {"a": "docker"}, "namespace": "kube-system"}, "vm by handler:vm"),
    ({"handler": "nope"}, "refused by handler:nope"),
    ({"handler": "raw"}, "refused by handler:raw"),
    ({"handler": "raw", "namespace": "kube-system"}, "docker by handler:raw"),
    ({"handler": "vm", "host_ipc": True}, "refused by handler:vm"),
    ({"handler": "vm", "privileged": True}, "vm by handler:vm"),
    # what users write
    ({"annotations": {"a": "vm"}}, "vm by user-vm"),
    ({"annotations": {"a": "docker"}}, "gvisor by default"),
    ({"annotations": {"a": "docker"}, "namespace": "kube-system"}, "docker by user-docker"),
    ({"annotations": {"a": "docker"}, "namespace": "plain"}, "docker by user-docker"),  # lowers nothing there
    ({"annotations": {"a": "vm"}, "host_network": True}, "refused by user-vm"),
    ({"name": "dev-1"}, "gvisor by default"),
    ({"name": "dev-1", "namespace": "kube-system"}, "docker by marked"),
    # floors: the highest that fits
    ({"namespace": "safe-1"}, "gvisor by default"),
    ({"namespace": "safe-vm"}, "refused by floor"),
    ({"namespace": "safe-vm", "handler": "vm"}, "vm by handler:vm"),
    ({"namespace": "plainer"}, "docker by plain"),
]


@pytest.mark.parametrize(("pod", "expected"), STEPS)
def test_order_of_steps(pod: dict[str, Any], expected: str) -> None:
    assert outcome(decide(policy(ORDERED), PodFacts(**pod))) == expected


def test_floor_holds_against_a_handler() -> None:
    found = policy("handlers: {d: docker}\nfloors: {'*': vm}\ndefault: vm")
    verdict = decide(found, PodFacts(handler="d", namespace="n"))
    assert outcome(verdict) == "refused by floor"
    assert 'The RuntimeClass handler "d" asks for it.' in verdict.reason
    assert "namespace n has the floor vm, and docker gives shared-kernel" in verdict.reason


def test_options_travel_with_what_chose_the_runtime() -> None:
    found = policy(ORDERED)
    assert decide(found, PodFacts(handler="tuned")).options == {"cpus": 2}
    assert decide(found, PodFacts(annotations={"a": "vm"})).options == {"kernel": "custom"}
    assert decide(found, PodFacts()).options == {}


def test_passed_over_rules_are_named_in_the_reason() -> None:
    """A user whose annotation was not followed can read why."""
    verdict = decide(policy(ORDERED), PodFacts(annotations={"a": "docker"}, namespace="default"))
    assert verdict.reason == (
        'No rule matches, so the default applies. "user-docker" was passed over: it would lower isolation below '
        "sandboxed, and the namespace default is not trusted."
    )


def test_a_missing_label_cannot_lower_isolation_either() -> None:
    """A rule that users leave by writing something protects them all the same."""
    text = "rules: [{name: r, match: {not: {labels: {light: 'yes'}}}, runtime: vm}]\ndefault: docker\ntrusted: [t]"
    pod = PodFacts(labels={"light": "yes"})
    verdict = decide(policy(text), pod)
    assert outcome(verdict) == "vm by r"
    assert '"default" was passed over' in verdict.reason
    assert outcome(decide(policy(text), PodFacts(labels={"light": "yes"}, namespace="t"))) == "docker by default"


def test_default_may_refuse() -> None:
    verdict = decide(
        policy("rules: [{name: r, match: {privileged: true}, runtime: docker}]\ndefault: {refuse: ask us}"), PodFacts()
    )
    assert outcome(verdict) == "refused by default"
    assert "ask us" in verdict.reason


# --------------------------------------------------------------------------------------------------------------- hooks
def vote(plugin: str, runtime: str) -> Vote:
    return Vote(plugin=plugin, runtime=runtime, reason="because", counted=False)


VOTES = [
    # (votes, pod, outcome, what is said of the votes)
    ([vote("good", "vm")], {}, "vm by hook:good", ["counted"]),
    ([vote("bad", "vm")], {}, "gvisor by default", ["may_override"]),
    ([vote("bad", "vm"), vote("good", "vm")], {}, "vm by hook:good", ["may_override", "counted"]),
    ([vote("good", "nothing")], {}, "gvisor by default", ["not loaded"]),
    ([vote("good", "docker")], {}, "gvisor by default", ["lowers isolation"]),
    ([vote("good", "docker")], {"namespace": "kube-system"}, "docker by hook:good", ["counted"]),
    ([vote("good", "docker")], {"namespace": "safe-1"}, "gvisor by default", ["below the floor"]),
    ([vote("good", "vm")], {"host_pid": True}, "gvisor by default", ["hostPID cannot be had"]),
    ([vote("good", "vm")], {"handler": "raw", "namespace": "kube-system"}, "docker by handler:raw", []),
    ([vote("good", "vm")], {"name": "evil"}, "refused by evil", []),
]


@pytest.mark.parametrize(("votes", "pod", "expected", "said"), VOTES)
def test_votes(votes: list[Vote], pod: dict[str, Any], expected: str, said: list[str]) -> None:
    verdict = decide(policy(ORDERED), PodFacts(**pod), lambda: votes)
    assert outcome(verdict) == expected
    assert len(verdict.votes) == len(said)
    for counted, words in zip(verdict.votes, said, strict=True):
        assert counted.counted is (words == "counted")
        assert words == "counted" or words in counted.reason


def test_the_first_allowed_vote_wins() -> None:
    found = policy("hooks: {may_override: [a, b]}\ndefault: docker")
    verdict = decide(found, PodFacts(), lambda: [vote("a", "gvisor"), vote("b", "vm")])
    assert outcome(verdict) == "gvisor by hook:a"
    assert [v.counted for v in verdict.votes] == [True, False]
    assert "a was first" in verdict.votes[1].reason


# ------------------------------------------------------------------------------------------------------------- explain
def test_explanation_names_each_rule_and_its_first_failing_condition() -> None:
    found = explain(policy(ORDERED), PodFacts(annotations={"a": "docker"}, namespace="plain-x"))
    assert [(rule.rule, rule.outcome) for rule in found.rules] == [
        ("evil", "no match"),
        ("user-docker", "matched"),
        ("user-vm", "not reached"),
        ("marked", "not reached"),
        ("plain", "not reached"),
    ]
    assert found.rules[0].failures[0].found == "pod"
    assert found.rules[2].failures[0].wanted == "vm"
    assert found.rules[2].failures[0].found == '"docker"'
    assert found.rules[4].note == "it would match"
    as_dict = found.as_dict()
    assert as_dict["rules"][0]["failures"][0]["matcher"] == "name"
    assert as_dict["is_trusted"] is False


def test_explanation_of_a_handler_shows_that_rules_have_no_say() -> None:
    found = explain(policy(ORDERED), PodFacts(handler="vm", namespace="plain"))
    assert {rule.outcome for rule in found.rules if rule.leads_to != "refuse"} == {"not reached"}


def test_hostile_text_is_shortened_and_made_harmless() -> None:
    found = policy("rules: [{name: r, match: {labels: {a: x}}, runtime: docker}]\ndefault: docker")
    shown = explain(found, PodFacts(name="n\x1b[2J" * 100, labels={"a": "\x1b[31m" * 10000})).as_dict()
    assert "\x1b" not in str(shown)
    assert len(str(shown)) < 2000


def test_a_long_value_cannot_make_a_pattern_slow() -> None:
    """Annotations may hold 256 KiB that a user chose to be as unfavourable as possible."""
    found = policy("rules: [{name: r, match: {annotations: {a: '*a*a*a*a*a*a*b'}}, refuse: no}]\ndefault: docker")
    assert not decide(found, PodFacts(annotations={"a": "a" * (256 << 10)})).is_refused
