"""What holds for every policy and every pod."""

from __future__ import annotations

import json
from dataclasses import replace

from hypothesis import assume, given, settings
from hypothesis import strategies as st

from dispatcher.model import Isolation, Vote
from dispatcher.policy import load_policy
from dispatcher.policy.decision import Policy, check_container, decide, trace
from dispatcher.policy.facts import ContainerFacts, PodFacts
from dispatcher.policy.matching import Subject, compile_match, glob
from dispatcher.policy.schema import Match
from dispatcher.policy.shadows import is_contradiction
from dispatcher.yaml_marks import Problem, YamlError
from tests.unit.policy import strategies as mine

# The same examples in every run: a failure here is a finding, never chance.
MANY = settings(max_examples=80, deadline=None, derandomize=True)


def load(text: str) -> Policy:
    policy: Policy | None = None
    problems: tuple[Problem, ...] = ()
    try:
        policy = load_policy(text, "policy.yaml", mine.RUNTIMES).policy
    except YamlError as error:
        problems = error.problems
    # The only thing wrong with these files can be rules that never act.
    assert all("never reached" in str(problem) or "never match" in str(problem) for problem in problems)
    assume(policy is not None)
    assert policy is not None
    return policy


votes = st.lists(
    st.builds(
        Vote,
        plugin=st.sampled_from(["p", "q", "r"]),
        runtime=st.sampled_from([*mine.RUNTIMES, "absent"]),
        reason=st.just(""),
        counted=st.just(False),
    ),
    max_size=3,
)


@MANY
@given(mine.policy_texts(), mine.pods, votes)
def test_users_never_lower_isolation(text: str, pod: PodFacts, cast: list[Vote]) -> None:
    """Outside trusted namespaces, labels and annotations never give a pod less than it has without them."""
    policy = load(text)
    assume(not policy.is_trusted(pod.namespace))
    with_words = decide(policy, pod, lambda: cast)
    without = decide(policy, pod.without_user_input(), list)
    if not with_words.is_refused and not without.is_refused:
        assert with_words.isolation >= without.isolation


@MANY
@given(mine.policy_texts(), mine.pods, votes)
def test_no_result_is_below_the_floor_or_contradicts_the_pod(text: str, pod: PodFacts, cast: list[Vote]) -> None:
    policy = load(text)
    verdict = decide(policy, pod, lambda: cast)
    if verdict.is_refused:
        assert verdict.reason
        return
    floor = policy.floor_for(pod.namespace)
    assert floor is None or verdict.isolation >= floor.level
    assert not (verdict.isolation is Isolation.VM and pod.host_namespaces)
    assert verdict.isolation is policy.isolation_of(verdict.runtime)
    assert all(vote.counted is False for vote in verdict.votes) or verdict.rule.startswith("hook:")


@MANY
@given(mine.policy_texts(), mine.pods)
def test_refusing_rules_hold_whatever_else_is_asked(text: str, pod: PodFacts) -> None:
    """A pod that a rule refuses is refused with any handler, too."""
    policy = load(text)
    if any(rule.match.first_match(Subject(pod=pod)) is not None for rule in policy.refusals):
        for handler in ("", "h", "t"):
            changed = replace(pod, handler=handler)
            still = any(rule.match.first_match(Subject(pod=changed)) is not None for rule in policy.refusals)
            assert decide(policy, changed).is_refused is True or not still


@MANY
@given(mine.policy_texts(), mine.pods)
def test_the_explanation_agrees_with_the_decision(text: str, pod: PodFacts) -> None:
    policy = load(text)
    verdict = decide(policy, pod)
    assert verdict == decide(policy, pod)
    traces = trace(policy, pod, verdict)
    matched = [item.rule for item in traces if item.outcome == "matched"]
    named = {rule.name for rule in (*policy.refusals, *policy.rules)}
    if verdict.rule in named and not verdict.passed_over:
        assert matched == [verdict.rule]
    for item in traces:
        assert bool(item.failures) == (item.outcome == "no match" or (item.outcome == "not reached" and not item.note))


@MANY
@given(mine.any_match.map(Match.model_validate), mine.pods, mine.containers)
def test_contradictions_are_never_claimed_wrongly(match: Match, pod: PodFacts, container: ContainerFacts) -> None:
    if is_contradiction(match):
        assert compile_match([match], of_container=False).first_match(Subject(pod=pod, container=container)) is None


@MANY
@given(mine.any_match.map(Match.model_validate), mine.pods, mine.containers)
def test_not_is_the_opposite(match: Match, pod: PodFacts, container: ContainerFacts) -> None:
    subject = Subject(pod=pod, container=container)
    plain = compile_match([match], of_container=True).first_match(subject)
    negated = compile_match([Match.model_validate({"not": [match]})], of_container=True).first_match(subject)
    assert (plain is None) is (negated is not None)


@MANY
@given(st.text("ab*?[]!-^$.\\", max_size=8), st.text("ab[]!-^$.\\\n", max_size=8))
def test_globs_agree_with_a_plain_definition(pattern: str, text: str) -> None:
    """`*` is any text, `?` one character, everything else itself."""

    def agrees(rest: str, left: str) -> bool:
        if not rest:
            return not left
        if rest[0] == "*":
            return any(agrees(rest[1:], left[cut:]) for cut in range(len(left) + 1))
        return bool(left) and rest[0] in ("?", left[0]) and agrees(rest[1:], left[1:])

    assert glob(pattern)(text) is agrees(pattern, text)


@MANY
@given(mine.any_match, mine.pods, mine.containers)
def test_container_rules_only_refuse(match: dict[str, object], pod: PodFacts, container: ContainerFacts) -> None:
    file = {
        "apiVersion": "dispatcher/v1",
        "rules": [{"name": "r", "phase": "container", "match": match, "refuse": "no"}],
        "default": "docker",
    }
    try:
        policy = load_policy(json.dumps(file), "policy.yaml", mine.RUNTIMES).policy
    except YamlError:
        return
    verdict = check_container(policy, pod, container)
    assert verdict is None or verdict.is_refused
