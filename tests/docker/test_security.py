"""The security context, as seen from inside the container."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dispatcher.errors import InvalidRequest, NotSupported
from dispatcher.model import (
    Capabilities,
    ContainerUser,
    GroupsPolicy,
    NamespaceMode,
    NamespaceOptions,
    PodSecurity,
    ProfileType,
    SecurityProfile,
)
from tests.docker.kit import World, container_spec, pod_spec, security
from tests.lab.images import NO_NEW_PRIVS, PREDEFINED_GROUP, STAGING, TestImages

pytestmark = [pytest.mark.lab, pytest.mark.asyncio(loop_scope="session")]

IDS = ("sh", "-c", "id -u; id -g; id -G")
PROC = ("sh", "-c", "grep -E '^(CapEff|CapBnd|Seccomp|NoNewPrivs):' /proc/self/status | tr -d '\\t'")


async def ids(world: World, image: str, **fields: object) -> tuple[ContainerUser, str]:
    """What was granted, and what `id` says inside and in an exec, which must agree."""
    pod = await world.make_pod()
    container = await world.refer(pod, image, container_spec("sh", "-c", "id -u; id -g; id -G; sleep 1000", **fields))
    made = await world.runtime.create_container(container)
    await world.runtime.start_container(container)
    printed = ""
    async for chunk in world.runtime.output(container, 0):
        printed += chunk.data.decode()
        if printed.count("\n") == 3:
            break
    assert (await world.exec(container, *IDS))[1].decode() == printed
    await world.remove_pod(pod)
    assert made.user is not None
    return made.user, " ".join(printed.split())


async def test_users_by_id_name_and_image(world: World, busybox: str) -> None:
    """The user comes from the container's uid or name, else from the image, by id or by name."""
    for image, fields, expected in (
        (busybox, {"run_as_user": 1001}, "1001 0 0"),
        (busybox, {"run_as_username": "nobody"}, "65534 65534 65534"),
        (busybox, {"run_as_user": 1001, "run_as_group": 1234, "supplemental_groups": (5, 6)}, "1001 1234 5 6 1234"),
        (f"{STAGING}/test-image-user-username:latest", {}, "33 33 33"),
        (f"{STAGING}/test-image-user-uid-group:latest", {}, "1003 1004 1004"),
    ):
        _, printed = await ids(world, image, security=security(**fields))
        uid, gid, *groups = printed.split()
        assert (uid, gid, sorted(groups)) == (*expected.split()[:2], sorted(expected.split()[2:])), fields


@pytest.mark.parametrize(
    ("policy", "expected"),
    [(GroupsPolicy.MERGE, [1000, 1234, 50000]), (GroupsPolicy.STRICT, [1000, 1234])],
)
async def test_supplemental_groups_policy(world: World, policy: GroupsPolicy, expected: list[int]) -> None:
    """Merge adds the image's memberships of the user, Strict does not; the status tells the truth."""
    own = security(run_as_user=1000, supplemental_groups=(1234,), groups_policy=policy)
    user, printed = await ids(world, f"{PREDEFINED_GROUP}:latest", security=own)
    assert sorted(user.supplemental_groups) == sorted(int(word) for word in printed.split()[2:]) == expected


async def test_impossible_users_are_refused_at_creation(world: World, busybox: str) -> None:
    """A group without a user, and a name that the image does not know, fail before anything is made."""
    pod = await world.make_pod()
    for own in (security(run_as_group=5), security(run_as_username="no-such-user")):
        with pytest.raises(InvalidRequest):
            await world.make(pod, busybox, container_spec("true", security=own))
    await world.remove_pod(pod)


async def process_state(world: World, image: str, **fields: object) -> dict[str, str]:
    pod = await world.make_pod(pod_spec(security=PodSecurity(privileged=bool(fields.get("privileged")))))
    printed = await world.text(pod, image, *PROC, security=security(**fields))
    await world.remove_pod(pod)
    return dict(line.split(":") for line in printed.splitlines())


async def test_capabilities(world: World, busybox: str) -> None:
    """Add and drop, with ALL first; a privileged container has what the engine can give."""
    default = int((await process_state(world, busybox))["CapEff"], 16)
    net_admin, net_raw = 1 << 12, 1 << 13
    assert not default & net_admin
    assert default & net_raw

    async def effective(**capabilities: tuple[str, ...]) -> int:
        state = await process_state(world, busybox, capabilities=Capabilities(**capabilities))
        assert state["CapEff"] == state["CapBnd"]
        return int(state["CapEff"], 16)

    assert await effective(add=("NET_ADMIN",)) == default | net_admin
    assert await effective(drop=("net_raw",)) == default & ~net_raw
    assert await effective(drop=("ALL",)) == 0
    assert await effective(drop=("ALL",), add=("NET_ADMIN",)) == net_admin
    everything = await effective(add=("ALL",))
    assert everything & default == default
    assert everything & (1 << 21)
    assert await effective(add=("ALL",), drop=("NET_RAW",)) == everything & ~net_raw
    assert int((await process_state(world, busybox, privileged=True))["CapEff"], 16) == everything


async def test_unknown_capability_is_refused(world: World, busybox: str) -> None:
    """A name that is no capability never reaches the engine's start."""
    pod = await world.make_pod()
    for names in (("NO_SUCH",), ("--privileged",)):
        own = security(capabilities=Capabilities(add=names))
        with pytest.raises(InvalidRequest):
            await world.make(pod, busybox, container_spec("true", security=own))
    own = security(capabilities=Capabilities(add_ambient=("NET_RAW",)))
    with pytest.raises(NotSupported, match="ambient"):
        await world.make(pod, busybox, container_spec("true", security=own))
    await world.remove_pod(pod)


