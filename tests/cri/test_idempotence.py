"""Ending what has ended, or never was, is no error: the kubelet repeats itself."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import grpc
import pytest

from dispatcher.cri import api_pb2 as pb
from tests.lab.client import CriClient, Pod

UNKNOWN = "ab" * 32


def test_stopping_an_unknown_pod_succeeds(cri: CriClient) -> None:
    cri.stop_pod(UNKNOWN)


def test_stopping_a_pod_twice_succeeds(cri: CriClient) -> None:
    with cri.run_pod() as pod:
        pod.stop()
        pod.stop()
        assert pod.status().state == pb.SANDBOX_NOTREADY


def test_removing_an_unknown_pod_succeeds(cri: CriClient) -> None:
    cri.remove_pod(UNKNOWN)


def test_stopping_an_unknown_container_succeeds(cri: CriClient) -> None:
    cri.stop_container(UNKNOWN)


@pytest.mark.parametrize("started", [True, False], ids=["exited", "never started"])
def test_stopping_a_container_that_does_not_run_succeeds(pod: Pod, started: bool) -> None:
    container = pod.run_to_end("sh", "-c", "exit 4") if started else pod.create()
    container.stop()
    container.stop(grace_s=5)
    if started:
        assert container.status().exit_code == 4


def test_removing_a_container_twice_succeeds(pod: Pod) -> None:
    container = pod.run()
    container.remove()
    container.remove()


def test_removing_an_unknown_container_succeeds(cri: CriClient) -> None:
    cri.remove_container(UNKNOWN)


def test_removing_an_unknown_image_succeeds_each_time(cri: CriClient) -> None:
    cri.remove_image(UNKNOWN)
    cri.remove_image(UNKNOWN)


@pytest.mark.parametrize("method", ["stop_pod", "remove_pod", "stop_container", "remove_container"])
def test_an_empty_id_never_means_the_only_one(cri: CriClient, pod: Pod, method: str) -> None:
    container = pod.run()
    code = grpc.StatusCode.OK
    try:
        getattr(cri, method)("")
    except grpc.RpcError as error:
        code = error.code()
    # A refusal is as good as doing nothing.
    assert code in {grpc.StatusCode.OK, grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.NOT_FOUND}
    assert container.status().state == pb.CONTAINER_RUNNING


def test_calls_that_end_a_pod_may_come_all_at_once(cri: CriClient) -> None:
    with cri.run_pod() as pod:
        pod.run()
        with ThreadPoolExecutor(8) as pool:
            for done in [pool.submit(pod.stop if number % 2 else pod.remove) for number in range(8)]:
                done.result()
        pod.remove()
        assert not cri.pods(id=pod.id)
