"""Mistakes in a policy file: each is found at load, at its line and column, with what was probably meant."""

from __future__ import annotations

import pytest

from dispatcher.model import Isolation
from dispatcher.policy import Loaded, RuntimeTraits, load_policy
from dispatcher.yaml_marks import YamlError

RUNTIMES = {
    "docker": RuntimeTraits(isolation=Isolation.SHARED_KERNEL, option_keys=frozenset({"init"})),
    "vm": RuntimeTraits(isolation=Isolation.VM, option_keys=frozenset({"cpus", "kernel"})),
}


def load(text: str, plugins: tuple[str, ...] | None = None) -> Loaded:
    return load_policy(text, "p.yaml", RUNTIMES, plugins=plugins)


def problems(text: str) -> list[str]:
    with pytest.raises(YamlError) as caught:
        load(text)
    return str(caught.value).splitlines()


def rules(*lines: str) -> str:
    return "\n".join(["apiVersion: dispatcher/v1", "default: docker", "rules:", *(f"- {line}" for line in lines)])


# (rule in line 4, beginning in column 3; what is said)
ONE_RULE = [
    ("{name: a, match: {privileged: true}, runtime: dokcer}", '4:49: rules[0].runtime: no runtime "dokcer" is loaded or declared in runtimes; known: docker, vm. Did you mean "docker"?'),
    ("{name: a, match: {privileged: yes}, runtime: vm}", "4:33: rules[0].match.privileged: should be a valid boolean, not 'yes'"),
    ("{name: a, match: {privilegd: true}, runtime: vm}", '4:21: rules[0].match.privilegd: unknown key. Did you mean "privileged"?'),
    ("{name: a, match: {hostnetwork: true}, runtime: vm}", '4:21: rules[0].match.hostnetwork: unknown key. Did you mean "hostNetwork"?'),
    ("{name: a, match: {labels: {a: true}}, runtime: vm}", '4:33: rules[0].match.labels.a: quote this: the value is text, such as "true"'),
    ("{name: a, match: {namespace: []}, runtime: vm}", "4:32: rules[0].match.namespace: a pattern, a list of patterns, or other_than with a list is expected here"),
    ("{name: a, match: [], runtime: vm}", "4:20: rules[0].match: List should have at least 1 item after validation, not 0"),
    ("{name: a, match: {memory: {at_most: 12 apples}}, runtime: vm}", "4:39: rules[0].match.memory.at_most: '12 apples' is not a quantity such as \"500m\", \"2\" or \"64Mi\""),
    ("{name: a, match: {privileged: true}}", "4:3: rules[0]: a rule has either runtime or refuse"),
    ("{name: a, match: {privileged: true}, runtime: vm, refuse: no}", "4:3: rules[0]: a rule has either runtime or refuse"),
    ("{name: a, match: {privileged: true}, refuse: no, with: {cpus: 1}}", "4:3: rules[0]: with and trusted_only belong to a rule that names a runtime"),
    ("{name: a, match: {privileged: true}, runtime: vm, with: {cpu: 1}}", '4:60: rules[0].with.cpu: the runtime "vm" has no option "cpu"; it has: cpus, kernel. Did you mean "cpus"?'),
    ("{name: a, match: {privileged: true}, runtime: vm, with: {cpus: [1]}}", "4:66: rules[0].with.cpus: an option is true, false, a number or a text"),
    ("{name: a, phase: contaner, match: {privileged: true}, refuse: no}", "4:20: rules[0].phase: 'contaner' is not one of sandbox, container. Did you mean \"container\"?"),
    ("{name: a, match: {image: 'docker.io/*'}, refuse: no}", "4:21: rules[0].match.image: image is known only when a container is created: this needs a rule with phase: container and refuse"),
    ("{name: a, match: {not: {devices: /dev/kvm}}, refuse: no}", "4:27: rules[0].match.not.devices: devices is known only when a container is created"),
    ("{name: a, match: [{privileged: true}, {not: [{capabilities: ALL}]}], refuse: no}", "4:49: rules[0].match[1].not[0].capabilities: capabilities is known only"),
    ("{name: a, phase: container, match: {image: 'docker.io/*'}, runtime: vm}", "4:62: rules[0].runtime: the runtime is chosen before containers are known: a rule of phase container can only refuse"),
    ("{name: a, phase: container, match: {image: busybox}, refuse: no}", '4:46: rules[0].match.image: "busybox" matches no image: write them in full, such as "docker.io/library/busybox:latest"'),
    ("{name: a, match: {handler: x}, runtime: vm}", "4:21: rules[0].match.handler: a pod with a handler is decided by the handlers map"),
    ("{name: a, match: {privileged: true, not: {privileged: true}}, refuse: no}", "4:20: rules[0].match: this can never match: its not covers all of the rest"),
    ("{name: default, match: {privileged: true}, refuse: no}", '4:10: rules[0].name: "default" is what decisions without a rule are called'),
    ("{name: 'a b', match: {privileged: true}, refuse: no}", "4:10: rules[0].name: 'a b' has to be 1 to 64 letters"),
]  # fmt: skip


