"""Where a cgroup is: by a process, and by the name that a kubelet sends."""

from __future__ import annotations

from pathlib import Path

import pytest

from dispatcher.cgroups import expand_cgroup_parent, find_cgroup_of_parent, parse_membership

V1 = ["12:hugetlb:/a/b", "5:cpu,cpuacct:/a/b", "4:memory:/a/b", "1:name=systemd:/a/b", "0::/"]


def test_membership_of_each_version(tmp_path: Path) -> None:
    """Version 1, both beside each other, and version 2 are told apart by the kernel's own lines."""
    v1 = parse_membership(V1, tmp_path)
    assert v1 is not None
    assert (v1.version, v1.name, v1.unified) == (1, "/a/b", None)
    assert (v1.folder("memory"), v1.folder("cpuacct")) == (tmp_path / "memory/a/b", tmp_path / "cpuacct/a/b")
    both = parse_membership([*V1[:-1], "0::/a/b"], tmp_path)
    assert both is not None
    assert (both.version, both.unified) == (1, tmp_path / "unified/a/b")
    v2 = parse_membership(["0::/kubepods.slice/docker-x.scope"], tmp_path)
    assert v2 is not None
    assert (v2.version, v2.name) == (2, "/kubepods.slice/docker-x.scope")
    assert v2.folder("memory") == tmp_path / "kubepods.slice/docker-x.scope"
    assert parse_membership([], tmp_path) is None


@pytest.mark.parametrize(
    ("line", "name"),
    [
        ("0::/kubepods.slice/docker-c1.scope", "/kubepods.slice/docker-c1.scope"),
        ("0::/kubepods.slice/docker-c1.scope/init.scope", "/kubepods.slice/docker-c1.scope"),
        ("0::/pods/c1/c1/c1", "/pods/c1"),
        ("0::/kubepods.slice/docker-c2.scope", None),
        ("0::/", None),
        ("4:memory:/pods/c1/inner", "/pods/c1"),
        ("4:memory:/pods/c2", None),
    ],
)
def test_a_container_that_divides_its_cgroup(tmp_path: Path, line: str, name: str | None) -> None:
    """Whatever a container makes below, its cgroup is the one with its id; a pid that was reused has none."""
    found = parse_membership([line], tmp_path, owner="c1")
    assert (found.name if found else None) == name


def test_the_cgroup_of_a_pod_by_its_name(tmp_path: Path) -> None:
    """Only what is there is found; a host with version 2 is told by its root."""
    assert find_cgroup_of_parent("/kubepods/pod1", tmp_path) is None
    for folder in ("memory/kubepods/pod1", "cpuacct/kubepods/pod1", "unified/kubepods/pod1"):
        (tmp_path / folder).mkdir(parents=True)
    v1 = find_cgroup_of_parent("/kubepods/pod1", tmp_path)
    assert v1 is not None
    assert (v1.version, set(v1.paths), v1.name) == (1, {"memory", "cpuacct"}, "/kubepods/pod1")
    assert v1.unified == tmp_path / "unified/kubepods/pod1"

    (tmp_path / "cgroup.controllers").write_text("cpu memory\n")
    assert find_cgroup_of_parent("kubepods-pod1.slice", tmp_path) is None
    (tmp_path / "kubepods.slice/kubepods-pod1.slice").mkdir(parents=True)
    v2 = find_cgroup_of_parent("kubepods-pod1.slice", tmp_path)
    assert v2 is not None
    assert (v2.version, v2.unified) == (2, tmp_path / "kubepods.slice/kubepods-pod1.slice")


@pytest.mark.parametrize(
    ("name", "path"),
    [
        ("/kubepods/pod1", "kubepods/pod1"),
        ("kubepods/pod1/", "kubepods/pod1"),
        ("kubepods-burstable-pod1_2.slice", "kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod1_2.slice"),
        ("/kubepods.slice/kubepods-pod1.slice", "kubepods.slice/kubepods-pod1.slice"),
        ("x.slice", "x.slice"),
        ("", None),
        ("/", None),
        ("-.slice", None),
        (".slice", None),
        ("a--b.slice", None),
        ("/kubepods/../../etc", None),
        ("./x", None),
        ("a\0b", None),
    ],
)
def test_names_become_paths_below_the_root(name: str, path: str | None) -> None:
    """A slice is expanded as systemd lays it out; nothing leads out of the hierarchy."""
    found = expand_cgroup_parent(name)
    assert (str(found) if found is not None else None) == path
