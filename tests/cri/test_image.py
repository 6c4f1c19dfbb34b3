"""Images: what a pull brings, under which names it is known, and that removal is complete."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import grpc
import pytest

from dispatcher.cri import api_pb2 as pb
from tests.lab.child import wait_until
from tests.lab.client import CriClient, Pod, refused
from tests.lab.images import PAUSE, PAUSE_OLD_NAME, STAGING, TestImages

TAGGED = f"{STAGING}/test-image-tag:test"
OTHER = f"{STAGING}/test-image-tag:all"
UNTAGGED = f"{STAGING}/test-image-latest"
BY_DIGEST = f"{STAGING}/test-image-digest"


@pytest.fixture(autouse=True)
def without_test_images(cri: CriClient) -> Iterator[None]:
    """Each test starts and leaves without the images of this file."""
    remove_test_images(cri)
    yield
    remove_test_images(cri)


def remove_test_images(cri: CriClient) -> None:
    for image in cri.images():
        if any("test-image-" in name for name in (*image.repo_tags, *image.repo_digests)):
            cri.remove_image(image.id)


def must(cri: CriClient, reference: str) -> pb.Image:
    image = cri.image(reference)
    assert image is not None, f"{reference} is not there"
    return image


def test_an_image_with_a_tag_is_pulled_and_removed(cri: CriClient) -> None:
    cri.pull(TAGGED)
    assert list(must(cri, TAGGED).repo_tags) == [TAGGED]
    cri.remove_image(TAGGED)
    assert cri.image(TAGGED) is None


def test_an_image_without_a_tag_is_the_latest(cri: CriClient) -> None:
    cri.pull(UNTAGGED)
    assert list(must(cri, UNTAGGED).repo_tags) == [f"{UNTAGGED}:latest"]
    cri.remove_image(UNTAGGED)
    assert cri.image(UNTAGGED) is None


def test_an_image_by_digest_has_the_digest_and_no_tag(cri: CriClient, test_images: TestImages) -> None:
    reference = f"{BY_DIGEST}@{test_images.get(BY_DIGEST).digest}"
    cri.pull(reference)
    image = must(cri, reference)
    assert list(image.repo_tags) == []
    assert list(image.repo_digests) == [reference]
    cri.remove_image(reference)
    assert cri.image(reference) is None


def test_a_pull_that_the_client_gives_up_leaves_no_half_image(cri: CriClient) -> None:
    with refused(grpc.StatusCode.DEADLINE_EXCEEDED):
        cri.pull(TAGGED, timeout_s=0.001)
    cri.pull(TAGGED)
    image = must(cri, TAGGED)
    assert image.size > 0


def test_status_knows_every_kind_of_reference_and_answers_the_same(cri: CriClient, test_images: TestImages) -> None:
    identity = cri.pull(TAGGED)
    image = must(cri, TAGGED)
    built = test_images.get(TAGGED)
    references = [
        TAGGED,
        image.id,
        image.id.removeprefix("sha256:"),
        identity,
        image.repo_digests[0],
        f"{STAGING}/test-image-tag@{built.digest}",
    ]
    for reference in references:
        assert must(cri, reference) == image, reference
    cri.pull(UNTAGGED)
    assert must(cri, UNTAGGED) == must(cri, f"{UNTAGGED}:latest")


@pytest.mark.parametrize(
    ("user", "uid", "username"),
    [("uid", 1002, ""), ("username", None, "www-data"), ("uid-group", 1003, ""), ("username-group", None, "www-data")],
)
def test_the_user_of_an_image_is_told(cri: CriClient, user: str, uid: int | None, username: str) -> None:
    reference = f"{STAGING}/test-image-user-{user}"
    cri.pull(reference)
    image = must(cri, reference)
    assert image.username == username
    assert (image.uid.value if image.HasField("uid") else None) == uid


def test_different_images_are_listed_apart(cri: CriClient) -> None:
    names = [f"{STAGING}/test-image-{number}:latest" for number in (1, 2, 3)]
    ids = {cri.pull(name) for name in names}
    assert len(ids) == 3
    listed = [tag for image in cri.images() for tag in image.repo_tags if tag in names]
    assert sorted(listed) == names
    for name in names:
        assert [list(image.repo_tags) for image in cri.images(name)] == [[name]]


def test_one_image_under_three_tags_is_listed_once(cri: CriClient) -> None:
    names = [f"{STAGING}/test-image-tags:{tag}" for tag in (1, 2, 3)]
    ids = {cri.pull(name) for name in names}
    assert len(ids) == 1
    (listed,) = [image for image in cri.images() if set(image.repo_tags) & set(names)]
    assert sorted(listed.repo_tags) == names


def test_removing_one_tag_removes_all_tags(cri: CriClient) -> None:
    names = [f"{STAGING}/test-image-tags:{tag}" for tag in (1, 2, 3)]
    for name in names:
        cri.pull(name)
    cri.remove_image(names[1])
    assert [cri.image(name) for name in names] == [None, None, None]


def test_removing_an_image_removes_its_names_of_other_registries(cri: CriClient) -> None:
    for name in (PAUSE, PAUSE_OLD_NAME):
        cri.pull(name)
    assert must(cri, PAUSE) == must(cri, PAUSE_OLD_NAME)
    cri.remove_image(PAUSE)
    assert cri.image(PAUSE) is None
    assert cri.image(PAUSE_OLD_NAME) is None


def test_an_image_is_there_at_once_after_its_pull_and_gone_at_once_after_its_removal(cri: CriClient) -> None:
    for _round in range(3):
        identity = cri.pull(TAGGED)
        assert must(cri, TAGGED).id
        assert TAGGED in {tag for image in cri.images() for tag in image.repo_tags}
        cri.remove_image(identity)
        assert cri.image(TAGGED) is None
        assert TAGGED not in {tag for image in cri.images() for tag in image.repo_tags}


def test_removals_of_one_image_at_once_all_succeed_and_see_it_gone(cri: CriClient) -> None:
    identity = must(cri, cri.pull(TAGGED)).id

    def remove() -> pb.Image | None:
        cri.remove_image(identity)
        return cri.image(identity)

    with ThreadPoolExecutor(5) as pool:
        assert [done.result() for done in [pool.submit(remove) for _ in range(5)]] == [None] * 5


def test_one_identity_in_every_reply(cri: CriClient, pod: Pod) -> None:
    identity = cri.pull(TAGGED)
    image = must(cri, TAGGED)
    container = pod.create(image=TAGGED, command=())
    container.start()
    (listed,) = cri.containers(id=container.id)
    status = container.status()
    assert {identity, image.id, listed.image_id, status.image_id} == {image.id}
    assert status.image.image
    assert status.image_ref
    container.remove()


def test_one_identity_from_different_registries(cri: CriClient, pod: Pod) -> None:
    assert cri.pull(PAUSE) == cri.pull(PAUSE_OLD_NAME)
    container = pod.run(image=PAUSE_OLD_NAME, command=())
    assert container.status().image_id == must(cri, PAUSE).id
    container.remove()


def test_the_identity_is_the_digest_of_the_configuration(cri: CriClient, test_images: TestImages) -> None:
    cri.pull(TAGGED)
    assert must(cri, TAGGED).id == test_images.get(TAGGED).id


def test_the_image_of_this_machine_is_chosen_from_an_index(cri: CriClient, test_images: TestImages, pod: Pod) -> None:
    reference = "registry.k8s.io/lab/index:1"
    cri.pull(reference)
    assert must(cri, reference).id == test_images.get(reference).id
    container = pod.run_to_end("cat", "/testfile", image=reference)
    assert container.wait_log(bool) in {"mine", "mine\n"}


def test_an_image_with_other_compression_runs(cri: CriClient, pod: Pod, test_images: TestImages) -> None:
    reference = "registry.k8s.io/lab/zstd:1"
    if reference not in test_images.images:
        pytest.skip("no zstd on this machine")
    assert pod.run_to_end("echo", "ok", image=reference).status().exit_code == 0


def test_what_does_not_exist_is_not_pulled(cri: CriClient) -> None:
    with refused():
        cri.pull("registry.k8s.io/lab/absent:1")
    with refused():
        cri.pull("not a reference")
    assert cri.image("registry.k8s.io/lab/absent:1") is None
    assert cri.image("not a reference") is None


def test_the_file_system_of_images_is_told(cri: CriClient) -> None:
    cri.pull(TAGGED)

    def told() -> pb.FilesystemUsage:
        usage: pb.FilesystemUsage = cri.rpc("ImageFsInfo").image_filesystems[0]
        return usage

    wait_until(lambda: told().used_bytes.value > 0, timeout_s=15, what="no used bytes")
    usage = told()
    assert usage.timestamp > 0
    assert usage.inodes_used.value > 0
    assert usage.fs_id.mountpoint.startswith("/")
