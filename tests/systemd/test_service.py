"""The unit of config/dispatcher.service on a real systemd, installed as docs/operations.md says, beside Debian's Docker.

One node for the module, as an operator has one. Each test leaves the daemon running and the pod alive.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from dispatcher.cri import api_pb2 as pb
from tests.lab.child import patient, wait_until
from tests.lab.client import ContainerHandle, CriClient, Pod
from tests.lab.http import request
from tests.lab.images import UPSTREAM_HOSTS, TestImages
from tests.lab.registry import Registry

pytestmark = [pytest.mark.lab, pytest.mark.timeout(patient(300))]
PROJECT = Path(__file__).parents[2]
PREFIX = Path("/opt/cri-dispatcher")
SOCKET = Path("/run/dispatcher/cri.sock")
UNIT = "dispatcher.service"
DOCKER = Path("/run/docker.sock")


def run(*argv: str | Path, check: bool = True, cwd: Path = PROJECT) -> str:
    """Run a command of an operator; its output."""
    # Without the variables of the test's own environment; packages come from the files that the machine has.
    keep = {
        name: os.environ[name] for name in ("HOME", "LC_ALL", "PIP_NO_INDEX", "PIP_FIND_LINKS") if name in os.environ
    }
    environment = {**keep, "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"}
    done = subprocess.run(
        argv, cwd=cwd, env=environment, capture_output=True, text=True, check=False, timeout=patient(300)
    )
    if check and done.returncode:
        log = subprocess.run(
            ["journalctl", "-n", "40", "--no-pager", "-u", UNIT], capture_output=True, text=True, check=False
        )
        raise AssertionError(f"{argv} ended with {done.returncode}:\n{done.stdout}{done.stderr}\n{log.stdout}")
    return done.stdout


def properties(*names: str) -> list[str]:
    """Properties of the unit, in the order that was asked for."""
    printed = run("systemctl", "show", UNIT, *(f"--property={name}" for name in names))
    found = dict(line.partition("=")[::2] for line in printed.splitlines())
    return [found[name] for name in names]


def main_pid() -> int:
    return int(properties("MainPID")[0])


@pytest.fixture(scope="module", autouse=True)
def service(registry: Registry) -> Iterator[None]:
    """Docker with live-restore, and the unit installed, enabled and started."""
    Path("/etc/docker").mkdir(exist_ok=True)
    Path("/etc/docker/daemon.json").write_text(json.dumps({"live-restore": True}))
    run("systemctl", "start", "docker")
    run("make", "install")
    for folder in ("/etc/dispatcher", "/etc/cni/net.d"):
        Path(folder).mkdir(parents=True, exist_ok=True)
    settings = yaml.safe_load((PROJECT / "config/dispatcher.yaml").read_text())
    settings["plugins"]["images"]["mirrors"] = {
        host: {"mirrors": [registry.url], "origin": False} for host in UPSTREAM_HOSTS
    }
    Path("/etc/dispatcher/dispatcher.yaml").write_text(yaml.safe_dump(settings))
    shutil.copy(PROJECT / "config/policy-docker.yaml", "/etc/dispatcher/policy.yaml")
    shutil.copy(PROJECT / "config/10-dispatcher-bridge.conflist", "/etc/cni/net.d/")
    shutil.copy(PROJECT / "config/dispatcher.service", "/etc/systemd/system/")
    Path("/usr/local/bin/dispatcher").unlink(missing_ok=True)
    Path("/usr/local/bin/dispatcher").symlink_to(PREFIX / "bin/dispatcher")
    run("systemctl", "daemon-reload")
    run("systemctl", "enable", "--now", UNIT)
    yield
    run("dispatcher", "rm", "--force", "--all", check=False)
    run("systemctl", "disable", "--now", UNIT, check=False)
    run("systemctl", "stop", "docker", "docker.socket", "containerd", check=False)


@pytest.fixture(scope="module")
def cri(service: None) -> Iterator[CriClient]:
    with CriClient(SOCKET) as client:
        client.wait_ready()
        yield client


@pytest.fixture(scope="module")
def pod(cri: CriClient, test_images: TestImages) -> Iterator[Pod]:
    with cri.run_pod(cgroup_parent="/kubepods.slice/kubepods-podservice.slice") as pod:
        yield pod


@pytest.fixture(scope="module")
def container(pod: Pod) -> ContainerHandle:
    """A container that must run from the first test to the last."""
    return pod.run(command=("sh", "-c", "while :; do date +%s; sleep 1; done"))


class Life:
    """What must be the same after whatever happened to the daemon or to the engine."""

    def __init__(self, pod: Pod, container: ContainerHandle) -> None:
        self.pod = pod
        self.container = container
        self.before = self.look()

    def look(self) -> tuple[object, ...]:
        status = self.container.status()
        pid = engine_pid(self.container.id)
        started = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
        netns = Path(f"/proc/{pid}/ns/net").stat().st_ino
        return (status.state, status.started_at, pid, started, netns, self.pod.status().state, self.pod.ip)

    def check(self) -> None:
        """The same process in the same namespace, READY and RUNNING, and it answers."""
        assert self.look() == self.before
        assert self.container.sh("echo alive") == "alive"
        assert (self.before[0], self.before[5]) == (pb.CONTAINER_RUNNING, pb.SANDBOX_READY)


@pytest.fixture
def life(pod: Pod, container: ContainerHandle) -> Life:
    return Life(pod, container)


def engine_pid(container_id: str) -> int:
    found: int = request(DOCKER, "GET", f"/containers/cri_{container_id}/json").json()["State"]["Pid"]
    return found


def wait_serving(cri: CriClient, *, other_than: int = 0) -> None:
    """Wait for a main process (another one, where one is named) that serves and is ready."""
    wait_until(lambda: main_pid() not in {0, other_than}, timeout_s=60, what="systemd started no new daemon")
    wait_until(lambda: properties("ActiveState") == ["active"], timeout_s=60, what="the unit does not become active")
    cri.wait_ready(timeout_s=60)


def test_start_returns_when_the_daemon_is_ready(cri: CriClient) -> None:
    """systemd waits for READY=1 and shows our status; the unit is enabled, watched, and its cgroups are delegated."""
    shown = properties(
        "ActiveState", "SubState", "UnitFileState", "Delegate", "KillMode", "WatchdogUSec", "NotifyAccess"
    )
    assert shown == ["active", "running", "enabled", "yes", "process", "1min", "main"]
    run("systemctl", "restart", UNIT)
    assert SOCKET.exists()  # at once: restart returned because of the message, and the socket is opened before it
    assert properties("StatusText") != [""]
    entered, ready = (
        int(word) for word in properties("ExecMainStartTimestampMonotonic", "ActiveEnterTimestampMonotonic")
    )
    assert entered < ready
    cri.wait_ready()


def test_folders_are_roots_own(cri: CriClient) -> None:
    """The socket, its folder and the records are for root only."""
    modes = [oct(Path(path).stat().st_mode & 0o777) for path in (SOCKET.parent, SOCKET, "/var/lib/dispatcher")]
    assert modes == ["0o700", "0o600", "0o700"]


def test_node_is_well(cri: CriClient, container: ContainerHandle) -> None:
    """`doctor` finds cgroup version 2 with the systemd driver here, which the kubelet is told as well."""
    found = json.loads(run("dispatcher", "doctor", "-o", "json", check=False))
    by_name = {check["check"]: check for check in (found["checks"] if isinstance(found, dict) else found)}
    assert "cgroup v2, driver systemd" in json.dumps(by_name["cgroups"])
    assert [check for check in by_name.values() if check["grade"] == "broken"] == []
    assert cri.rpc("RuntimeConfig").linux.cgroup_driver == pb.SYSTEMD
    run("dispatcher", "status", "--wait", "30")


def test_containers_are_in_the_pods_slice_and_confined(container: ContainerHandle) -> None:
    """Scopes below the kubelet's slice, and Docker's AppArmor profile where the kernel has AppArmor."""
    pid = engine_pid(container.id)
    cgroup = Path(f"/proc/{pid}/cgroup").read_text().strip()
    assert re.fullmatch(r"0::/kubepods\.slice/kubepods-podservice\.slice/docker-[0-9a-f]{64}\.scope", cgroup), cgroup
    if Path("/sys/module/apparmor/parameters/enabled").read_text().strip() == "Y":
        assert Path(f"/proc/{pid}/attr/current").read_text().strip() == "docker-default (enforce)"


def test_pods_survive_stop_and_start(cri: CriClient, life: Life) -> None:
    """Stopping the unit ends the daemon and no pod; nothing else of ours remains in the unit's cgroup."""
    pid = main_pid()
    run("systemctl", "stop", UNIT)
    assert properties("ActiveState", "Result", "ExecMainStatus") == ["inactive", "success", "0"]
    assert not Path(f"/proc/{pid}").exists()
    procs = Path("/sys/fs/cgroup/system.slice/dispatcher.service/cgroup.procs")
    assert not procs.exists() or procs.read_text() == ""
    assert Path(f"/proc/{life.before[2]}").exists()
    assert [path.name for path in Path("/run/dispatcher/netns").iterdir()] == [life.pod.id]
    run("systemctl", "start", UNIT)
    cri.wait_ready()
    life.check()


