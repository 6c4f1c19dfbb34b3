"""Rules that never act: every claim is true, over all pairs of conditions of a small world."""

from __future__ import annotations

import itertools
from typing import Any

import pytest

from dispatcher.policy.facts import ContainerFacts, HostPath, PodFacts
from dispatcher.policy.matching import Subject, compile_match
from dispatcher.policy.schema import Match
from dispatcher.policy.shadows import covers, is_contradiction

WORDS = ["a", "ab", "abc", "b"]
GLOBS: list[Any] = [
    "a",
    "ab",
    "a*",
    "ab*",
    "*",
    "?",
    "*b",
    "a?c",
    ["a", "b"],
    {"other_than": ["a"]},
    {"other_than": ["a*", "b"]},
]
PATHS = ["/", "/etc", "/etc/a", "/etc/a/b", "/data", "/database", "/dev/x"]
PATH_GLOBS: list[Any] = [
    "/etc",
    "/etc/*",
    "/etc/a",
    "/data*",
    "/*/a",
    "*",
    "/d?",
    ["/etc", "/data"],
    {"other_than": ["/etc"]},
]
ENTRIES: list[Any] = [{"k": glob} for glob in GLOBS] + [{"k": {"exists": True}}, {"k": {"exists": False}}, {"l": "a"}]
RANGES = [{}, {"at_least": 1}, {"at_least": 2}, {"at_most": 1}, {"at_most": 2}, {"at_least": 1, "at_most": 2}]

CONDITIONS: dict[str, list[Any]] = {
    "namespace": GLOBS,
    "labels": ENTRIES,
    "privileged": [True, False],
    "hostNetwork": [True, False],
    "sysctls": GLOBS,
    "qos": ["guaranteed", ["guaranteed", "burstable"], ["burstable"]],
    "memory": RANGES,
    "image": [
        "docker.io/*",
        "*:latest",
        "*",
        "reg.io/a*",
        {"other_than": ["docker.io/*"]},
        ["reg.io/*", "docker.io/*"],
    ],
    "capabilities": ["SYS_ADMIN", "cap_sys_admin", "SYS_*", "*", ["NET_RAW", "SYS_ADMIN"], {"other_than": ["NET_RAW"]}],
    "host_mounts": PATH_GLOBS,
    "devices": PATH_GLOBS,
    "seccomp_unconfined": [True, False],
}


def some(words: list[str]) -> list[tuple[str, ...]]:
    return [(), *itertools.combinations(words, 1), *itertools.combinations(words, 2)]


def subjects(key: str) -> list[Subject]:
    """Every pod or container that differs in what a condition asks for."""
    flags = [False, True]
    pods: dict[str, list[PodFacts]] = {
        "namespace": [PodFacts(namespace=word) for word in WORDS],
        "labels": [PodFacts(labels=labels) for word in ["", *WORDS] for labels in ({"k": word}, {"l": word}, {})],
        "privileged": [PodFacts(privileged=flag) for flag in flags],
        "hostNetwork": [PodFacts(host_network=flag) for flag in flags],
        "sysctls": [PodFacts(sysctls=found) for found in some(WORDS)],
        "qos": [PodFacts(qos=qos) for qos in ("", "guaranteed", "burstable", "besteffort")],
        "memory": [PodFacts(memory_bytes=size) for size in (None, 0, 1, 2, 3)],
    }
    boxes: dict[str, list[ContainerFacts]] = {
        "image": [
            ContainerFacts(images=names)
            for names in some(["docker.io/library/a:latest", "reg.io/a/b:1", "reg.io/b:latest"])
            if names
        ],
        "capabilities": [ContainerFacts(capabilities=found) for found in some(["SYS_ADMIN", "NET_RAW", "ALL"])],
        "host_mounts": [ContainerFacts(host_mounts=tuple(map(HostPath, found))) for found in some(PATHS)],
        "devices": [ContainerFacts(devices=found) for found in some(["vendor.com/gpu=0", *PATHS])],
        "seccomp_unconfined": [ContainerFacts(seccomp_unconfined=flag) for flag in flags],
    }
    if key in pods:
        return [Subject(pod=pod) for pod in pods[key]]
    return [Subject(pod=PodFacts(), container=box) for box in boxes[key]]


def forms(key: str) -> list[list[Match]]:
    """Each value of a condition alone, negated, and as one of two alternatives."""
    plain = [{key: value} for value in CONDITIONS[key]]
    shapes: list[list[dict[str, Any]]] = [[match] for match in plain]
    shapes += [[{"not": match}] for match in plain]
    shapes += [[{**one, "not": other}] for one, other in itertools.pairwise(plain)]
    shapes += [[{"not": [one, other]}] for one, other in zip(plain, plain[2:], strict=False)]
    shapes += [[one, other] for one, other in itertools.pairwise(plain)]
    shapes += [[{**match, "hostPID": True}] for match in plain[:3]]
    return [[Match.model_validate(match) for match in shape] for shape in shapes]


@pytest.mark.parametrize("key", CONDITIONS)
def test_every_claim_of_coverage_is_true(key: str) -> None:
    world = subjects(key)
    shapes = forms(key)
    hits = []
    for shape in shapes:
        compiled = compile_match(shape, of_container=key == "devices")
        hits.append({index for index, subject in enumerate(world) if compiled.first_match(subject) is not None})
    claims = 0
    for (wide, wide_hits), (narrow, narrow_hits) in itertools.product(zip(shapes, hits, strict=True), repeat=2):
        if covers(wide, narrow):
            claims += 1
            assert narrow_hits <= wide_hits, (wide, narrow)
    assert claims >= len(shapes), "at least every match covers itself"


@pytest.mark.parametrize("key", CONDITIONS)
def test_every_claim_of_contradiction_is_true(key: str) -> None:
    for shape in forms(key):
        if len(shape) == 1 and is_contradiction(shape[0]):
            compiled = compile_match(shape, of_container=False)
            assert all(compiled.first_match(subject) is None for subject in subjects(key)), shape


FOUND = [
    ({"namespace": "a*"}, {"namespace": "abc", "privileged": True}),
    ({"namespace": ["a", "b"]}, {"namespace": "b"}),
    ({}, {"privileged": True}),
    ({"privileged": True}, {"privileged": True, "labels": {"a": "b"}}),
    ({"labels": {"a": {"exists": True}}}, {"labels": {"a": "x*", "b": "y"}}),
    ({"memory": {"at_most": "2Gi"}}, {"memory": {"at_least": "1Gi", "at_most": "1536Mi"}}),
    ({"not": {"privileged": True, "hostPID": True}}, {"not": {"privileged": True}}),
    ({"not": {"namespace": "abc"}}, {"not": {"namespace": "a*"}}),
    ({"qos": ["burstable", "guaranteed"]}, {"qos": "burstable"}),
]


@pytest.mark.parametrize(("wide", "narrow"), FOUND)
def test_what_an_operator_would_see_is_found(wide: dict[str, Any], narrow: dict[str, Any]) -> None:
    one, other = [Match.model_validate(wide)], [Match.model_validate(narrow)]
    assert covers(one, other)
    assert not covers(other, one)
