"""One endpoint per module and runtime, with every pod routed to that runtime.

`DISPATCHER_CRI_SOCKET` names another CRI endpoint to run this suite against; its mirrors must lead to the registry
whose port `DISPATCHER_LAB_REGISTRY_PORT` fixes.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from tests.lab.child import PartMissingError
from tests.lab.client import ContainerHandle, CriClient, Pod
from tests.lab.images import TestImages

EXTERNAL = os.environ.get("DISPATCHER_CRI_SOCKET", "")
RUNTIMES = ("external",) if EXTERNAL else ("docker",)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "cri" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.lab)


@pytest.fixture(scope="module", params=RUNTIMES)
def cri(request: pytest.FixtureRequest, test_images: TestImages) -> Iterator[CriClient]:
    """A client of an endpoint that routes every pod to one runtime."""
    socket = EXTERNAL or str(request.getfixturevalue("node")(default_runtime=request.param).socket)
    with CriClient(socket, timeout_s=60) as client:
        yield client
        client.remove_all_pods()


@pytest.fixture(scope="module")
def pod(cri: CriClient) -> Iterator[Pod]:
    """A pod that the tests of a module share; each makes containers of its own in it."""
    with cri.run_pod() as pod:
        yield pod


@pytest.fixture(scope="module")
def running(pod: Pod) -> ContainerHandle:
    """A container that runs and that nobody may stop."""
    return pod.run()


@pytest.fixture
def image(request: pytest.FixtureRequest, test_images: TestImages) -> str:
    """The image of a test's `param`; the test is skipped where this machine could not build it."""
    try:
        return test_images.need(request.param)
    except PartMissingError as exc:
        pytest.skip(str(exc))
