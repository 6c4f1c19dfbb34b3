"""Policy files from anywhere: each is refused with places and sentences, or decides every pod as promised."""

from __future__ import annotations

import json
import random
import re
from typing import Any

import pytest

from dispatcher.model import Isolation, Vote
from dispatcher.policy import RuntimeTraits, decision, explain, load, load_policy, matching
from dispatcher.policy.decision import Policy, check_container, decide
from dispatcher.policy.facts import ContainerFacts, HostPath, PodFacts
from dispatcher.yaml_marks import YamlError
from tests.fuzz.harness import Fuzzer, finds

pytestmark = [pytest.mark.fuzz, pytest.mark.timeout(0)]

RUNTIMES = {
    "docker": RuntimeTraits(isolation=Isolation.SHARED_KERNEL, option_keys=frozenset({"init"})),
    "gvisor": RuntimeTraits(isolation=Isolation.SANDBOXED),
    "vm": RuntimeTraits(isolation=Isolation.VM, option_keys=frozenset({"cpus"})),
}
WORDS = [
    "a",
    "ab",
    "kube-system",
    "docker",
    "gvisor",
    "vm",
    "kata",
    "*",
    "a*",
    "?b",
    "[a-z]",
    "(",
    "",
    "docker.io/*",
    "/etc",
]
KEYS = [
    *("apiVersion", "runtimes", "handlers", "floors", "trusted", "hooks", "may_override", "rules", "default", "tests"),
    *("name", "description", "phase", "match", "runtime", "with", "refuse", "trusted_only", "not", "expect", "refused"),
    *("namespace", "labels", "annotations", "handler", "privileged", "hostNetwork", "hostPID", "hostIPC", "userns"),
    *("sysctls", "qos", "cpu", "memory", "at_least", "at_most", "image", "capabilities", "devices", "host_mounts"),
    *("seccomp_unconfined", "exists", "other_than", "any_of", "pod", "container", "votes", "plugin", "rule", "<<", "k"),
]
FLAGS = ["privileged", "hostNetwork", "hostPID", "hostIPC", "userns"]
SANDBOX = ["namespace", "name", "labels", "annotations", "sysctls", "qos", "cpu", "memory", *FLAGS]
CONTAINER = ["image", "capabilities", "devices", "host_mounts", "seccomp_unconfined", "runtime"]
VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, 1, -1, 1.5, 10**30, "dispatcher/v1", "sandbox", "container", "shared-kernel", "sandboxed"),
    *("1Gi", "500m", "1e99", "burstable", "true", "yes", "\u0000", "\ud800", "ä" * 300, [], {}, [[]], [{}], *WORDS),
)
TOKENS = [key.encode() + b": " for key in KEYS]
TOKENS += [json.dumps(value).encode() for value in VALUES]
TOKENS += [b"- ", b"&x ", b"*x", b"!!int ", b"!x ", b"|\n ", b"---\n", b"...\n", b"{", b"}", b"[", b"]", b"\t", b"\xff"]
TOKENS += [b"? ", b": ", b"<<: ", b"#", b"%YAML 1.1\n", b"\n  ", b"[" * 70, b"'", b'"']

PODS = [
    PodFacts(),
    PodFacts(namespace="kube-system", name="ab", labels={"k": "a"}, annotations={"k": "ab"}),
    PodFacts(namespace="a", labels={"k": "a", "a": ""}, annotations={"k": "docker"}, sysctls=("a", "net.x")),
    PodFacts(namespace="ab", privileged=True, host_network=True, host_pid=True, host_ipc=True, qos="burstable"),
    PodFacts(
        namespace="ab", annotations={"k": "vm"}, userns=True, cpu_millis=500, memory_bytes=1 << 30, qos="besteffort"
    ),
    PodFacts(namespace="[a-z]", handler="a"),
    PodFacts(namespace="a", handler="docker", labels={"k": "a" * 1000}),
]
CONTAINERS = [
    ContainerFacts(),
    ContainerFacts(
        images=("docker.io/library/a:latest",),
        privileged=True,
        capabilities=("ALL",),
        devices=(HostPath("/dev/x"), "a.b/c=d"),
        host_mounts=(HostPath("/etc"), HostPath("/")),
        seccomp_unconfined=True,
        runtime="docker",
    ),
]
VOTES = [
    Vote(plugin=plugin, runtime=runtime, reason="", counted=False) for plugin in "ak" for runtime in ("docker", "vm")
]


def check_file(data: bytes) -> str:
    """The property: YamlError that places each problem in the file, or a policy that keeps its promises."""
    try:
        loaded = load_policy(data, "p.yaml", RUNTIMES, plugins=("a",))
    except YamlError as error:
        return _look_at(error, data)
    assert load_policy(data, "p.yaml", RUNTIMES).policy.hash == loaded.policy.hash
    for warning in loaded.warnings:
        assert warning.line >= 1
    answers = [_hold(loaded.policy, pod) for pod in PODS]
    return f"{len(loaded.file.rules) > 1} {bool(loaded.policy.container_rules)} {''.join(sorted(set(answers)))}"


def _look_at(error: YamlError, data: bytes) -> str:
    assert error.problems
    lines = len(data.splitlines()) + 2
    for problem in error.problems:
        assert problem.file == "p.yaml"
        assert 1 <= problem.line <= lines, problem
        assert problem.column >= 1
        assert problem.message
        # A file is text of its operator, yet a terminal has to survive it.
        assert len(problem.message) < 5000
    # What is said, without the names in it: so that new names are no news.
    said = error.problems[0].message.rpartition(": ")[2]
    first = re.sub(r"'[^']*'|\"[^\"]*\"|[^a-z ]+", "", said)
    return first[:24]


