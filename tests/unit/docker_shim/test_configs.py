"""What the engine is asked for: each golden file is the whole create request of one case.

`DISPATCHER_WRITE_GOLDEN=1 pytest tests/unit/docker_shim` writes them anew; read the difference before you commit it.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from dispatcher.api import ContainerRef, PodRef
from dispatcher.api.containers import stop_signal
from dispatcher.errors import InvalidRequest, NotSupported
from dispatcher.model import (
    Attachment,
    Capabilities,
    ContainerId,
    ContainerMetadata,
    ContainerSecurity,
    ContainerSpec,
    ContainerUser,
    Device,
    EnvVar,
    IdMapping,
    ImageConfig,
    ImageId,
    Mount,
    NamespaceMode,
    NamespaceOptions,
    PodId,
    PodMetadata,
    PodSecurity,
    PodSpec,
    ProfileType,
    Propagation,
    Resources,
    SecurityProfile,
    SelinuxOptions,
)
from dispatcher_docker_shim.container_config import Built, Resolved, build_container, merge_limits
from dispatcher_docker_shim.pause_config import build_pause
from dispatcher_docker_shim.traits import EngineTraits

GOLDEN = Path(__file__).with_name("golden")
NODE = "11111111-2222-3333-4444-555555555555"
OLD = EngineTraits(version="20.10.24", api=(1, 41))
NEW = EngineTraits(
    version="28.0.0",
    api=(1, 48),
    cgroup_driver="systemd",
    cgroup_version=2,
    apparmor=True,
    selinux=True,
    recursive_read_only=True,
    cdi=True,
    userns_remap=True,
)
CLAMPED = replace(OLD, oom_floor=0, rlimit_caps={"nofile": 20_000}, swap_limit=False)


def pod(**fields: object) -> PodRef:
    metadata = PodMetadata(name="web", namespace="default", uid="u-1")
    labels = {"app": "web", "com.docker.compose.project": "evil"}
    spec = PodSpec(metadata=metadata, **{"hostname": "web-0", "labels": labels, **fields})  # type: ignore[arg-type]
    attachment = None if spec.uses_host_network else Attachment(netns_path="/run/cri-dispatcher/netns/p")
    return PodRef(id=PodId("a" * 64), spec=spec, attachment=attachment)


def container(owner: PodRef | None = None, *, image: ImageConfig | None = None, **fields: object) -> ContainerRef:
    fields.setdefault("command", ("server", "--port", "80"))
    fields.setdefault("security", ContainerSecurity(namespaces=NamespaceOptions(pid=NamespaceMode.CONTAINER)))
    spec = ContainerSpec(metadata=ContainerMetadata(name="main"), image_ref="sha256:0", **fields)  # type: ignore[arg-type]
    return ContainerRef(
        id=ContainerId("b" * 64),
        pod=owner or pod(),
        spec=spec,
        image_id=ImageId("sha256:" + "c" * 64),
        image=image or ImageConfig(cmd=("default",)),
    )


def security(**fields: object) -> ContainerSecurity:
    fields.setdefault("namespaces", NamespaceOptions(pid=NamespaceMode.CONTAINER))
    return ContainerSecurity(**fields)  # type: ignore[arg-type]


def build(item: ContainerRef, traits: EngineTraits = OLD, **resolved: object) -> Built:
    values = {"image": "cri-dispatcher.local/n:c", "user": ContainerUser(uid=0, gid=0, supplemental_groups=(0,))}
    found = Resolved(**{**values, **resolved})  # type: ignore[arg-type]
    return build_container(item, found, node_uuid=NODE, traits=traits)


def pause(item: PodRef, traits: EngineTraits = OLD) -> object:
    config, notes = build_pause(item, image="cri-dispatcher.local/pause:x", node_uuid=NODE, traits=traits)
    return {"config": config, "notes": list(notes)}


def made(item: ContainerRef, traits: EngineTraits = OLD, **resolved: object) -> object:
    built = build(item, traits, **resolved)
    return {"config": built.config, "notes": list(built.notes)}


NODE_SPACES = NamespaceOptions(network=NamespaceMode.NODE, pid=NamespaceMode.NODE, ipc=NamespaceMode.NODE)
EVERYTHING: dict[str, Any] = {
    "command": ("a",),
    "args": ("b", "--c=d"),
    "working_dir": "/work",
    "envs": (EnvVar(key="X", value="ä\n$(y)".encode()), EnvVar(key="EMPTY", value=b"")),
    "mounts": (
        Mount(container_path="/data", host_path="/host", propagation=Propagation.BIDIRECTIONAL),
        Mount(container_path="/ro", host_path="/host2", readonly=True),
    ),
    "devices": (Device(container_path="/dev/x", host_path="/dev/null", permissions="rw"),),
    "stdin": True,
    "stdin_once": True,
    "tty": True,
    "labels": {"traefik.enable": "true"},
    "annotations": {"a": "b"},
    "resources": Resources(
        cpu_period_us=100_000,
        cpu_quota_us=50_000,
        cpu_shares=512,
        memory_limit_bytes=64 << 20,
        oom_score_adj=-900,
        cpuset_cpus="0-1",
        cpuset_mems="0",
    ),
    "security": security(
        run_as_user=1000,
        capabilities=Capabilities(add=("net_admin", "CAP_SYS_TIME"), drop=("ALL",)),
        readonly_rootfs=True,
        no_new_privs=True,
        masked_paths=("/proc/kcore",),
        readonly_paths=(),
        seccomp=SecurityProfile(type=ProfileType.LOCALHOST, localhost_ref="/p.json"),
        apparmor=SecurityProfile(type=ProfileType.LOCALHOST, localhost_ref="profile"),
        selinux=SelinuxOptions(user="u", role="r", type="t", level="s0:c1,c2"),
    ),
}
RESOLVED: dict[str, Any] = {
    "sources": ("/real/host", "/real/host2"),
    "user": ContainerUser(uid=1000, gid=1000, supplemental_groups=(1000, 5, 6)),
    "seccomp_json": '{"defaultAction":"SCMP_ACT_ALLOW"}',
    "rlimits": {"nofile": (1024, 1 << 20)},
}
PLAIN_PROFILE = SecurityProfile(type=ProfileType.RUNTIME_DEFAULT)
WITHOUT_APPARMOR: dict[str, Any] = {**EVERYTHING, "security": replace(EVERYTHING["security"], apparmor=PLAIN_PROFILE)}
RECURSIVE = Mount(container_path="/r", host_path="/h", readonly=True, recursive_readonly=True)

CASES: dict[str, Callable[[], object]] = {
    "pause-plain": lambda: pause(pod()),
    "pause-host-namespaces": lambda: pause(pod(security=PodSecurity(namespaces=NODE_SPACES))),
    "pause-clamped": lambda: pause(pod(cgroup_parent="/kubepods/pod1", sysctls={"kernel.sem": "1 2 3 4"}), CLAMPED),
    "pause-systemd": lambda: pause(
        pod(
            cgroup_parent="/kubepods.slice/kubepods-pod1.slice",
            security=PodSecurity(selinux=SelinuxOptions(level="s0")),
        ),
        NEW,
    ),
    "container-plain": lambda: made(container()),
    "container-image-defaults": lambda: made(container(command=(), args=("x",), image=ImageConfig(working_dir="/w"))),
    "container-everything-20.10": lambda: made(container(**WITHOUT_APPARMOR), CLAMPED, **RESOLVED),
    "container-everything-28": lambda: made(container(**EVERYTHING, cdi_devices=("v.com/c=d",)), NEW, **RESOLVED),
    "container-privileged": lambda: made(
        container(
            pod(security=PodSecurity(privileged=True)),
            security=security(privileged=True, seccomp=PLAIN_PROFILE, masked_paths=("/proc/kcore",)),
        ),
    ),
    "container-host-namespaces": lambda: made(
        container(
            pod(security=PodSecurity(namespaces=NODE_SPACES)),
            security=security(namespaces=NODE_SPACES),
        ),
    ),
    "container-shared-pid": lambda: made(container(security=ContainerSecurity())),
    "container-target-pid": lambda: made(
        container(
            security=ContainerSecurity(
                namespaces=NamespaceOptions(pid=NamespaceMode.TARGET, target_id="d" * 64),
            ),
        ),
    ),
    "container-recursive-read-only": lambda: made(container(mounts=(RECURSIVE,)), NEW, sources=("/h",)),
}


@pytest.mark.parametrize("name", CASES)
def test_create_request(name: str) -> None:
    """The request is exactly the one on file."""
    text = json.dumps(CASES[name](), indent=1, sort_keys=True, ensure_ascii=False) + "\n"
    path = GOLDEN / f"{name}.json"
    if os.environ.get("DISPATCHER_WRITE_GOLDEN"):
        path.write_text(text, encoding="utf-8")
    assert path.read_text(encoding="utf-8") == text


def test_every_golden_file_has_its_case() -> None:
    """No file is left behind by a case that is gone."""
    assert {path.stem for path in GOLDEN.glob("*.json")} == set(CASES)


def test_hostile_text_reaches_no_key() -> None:
    """Labels and annotations of users are nowhere in a request."""
    text = json.dumps([pause(pod()), made(container(labels={"evil": "1"}, annotations={"evil": "1"}))])
    assert "evil" not in text


def mounted(**fields: object) -> tuple[Mount, ...]:
    return (Mount(container_path="/m", host_path="/h", **fields),)  # type: ignore[arg-type]


REFUSED: dict[str, tuple[type[Exception], dict[str, object]]] = {
    "no command": (InvalidRequest, {"command": (), "image": ImageConfig()}),
    "privileged": (InvalidRequest, {"security": security(privileged=True)}),
    "ambient": (NotSupported, {"security": security(capabilities=Capabilities(add_ambient=("NET_RAW",)))}),
    "capability": (InvalidRequest, {"security": security(capabilities=Capabilities(drop=("a b",)))}),
    "UTF-8": (NotSupported, {"envs": (EnvVar(key="x", value=b"\xff"),)}),
    "zero byte": (InvalidRequest, {"envs": (EnvVar(key="x", value=b"a\0b"),)}),
    "holds '='": (InvalidRequest, {"envs": (EnvVar(key="x=y", value=b""),)}),
    "id mapping": (NotSupported, {"mounts": mounted(uid_mappings=(IdMapping(host_id=0, container_id=0, length=1),))}),
    "not absolute": (InvalidRequest, {"mounts": (Mount(container_path="m", host_path="/h"),)}),
    "recursively read-only: that": (NotSupported, {"mounts": mounted(readonly=True, recursive_readonly=True)}),
    "subset of rwm": (
        InvalidRequest,
        {"devices": (Device(container_path="/x", host_path="/x", permissions="rx"),)},
    ),
    "CDI devices need": (NotSupported, {"cdi_devices": ("v.com/c=d",)}),
    "AppArmor": (
        NotSupported,
        {"security": security(apparmor=SecurityProfile(type=ProfileType.LOCALHOST, localhost_ref="p"))},
    ),
    "target PID": (
        InvalidRequest,
        {"security": security(namespaces=NamespaceOptions(pid=NamespaceMode.TARGET))},
    ),
    "read-only path": (InvalidRequest, {"security": security(readonly_paths=("/a/../b",))}),
}


@pytest.mark.parametrize("words", REFUSED)
def test_refusals(words: str) -> None:
    """What cannot work or cannot be done honestly is refused, and the message names it."""
    kind, fields = REFUSED[words]
    with pytest.raises(kind, match=words):
        build(container(**fields), sources=("/h",) * len(container(**fields).spec.mounts))  # type: ignore[arg-type]


def test_seccomp_is_refused_without_seccomp() -> None:
    """An engine without seccomp must not pretend the default profile."""
    with pytest.raises(NotSupported, match="seccomp"):
        build(container(security=security(seccomp=PLAIN_PROFILE)), replace(OLD, seccomp=False))


@pytest.mark.parametrize(
    ("own", "image", "expected"),
    [
        ("", "", "SIGTERM"),
        ("", "SIGUSR1", "SIGUSR1"),
        ("SIGINT", "SIGUSR1", "SIGINT"),
        ("", "quit", "SIGQUIT"),
        ("", "9", "9"),
        ("SIGRTMIN+3", "", "SIGRTMIN+3"),
        ("", "--all; rm", "SIGTERM"),
        ("", "99", "SIGTERM"),
    ],
)
def test_stop_signal(own: str, image: str, expected: str) -> None:
    """The container's, else the image's where it looks like one, else TERM."""
    assert stop_signal(container(stop_signal=own, image=ImageConfig(stop_signal=image))) == expected


def test_update_names_the_sdks_arguments() -> None:
    """An update carries swap with memory, and tells what will be in force."""
    granted, arguments = merge_limits(Resources(memory_limit_bytes=100, cpu_quota_us=-1, oom_score_adj=3), OLD)
    assert arguments == {"mem_limit": 100, "memswap_limit": 100, "cpu_quota": -1}
    assert granted.memory_swap_limit_bytes == 100