def test_pods_survive_a_restart(cri: CriClient, life: Life) -> None:
    pid = main_pid()
    run("systemctl", "restart", UNIT)
    assert main_pid() not in {0, pid}
    cri.wait_ready()
    life.check()


def test_pods_survive_kill_9_and_systemd_starts_anew(cri: CriClient, life: Life) -> None:
    pid = main_pid()
    os.kill(pid, signal.SIGKILL)
    wait_serving(cri, other_than=pid)
    life.check()
    assert int(properties("NRestarts")[0]) >= 1


def test_pods_survive_an_upgrade(cri: CriClient, life: Life, tmp_path: Path) -> None:
    """`make install` of another version below a running daemon, then a restart: the new version looks after old pods."""
    tree = tmp_path / "next"
    shutil.copytree(PROJECT, tree, ignore=shutil.ignore_patterns("__pycache__", ".lab", "tests", "build"))
    project = tree / "pyproject.toml"
    project.write_text(re.sub(r'(?m)^version = ".*"$', 'version = "99.1"', project.read_text(), count=1))
    before = cri.version().runtime_version
    run("make", "install", cwd=tree)
    life.check()
    assert cri.version().runtime_version == before
    run("systemctl", "restart", UNIT)
    cri.wait_ready()
    assert cri.version().runtime_version == "99.1" != before
    life.check()


