"""Propagation and read-only mounts: the kernel's rules as the CRI names them."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from dispatcher.cri import api_pb2 as pb
from tests.lab.client import ContainerHandle, CriClient, Pod, refused

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root to mount")

PRIVATE, SLAVE, SHARED = (
    pb.PROPAGATION_PRIVATE,
    pb.PROPAGATION_HOST_TO_CONTAINER,
    pb.PROPAGATION_BIDIRECTIONAL,
)


def mount(*arguments: str) -> None:
    subprocess.run(["mount", *arguments], check=True, capture_output=True)


@pytest.fixture
def shared_folder(tmp_path: Path) -> Iterator[Path]:
    """A host folder that is a shared mount, as the root of a systemd host is. Everything below is unmounted."""
    folder = tmp_path / "shared"
    folder.mkdir()
    mount("--bind", str(folder), str(folder))
    mount("--make-rshared", str(folder))
    try:
        (folder / "early").mkdir()
        (folder / "late").mkdir()
        yield folder
    finally:
        # Recursive and lazy: a container's mount may still be on its way out.
        subprocess.run(["umount", "-l", "-R", str(folder)], check=False, capture_output=True)


@pytest.fixture(scope="module")
def privileged_pod(cri: CriClient) -> Iterator[Pod]:
    with cri.run_pod(security=pb.LinuxSandboxSecurityContext(privileged=True)) as pod:
        yield pod


@contextmanager
def propagating(pod: Pod, folder: Path, propagation: pb.MountPropagation) -> Iterator[ContainerHandle]:
    container = pod.run(
        security=pb.LinuxContainerSecurityContext(privileged=True),
        mounts=[pb.Mount(host_path=str(folder), container_path="/mnt/it", propagation=propagation)],
    )
    try:
        assert list(container.status().mounts) == list(container.config.mounts)
        yield container
    finally:
        container.remove()


def late_mount_is_seen(container: ContainerHandle, folder: Path) -> bool:
    mount("-t", "tmpfs", "tmpfs", str(folder / "late"))
    (folder / "late/mark").touch()
    return container.exec("test", "-e", "/mnt/it/late/mark").exit_code == 0


def own_mount_is_seen(container: ContainerHandle, folder: Path) -> bool:
    container.sh("mount -t tmpfs tmpfs /mnt/it/early && touch /mnt/it/early/mark")
    return (folder / "early/mark").exists()


def test_private_propagates_nothing(privileged_pod: Pod, shared_folder: Path) -> None:
    with propagating(privileged_pod, shared_folder, PRIVATE) as container:
        assert not late_mount_is_seen(container, shared_folder)
        assert not own_mount_is_seen(container, shared_folder)


def test_shared_propagates_both_ways(privileged_pod: Pod, shared_folder: Path) -> None:
    with propagating(privileged_pod, shared_folder, SHARED) as container:
        assert late_mount_is_seen(container, shared_folder)
        assert own_mount_is_seen(container, shared_folder)


def test_slave_propagates_from_the_host_only(privileged_pod: Pod, shared_folder: Path) -> None:
    with propagating(privileged_pod, shared_folder, SLAVE) as container:
        assert late_mount_is_seen(container, shared_folder)
        assert not own_mount_is_seen(container, shared_folder)


# ---------------------------------------------------------------------------------------------------------- read-only


@pytest.fixture
def nested(tmp_path: Path) -> Iterator[Path]:
    """A folder with a file system of its own inside."""
    inner = tmp_path / "outer/inner"
    inner.mkdir(parents=True)
    mount("-t", "tmpfs", "tmpfs", str(inner))
    try:
        yield inner.parent
    finally:
        subprocess.run(["umount", "-l", str(inner)], check=False, capture_output=True)


def read_only(folder: Path, **fields: object) -> pb.Mount:
    return pb.Mount(host_path=str(folder), container_path="/mnt/it", **{"readonly": True, **fields})  # type: ignore[arg-type]


def need_recursive(cri: CriClient) -> None:
    if not cri.handler_features().recursive_read_only_mounts:
        pytest.skip("the handler does not offer recursive read-only mounts")


def writable(container: ContainerHandle, path: str) -> bool:
    ran = container.exec("touch", f"{path}/new")
    assert ran.exit_code == 0 or "Read-only file system" in ran.stderr, ran.stderr
    return ran.exit_code == 0


def test_read_only_is_not_recursive_by_itself(pod: Pod, nested: Path) -> None:
    container = pod.run(mounts=[read_only(nested)])
    assert not writable(container, "/mnt/it")
    assert writable(container, "/mnt/it/inner")
    container.remove()


def test_recursive_read_only_reaches_mounts_inside(cri: CriClient, pod: Pod, nested: Path) -> None:
    need_recursive(cri)
    container = pod.run(mounts=[read_only(nested, recursive_read_only=True)])
    assert not writable(container, "/mnt/it")
    assert not writable(container, "/mnt/it/inner")
    assert container.status().mounts[0].recursive_read_only
    container.remove()


def test_recursive_read_only_is_refused_where_it_is_not_offered(cri: CriClient, pod: Pod, tmp_path: Path) -> None:
    """Silently mounting writable what must be read-only would be worse than no pod."""
    if cri.handler_features().recursive_read_only_mounts:
        pytest.skip("the handler offers recursive read-only mounts")
    with refused():
        pod.create(mounts=[read_only(tmp_path, recursive_read_only=True)])


@pytest.mark.parametrize("propagation", [SLAVE, SHARED], ids=["host to container", "bidirectional"])
def test_recursive_read_only_with_propagation_is_refused(
    privileged_pod: Pod, shared_folder: Path, propagation: pb.MountPropagation
) -> None:
    with refused():
        privileged_pod.create(
            mounts=[read_only(shared_folder, recursive_read_only=True, propagation=propagation)],
            security=pb.LinuxContainerSecurityContext(privileged=True),
        )


def test_recursive_read_only_on_a_writable_mount_is_refused(pod: Pod, tmp_path: Path) -> None:
    with refused():
        pod.create(mounts=[read_only(tmp_path, recursive_read_only=True, readonly=False)])
