"""Sandboxes: their life, what is kept of them, kernel parameters, refusals."""

from __future__ import annotations

import grpc
import pytest

from dispatcher.cri import api_pb2 as pb
from tests.cri.metric_names import EXPECTED, OPTIONAL_VALUE, TOLERATED
from tests.lab.child import wait_until
from tests.lab.client import CriClient, Pod, pod_namespaces, refused, unique

READY = pb.PodSandboxStateValue(state=pb.SANDBOX_READY)
NOTREADY = pb.PodSandboxStateValue(state=pb.SANDBOX_NOTREADY)


def test_a_run_pod_is_ready_with_an_address(cri: CriClient) -> None:
    with cri.run_pod() as pod:
        status = pod.status()
        assert status.state == pb.SANDBOX_READY
        assert status.created_at > 0
        assert status.network.ip
        assert [listed.id for listed in cri.pods(id=pod.id)] == [pod.id]


def test_a_stopped_pod_is_not_ready_without_address_and_stays_listed(cri: CriClient) -> None:
    with cri.run_pod() as pod:
        pod.stop()
        assert pod.status().state == pb.SANDBOX_NOTREADY
        assert [listed.id for listed in cri.pods(id=pod.id, state=NOTREADY)] == [pod.id]
        assert not cri.pods(id=pod.id, state=READY)


def test_a_removed_pod_is_gone(cri: CriClient) -> None:
    with cri.run_pod() as pod:
        pod.stop()
        pod.remove()
        assert not cri.pods(id=pod.id)
        with refused(grpc.StatusCode.NOT_FOUND):
            pod.status()


def test_metadata_labels_and_annotations_are_kept_as_they_came(cri: CriClient) -> None:
    metadata = pb.PodSandboxMetadata(name=unique("kept"), uid=unique("uid"), namespace="kube-system", attempt=3)
    config = cri.pod_config(
        unique("kept"),
        metadata=metadata,
        labels={"app": "x", "ä": "ü"},
        annotations={"a/b": "line\nline\t", "big": "x" * 9000},
    )
    with cri.run_pod(config) as pod:
        status = pod.status()
        (listed,) = cri.pods(id=pod.id)
        for view in (status, listed):
            assert view.metadata == metadata
            assert dict(view.labels) == dict(config.labels)
            assert dict(view.annotations) == dict(config.annotations)
            assert view.runtime_handler == cri.handler
        assert listed.created_at == status.created_at
        assert status.linux.namespaces.options == config.linux.security_context.namespace_options


def test_lists_filter_by_state_label_and_id_together(cri: CriClient) -> None:
    mark = unique("mark")
    with cri.run_pod(labels={"mark": mark, "n": "1"}) as one, cri.run_pod(labels={"mark": mark, "n": "2"}) as two:
        assert {pod.id for pod in cri.pods(label_selector={"mark": mark})} == {one.id, two.id}
        assert [pod.id for pod in cri.pods(label_selector={"mark": mark, "n": "2"})] == [two.id]
        assert not cri.pods(id=one.id, label_selector={"n": "2"})
        assert {one.id, two.id} <= {pod.id for pod in cri.pods(state=READY)}
        assert {one.id, two.id} <= {pod.id for pod in cri.pods()}


def test_a_unique_prefix_of_an_id_names_the_pod(cri: CriClient) -> None:
    with cri.run_pod() as pod:
        short = Pod(cri, pod.id[:13], pod.config)
        assert short.status().id == pod.id
        assert [listed.id for listed in cri.pods(id=pod.id[:13])] == [pod.id]


@pytest.mark.parametrize(
    ("sysctl", "value"),
    [
        pytest.param("kernel.shm_rmid_forced", "1", id="safe"),
        pytest.param("fs.mqueue.msg_max", "100", id="unsafe"),
        pytest.param("net.ipv4.ip_unprivileged_port_start", "77", id="network"),
    ],
)
def test_kernel_parameters_are_set_in_the_pod(cri: CriClient, sysctl: str, value: str) -> None:
    with cri.run_pod(sysctls={sysctl: value}) as pod:
        assert pod.run().sh(f"cat /proc/sys/{sysctl.replace('.', '/')}") == value