def _hold(policy: Policy, pod: PodFacts) -> str:
    verdict = decide(policy, pod, lambda: VOTES)
    explained = explain(policy, pod, VOTES)
    json.dumps(explained.as_dict())
    assert (explained.runtime, explained.rule) == (verdict.runtime, verdict.rule)
    assert verdict.reason
    for container in CONTAINERS:
        refusal = check_container(policy, pod, container)
        assert refusal is None or refusal.is_refused
    if verdict.is_refused:
        return "no"
    floor = policy.floor_for(pod.namespace)
    assert floor is None or verdict.isolation >= floor.level
    assert not (verdict.isolation is Isolation.VM and pod.host_namespaces)
    if not policy.is_trusted(pod.namespace):
        plain = decide(policy, pod.without_user_input())
        assert plain.is_refused or verdict.isolation >= plain.isolation
    return verdict.runtime[:1]


def generate(chance: random.Random) -> bytes:
    """A policy that is nearly right."""
    pick = chance.choice

    def patterns() -> Any:
        if chance.random() < 0.03:
            return pick(VALUES)
        words = [pick(WORDS) for _ in range(chance.randrange(1, 3))]
        return pick([words[0], words, {"other_than": words}])

    def match(phase: str, depth: int) -> Any:
        found: dict[str, Any] = {}
        for _ in range(chance.randrange(3)):
            key = pick(SANDBOX + CONTAINER if phase == "container" or chance.random() < 0.03 else SANDBOX)
            if key in ("labels", "annotations"):
                found[key] = {"k": pick([patterns(), {"exists": pick([True, False])}])}
            elif key in ("cpu", "memory"):
                found[key] = {pick(["at_least", "at_most"]): pick([1, "1Gi", "500m"])}
            elif key in FLAGS or key == "seccomp_unconfined":
                found[key] = pick([True, False])
            elif key == "qos":
                found[key] = pick(["burstable", ["guaranteed", "besteffort"]])
            else:
                found[key] = patterns()
        if depth and chance.random() < 0.3:
            found["not"] = match(phase, depth - 1)
        return [found, match(phase, 0)] if depth == 2 and chance.random() < 0.2 else found

    rules = []
    for index in range(chance.randrange(4)):
        phase = pick(["sandbox", "sandbox", "container"])
        rule: dict[str, Any] = {"name": f"r{index}", "phase": phase, "match": match(phase, 2)}
        if phase == "container" or chance.random() < 0.2:
            rule["refuse"] = "no"
        else:
            rule["runtime"] = pick(["docker", "gvisor", "vm", "kata"])
            rule["trusted_only"] = pick([True, False])
        if chance.random() < 0.1:
            rule[pick(KEYS)] = pick(VALUES)
        rules.append(rule)
    file: dict[str, Any] = {
        "apiVersion": "dispatcher/v1",
        "runtimes": {"kata": pick(["vm", "sandboxed"])},
        "rules": rules,
        "default": pick(["docker", "vm", "gvisor", {"refuse": "no"}]),
        "trusted": pick([[], ["kube-system"], ["a"]]),
        "floors": pick([{}, {"a*": "vm"}, {"*": "sandboxed"}]),
        "handlers": pick([{}, {"a": "docker"}, {"docker": {"runtime": "vm", "with": {"cpus": 1}}}]),
        "hooks": {"may_override": pick([[], ["a"], ["k"]])},
    }
    if chance.random() < 0.2:
        file["tests"] = [{"name": "t", "pod": {"privileged": True}, "expect": {"runtime": pick(["docker", "vm"])}}]
    if chance.random() < 0.2:
        file[pick(KEYS)] = pick(VALUES)
    return json.dumps(file, indent=chance.choice([None, 1])).encode()


def make_fuzzer(**changes: Any) -> Fuzzer:
    """The fuzzer of policy files."""
    return Fuzzer(check=check_file, corpus="policy", tokens=TOKENS, generate=generate, **changes)


def test_policy_files_are_refused_or_keep_their_promises() -> None:
    """Nothing but YamlError is ever raised, and a policy that loads never breaks a rule about isolation."""
    print(make_fuzzer().run())


def _data_at_without_care(document: Any, path: Any) -> object:
    data = document.data
    for part in path:
        data = data[part]
    return data


def _pass_over_nothing(*_: object) -> str:
    return ""


def _glob_without_escape(pattern: str) -> Any:
    return re.compile(pattern.replace("*", ".*").replace("?", ".") + "$").match


PLANTED = [
    (load, "_data_at", _data_at_without_care),  # a look-up that forgets what may be absent
    (decision, "_pass_over", _pass_over_nothing),  # users lower isolation
    (matching, "glob", _glob_without_escape),  # patterns as regular expressions
]


@pytest.mark.parametrize(("module", "name", "replacement"), PLANTED, ids=[name for _, name, _ in PLANTED])
def test_planted_faults_are_found(monkeypatch: pytest.MonkeyPatch, module: Any, name: str, replacement: Any) -> None:
    """Each is caught within seconds."""
    monkeypatch.setattr(module, name, replacement)
    finds(make_fuzzer(seconds=30, seed=1), name)
