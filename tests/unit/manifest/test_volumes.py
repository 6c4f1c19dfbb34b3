"""Volumes on disk, as containers find them."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from dispatcher.errors import InvalidRequest, WrongState
from dispatcher.manifest import (
    PodManifest,
    plan_container_files,
    plan_volumes,
    read_manifest,
    remove_pod_dir,
    write_volumes,
)
from dispatcher.manifest.volumes import volume_path

OBJECTS = """
---
{apiVersion: v1, kind: ConfigMap, metadata: {name: m}, data: {a.txt: hello, b: x}}
---
{apiVersion: v1, kind: Secret, metadata: {name: s}, data: {raw: AP8=}}
"""


def manifest(volumes: str, mounts: str = "", spec: str = "") -> PodManifest:
    text = (
        "apiVersion: v1\nkind: Pod\nmetadata: {name: web}\nspec:\n"
        f"  containers: [{{name: c, image: a, volumeMounts: [{mounts}]}}]\n  volumes: [{volumes}]\n  {spec}{OBJECTS}"
    )
    return read_manifest(text, "m.yaml")[0]


def write(found: PodManifest, pod_dir: Path) -> None:
    write_volumes(plan_volumes(found, str(pod_dir)))
    for _, container in found.containers:
        write_volumes(plan_container_files(found, container, str(pod_dir), 0))


def place(found: PodManifest, name: str, pod_dir: Path) -> Path:
    return Path(volume_path(found, name, str(pod_dir)))


def test_config_map_and_secret_hold_their_keys(tmp_path: Path) -> None:
    found = manifest("{name: v, configMap: {name: m}}, {name: w, secret: {secretName: s, defaultMode: 0400}}")
    write(found, tmp_path)
    folder = place(found, "v", tmp_path)
    assert (folder / "a.txt").read_text() == "hello"
    assert sorted(path.name for path in folder.iterdir() if not path.name.startswith("..")) == ["a.txt", "b"]
    assert os.readlink(folder / "a.txt") == "..data/a.txt"
    secret = place(found, "w", tmp_path) / "raw"
    assert secret.read_bytes() == b"\x00\xff"
    assert stat.S_IMODE(secret.stat().st_mode) == 0o400
    assert stat.S_IMODE((folder / "b").stat().st_mode) == 0o644


def test_items_choose_keys_paths_and_modes(tmp_path: Path) -> None:
    found = manifest("{name: v, configMap: {name: m, items: [{key: a.txt, path: x/y, mode: 0600}]}}")
    write(found, tmp_path)
    folder = place(found, "v", tmp_path)
    assert (folder / "x/y").read_text() == "hello"
    assert stat.S_IMODE((folder / "x/y").stat().st_mode) == 0o600
    assert not (folder / "b").exists()


def test_empty_dir_stays_as_it_is_when_written_again(tmp_path: Path) -> None:
    found = manifest("{name: v, emptyDir: {}}")
    write(found, tmp_path)
    kept = place(found, "v", tmp_path) / "kept"
    kept.write_text("1")
    write(found, tmp_path)
    assert kept.read_text() == "1"
    assert stat.S_IMODE(place(found, "v", tmp_path).stat().st_mode) == 0o777


def test_the_termination_log_is_kept_per_attempt(tmp_path: Path) -> None:
    found = manifest("{name: v, emptyDir: {}}")
    write(found, tmp_path)
    log = tmp_path / "containers/c/0"
    log.write_text("last words")
    write(found, tmp_path)
    assert log.read_text() == "last words"
    assert stat.S_IMODE(log.stat().st_mode) == 0o666


def test_sub_paths_are_made(tmp_path: Path) -> None:
    found = manifest("{name: v, emptyDir: {}}", "{name: v, mountPath: /x, subPath: a/b}")
    write(found, tmp_path)
    assert (place(found, "v", tmp_path) / "a/b").is_dir()


def test_a_sub_path_cannot_leave_its_volume_by_a_link(tmp_path: Path) -> None:
    """A container that ran before may have planted the link."""
    found = manifest("{name: v, emptyDir: {}}", "{name: v, mountPath: /x, subPath: a/b}")
    write_volumes(plan_volumes(found, str(tmp_path / "pod")))
    outside = tmp_path / "outside"
    outside.mkdir()
    (place(found, "v", tmp_path / "pod") / "a").symlink_to(outside)
    with pytest.raises(InvalidRequest, match="leads out of its volume"):
        write(found, tmp_path / "pod")
    assert not list(outside.iterdir())


def test_host_paths_are_held_against_their_type(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "folder").mkdir()
    cases = [
        ("file", "File", ""),
        ("folder", "Directory", ""),
        ("folder", "", ""),
        ("new/folder", "DirectoryOrCreate", ""),
        ("newfile", "FileOrCreate", ""),
        ("file", "Directory", "is no Directory"),
        ("folder", "FileOrCreate", "is no File"),
        ("folder", "Socket", "is no Socket"),
        ("gone", "File", "No such file"),
        ("gone", "", "No such file"),
    ]
    for name, kind, said in cases:
        found = manifest(f"{{name: v, hostPath: {{path: {tmp_path}/{name}, type: '{kind}'}}}}")
        if said:
            with pytest.raises(WrongState, match=said):
                write(found, tmp_path / "pod")
        else:
            write(found, tmp_path / "pod")
    assert (tmp_path / "new/folder").is_dir()
    assert (tmp_path / "newfile").is_file()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root gives files to another group")
def test_fs_group_gets_the_volumes_and_not_the_pod_folder(tmp_path: Path) -> None:
    found = manifest(
        "{name: v, emptyDir: {}}, {name: w, secret: {secretName: s, defaultMode: 0400}}",
        spec="securityContext: {fsGroup: 4242}",
    )
    write(found, tmp_path / "pod")
    folder = place(found, "v", tmp_path / "pod")
    assert folder.stat().st_gid == 4242
    assert folder.stat().st_mode & stat.S_ISGID
    secret = place(found, "w", tmp_path / "pod") / "raw"
    assert secret.stat().st_gid == 4242
    assert stat.S_IMODE(secret.stat().st_mode) == 0o440
    assert (tmp_path / "pod").stat().st_gid != 4242


def test_a_secret_is_not_shown_by_its_plan() -> None:
    assert "x00" not in repr(plan_volumes(manifest("{name: w, secret: {secretName: s}}"), "/p"))


def test_remove_takes_everything(tmp_path: Path) -> None:
    found = manifest("{name: v, configMap: {name: m}}")
    write(found, tmp_path / "pod")
    remove_pod_dir(str(tmp_path / "pod"))
    remove_pod_dir(str(tmp_path / "pod"))
    assert not (tmp_path / "pod").exists()