def test_an_unknown_handler_is_refused_before_anything_exists(cri: CriClient) -> None:
    config = cri.pod_config()
    with refused(grpc.StatusCode.NOT_FOUND, grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.UNKNOWN):
        cri.rpc("RunPodSandbox", pb.RunPodSandboxRequest(config=config, runtime_handler="no-such-handler"))
    assert not [pod for pod in cri.pods() if pod.metadata.uid == config.metadata.uid]


def test_a_repeated_request_brings_the_same_pod_or_a_refusal_but_never_a_second(cri: CriClient) -> None:
    with cri.run_pod() as pod:
        try:
            again = cri.run_pod(pod.config).id
        except grpc.RpcError:
            again = pod.id
        assert again == pod.id
        assert len([found for found in cri.pods() if found.metadata.uid == pod.config.metadata.uid]) == 1


@pytest.mark.parametrize("method", ["PodSandboxStatus", "UpdatePodSandboxResources"])
def test_an_unknown_pod_is_not_found(cri: CriClient, method: str) -> None:
    request = getattr(pb, f"{method}Request")(pod_sandbox_id="0" * 64)
    with refused(grpc.StatusCode.NOT_FOUND):
        cri.rpc(method, request)


def test_removing_a_pod_removes_its_running_containers(cri: CriClient) -> None:
    with cri.run_pod() as pod:
        container = pod.run()
        pod.stop()
        assert container.status().state == pb.CONTAINER_EXITED
        pod.remove()
        assert not cri.containers(pod_sandbox_id=pod.id)
        container.remove()


def test_pod_status_tells_a_host_network_and_has_no_address_of_its_own(cri: CriClient) -> None:
    security = pb.LinuxSandboxSecurityContext(namespace_options=pod_namespaces(network=pb.NODE))
    with cri.run_pod(security=security, hostname="") as pod:
        assert pod.status().linux.namespaces.options.network == pb.NODE


# ------------------------------------------------------------------------------------------------------------ metrics


def need_metrics(cri: CriClient) -> None:
    if cri.unimplemented("ListMetricDescriptors"):
        pytest.skip("the endpoint has no ListMetricDescriptors")


def test_metric_descriptors_are_complete(cri: CriClient) -> None:
    need_metrics(cri)
    descriptors = {descriptor.name: descriptor for descriptor in cri.rpc("ListMetricDescriptors").descriptors}
    assert set(descriptors) >= EXPECTED - TOLERATED
    assert all(descriptor.help and descriptor.label_keys for descriptor in descriptors.values())


def test_pod_metrics_have_a_value_per_label_key(cri: CriClient, pod: Pod) -> None:
    need_metrics(cri)
    keys = {found.name: len(found.label_keys) for found in cri.rpc("ListMetricDescriptors").descriptors}
    container = pod.run()
    container.sh("for i in 0 1 2 3 4 5 6 7 8 9; do echo x > /tmp/$i; done; sync")

    def values() -> dict[str, list[pb.Metric]]:
        found: dict[str, list[pb.Metric]] = {}
        for entry in cri.rpc("ListPodSandboxMetrics").pod_metrics:
            if entry.pod_sandbox_id == pod.id:
                inner = [metric for part in entry.container_metrics for metric in part.metrics]
                for metric in (*entry.metrics, *inner):
                    found.setdefault(metric.name, []).append(metric)
        return found

    wait_until(lambda: set(values()) >= EXPECTED - TOLERATED - OPTIONAL_VALUE, timeout_s=20, what="metrics are missing")
    for name, metrics in values().items():
        assert {len(metric.label_values) for metric in metrics} == {keys[name]}, name
