"""User namespaces per pod: done where they are offered, refused where they are not, and bad requests always."""

from __future__ import annotations

import pytest

from dispatcher.cri import api_pb2 as pb
from tests.lab.client import CriClient, Pod, pod_namespaces, refused

MAPPING = pb.IDMapping(host_id=100_000, container_id=0, length=65_536)


def run(cri: CriClient, **userns: object) -> Pod:
    options = pod_namespaces(userns_options=pb.UserNamespace(**userns))  # type: ignore[arg-type]
    return cri.run_pod(security=pb.LinuxSandboxSecurityContext(namespace_options=options))


def offered(cri: CriClient) -> bool:
    return cri.handler_features().user_namespaces


def test_a_namespace_of_the_pod(cri: CriClient) -> None:
    if not offered(cri):
        pytest.skip("the handler does not offer user namespaces")
    with run(cri, mode=pb.POD, uids=[MAPPING], gids=[MAPPING]) as pod:
        assert pod.run().sh("cat /proc/self/uid_map").split() == ["0", "100000", "65536"]


def test_a_namespace_of_the_pod_is_refused_where_it_is_not_offered(cri: CriClient) -> None:
    """Root in such a pod must never turn out to be root of the host."""
    if offered(cri):
        pytest.skip("the handler offers user namespaces")
    with refused():
        run(cri, mode=pb.POD, uids=[MAPPING], gids=[MAPPING])


def test_the_namespace_of_the_node_is_the_usual_case(cri: CriClient) -> None:
    with run(cri, mode=pb.NODE) as pod:
        assert pod.run().sh("cat /proc/self/uid_map").split() == ["0", "0", "4294967295"]


@pytest.mark.parametrize(
    "userns",
    [
        pytest.param({"mode": pb.POD, "uids": [MAPPING, MAPPING], "gids": [MAPPING, MAPPING]}, id="two mappings"),
        pytest.param(
            {
                "mode": pb.POD,
                "uids": [pb.IDMapping(host_id=100_000, container_id=1, length=65_536)],
                "gids": [pb.IDMapping(host_id=100_000, container_id=1, length=65_536)],
            },
            id="zero is not mapped",
        ),
        pytest.param({"mode": pb.CONTAINER}, id="container"),
        pytest.param({"mode": pb.TARGET}, id="target"),
    ],
)
def test_a_bad_request_is_refused(cri: CriClient, userns: dict[str, object]) -> None:
    with refused():
        run(cri, **userns)
