"""System call filters: none, the runtime's own, and the node's files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dispatcher.cri import api_pb2 as pb
from tests.lab.client import ContainerHandle, CriClient, Pod, refused

Security = pb.LinuxContainerSecurityContext
Profile = pb.SecurityProfile
UNCONFINED, LOCALHOST = Profile.Unconfined, Profile.Localhost
OFF, FILTER = "0", "2"


def mode(container: ContainerHandle) -> str:
    return container.sh("grep ^Seccomp: /proc/1/status").split()[1]


@pytest.fixture
def no_hostname(tmp_path: Path) -> Profile:
    """A profile of the node that allows everything but sethostname."""
    return localhost(tmp_path / "no-hostname.json", "SCMP_ACT_ALLOW", [call("sethostname", "SCMP_ACT_ERRNO")])


def localhost(path: Path, default: str, calls: list[dict[str, object]]) -> Profile:
    path.write_text(json.dumps({"defaultAction": default, "syscalls": calls}))
    return Profile(profile_type=LOCALHOST, localhost_ref=str(path))


def call(name: str, action: str) -> dict[str, object]:
    return {"names": [name], "action": action}


def sets_hostname(container: ContainerHandle) -> bool:
    return container.exec("unshare", "-u", "hostname", "other").exit_code == 0


def test_unconfined_is_no_filter(pod: Pod) -> None:
    assert mode(pod.run(security=Security(seccomp=Profile(profile_type=UNCONFINED)))) == OFF


def test_no_profile_is_no_filter(pod: Pod) -> None:
    assert mode(pod.run()) == OFF


def test_an_empty_profile_is_the_runtimes_own(pod: Pod) -> None:
    assert mode(pod.run(security=Security(seccomp=Profile()))) == FILTER


def test_a_profile_of_the_node_is_enforced(pod: Pod, tmp_path: Path) -> None:
    profile = localhost(
        tmp_path / "no-chmod.json",
        "SCMP_ACT_ALLOW",
        [call("chmod", "SCMP_ACT_ERRNO"), call("fchmodat", "SCMP_ACT_ERRNO")],
    )
    container = pod.run(security=Security(seccomp=profile))
    assert mode(container) == FILTER
    assert container.exec("chmod", "400", "/etc/passwd").exit_code != 0


def test_a_profile_that_does_not_exist_is_refused(pod: Pod, tmp_path: Path) -> None:
    with refused():
        pod.run(security=Security(seccomp=Profile(profile_type=LOCALHOST, localhost_ref=str(tmp_path / "absent.json"))))


def test_the_host_name_may_be_set_when_unconfined(pod: Pod) -> None:
    admin = pb.Capability(add_capabilities=["SYS_ADMIN"])
    container = pod.run(security=Security(capabilities=admin, seccomp=Profile(profile_type=UNCONFINED)))
    assert sets_hostname(container)


def test_the_host_name_may_not_be_set_under_a_profile_that_forbids_it(pod: Pod, no_hostname: Profile) -> None:
    admin = pb.Capability(add_capabilities=["SYS_ADMIN"])
    assert not sets_hostname(pod.run(security=Security(capabilities=admin, seccomp=no_hostname)))


def test_a_privileged_container_ignores_the_profile(cri: CriClient, no_hostname: Profile) -> None:
    with cri.run_pod(security=pb.LinuxSandboxSecurityContext(privileged=True)) as pod:
        container = pod.run(security=Security(privileged=True, seccomp=no_hostname))
        assert mode(container) == OFF
        assert sets_hostname(container)


def test_apparmor_profiles_are_refused_where_the_host_has_none(pod: Pod) -> None:
    """Running without the asked protection would be silent; where AppArmor is on, an unloaded profile is refused."""
    profile = Profile(profile_type=LOCALHOST, localhost_ref="dispatcher-lab-not-loaded")
    with refused():
        pod.create(security=Security(apparmor=profile))
    with refused():
        pod.create(security=Security(apparmor_profile="localhost/dispatcher-lab-not-loaded"))
