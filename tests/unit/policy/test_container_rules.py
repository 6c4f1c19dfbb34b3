"""Rules about containers: they see image, devices, mounts and capabilities, and can only refuse."""

from __future__ import annotations

from pathlib import Path

import pytest

from dispatcher.model import (
    Capabilities,
    ContainerMetadata,
    ContainerSecurity,
    ContainerSpec,
    Device,
    Image,
    ImageConfig,
    ImageId,
    ImageVolume,
    Isolation,
    Mount,
    ProfileType,
    SecurityProfile,
)
from dispatcher.policy import RuntimeTraits, load_policy
from dispatcher.policy.decision import check_container
from dispatcher.policy.facts import PodFacts, facts_of_container, normal_image

RUNTIMES = {"docker": RuntimeTraits(isolation=Isolation.SHARED_KERNEL)}
CONFINED = SecurityProfile(type=ProfileType.RUNTIME_DEFAULT)


def image(*tags: str, digests: tuple[str, ...] = ()) -> Image:
    return Image(
        id=ImageId("sha256:" + "0" * 64), repo_tags=tags, repo_digests=digests, size_bytes=1, config=ImageConfig()
    )


def spec(
    *,
    user_image: str = "busybox",
    mounts: tuple[Mount, ...] = (),
    devices: tuple[Device, ...] = (),
    cdi: tuple[str, ...] = (),
    security: ContainerSecurity | None = None,
) -> ContainerSpec:
    return ContainerSpec(
        metadata=ContainerMetadata(name="c"),
        image_ref="sha256:" + "0" * 64,
        user_image=user_image,
        mounts=mounts,
        devices=devices,
        cdi_devices=cdi,
        security=security or ContainerSecurity(seccomp=CONFINED),
    )


def is_refused(
    match: str, container: ContainerSpec, held: Image | None = None, *, runtime: str = "docker", follow: bool = False
) -> bool:
    text = (
        "apiVersion: dispatcher/v1\ndefault: docker\n"
        f"rules: [{{name: r, phase: container, match: {{{match}}}, refuse: no}}]"
    )
    policy = load_policy(text, "p.yaml", RUNTIMES).policy
    real = {"resolve": lambda path: str(Path(path).resolve())} if follow else {}
    facts = facts_of_container(container, held or image("docker.io/library/busybox:latest"), runtime, **real)
    return check_container(policy, PodFacts(namespace="tenant"), facts) is not None


def mount(path: str) -> Mount:
    return Mount(container_path="/x", host_path=path)


MOUNTS = [
    ("host_mounts: /etc", "/etc", True),
    ("host_mounts: /etc", "/etc/shadow", True),
    ("host_mounts: /etc", "/", True),  # whoever has / has /etc
    ("host_mounts: /etc/shadow", "/etc", True),
    ("host_mounts: /etc", "/etcetera", False),
    ("host_mounts: /etc", "//etc/./x/../shadow", True),
    ("host_mounts: '/var/*/docker.sock'", "/var/run", True),
    ("host_mounts: '/var/*/docker.sock'", "/var/run/docker.sock", True),
    ("host_mounts: '/var/*/docker.sock'", "/srv", False),
    ("host_mounts: {other_than: [/data, /srv/*]}", "/data/x", False),
    ("host_mounts: {other_than: [/data, /srv/*]}", "/srv/y", False),
    ("host_mounts: {other_than: [/data, /srv/*]}", "/srv", True),
    ("host_mounts: {other_than: [/data]}", "/", True),
    ("host_mounts: {other_than: [/data]}", "/database", True),
]


@pytest.mark.parametrize(("match", "path", "expected"), MOUNTS)
def test_host_mounts(match: str, path: str, expected: bool) -> None:
    assert is_refused(match, spec(mounts=(mount(path),))) is expected


def test_one_bad_mount_among_good_ones_is_seen() -> None:
    mounts = (mount("/data/a"), mount("/etc"), mount("/data/b"))
    assert is_refused("host_mounts: {other_than: [/data]}", spec(mounts=mounts))
    assert is_refused("host_mounts: /etc", spec(mounts=mounts))


def test_a_link_to_a_forbidden_folder_is_that_folder(tmp_path: Path) -> None:
    forbidden = tmp_path / "forbidden"
    forbidden.mkdir()
    (tmp_path / "link").symlink_to(forbidden)
    container = spec(mounts=(mount(f"{tmp_path}/link"),))
    assert is_refused(f"host_mounts: {forbidden}", container, follow=True)


def test_image_volumes_are_no_host_mounts() -> None:
    volume = Mount(container_path="/x", image=ImageVolume(reference="a"), readonly=True)
    assert not is_refused("host_mounts: '*'", spec(mounts=(volume,)))


