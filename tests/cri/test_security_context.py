"""Users, groups, capabilities, privileges and file system protection of a container's process."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from dispatcher.cri import api_pb2 as pb
from tests.lab.client import ContainerHandle, CriClient, Pod, refused
from tests.lab.images import NO_NEW_PRIVS, PREDEFINED_GROUP, shell_runs_applets_itself

Security = pb.LinuxContainerSecurityContext


def value(number: int) -> pb.Int64Value:
    return pb.Int64Value(value=number)


@pytest.fixture(scope="module")
def privileged_pod(cri: CriClient) -> Iterator[Pod]:
    with cri.run_pod(security=pb.LinuxSandboxSecurityContext(privileged=True)) as pod:
        yield pod


def ids(container: ContainerHandle) -> tuple[int, int, list[int]]:
    """User, group and all groups of the first process, as the kernel knows them."""
    status = dict(line.split(":", 1) for line in container.sh("cat /proc/1/status").splitlines())
    return (
        int(status["Uid"].split()[0]),
        int(status["Gid"].split()[0]),
        sorted({int(status["Gid"].split()[0]), *map(int, status["Groups"].split())}),
    )


# ------------------------------------------------------------------------------------------------------------- users


def test_a_user_by_number(pod: Pod) -> None:
    assert ids(pod.run(security=Security(run_as_user=value(1001))))[:2] == (1001, 0)


def test_a_user_by_name(pod: Pod) -> None:
    assert ids(pod.run(security=Security(run_as_username="nobody")))[0] == 65534


def test_a_user_zero_overrides_the_image(pod: Pod) -> None:
    container = pod.run(image=PREDEFINED_GROUP, security=Security(run_as_user=value(0)))
    assert ids(container)[0] == 0


def test_a_user_that_the_image_does_not_know_is_refused(pod: Pod) -> None:
    with refused():
        pod.run(security=Security(run_as_username="stranger"))


def test_a_group_with_a_user(pod: Pod) -> None:
    container = pod.run(security=Security(run_as_user=value(1001), run_as_group=value(1005)))
    assert ids(container)[:2] == (1001, 1005)


def test_a_group_without_a_user_is_refused(pod: Pod) -> None:
    with refused():
        pod.create(security=Security(run_as_group=value(1005)))


def test_supplemental_groups(pod: Pod) -> None:
    container = pod.run(security=Security(supplemental_groups=[1234, 5678]))
    assert {1234, 5678} <= set(ids(container)[2])
    assert {"1234", "5678"} <= set(container.sh("id -G").split())


@pytest.mark.parametrize(
    ("policy", "groups"),
    [
        pytest.param(pb.Merge, [1000, 1234, 50000], id="merge adds the groups of the image"),
        pytest.param(pb.Strict, [1000, 1234], id="strict ignores the groups of the image"),
    ],
)
def test_the_policy_of_supplemental_groups(
    cri: CriClient, pod: Pod, policy: pb.SupplementalGroupsPolicy, groups: list[int]
) -> None:
    if not cri.status().features.supplemental_groups_policy:
        pytest.skip("the endpoint does not offer a policy of supplemental groups")
    container = pod.run(
        image=PREDEFINED_GROUP,
        command=["sh", "-c", "id -G; exec sleep 1000"],
        security=Security(supplemental_groups=[1234], supplemental_groups_policy=policy),
    )
    assert ids(container) == (1000, 1000, groups)
    assert sorted(map(int, container.sh("id -G").split())) == groups
    assert sorted(map(int, container.wait_log(lambda text: text.endswith("\n")).split())) == groups
    told = container.status().user.linux
    assert (told.uid, told.gid, sorted(told.supplemental_groups)) == (1000, 1000, groups)


# ------------------------------------------------------------------------------------------------------- file system


@pytest.mark.parametrize("read_only", [False, True])
def test_the_root_file_system_is_writable_or_not(pod: Pod, read_only: bool) -> None:
    container = pod.run_to_end("touch", "test.go", security=Security(readonly_rootfs=read_only))
    assert (container.status().exit_code != 0) == read_only
    if read_only:
        container.wait_log(lambda text: text == "touch: test.go: Read-only file system\n", stream="stderr")


def test_a_masked_file_cannot_be_read_or_run(pod: Pod) -> None:
    container = pod.run(security=Security(masked_paths=["/bin/ls", "/etc/group"]))
    assert container.sh("cat /etc/group") == ""
    ran = container.exec("/bin/sh", "-c", "ls")
    assert ran.exit_code != 0 or shell_runs_applets_itself()
    if not shell_runs_applets_itself():
        assert ran.stderr == "/bin/sh: ls: Permission denied\n"


def test_a_masked_folder_is_empty(pod: Pod) -> None:
    container = pod.run(security=Security(masked_paths=["/var", "/not/there"]))
    assert container.sh("ls -A /var") == ""


def test_a_read_only_path_cannot_be_written(pod: Pod) -> None:
    container = pod.run(security=Security(readonly_paths=["/tmp"]))
    assert container.exec("touch", "/tmp/test").stderr == "touch: /tmp/test: Read-only file system\n"
    container.sh("touch /var/www/test")


# ------------------------------------------------------------------------------------------------------- capabilities

CAP_NET_ADMIN, CAP_NET_RAW, CAP_CHOWN = 12, 13, 0


def capabilities(container: ContainerHandle, kind: str = "CapEff") -> int:
    return int(container.sh(f"grep {kind}: /proc/1/status").split()[1], 16)


def makes_a_bridge(container: ContainerHandle) -> bool:
    return container.exec("brctl", "addbr", "foobar").exit_code == 0


def test_a_privileged_container_may_do_what_root_may(privileged_pod: Pod) -> None:
    container = privileged_pod.run(security=Security(privileged=True))
    assert makes_a_bridge(container)
    assert container.sh("test -w /proc/sys/net && echo yes") == "yes"
    container.sh("brctl delbr foobar")


def test_an_ordinary_container_may_not(pod: Pod) -> None:
    container = pod.run()
    assert not makes_a_bridge(container)
    assert not capabilities(container) >> CAP_NET_ADMIN & 1


def test_an_added_capability_is_there(pod: Pod) -> None:
    container = pod.run(security=Security(capabilities=pb.Capability(add_capabilities=["NET_ADMIN"])))
    assert makes_a_bridge(container)
    assert capabilities(container) >> CAP_CHOWN & 1
    container.sh("brctl delbr foobar")


def test_a_dropped_capability_is_gone(pod: Pod) -> None:
    container = pod.run(security=Security(capabilities=pb.Capability(drop_capabilities=["NET_RAW"])))
    assert capabilities(container) >> CAP_CHOWN & 1
    assert not capabilities(container, "CapBnd") >> CAP_NET_RAW & 1
    ran = container.exec("ping", "-c", "1", "127.0.0.1")
    assert ran.exit_code != 0
    assert "permission denied" in ran.stderr


def test_all_capabilities_added(pod: Pod) -> None:
    container = pod.run(security=Security(capabilities=pb.Capability(add_capabilities=["ALL"])))
    assert makes_a_bridge(container)
    assert capabilities(container).bit_count() > 30
    container.sh("brctl delbr foobar")


def test_all_capabilities_dropped(pod: Pod) -> None:
    container = pod.run(security=Security(capabilities=pb.Capability(drop_capabilities=["ALL"])))
    assert [capabilities(container, kind) for kind in ("CapBnd", "CapEff", "CapPrm")] == [0, 0, 0]


def test_all_dropped_and_one_added_leaves_that_one(pod: Pod) -> None:
    wanted = pb.Capability(drop_capabilities=["ALL"], add_capabilities=["NET_ADMIN"])
    assert capabilities(pod.run(security=Security(capabilities=wanted)), "CapBnd") == 1 << CAP_NET_ADMIN


def test_an_unknown_capability_is_refused(pod: Pod) -> None:
    with refused():
        pod.run(security=Security(capabilities=pb.Capability(add_capabilities=["FLY"])))


@pytest.mark.parametrize("image", [NO_NEW_PRIVS], indirect=True, ids=["setuid"])
@pytest.mark.parametrize("forbidden", [True, False])
def test_a_setuid_program_gains_privileges_unless_forbidden(pod: Pod, image: str, forbidden: bool) -> None:
    security = Security(run_as_user=value(1000), no_new_privs=forbidden)
    container = pod.run(image=image, command=(), security=security)
    container.wait_exited()
    uid = 1000 if forbidden else 0
    container.wait_log(lambda text: text == f"Effective uid: {uid}\n")
