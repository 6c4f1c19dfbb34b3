"""The policy files that we ship: what they do with pods, on nodes with and without virtual machines."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dispatcher.model import Isolation
from dispatcher.policy import Loaded, RuntimeTraits, explain, json_schema, load_policy
from dispatcher.policy.facts import PodFacts

CONFIG = Path(__file__).parents[3] / "config"
DOCKER_ONLY = {"docker": RuntimeTraits(isolation=Isolation.SHARED_KERNEL)}
ALL = {
    **DOCKER_ONLY,
    "hyper_vm": RuntimeTraits(isolation=Isolation.VM),
    "unikernel": RuntimeTraits(isolation=Isolation.VM),
}
OS_CONTAINER = {"runtime.frakti.alpha.kubernetes.io/OSContainer": "true"}
UNIKERNEL = {"runtime.frakti.alpha.kubernetes.io/Unikernel": "true"}


def load(name: str, runtimes: dict[str, RuntimeTraits]) -> Loaded:
    path = CONFIG / name
    return load_policy(path.read_bytes(), name, runtimes)


@pytest.mark.parametrize("name", ["policy.yaml", "policy-docker.yaml"])
def test_loads_without_warning_where_all_runtimes_are(name: str) -> None:
    assert load(name, ALL).warnings == ()


def test_policy_with_vms_warns_by_name_on_a_docker_node() -> None:
    """The operator of a Docker node who installs the wrong file is told so, and told which file is right."""
    warnings = [str(warning) for warning in load("policy.yaml", DOCKER_ONLY).warnings]
    assert any('default: the runtime "hyper_vm" is not loaded' in text for text in warnings)
    assert any("policy-docker.yaml" in text for text in warnings)


def test_docker_policy_is_at_home_on_a_docker_node() -> None:
    loaded = load("policy-docker.yaml", DOCKER_ONLY)
    assert loaded.warnings == ()
    assert explain(loaded.policy, PodFacts()).runtime == "docker"


PODS = [
    (PodFacts(), "hyper_vm", "default"),
    (PodFacts(namespace="kube-system"), "hyper_vm", "default"),
    (PodFacts(privileged=True), "docker", "host-access"),
    (PodFacts(host_network=True), "docker", "host-access"),
    (PodFacts(host_pid=True), "docker", "host-access"),
    (PodFacts(host_ipc=True), "docker", "host-access"),
    (PodFacts(annotations=OS_CONTAINER), "hyper_vm", "default"),
    (PodFacts(annotations=OS_CONTAINER, namespace="kube-system"), "docker", "os-container"),
    (PodFacts(annotations=UNIKERNEL), "unikernel", "unikernel"),
    (PodFacts(annotations=UNIKERNEL, namespace="kube-system"), "unikernel", "unikernel"),
    (PodFacts(annotations={**UNIKERNEL, **OS_CONTAINER}, namespace="kube-system"), "docker", "os-container"),
    (PodFacts(annotations={**UNIKERNEL, **OS_CONTAINER}), "unikernel", "unikernel"),
    (PodFacts(annotations={next(iter(OS_CONTAINER)): "True"}, namespace="kube-system"), "hyper_vm", "default"),
    (PodFacts(annotations=UNIKERNEL, host_network=True), "", "unikernel-needs-its-own-kernel"),
    (PodFacts(annotations=UNIKERNEL, privileged=True, namespace="kube-system"), "", "unikernel-needs-its-own-kernel"),
    (PodFacts(handler="vm", privileged=True), "hyper_vm", "handler:vm"),
    (PodFacts(handler="vm", host_network=True), "", "handler:vm"),
    (PodFacts(handler="unikernel", host_pid=True), "", "handler:unikernel"),
    (PodFacts(handler="docker"), "docker", "handler:docker"),
    (PodFacts(handler="runc"), "", "handler:runc"),
]


@pytest.mark.parametrize(("pod", "runtime", "rule"), PODS)
def test_where_pods_go(pod: PodFacts, runtime: str, rule: str) -> None:
    found = explain(load("policy.yaml", ALL).policy, pod)
    assert (found.runtime, found.rule) == (runtime, rule)
    assert found.is_refused is (not runtime)


def test_a_missing_runtime_changes_no_route() -> None:
    """Without VMs, the same pods have the same routes: nothing falls back to Docker."""
    with_vms, without = load("policy.yaml", ALL).policy, load("policy.yaml", DOCKER_ONLY).policy
    for pod, runtime, _ in PODS:
        found = explain(without, pod)
        assert found.runtime == runtime
        assert found.is_loaded is (runtime == "docker")
        assert found.reason == explain(with_vms, pod).reason


def test_schema_file_is_current() -> None:
    """Editors complete and check policy files by config/policy.schema.json."""
    shipped = (CONFIG / "policy.schema.json").read_text()
    assert json.loads(shipped) == json_schema(), "python -m dispatcher.policy writes it anew"
    assert json.loads(shipped)["$id"] == "urn:cri-dispatcher:policy:v1"
