"""Events of pods and containers as they happen, and the lists in their streaming form."""

from __future__ import annotations

from dispatcher.cri import api_pb2 as pb
from tests.lab.client import CriClient


def test_the_life_of_a_pod_is_told_by_events(cri: CriClient) -> None:
    """Each change once, in order, with the sandbox's and the containers' statuses of that moment."""
    stream = cri.stream("GetContainerEvents", timeout_s=60)
    try:
        pod = cri.run_pod()
        container = pod.run(command=["sleep", "1000"])
        cri.stop_container(container.id)
        pod.stop()
        pod.remove()
        seen, newest = [], 0
        for event in stream:
            if event.container_id not in (pod.id, container.id):
                continue
            seen.append((event.container_id == pod.id, event.container_event_type))
            assert event.created_at > newest, "a kubelet drops what is not newer than what it knows"
            newest = event.created_at
            if (event.container_id, event.container_event_type) == (container.id, pb.CONTAINER_STOPPED_EVENT):
                assert event.pod_sandbox_status.id == pod.id
                assert [s.exit_code for s in event.containers_statuses] == [137]
            if seen[-1] == (True, pb.CONTAINER_DELETED_EVENT):
                # A kubelet passes over events without a status, and forgets a pod by the sandbox's id in it.
                assert event.pod_sandbox_status.id == pod.id
                assert event.pod_sandbox_status.state == pb.SANDBOX_NOTREADY
                assert not event.containers_statuses
                break
    finally:
        stream.cancel()
    of_pod = [kind for is_pod, kind in seen if is_pod]
    of_container = [kind for is_pod, kind in seen if not is_pod]
    assert of_pod == [
        pb.CONTAINER_CREATED_EVENT,
        pb.CONTAINER_STARTED_EVENT,
        pb.CONTAINER_STOPPED_EVENT,
        pb.CONTAINER_DELETED_EVENT,
    ]
    assert of_container[:3] == [
        pb.CONTAINER_CREATED_EVENT,
        pb.CONTAINER_STARTED_EVENT,
        pb.CONTAINER_STOPPED_EVENT,
    ]


def test_every_client_is_told_everything(cri: CriClient) -> None:
    """Several clients at once see the same events, of all pods, with the same times."""
    streams = [cri.stream("GetContainerEvents", timeout_s=60) for _ in range(4)]
    try:
        first, second = cri.run_pod(), cri.run_pod()
        for pod in (first, second):
            pod.stop()
            pod.remove()
        told = []
        for stream in streams:
            of_both = []
            for event in stream:
                if event.container_id in (first.id, second.id):
                    of_both.append((event.container_id, event.container_event_type, event.created_at))
                if (event.container_id, event.container_event_type) == (second.id, pb.CONTAINER_DELETED_EVENT):
                    break
            told.append(of_both)
    finally:
        for stream in streams:
            stream.cancel()
    assert len(told[0]) == 8
    assert all(of_both == told[0] for of_both in told)


def test_streamed_lists_hold_what_the_lists_hold(cri: CriClient) -> None:
    with cri.run_pod(labels={"streamed": "yes"}) as pod:
        container = pod.run(command=["sleep", "1000"])
        pods = [p for m in cri.stream("StreamPodSandboxes", timeout_s=20) for p in m.pod_sandboxes]
        assert pods == cri.pods()
        containers = [c for m in cri.stream("StreamContainers", timeout_s=20) for c in m.containers]
        assert containers == cri.containers()
        images = [i for m in cri.stream("StreamImages", timeout_s=20) for i in m.images]
        assert images == cri.images()
        request = pb.StreamContainerStatsRequest(filter=pb.ContainerStatsFilter(id=container.id))
        stats = [s for m in cri.stream("StreamContainerStats", request, timeout_s=20) for s in m.container_stats]
        assert [s.attributes.id for s in stats] == [container.id]


def test_an_empty_list_streams_no_message(cri: CriClient) -> None:
    request = pb.StreamPodSandboxesRequest(filter=pb.PodSandboxFilter(id="0" * 64))
    assert list(cri.stream("StreamPodSandboxes", request, timeout_s=20)) == []


def test_the_present_attempt_is_told_before_the_past_ones(cri: CriClient) -> None:
    """A kubelet with evented PLEG takes the first status of a name; the past attempts of a restart come behind it."""
    with cri.run_pod() as pod:
        for attempt in range(2):
            pod.create(name="again", attempt=attempt, command=["true"]).start()
        stream = cri.stream("GetContainerEvents", timeout_s=60)
        try:
            present = pod.create(name="again", attempt=2, command=["sleep", "1000"])
            present.start()
            event = next(event for event in stream if event.container_id == present.id)
        finally:
            stream.cancel()
        told = [status.metadata.attempt for status in pod.status_reply().containers_statuses]
    assert [status.metadata.attempt for status in event.containers_statuses] == [2, 1, 0]
    assert told == [2, 1, 0]
