"""A second image as a read-only volume."""

from __future__ import annotations

import grpc
import pytest

from dispatcher.cri import api_pb2 as pb
from tests.lab.client import CriClient, Pod, refused
from tests.lab.images import STAGING

IMAGE = f"{STAGING}/test-image-tag:test"


@pytest.fixture(scope="module")
def image_ref(cri: CriClient, pod: Pod) -> str:
    """The volume's image, pulled; the tests are skipped where the endpoint knows no image volumes."""
    reference = cri.ensure_image(IMAGE)
    try:
        pod.create(mounts=[volume(reference)]).remove()
    except grpc.RpcError as error:
        if error.code() is grpc.StatusCode.UNIMPLEMENTED:
            pytest.skip("the endpoint has no image volumes")
    return reference


def volume(reference: str, *, sub_path: str = "", readonly: bool = True) -> pb.Mount:
    return pb.Mount(
        container_path="/volume",
        image=pb.ImageSpec(image=reference, user_specified_image=IMAGE),
        readonly=readonly,
        image_sub_path=sub_path,
    )


def test_the_status_tells_the_image_of_a_mount(pod: Pod, image_ref: str) -> None:
    container = pod.run(mounts=[volume(image_ref)])
    (mount,) = container.status().mounts
    assert mount.container_path == "/volume"
    assert mount.image.image_ref == image_ref


def test_an_image_is_mounted_read_only_and_its_programs_run(pod: Pod, image_ref: str) -> None:
    container = pod.run(mounts=[volume(image_ref)])
    assert container.sh("cat /volume/testfile") == "tag:test"
    assert "Read-only file system" in container.exec("touch", "/volume/new").stderr
    assert container.exec("/volume/bin/busybox", "true").exit_code == 0


def test_a_writable_image_volume_is_refused(pod: Pod, image_ref: str) -> None:
    with refused():
        pod.create(mounts=[volume(image_ref, readonly=False)])


def test_a_sub_path_shows_that_folder_only(pod: Pod, image_ref: str) -> None:
    container = pod.run(mounts=[volume(image_ref, sub_path="etc")])
    assert container.sh("ls /volume").split() == ["group", "passwd"]


@pytest.mark.parametrize("sub_path", ["absent", "../../../etc", "/etc/../../.."])
def test_a_sub_path_that_is_not_in_the_image_is_refused(pod: Pod, image_ref: str, sub_path: str) -> None:
    with refused():
        pod.run(mounts=[volume(image_ref, sub_path=sub_path)])