IMAGES = [
    ("image: 'docker.io/library/busybox:*'", "busybox", True),
    ("image: 'docker.io/*'", "registry.example/busybox", False),
    ("image: {other_than: ['registry.example/*']}", "busybox:1.36", True),
    ("image: {other_than: ['registry.example/*']}", "registry.example/a/b@sha256:00", False),
    ("image: {other_than: ['registry.example/*']}", "registry.example.evil/a", True),
    ("image: '*@sha256:*'", "registry.example/a@sha256:00", True),
]


@pytest.mark.parametrize(("match", "name", "expected"), IMAGES)
def test_images(match: str, name: str, expected: bool) -> None:
    assert is_refused(match, spec(user_image=name), image()) is expected


def test_an_image_is_known_by_every_name_it_has_here() -> None:
    """Pulling a forbidden image under another name does not help: here, the bytes are the same image."""
    held = image("good.io/a:1", "evil.io/a:1")
    assert is_refused("image: 'evil.io/*'", spec(user_image="good.io/a:1"), held)


NAMES = [
    ("busybox", "docker.io/library/busybox:latest"),
    ("busybox:1", "docker.io/library/busybox:1"),
    ("a/b", "docker.io/a/b:latest"),
    ("index.docker.io/a", "docker.io/library/a:latest"),
    ("localhost/a", "localhost/a:latest"),
    ("localhost:5000/a", "localhost:5000/a:latest"),
    ("r.io/a/b/c:v1", "r.io/a/b/c:v1"),
    ("r.io/a@sha256:00", "r.io/a@sha256:00"),
    ("r.io/a:v1@sha256:00", "r.io/a:v1@sha256:00"),
]


@pytest.mark.parametrize(("short", "full"), NAMES)
def test_image_names_in_full(short: str, full: str) -> None:
    assert normal_image(short) == full


SECURITY = [
    ("privileged: true", ContainerSecurity(privileged=True), True),
    ("privileged: true", ContainerSecurity(seccomp=CONFINED), False),
    ("capabilities: CAP_SYS_ADMIN", ContainerSecurity(capabilities=Capabilities(add=("sys_admin",))), True),
    ("capabilities: SYS_ADMIN", ContainerSecurity(capabilities=Capabilities(add=("ALL",))), True),
    ("capabilities: SYS_ADMIN", ContainerSecurity(privileged=True), True),
    ("capabilities: SYS_ADMIN", ContainerSecurity(capabilities=Capabilities(add=("NET_RAW",))), False),
    ("capabilities: NET_RAW", ContainerSecurity(capabilities=Capabilities(add_ambient=("NET_RAW",))), True),
    ("capabilities: NET_RAW", ContainerSecurity(capabilities=Capabilities(drop=("NET_RAW",))), False),
    (
        "capabilities: {other_than: [NET_BIND_SERVICE]}",
        ContainerSecurity(capabilities=Capabilities(add=("ALL",))),
        True,
    ),
    (
        "capabilities: {other_than: [NET_RAW]}",
        ContainerSecurity(capabilities=Capabilities(add=("CAP_NET_RAW",))),
        False,
    ),
    ("seccomp_unconfined: true", ContainerSecurity(), True),
    ("seccomp_unconfined: true", ContainerSecurity(seccomp=SecurityProfile(type=ProfileType.UNCONFINED)), True),
    ("seccomp_unconfined: true", ContainerSecurity(seccomp=CONFINED), False),
    ("seccomp_unconfined: true", ContainerSecurity(seccomp=CONFINED, privileged=True), True),
    ("namespace: 'tenant*', privileged: true", ContainerSecurity(privileged=True), True),
    ("namespace: 'other*', privileged: true", ContainerSecurity(privileged=True), False),
    ("runtime: docker, privileged: true", ContainerSecurity(privileged=True), True),
    ("runtime: vm, privileged: true", ContainerSecurity(privileged=True), False),
]


@pytest.mark.parametrize(("match", "security", "expected"), SECURITY)
def test_security(match: str, security: ContainerSecurity, expected: bool) -> None:
    assert is_refused(match, spec(security=security)) is expected


DEVICES = [
    ("devices: /dev/kvm", ("/dev/kvm",), (), True),
    ("devices: /dev/kvm", ("/dev",), (), True),
    ("devices: /dev/kvm", ("/dev/null",), (), False),
    ("devices: 'nvidia.com/*'", (), ("nvidia.com/gpu=0",), True),
    ("devices: {other_than: [/dev/null]}", ("/dev/null",), (), False),
    ("devices: {other_than: [/dev/null]}", ("/dev/null",), ("nvidia.com/gpu=0",), True),
    ("devices: {other_than: [/dev/null, 'nvidia.com/*']}", ("/dev/null",), ("nvidia.com/gpu=0",), False),
]


@pytest.mark.parametrize(("match", "paths", "cdi", "expected"), DEVICES)
def test_devices(match: str, paths: tuple[str, ...], cdi: tuple[str, ...], expected: bool) -> None:
    devices = tuple(Device(container_path=path, host_path=path, permissions="rwm") for path in paths)
    assert is_refused(match, spec(devices=devices, cdi=cdi)) is expected