def test_pods_survive_a_restart_of_docker(cri: CriClient, life: Life) -> None:
    """With live-restore, and with the socket unit in between."""
    run("systemctl", "restart", "docker")
    cri.wait_ready(timeout_s=60)
    life.check()


def test_pod_can_be_made_after_all_that(cri: CriClient, pod: Pod) -> None:
    """And its end leaves no namespace, no slice and no scope."""
    with cri.run_pod(cgroup_parent="/kubepods.slice/kubepods-podlast.slice") as last:
        output = last.run_to_end("echo", "done")
        assert output.wait_log(lambda text: text == "done\n")
        assert last.ip != pod.ip
    assert [path.name for path in Path("/run/dispatcher/netns").iterdir()] == [pod.id]
    assert list(Path("/sys/fs/cgroup/kubepods.slice/kubepods-podlast.slice").glob("docker-*")) == []


def test_journal_has_our_log(cri: CriClient) -> None:
    """One JSON object per line, and no complaint of systemd about the unit."""
    lines = run("journalctl", "--no-pager", "-o", "cat", "-u", UNIT, "_SYSTEMD_UNIT=" + UNIT).splitlines()
    assert lines
    assert all(json.loads(line)["level"] for line in lines if line.startswith("{"))
    assert [line for line in lines if not line.startswith("{")] == []
    complaints = run(
        "journalctl", "--no-pager", "-o", "cat", "_PID=1", "-p", "warning", "--grep", "dispatcher", check=False
    )
    # The daemon that a test killed is told in two lines.
    killed = ("status=9/KILL", "Failed with result 'signal'")
    assert [line for line in complaints.splitlines() if not any(part in line for part in killed)] == []
