"""What the guest's agent is asked for: each golden file is the whole configuration of one case.

`DISPATCHER_WRITE_GOLDEN=1 pytest tests/unit/hyper_vm` writes them anew; read the difference before you commit it.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from dispatcher.api import ContainerRef, ExecSpec
from dispatcher.errors import InvalidRequest, NotSupported
from dispatcher.model import (
    Capabilities,
    ContainerSecurity,
    ContainerUser,
    Device,
    EnvVar,
    HugepageLimit,
    IdMapping,
    ImageConfig,
    NamespaceMode,
    NamespaceOptions,
    PodSecurity,
    Resources,
    UserNamespace,
)
from dispatcher_hyper_vm.oci_spec import (
    Built,
    GuestDisk,
    GuestMount,
    Resolved,
    build_container,
    build_exec,
    limits,
)
from tests.unit.hyper_vm.refs import container, pod

GOLDEN = Path(__file__).with_name("golden")
ROOT = ContainerUser(uid=0, gid=0, supplemental_groups=(0,))


def build(item: ContainerRef, **resolved: Any) -> Built:
    return build_container(item, Resolved(**{"user": ROOT, **resolved}))


EVERYTHING: dict[str, Any] = {
    "command": ("a",),
    "args": ("b", "--c=d"),
    "working_dir": "/work",
    "envs": (EnvVar(key="X", value="ä\n$(y)".encode()), EnvVar(key="RAW", value=b"\xff\xfe")),
    "devices": (Device(container_path="/dev/x", host_path="/dev/null", permissions="rw"),),
    "tty": True,
    "resources": Resources(
        cpu_period_us=100_000,
        cpu_quota_us=50_000,
        cpu_shares=512,
        memory_limit_bytes=64 << 20,
        memory_swap_limit_bytes=64 << 20,
        oom_score_adj=-997,
        unified={"memory.high": "60000000"},
    ),
    "security": ContainerSecurity(
        namespaces=NamespaceOptions(pid=NamespaceMode.TARGET, target_id="d" * 64),
        capabilities=Capabilities(add=("net_admin",), drop=("CAP_MKNOD",), add_ambient=("NET_BIND_SERVICE",)),
        readonly_rootfs=True,
        no_new_privs=True,
        masked_paths=("/proc/kcore",),
        readonly_paths=(),
    ),
}


def cases() -> dict[str, Any]:
    plain = build(container())
    everything = build(
        container(**EVERYTHING),
        user=ContainerUser(uid=1000, gid=2000, supplemental_groups=(2000, 3000)),
        mounts=(
            GuestMount(target="/data/deep", source="/run/pod/share/share-1", options=("rbind", "ro", "rprivate")),
            GuestMount(target="/data", source="/run/pod/vol/empty-dir-1", options=("rbind", "rw", "rprivate")),
        ),
        disks=(GuestDisk(path="/dev/xvda", serial="block-1"),),
        rlimits={"nofile": (1024, 4096)},
    )
    privileged = build(
        container(
            pod(security=PodSecurity(privileged=True)),
            security=ContainerSecurity(namespaces=NamespaceOptions(pid=NamespaceMode.CONTAINER), privileged=True),
        )
    )
    return {
        "plain": plain.spec,
        "everything": everything.spec,
        "privileged": privileged.spec,
        "exec": build_exec(container(**EVERYTHING), ROOT, ExecSpec(command=("ls", "-l"))),
    }


@pytest.mark.parametrize("name", ["plain", "everything", "privileged", "exec"])
def test_golden(name: str) -> None:
    text = json.dumps(cases()[name], indent=1, sort_keys=True) + "\n"
    path = GOLDEN / f"{name}.json"
    if os.environ.get("DISPATCHER_WRITE_GOLDEN"):
        path.parent.mkdir(exist_ok=True)
        path.write_text(text, encoding="utf-8")
    assert text == path.read_text(encoding="utf-8")


def test_environment_of_the_request_wins_over_the_image() -> None:
    image = ImageConfig(cmd=("x",), env=("A=image", "B=image", "no-equals", "PATH=/bin"))
    env = build(container(image=image, envs=(EnvVar(key="A", value=b"own"),))).spec["process"]["env"]
    assert {"A=own", "B=image", "PATH=/bin", "HOSTNAME=web-0", "HOME=/root"} == set(env)


@pytest.mark.parametrize(
    ("image", "fields", "line"),
    [
        (ImageConfig(entrypoint=("e",), cmd=("c",)), {"command": ()}, ["e", "c"]),
        (ImageConfig(entrypoint=("e",), cmd=("c",)), {"command": (), "args": ("a",)}, ["e", "a"]),
        (ImageConfig(entrypoint=("e",), cmd=("c",)), {"command": ("x",)}, ["x"]),
        (ImageConfig(entrypoint=("e",), cmd=("c",)), {"command": ("x",), "args": ("a",)}, ["x", "a"]),
    ],
)
def test_command_and_args_are_merged_as_kubernetes_says(
    image: ImageConfig, fields: dict[str, Any], line: list[str]
) -> None:
    assert build(container(image=image, **fields)).spec["process"]["args"] == line


@pytest.mark.parametrize(
    ("wanted", "has", "lacks"),
    [
        (Capabilities(), {"CAP_CHOWN"}, {"CAP_SYS_ADMIN"}),
        (Capabilities(drop=("ALL",)), set(), {"CAP_CHOWN"}),
        (Capabilities(drop=("ALL",), add=("NET_RAW",)), {"CAP_NET_RAW"}, {"CAP_CHOWN"}),
        (Capabilities(add=("ALL",)), {"CAP_SYS_ADMIN", "CAP_BPF"}, set()),
        (Capabilities(add=("ALL",), drop=("SYS_ADMIN",)), {"CAP_BPF"}, {"CAP_SYS_ADMIN"}),
    ],
)
def test_capabilities(wanted: Capabilities, has: set[str], lacks: set[str]) -> None:
    built = build(container(security=ContainerSecurity(capabilities=wanted)))
    assert has <= built.capabilities
    assert not lacks & built.capabilities
    assert set(built.spec["process"]["capabilities"]["bounding"]) == built.capabilities


def test_a_user_namespace_belongs_to_the_pod_and_owns_what_it_shares() -> None:
    mapping = (IdMapping(host_id=65536, container_id=0, length=65536),)
    spaces = NamespaceOptions(user=UserNamespace(mode=NamespaceMode.POD, uids=mapping, gids=mapping))
    owner = pod(security=PodSecurity(namespaces=spaces))
    namespaces = build(container(owner)).spec["linux"]["namespaces"]
    assert {row["type"] for row in namespaces if row.get("path") == "pod"} == {"pid", "user", "ipc", "uts"}


def test_a_mount_of_its_own_replaces_the_standard_one() -> None:
    own = GuestMount(target="/dev/shm", source="/run/pod/vol/memory-1", options=("rbind",))
    rows = [m for m in build(container(), mounts=(own,)).spec["mounts"] if m["destination"] == "/dev/shm"]
    assert [row["source"] for row in rows] == ["/run/pod/vol/memory-1"]


def test_limits_that_a_guest_cannot_give_are_noted() -> None:
    granted, row, notes = limits(
        Resources(memory_limit_bytes=1 << 20, memory_swap_limit_bytes=2 << 20, cpuset_cpus="0-1")
    )
    assert granted == Resources(memory_limit_bytes=1 << 20, memory_swap_limit_bytes=1 << 20)
    assert row == {"memory": {"limit": 1 << 20, "swap": 1 << 20}}
    assert len(notes) == 2


@pytest.mark.parametrize(
    ("item", "kind", "words"),
    [
        (
            container(security=ContainerSecurity(namespaces=NamespaceOptions(pid=NamespaceMode.NODE))),
            NotSupported,
            "runtime: docker",
        ),
        (
            container(
                pod(security=PodSecurity(namespaces=NamespaceOptions(network=NamespaceMode.NODE))),
            ),
            NotSupported,
            "hostNetwork",
        ),
        (container(security=ContainerSecurity(privileged=True)), InvalidRequest, "privileged"),
        (
            container(security=ContainerSecurity(namespaces=NamespaceOptions(pid=NamespaceMode.TARGET, target_id="x"))),
            InvalidRequest,
            "target",
        ),
        (
            container(security=ContainerSecurity(capabilities=Capabilities(add=("FLY",)))),
            InvalidRequest,
            "FLY",
        ),
        (container(working_dir="relative"), InvalidRequest, "absolute"),
        (container(command=(), image=ImageConfig()), InvalidRequest, "no command"),
        (container(envs=(EnvVar(key="", value=b""),)), InvalidRequest, "empty"),
        (
            container(resources=Resources(hugepage_limits=(HugepageLimit(page_size="2MB", limit_bytes=1 << 21),))),
            NotSupported,
            "huge pages",
        ),
        (container(resources=Resources(unified={"memory.max/../x": "1"})), InvalidRequest, "cgroup setting"),
        (container(resources=Resources(unified={"memory.max": "1\n2"})), InvalidRequest, "cgroup setting"),
    ],
)
def test_what_cannot_be_is_refused_with_the_reason(item: ContainerRef, kind: type[Exception], words: str) -> None:
    with pytest.raises(kind, match=words):
        build(item)


def test_a_huge_page_limit_of_zero_is_no_wish() -> None:
    wanted = Resources(hugepage_limits=(HugepageLimit(page_size="2MB", limit_bytes=0),))
    assert build(container(resources=wanted)).spec["linux"]["resources"] == {}