@pytest.mark.parametrize(("rule", "said"), ONE_RULE)
def test_mistakes_in_a_rule(rule: str, said: str) -> None:
    found = problems(rules(rule))
    assert len(found) == 1, found
    assert found[0].startswith("p.yaml:" + said)


# (whole file; what is said)
FILES = [
    ("", ['1:1: the key "apiVersion" is missing', '1:1: the key "default" is missing']),
    ("apiVersion: v1\ndefault: docker", ["1:13: apiVersion: 'v1' is not one of dispatcher/v1."]),
    ("apiVersion: dispatcher/v1\ndefault: {}", ["2:10: default: either runtime or refuse is expected here"]),
    ("apiVersion: dispatcher/v1\ndefault: docer", ['2:10: default: no runtime "docer" is loaded or declared in runtimes; known: docker, vm. Did you mean "docker"?']),
    ("apiVersion: dispatcher/v1\ndefault: vm\nfloors: {a: vmm}", ["3:13: floors.a: 'vmm' is not one of shared-kernel, sandboxed, vm. Did you mean \"vm\"?"]),
    ("apiVersion: dispatcher/v1\ndefault: vm\nruntimes: {docker: vm}", ['3:20: runtimes.docker: the runtime "docker" gives shared-kernel, not vm']),
    ("apiVersion: dispatcher/v1\ndefault: vm\nhandlers: {Vm: vm}", ["3:16: handlers.Vm: 'Vm' is no name of a RuntimeClass handler"]),
    ("apiVersion: dispatcher/v1\ndefault: vm\nhandlers: {a: vn}", ['3:15: handlers.a: no runtime "vn"']),
    ("apiVersion: dispatcher/v1\ndefault: vm\nhandlers: {a: {runtime: vm, with: {x: 1}}}", ['3:36: handlers.a.with.x: the runtime "vm" has no option "x"']),
    ("apiVersion: dispatcher/v1\ndefault: vm\ndefault: docker", ["3:1: default: this key stands already in line 2"]),
    ("apiVersion: dispatcher/v1\ndefault: vm\nrule: []", ['3:1: rule: unknown key. Did you mean "rules"?']),
    ("apiVersion: dispatcher/v1\ndefault: [vm", ["3:1: while parsing a flow sequence"]),
    ("apiVersion: dispatcher/v1\n---\ndefault: vm", ["2:1: only one document per file is allowed"]),
    ("- a", ["1:1: "]),
]  # fmt: skip


@pytest.mark.parametrize(("text", "said"), FILES)
def test_mistakes_in_a_file(text: str, said: list[str]) -> None:
    found = problems(text)
    assert len(found) == len(said), found
    for line, words in zip(found, said, strict=True):
        assert line.startswith("p.yaml:" + words)


def test_all_mistakes_come_at_once_in_order() -> None:
    found = problems(
        rules(
            "{name: a, match: {namespace: 'x*'}, runtime: vm}",
            "{name: a, match: {namespace: xy}, runtime: vmm}",
            "{name: b, phase: container, match: {seccomp_unconfined: true}, runtime: vm}",
        )
    )
    assert [line.split(": ")[0] for line in found] == ["p.yaml:5:3", "p.yaml:5:10", "p.yaml:5:46", "p.yaml:6:66"]
    assert 'a rule "a" stands already in line 4' in found[1]


SHADOWS = [
    (["{name: a, runtime: vm}", "{name: b, match: {privileged: true}, runtime: vm}"], "b", "stands before it"),
    (["{name: a, match: {namespace: 'x*'}, runtime: vm}", "{name: b, match: {namespace: [xa, xb]}, runtime: docker}"], "b", "stands before it"),
    (["{name: a, match: {privileged: true}, runtime: vm}", "{name: b, match: {privileged: true}, refuse: no}"], "a", "refusals are asked first"),
    (["{name: a, phase: container, refuse: no}", "{name: b, phase: container, match: {privileged: true}, refuse: no}"], "b", "stands before it"),
    (["{name: a, match: {labels: {k: {exists: true}}}, runtime: vm}", "{name: b, match: {labels: {k: x}}, runtime: docker}"], "b", "stands before it"),
]  # fmt: skip


