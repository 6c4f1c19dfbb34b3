"""Mounts, image volumes and devices."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from dispatcher.errors import InvalidRequest, NotSupported
from dispatcher.model import Device, ImageVolume, Mount, PodSecurity, Propagation
from tests.docker.kit import World, container_spec, pod_spec, security

pytestmark = [pytest.mark.lab, pytest.mark.asyncio(loop_scope="session")]


def mount(source: Path | str, target: str = "/mnt", **fields: object) -> Mount:
    return Mount(container_path=target, host_path=str(source), **fields)  # type: ignore[arg-type]


async def test_host_path_is_mounted_and_links_are_followed(world: World, busybox: str, folder: Path) -> None:
    """A host folder, a file and a symbolic link to either appear inside; writes reach the host."""
    (folder / "real").mkdir()
    (folder / "real/file").write_text("content\n")
    (folder / "link").symlink_to(folder / "real")
    pod = await world.make_pod()
    mounts = (mount(folder / "link", "/a"), mount(folder / "link/file", "/b", readonly=True))
    script = "cat /a/file /b; echo new > /a/new; echo x >> /b"
    printed = await world.text(pod, busybox, "sh", "-c", script, mounts=mounts)
    assert printed.splitlines()[:2] == ["content", "content"]
    assert "Read-only" in printed.splitlines()[2]
    assert (folder / "real/new").read_text() == "new\n"
    await world.remove_pod(pod)


async def test_missing_host_path_is_an_error(world: World, busybox: str, folder: Path) -> None:
    """Nothing is made on the host for a mount that names nothing."""
    pod = await world.make_pod()
    for path in (folder / "missing", "", "relative"):
        with pytest.raises(InvalidRequest, match="does not exist"):
            await world.make(pod, busybox, container_spec("true", mounts=(mount(path),)))
    assert not (folder / "missing").exists()
    await world.remove_pod(pod)


@pytest.fixture
def shared_folder(folder: Path) -> Iterator[Path]:
    """A folder that is a shared mount, as the kubelet's is."""
    subprocess.run(["mount", "--bind", folder, folder], check=True)
    subprocess.run(["mount", "--make-rshared", folder], check=True)
    yield folder
    subprocess.run(["umount", "-R", folder], check=True)


async def test_propagation(world: World, busybox: str, shared_folder: Path) -> None:
    """What the host mounts later appears in all but private mounts; what a container mounts only in shared ones."""
    pod = await world.make_pod(pod_spec(security=PodSecurity(privileged=True)))
    for propagation in Propagation:
        source = shared_folder / propagation.value
        for inner in ("late", "inside"):
            (source / inner).mkdir(parents=True)
        spec = container_spec(
            "sleep",
            "1000",
            mounts=(mount(source, propagation=propagation),),
            security=security(privileged=True),
        )
        container = await world.run(pod, busybox, spec)
        subprocess.run(["mount", "-t", "tmpfs", "none", source / "late"], check=True)
        (source / "late/file").touch()
        _, seen, _ = await world.exec(container, "ls", "/mnt/late")
        assert bool(seen) is (propagation is not Propagation.PRIVATE)
        await world.exec(container, "sh", "-c", "mount -t tmpfs none /mnt/inside && touch /mnt/inside/file")
        assert (source / "inside/file").exists() is (propagation is Propagation.BIDIRECTIONAL)
    await world.remove_pod(pod)


async def test_readonly_is_not_recursive_unless_asked(world: World, busybox: str, shared_folder: Path) -> None:
    """A nested mount stays writable below a read-only one; recursive read-only is done or refused, never pretended."""
    (shared_folder / "inner").mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "none", shared_folder / "inner"], check=True)
    pod = await world.make_pod()
    script = "touch /mnt/inner/x && echo inner; touch /mnt/x || echo outer"
    plain = mount(shared_folder, readonly=True)
    assert "inner\n" in await world.text(pod, busybox, "sh", "-c", script, mounts=(plain,))
    whole = mount(shared_folder, readonly=True, recursive_readonly=True)
    if (await world.runtime.probe()).features.recursive_read_only_mounts:
        assert "inner\n" not in await world.text(pod, busybox, "sh", "-c", script, mounts=(whole,))
    else:
        with pytest.raises(NotSupported, match="recursively"):
            await world.make(pod, busybox, container_spec("true", mounts=(whole,)))
    for wrong in (
        mount(shared_folder, recursive_readonly=True),
        mount(shared_folder, readonly=True, recursive_readonly=True, propagation=Propagation.BIDIRECTIONAL),
    ):
        with pytest.raises(InvalidRequest):
            await world.make(pod, busybox, container_spec("true", mounts=(wrong,)))
    await world.remove_pod(pod)


async def test_image_volumes(world: World, busybox: str) -> None:
    """An image is mounted read-only and executable, whole or below a sub path that must exist."""
    image = await world.image("gcr.io/k8s-staging-cri-tools/test-image-tag:test")

    def volume(sub_path: str = "", **fields: object) -> Mount:
        what = ImageVolume(reference="x", image_id=image.id, sub_path=sub_path)
        return Mount(container_path="/vol", image=what, **{"readonly": True, **fields})  # type: ignore[arg-type]

    pod = await world.make_pod()
    script = "cat /vol/testfile; touch /vol/x; /vol/bin/busybox echo runs"
    printed = await world.text(pod, busybox, "sh", "-c", script, mounts=(volume(),))
    assert printed.startswith("tag:test")
    assert "Read-only" in printed
    assert "runs\n" in printed
    inner = await world.text(pod, busybox, "ls", "/vol", mounts=(volume("etc"),))
    assert "passwd" in inner.split()
    for wrong in (volume("missing"), volume("../.."), volume(readonly=False), volume(host_path="/etc")):
        with pytest.raises(InvalidRequest):
            await world.make(pod, busybox, container_spec("true", mounts=(wrong,)))
    await world.remove_pod(pod)


async def test_devices(world: World, busybox: str) -> None:
    """A device appears with its permissions, a folder with all of its devices; a missing one is refused."""
    # One that no container may open unless it is asked for.
    source = next(path for path in ("/dev/fuse", "/dev/kvm", "/dev/kmsg") if Path(path).exists())
    pod = await world.make_pod()
    devices = (Device(container_path="/dev/mine", host_path=source, permissions="r"),)
    script = "ls -l /dev/mine | cut -c1; (: < /dev/mine) && echo reads; (: > /dev/mine) 2>&1 | grep -o 'not permitted'"
    printed = await world.text(pod, busybox, "sh", "-c", script, devices=devices)
    assert printed.splitlines() == ["c", "reads", "not permitted"]
    inputs = (Device(container_path="/dev/all", host_path="/dev/net", permissions="rwm"),)
    if Path("/dev/net/tun").exists():
        assert await world.text(pod, busybox, "ls", "/dev/all", devices=inputs) == "tun\n"
    missing = (Device(container_path="/dev/x", host_path="/dev/no-such-device", permissions="rwm"),)
    with pytest.raises(InvalidRequest, match="does not exist"):
        await world.make(pod, busybox, container_spec("true", devices=missing))
    with pytest.raises((NotSupported, InvalidRequest), match="CDI"):
        await world.make(pod, busybox, container_spec("true", cdi_devices=("not a name",)))
    await world.remove_pod(pod)
