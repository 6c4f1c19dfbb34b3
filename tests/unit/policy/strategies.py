"""Random policies and pods for property tests: few names, so that rules and pods meet often."""

from __future__ import annotations

import json
from typing import Any

from hypothesis import strategies as st

from dispatcher.model import Isolation
from dispatcher.policy import RuntimeTraits
from dispatcher.policy.facts import ContainerFacts, HostPath, PodFacts

RUNTIMES = {
    "docker": RuntimeTraits(isolation=Isolation.SHARED_KERNEL),
    "gvisor": RuntimeTraits(isolation=Isolation.SANDBOXED),
    "vm": RuntimeTraits(isolation=Isolation.VM),
}

WORDS = ["a", "ab", "abc", "b", "kube-system"]
GLOBS = ["a", "ab", "a*", "ab*", "*", "?", "*b", "a?c", "b", "kube-*"]
PATHS = ["/", "/etc", "/etc/a", "/etc/a/b", "/data", "/database", "/dev/x"]
PATH_GLOBS = ["/etc", "/etc/*", "/etc/a", "/data", "/data*", "/*/a", "*", "/dev/?"]
IMAGES = ["docker.io/library/a:latest", "reg.io/a/b:1", "reg.io/a@sha256:00"]
IMAGE_GLOBS = ["docker.io/*", "reg.io/a/*", "reg.io/*", "*:latest", "*"]
CAPABILITIES = ["SYS_ADMIN", "NET_RAW", "ALL"]


def _patterns(globs: list[str]) -> st.SearchStrategy[Any]:
    some = st.lists(st.sampled_from(globs), min_size=1, max_size=2)
    return st.one_of(st.sampled_from(globs), some, some.map(lambda found: {"other_than": found}))


_values = st.dictionaries(
    st.sampled_from(["k", "l"]),
    st.one_of(_patterns(GLOBS), st.booleans().map(lambda exists: {"exists": exists})),
    max_size=2,
)
_range = st.fixed_dictionaries(
    {}, optional={"at_least": st.sampled_from([0, 1, 2]), "at_most": st.sampled_from([1, 2, 3])}
)
_SANDBOX = {
    "namespace": _patterns(GLOBS),
    "name": _patterns(GLOBS),
    "labels": _values,
    "annotations": _values,
    "privileged": st.booleans(),
    "hostNetwork": st.booleans(),
    "hostPID": st.booleans(),
    "userns": st.booleans(),
    "sysctls": _patterns(GLOBS),
    "qos": st.lists(st.sampled_from(["guaranteed", "burstable", "besteffort"]), min_size=1, max_size=2),
    "cpu": _range,
    "memory": _range,
}
_CONTAINER = {
    "image": _patterns(IMAGE_GLOBS),
    "capabilities": _patterns(["SYS_ADMIN", "cap_net_raw", "*", "SYS_*"]),
    "devices": _patterns(PATH_GLOBS),
    "host_mounts": _patterns(PATH_GLOBS),
    "seccomp_unconfined": st.booleans(),
    "runtime": _patterns(GLOBS),
}


def _match(parts: dict[str, st.SearchStrategy[Any]], depth: int = 2) -> st.SearchStrategy[dict[str, Any]]:
    optional: dict[str, st.SearchStrategy[Any]] = dict(parts)
    if depth:
        inner = _match(parts, depth - 1)
        optional["not"] = st.one_of(inner, st.lists(inner, min_size=1, max_size=2))

    @st.composite
    def few(draw: st.DrawFn) -> dict[str, Any]:
        names = draw(st.lists(st.sampled_from(sorted(optional)), max_size=3, unique=True))
        return {name: draw(optional[name]) for name in names}

    return few()


sandbox_match = _match(_SANDBOX)
any_match = _match({**_SANDBOX, **_CONTAINER})

pods = st.builds(
    PodFacts,
    namespace=st.sampled_from(WORDS),
    name=st.sampled_from(WORDS),
    labels=st.dictionaries(st.sampled_from(["k", "l"]), st.sampled_from(["", *WORDS]), max_size=2),
    annotations=st.dictionaries(st.sampled_from(["k", "l"]), st.sampled_from(["", *WORDS]), max_size=2),
    handler=st.sampled_from(["", "", "", "h", "t", "none"]),
    privileged=st.booleans(),
    host_network=st.booleans(),
    host_pid=st.booleans(),
    userns=st.booleans(),
    sysctls=st.lists(st.sampled_from(WORDS), max_size=2).map(tuple),
    qos=st.sampled_from(["", "guaranteed", "burstable", "besteffort"]),
    cpu_millis=st.sampled_from([None, 500, 1000, 2500]),
    memory_bytes=st.sampled_from([None, 1, 2, 3]),
)
containers = st.builds(
    ContainerFacts,
    images=st.lists(st.sampled_from(IMAGES), min_size=1, max_size=2).map(tuple),
    privileged=st.booleans(),
    capabilities=st.lists(st.sampled_from(CAPABILITIES), max_size=2).map(tuple),
    devices=st.lists(st.sampled_from(["vendor.com/gpu=0", *PATHS]), max_size=2).map(tuple),
    host_mounts=st.lists(st.sampled_from(PATHS).map(HostPath), max_size=2).map(tuple),
    seccomp_unconfined=st.booleans(),
    runtime=st.sampled_from(["docker", "vm"]),
)

_runtime = st.sampled_from(sorted(RUNTIMES))


@st.composite
def policy_texts(draw: st.DrawFn) -> str:
    """A policy file whose rules are plausible, though some may shadow others."""
    rules = []
    for index in range(draw(st.integers(0, 5))):
        rule: dict[str, Any] = {"name": f"r{index}"}
        if draw(st.booleans()) or draw(st.booleans()):
            rule["match"] = draw(sandbox_match)
        if draw(st.integers(0, 4)) == 0:
            rule["refuse"] = "no"
        else:
            rule["runtime"] = draw(_runtime)
            rule["trusted_only"] = draw(st.booleans())
        rules.append(rule)
    level = st.sampled_from(["shared-kernel", "sandboxed", "vm"])
    default = draw(st.one_of(_runtime, _runtime, st.just({"refuse": "no"})))
    file = {
        "apiVersion": "dispatcher/v1",
        "handlers": {"h": draw(_runtime), "t": {"runtime": draw(_runtime), "trusted_only": True}},
        "floors": draw(st.dictionaries(st.sampled_from(GLOBS), level, max_size=2)),
        "trusted": draw(st.lists(st.sampled_from(["kube-system", "b", "a?c"]), max_size=2)),
        "hooks": {"may_override": draw(st.lists(st.sampled_from(["p", "q"]), max_size=2))},
        "rules": rules,
        "default": default,
    }
    return json.dumps(file)