@pytest.mark.parametrize(("lines", "name", "why"), SHADOWS)
def test_unreachable_rules(lines: list[str], name: str, why: str) -> None:
    found = problems(rules(*lines))
    assert len(found) == 1
    assert f'the rule "{name}" is never reached' in found[0]
    assert why in found[0]


NO_SHADOWS = [
    # a rule that can be passed over leaves something to later ones
    ["{name: a, match: {privileged: true}, runtime: docker, trusted_only: true}", "{name: b, match: {privileged: true}, runtime: vm}"],
    ["{name: a, match: {labels: {k: x}}, runtime: docker}", "{name: b, match: {labels: {k: x}}, runtime: vm}"],
    # phases do not meet
    ["{name: a, match: {privileged: true}, refuse: no}", "{name: b, phase: container, match: {privileged: true}, refuse: no}"],
    ["{name: a, match: {namespace: 'a?'}, runtime: vm}", "{name: b, match: {namespace: 'a*'}, runtime: docker}"],
]  # fmt: skip


@pytest.mark.parametrize("lines", NO_SHADOWS)
def test_rules_that_can_be_reached(lines: list[str]) -> None:
    load(rules(*lines))


TESTS = [
    ("{name: t, expect: {runtime: vm}}", 'tests[0]: test "t": expected vm, but it goes to docker.'),
    ("{name: t, pod: {privileged: true}, expect: {runtime: vm}}", "expected vm, but it is refused."),
    ("{name: t, expect: {refused: true}}", "expected a refusal, but it goes to docker."),
    ("{name: t, expect: {runtime: docker, rule: strict}}", 'expected the rule "strict", but "default" decided.'),
    ("{name: t, container: {image: evil.io/x}, expect: {runtime: docker}}", 'expected docker, but it is refused. Rule "images" refuses it'),
    ("{name: t, expect: {runtime: docker, rule: stricd}}", 'there is no rule "stricd". Did you mean "strict"?'),
    ("{name: t, expect: {}}", "either runtime or refused: true is expected here"),
    ("{name: t, pod: {hostnet: true}, expect: {runtime: docker}}", "unknown key."),
]  # fmt: skip


@pytest.mark.parametrize(("case", "said"), TESTS)
def test_a_failing_test_of_the_file_keeps_it_out(case: str, said: str) -> None:
    text = rules(
        "{name: strict, match: {privileged: true}, refuse: no}",
        "{name: images, phase: container, match: {image: 'evil.io/*'}, refuse: no}",
    )
    found = problems(f"{text}\ntests:\n- {case}")
    assert len(found) == 1, found
    assert found[0].startswith("p.yaml:7:")
    assert said in found[0]


def test_passing_tests_let_it_in() -> None:
    load(
        rules("{name: images, phase: container, match: {image: 'evil.io/*'}, refuse: no}")
        + "\nhooks: {may_override: [p]}\ntests:"
        "\n- {name: a, expect: {runtime: docker, rule: default}}"
        "\n- {name: b, container: {image: evil.io/x}, expect: {refused: true, rule: images}}"
        "\n- {name: c, votes: [{plugin: p, runtime: vm}], expect: {runtime: vm, rule: 'hook:p'}}"
    )


def test_a_declared_runtime_may_be_missing() -> None:
    loaded = load("apiVersion: dispatcher/v1\nruntimes: {kata: vm}\ndefault: {runtime: kata, with: {anything: 1}}")
    assert len(loaded.warnings) == 1
    assert 'the runtime "kata" is not loaded here' in str(loaded.warnings[0])


WARNINGS = [
    ("trusted: ['*']", "every namespace is trusted"),
    ("floors: {'*': vm}\nrules: [{name: a, match: {privileged: true}, runtime: docker}]", 'leads below the floor "*" (vm)'),
    ("rules: [{name: a, match: {hostPID: true}, runtime: vm}]", "host namespaces cannot be had in vm"),
    ("hooks: {may_override: [goood]}", 'no plugin "goood" with hooks is loaded. Did you mean "good"?'),
]  # fmt: skip


@pytest.mark.parametrize(("text", "said"), WARNINGS)
def test_warnings(text: str, said: str) -> None:
    loaded = load(f"apiVersion: dispatcher/v1\ndefault: vm\n{text}", plugins=("good",))
    assert len(loaded.warnings) == 1
    assert said in str(loaded.warnings[0])