async def test_privileged_container_needs_a_privileged_pod(world: World, busybox: str) -> None:
    """A container cannot be more than its sandbox was admitted for."""
    pod = await world.make_pod()
    with pytest.raises(InvalidRequest, match="privileged"):
        await world.make(pod, busybox, container_spec("true", security=security(privileged=True)))
    await world.remove_pod(pod)


async def test_seccomp(world: World, busybox: str, folder: Path) -> None:
    """Absent and unconfined mean none, the default filters, a localhost profile is applied; privileged ignores it."""
    profile = folder / "deny.json"
    rule = {"names": ["sethostname"], "action": "SCMP_ACT_ERRNO"}
    profile.write_text(json.dumps({"defaultAction": "SCMP_ACT_ALLOW", "syscalls": [rule]}))
    local = SecurityProfile(type=ProfileType.LOCALHOST, localhost_ref=str(profile))
    kinds = {None: "0", ProfileType.UNCONFINED: "0", ProfileType.RUNTIME_DEFAULT: "2"}
    for kind, expected in kinds.items():
        wanted = None if kind is None else SecurityProfile(type=kind)
        assert (await process_state(world, busybox, seccomp=wanted))["Seccomp"] == expected
    assert (await process_state(world, busybox, seccomp=local, privileged=True))["Seccomp"] == "0"

    pod = await world.make_pod()
    admin = Capabilities(add=("SYS_ADMIN",))
    command = ("sh", "-c", "hostname other 2>/dev/null && hostname || echo denied")
    unconfined = SecurityProfile(type=ProfileType.UNCONFINED)
    for wanted, expected in ((local, "denied\n"), (unconfined, "other\n")):
        own = security(seccomp=wanted, capabilities=admin)
        assert await world.text(pod, busybox, *command, security=own) == expected
    for bad in (str(folder / "missing.json"), "relative.json", "/dev/zero", "/etc/passwd"):
        own = security(seccomp=SecurityProfile(type=ProfileType.LOCALHOST, localhost_ref=bad))
        with pytest.raises(InvalidRequest, match="seccomp"):
            await world.make(pod, busybox, container_spec("true", security=own))
    await world.remove_pod(pod)


async def test_no_new_privileges(world: World, test_images: TestImages) -> None:
    """A setuid program gains nothing where the pod forbids it."""
    image = test_images.need(NO_NEW_PRIVS)
    pod = await world.make_pod()
    for forbidden, expected in ((True, "Effective uid: 1000\n"), (False, "Effective uid: 0\n")):
        own = security(run_as_user=1000, no_new_privs=forbidden)
        assert await world.text(pod, image, security=own) == expected
    await world.remove_pod(pod)


async def test_masked_and_readonly_paths_and_root(world: World, busybox: str) -> None:
    """Masked paths cannot be read, read-only ones not written; empty lists mean none, as an unmasked /proc."""
    pod = await world.make_pod()
    own = security(masked_paths=("/etc/passwd", "/proc/timer_list"), readonly_paths=("/tmp",))
    printed = await world.text(
        pod, busybox, "sh", "-c", "cat /etc/passwd; touch /tmp/x; touch /y && echo made", security=own
    )
    assert printed.splitlines() == ["made", "touch: /tmp/x: Read-only file system"]
    none = security(masked_paths=(), readonly_paths=())
    command = ("sh", "-c", "grep -c ' /proc/' /proc/mounts")
    assert await world.text(pod, busybox, *command, security=none) == "0\n"
    assert await world.text(pod, busybox, *command, security=security()) != "0\n"
    root = security(readonly_rootfs=True)
    assert "Read-only" in await world.text(pod, busybox, "touch", "/x", security=root)
    own = security(masked_paths=("/proc/../bin",))
    with pytest.raises(InvalidRequest):
        await world.make(pod, busybox, container_spec("true", security=own))
    await world.remove_pod(pod)


async def test_target_pid_namespace(world: World, busybox: str) -> None:
    """An ephemeral container sees the processes of its target, which must be of the same pod."""
    pod, other = await world.make_pod(), await world.make_pod()
    target = await world.run(pod, busybox, container_spec("sleep", "1000"))
    spaces = NamespaceOptions(pid=NamespaceMode.TARGET, target_id=target.id)
    own = security(namespaces=spaces)
    assert await world.text(pod, busybox, "cat", "/proc/1/comm", security=own) == "sleep\n"
    with pytest.raises(InvalidRequest, match="not a container of this pod"):
        await world.make(other, busybox, container_spec("true", security=own))
    await world.remove_pod(pod)
    await world.remove_pod(other)


async def test_apparmor_profile_that_is_not_loaded_is_refused(world: World, busybox: str) -> None:
    """An unknown profile fails at creation, with or without AppArmor on the host; strange names fail everywhere."""
    pod = await world.make_pod()
    for name in ("no-such-profile-of-ours", "unconfined\nx=y"):
        own = security(apparmor=SecurityProfile(type=ProfileType.LOCALHOST, localhost_ref=name))
        with pytest.raises((InvalidRequest, NotSupported), match="AppArmor"):
            await world.make(pod, busybox, container_spec("true", security=own))
    default = security(apparmor=SecurityProfile(type=ProfileType.RUNTIME_DEFAULT))
    assert await world.text(pod, busybox, "echo", "fine", security=default) == "fine\n"
    await world.remove_pod(pod)
