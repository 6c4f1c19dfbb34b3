"""The test cases that a policy file brings along: each is decided as a pod would be, with no runtime at hand. Pure."""

from __future__ import annotations

from dataclasses import replace

from dispatcher.model import Vote
from dispatcher.policy.decision import Policy, Verdict, check_container, decide
from dispatcher.policy.facts import ContainerFacts, PodFacts, normal_image, tidy_path
from dispatcher.policy.schema import TestCase, TestContainer, TestPod


def run(policy: Policy, case: TestCase) -> str:
    """Run one case; return what came out instead, or "" when it came out as expected."""
    # A case speaks about the file, not about this node: a runtime that is missing here still gets its pods.
    loaded = {name: replace(traits, is_loaded=True) for name, traits in policy.runtimes.items()}
    policy = replace(policy, runtimes=loaded)
    pod = pod_facts(case.pod)
    votes = [Vote(plugin=vote.plugin, runtime=vote.runtime, reason="test", counted=False) for vote in case.votes]
    verdict = decide(policy, pod, lambda: votes)
    if case.container is not None and not verdict.is_refused:
        verdict = check_container(policy, pod, container_facts(case.container, verdict.runtime)) or verdict
    return _difference(case, verdict)


def pod_facts(pod: TestPod) -> PodFacts:
    """Flatten a test pod."""
    return PodFacts(
        namespace=pod.namespace,
        name=pod.name,
        labels=pod.labels,
        annotations=pod.annotations,
        handler=pod.handler,
        privileged=pod.privileged,
        host_network=pod.host_network,
        host_pid=pod.host_pid,
        host_ipc=pod.host_ipc,
        userns=pod.userns,
        sysctls=tuple(sorted(pod.sysctls)),
        qos=pod.qos or "",
        cpu_millis=pod.cpu,
        memory_bytes=pod.memory,
    )


def container_facts(container: TestContainer, runtime: str) -> ContainerFacts:
    """Flatten a test container."""
    capabilities = tuple(name.upper().removeprefix("CAP_") for name in container.capabilities)
    return ContainerFacts(
        images=(normal_image(container.image),),
        privileged=container.privileged,
        capabilities=("ALL",) if container.privileged else capabilities,
        devices=tuple(tidy_path(name) if name.startswith("/") else name for name in container.devices),
        host_mounts=tuple(tidy_path(path) for path in container.host_mounts),
        seccomp_unconfined=container.seccomp_unconfined or container.privileged,
        runtime=runtime,
    )


def _difference(case: TestCase, verdict: Verdict) -> str:
    expect = case.expect
    if verdict.is_refused and not expect.refused:
        return f"expected {expect.runtime}, but it is refused. {verdict.reason}"
    if expect.refused and not verdict.is_refused:
        return f"expected a refusal, but it goes to {verdict.runtime}. {verdict.reason}"
    if not expect.refused and verdict.runtime != expect.runtime:
        return f"expected {expect.runtime}, but it goes to {verdict.runtime}. {verdict.reason}"
    if expect.rule is not None and verdict.rule != expect.rule:
        return f'expected the rule "{expect.rule}", but "{verdict.rule}" decided. {verdict.reason}'
    return ""
