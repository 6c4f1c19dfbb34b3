"""How each kind of mount reaches the guest, and what is refused."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from dispatcher.errors import InvalidRequest, NotSupported
from dispatcher.model import IdMapping, ImageVolume, Mount, Propagation
from dispatcher_hyper_vm.mounts import HostPath, Kind, Way, plan_mount

PODS = "/var/lib/kubelet/pods/0b/volumes"
FOLDER = HostPath(path="/srv/data", kind=Kind.FOLDER)
FILE = HostPath(path="/srv/file", kind=Kind.FILE, size_bytes=100)
READ_ONLY = Mount(container_path="/x", host_path="/x", readonly=True)
WRITABLE = Mount(container_path="/x", host_path="/x")


def at(path: str, **fields: Any) -> HostPath:
    return replace(FOLDER, path=f"{PODS}/{path}", **fields)


@pytest.mark.parametrize(
    ("mount", "found", "way"),
    [
        (READ_ONLY, at("kubernetes.io~configmap/conf", size_bytes=10), Way.FILES),
        (READ_ONLY, at("kubernetes.io~secret/key", size_bytes=10, memory_bytes=1 << 30), Way.FILES),
        (READ_ONLY, at("kubernetes.io~projected/token", size_bytes=10), Way.FILES),
        (READ_ONLY, at("kubernetes.io~configmap/large"), Way.SHARE),
        (WRITABLE, at("kubernetes.io~empty-dir/work"), Way.EMPTY_DIR),
        (READ_ONLY, at("kubernetes.io~empty-dir/work"), Way.EMPTY_DIR),
        (WRITABLE, at("kubernetes.io~empty-dir/work", memory_bytes=1 << 20), Way.MEMORY),
        (WRITABLE, at("kubernetes.io~empty-dir/work/below"), Way.SHARE),
        (WRITABLE, FOLDER, Way.SHARE),
        (READ_ONLY, FOLDER, Way.SHARE),
        (READ_ONLY, FILE, Way.FILES),
        (WRITABLE, FILE, Way.SHARE),
        (replace(WRITABLE, container_path="/etc/hosts"), FILE, Way.FILES),
        (replace(WRITABLE, container_path="/dev/termination-log"), FILE, Way.REPORT),
        (READ_ONLY, replace(FILE, size_bytes=None), Way.SHARE),
    ],
)
def test_the_way_of_a_mount(mount: Mount, found: HostPath, way: Way) -> None:
    planned = plan_mount(mount, found, report_path="/dev/termination-log")
    assert planned.way is way
    assert f"/{planned.name}" in planned.bind.source
    assert ("ro" in planned.bind.options) is mount.readonly


def test_no_name_of_the_host_reaches_the_guest() -> None:
    evil = replace(FOLDER, path="/srv/$(reboot)\n..")
    planned = plan_mount(WRITABLE, evil)
    assert planned.bind.source.startswith("/run/pod/share/share-")
    assert "reboot" not in planned.bind.source


def test_one_source_has_one_name_and_two_have_two() -> None:
    one, two = plan_mount(WRITABLE, FOLDER), plan_mount(replace(WRITABLE, container_path="/y"), FOLDER)
    assert one.name == two.name != plan_mount(WRITABLE, replace(FOLDER, path="/srv/other")).name


def test_image_volumes_are_read_only_disks() -> None:
    volume = ImageVolume(reference="r", image_id="sha256:" + "1" * 64, sub_path="etc")
    planned = plan_mount(Mount(container_path="/img", readonly=True, image=volume), None)
    assert (planned.way, planned.sub_path) == (Way.IMAGE, "etc")
    with pytest.raises(InvalidRequest, match="read-only"):
        plan_mount(Mount(container_path="/img", image=volume), None)


def test_options_of_a_mount_are_carried() -> None:
    mount = Mount(
        container_path="/x/",
        host_path="/x",
        readonly=True,
        recursive_readonly=True,
        options=("nosuid", "noexec"),
    )
    planned = plan_mount(mount, FOLDER)
    assert planned.bind.target == "/x"
    assert planned.bind.options == ("rbind", "ro", "rprivate", "rro", "noexec", "nosuid")


@pytest.mark.parametrize(
    ("mount", "found", "kind", "words"),
    [
        (WRITABLE, None, InvalidRequest, "does not exist"),
        (WRITABLE, replace(FOLDER, kind=Kind.SOCKET), NotSupported, "socket"),
        (WRITABLE, replace(FOLDER, kind=Kind.DEVICE), NotSupported, "runtime: docker"),
        (replace(WRITABLE, propagation=Propagation.BIDIRECTIONAL), FOLDER, NotSupported, "propagate"),
        (replace(WRITABLE, container_path="rel"), FOLDER, InvalidRequest, "absolute"),
        (replace(WRITABLE, container_path="/a/../b"), FOLDER, InvalidRequest, "absolute"),
        (replace(WRITABLE, recursive_readonly=True), FOLDER, InvalidRequest, "recursively"),
        (
            replace(WRITABLE, uid_mappings=(IdMapping(host_id=1, container_id=0, length=1),)),
            FOLDER,
            NotSupported,
            "id mapping",
        ),
        (replace(WRITABLE, options=("bind,exec",)), FOLDER, InvalidRequest, "options"),
    ],
)
def test_what_cannot_be_is_refused(mount: Mount, found: HostPath | None, kind: type[Exception], words: str) -> None:
    with pytest.raises(kind, match=words):
        plan_mount(mount, found)


def test_host_folders_may_be_closed_by_the_operator() -> None:
    with pytest.raises(NotSupported, match="host_folders"):
        plan_mount(WRITABLE, FOLDER, allow_share=False)
    assert plan_mount(READ_ONLY, FILE, allow_share=False).way is Way.FILES
