"""A client that gives up does not stop the work: its retry joins it, also under load, and gets the same sandbox."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import grpc

from dispatcher.cri import api_pb2 as pb
from tests.lab.client import refused
from tests.lab.images import BUSYBOX, TestImages
from tests.lab.node import Node


def test_a_retry_after_a_deadline_joins_the_first_call(
    node: Callable[..., Node], test_images: TestImages, nothing_left: Callable[[Node], None]
) -> None:
    """Eight pods at once, each asked for with a hopeless deadline, then again: one sandbox each."""
    current = node()
    client = current.client()
    configs = [client.pod_config() for _ in range(8)]

    def ask(config: pb.PodSandboxConfig) -> str:
        request = pb.RunPodSandboxRequest(config=config)
        with refused(grpc.StatusCode.DEADLINE_EXCEEDED):
            client.rpc("RunPodSandbox", request, timeout_s=0.02)
        first: str = client.rpc("RunPodSandbox", request).pod_sandbox_id
        again: str = client.rpc("RunPodSandbox", request).pod_sandbox_id
        assert first == again
        return first

    with ThreadPoolExecutor(8) as pool:
        ids = list(pool.map(ask, configs))
    assert sorted(p.id for p in client.pods()) == sorted(ids)
    assert len(set(ids)) == 8
    client.remove_all_pods()
    nothing_left(current)


def test_another_pod_of_the_same_name_is_refused(node: Callable[..., Node]) -> None:
    """A request with the same identity but other contents is no retry."""
    client = node().client()
    config = client.pod_config()
    with client.run_pod(config):
        other = pb.PodSandboxConfig()
        other.CopyFrom(config)
        other.labels["changed"] = "yes"
        with refused(grpc.StatusCode.ALREADY_EXISTS):
            client.rpc("RunPodSandbox", pb.RunPodSandboxRequest(config=other))


def test_a_retry_of_a_pull_joins_and_one_without_clients_stops(
    node: Callable[..., Node], test_images: TestImages
) -> None:
    current = node()
    client = current.client()
    request = pb.PullImageRequest(image=pb.ImageSpec(image=BUSYBOX))
    with refused(grpc.StatusCode.DEADLINE_EXCEEDED):
        client.rpc("PullImage", request, timeout_s=0.005)
    assert client.rpc("PullImage", request).image_ref
    assert client.image(BUSYBOX) is not None
    client.remove_image(BUSYBOX)
