"""`doctor` on nodes that are broken in one way each: what it finds, and the mend that it prints."""

from __future__ import annotations

import io
import json
import os
import socket
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from socketserver import UnixStreamServer
from typing import Any

import pytest

from dispatcher.commands import cli
from dispatcher.commands import doctor_checks as checks
from dispatcher.commands.doctor_checks import Finding, Node, Settings
from dispatcher.commands.output import Console

NodeMaker = Callable[[dict[str, str]], Node]


@pytest.fixture
def node(tmp_path: Path) -> NodeMaker:
    def make(files: dict[str, str]) -> Node:
        for name, text in files.items():
            path = tmp_path / name.lstrip("/")
            path.parent.mkdir(parents=True, exist_ok=True)
            if not name.endswith("/"):
                path.write_text(text)
            else:
                path.mkdir(exist_ok=True)
        return Node(root=tmp_path)

    return make


def grades(findings: Iterator[Finding]) -> dict[str, str]:
    return {finding.check: finding.grade for finding in findings}


def only(findings: Iterator[Finding]) -> Finding:
    (finding,) = findings
    return finding


V2 = {"/sys/fs/cgroup/cgroup.controllers": "cpuset cpu io memory pids\n"}
V1 = dict.fromkeys(("/sys/fs/cgroup/memory/", "/sys/fs/cgroup/cpu,cpuacct/", "/sys/fs/cgroup/pids/"), "")


@pytest.mark.parametrize(
    ("files", "driver", "grade", "said"),
    [
        (V2, "auto", "ok", "cgroup v2, driver cgroupfs (detected)"),
        ({**V2, "/run/systemd/system/": ""}, "auto", "ok", "cgroup v2, driver systemd (detected)"),
        (V1, "cgroupfs", "ok", "cgroup v1, driver cgroupfs"),
        ({"/sys/fs/cgroup/cgroup.controllers": "cpu io"}, "auto", "broken", "without memory, pids"),
        (V2, "systemd", "broken", "systemd does not run"),
        ({}, "auto", "broken", "no cgroup hierarchy"),
    ],
)
def test_cgroups(node: NodeMaker, files: dict[str, str], driver: str, grade: str, said: str) -> None:
    finding = only(checks.check_cgroups(node(files), Settings(cgroup_driver=driver)))
    assert finding.grade == grade
    assert said in finding.message
    assert bool(finding.mend) == (grade == "broken")


@pytest.mark.parametrize(
    ("capabilities", "grade"), [("000001ffffffffff", "ok"), ("0000000000201000", "hint"), ("0", "broken")]
)
def test_privileges(node: NodeMaker, capabilities: str, grade: str) -> None:
    finding = only(
        checks.check_privileges(node({"/proc/self/status": f"Name:\tx\nCapEff:\t{capabilities}\n"}), Settings())
    )
    assert finding.grade == grade


class Engine:
    """A UNIX socket that answers as a Docker Engine does to /version and /info."""

    def __init__(self, path: Path, **facts: Any) -> None:
        answers = {
            "/version": {"Version": facts.pop("version", "26.1"), "ApiVersion": facts.pop("api", "1.45")},
            "/info": {"Driver": "overlay2", "CgroupDriver": "cgroupfs", "LiveRestoreEnabled": True, **facts},
        }

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                body = json.dumps(answers[self.path]).encode()
                self.send_response(200)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *args: Any) -> None:
                pass

            def address_string(self) -> str:
                return "local"

        self.server = UnixStreamServer(str(path), Handler)
        self.thread = threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.01})
        self.thread.start()

    def close(self) -> None:
        self.server.shutdown()
        self.thread.join()
        self.server.server_close()


@pytest.mark.parametrize(
    ("facts", "expected"),
    [
        ({}, {"docker": "ok", "docker live-restore": "ok"}),
        ({"api": "1.40"}, {"docker": "broken", "docker live-restore": "ok"}),
        ({"LiveRestoreEnabled": False}, {"docker": "ok", "docker live-restore": "hint"}),
        ({"CgroupDriver": "systemd"}, {"docker": "ok", "docker live-restore": "ok", "docker cgroups": "broken"}),
    ],
)
def test_docker(node: NodeMaker, tmp_path: Path, facts: dict[str, Any], expected: dict[str, str]) -> None:
    engine = Engine(tmp_path / "docker.sock", **facts)
    try:
        settings = Settings(docker_socket=Path("/docker.sock"), cgroup_driver="cgroupfs")
        assert grades(checks.check_docker(node({}), settings)) == expected
    finally:
        engine.close()


def test_docker_that_is_away_or_silent(node: NodeMaker, tmp_path: Path) -> None:
    settings = Settings(docker_socket=Path("/docker.sock"))
    missing = only(checks.check_docker(node({}), settings))
    assert (missing.grade, "apt-get install docker.io" in missing.mend) == ("broken", True)
    with socket.socket(socket.AF_UNIX) as stale:
        stale.bind(str(tmp_path / "docker.sock"))
    assert "does not answer" in only(checks.check_docker(node({}), settings)).message
    assert only(checks.check_docker(node({}), Settings(plugins=("cni",)))).grade == "ok"


CONFLIST = json.dumps({"name": "x", "plugins": [{"type": "bridge"}, {"type": "portmap"}]})


def test_cni(node: NodeMaker, tmp_path: Path) -> None:
    assert grades(checks.check_cni(node({}), Settings())) == {"cni": "broken"}
    assert grades(checks.check_cni(node({}), Settings(cni_default_allowed=True))) == {
        "cni": "ok",
        "cni plugins": "broken",
    }
    somewhere = node({"/etc/cni/net.d/10.conflist": CONFLIST, "/usr/lib/cni/bridge": "", "/opt/cni/bin/portmap": ""})
    found = list(checks.check_cni(somewhere, Settings()))
    assert "bridge, portmap not found" in found[1].message  # there, but not executable
    for name in ("usr/lib/cni/bridge", "opt/cni/bin/portmap"):
        (tmp_path / name).chmod(0o755)
    assert grades(checks.check_cni(somewhere, Settings())) == {"cni": "ok", "cni plugins": "ok"}
    broken = node({"/etc/cni/net.d/00.conflist": "{"})
    assert "00.conflist cannot be read" in only(checks.check_cni(broken, Settings())).message


def test_forwarding_and_firewall(node: NodeMaker, tmp_path: Path) -> None:
    assert grades(checks.check_firewall(node({}), Settings())) == {
        "iptables": "broken",
        "ip_forward": "hint",
        "br_netfilter": "hint",
    }
    files = {
        "/usr/sbin/iptables": "",
        "/proc/sys/net/ipv4/ip_forward": "1",
        "/proc/sys/net/bridge/bridge-nf-call-iptables": "1",
    }
    good = node(files)
    (tmp_path / "usr/sbin/iptables").chmod(0o755)
    assert set(grades(checks.check_firewall(good, Settings())).values()) == {"ok"}


def test_kvm_is_reported_and_never_a_fault(node: NodeMaker) -> None:
    assert only(checks.check_kvm(node({}), Settings())).grade == "ok"
    assert only(checks.check_kvm(node({"/dev/kvm": ""}), Settings())).grade == "ok"


@pytest.mark.parametrize(("mode", "grade"), [(0o700, "ok"), (0o755, "hint"), (0o777, "broken"), (0o720, "broken")])
def test_state_folder(node: NodeMaker, tmp_path: Path, mode: int, grade: str) -> None:
    somewhere = node({"/var/lib/dispatcher/": ""})
    (tmp_path / "var/lib/dispatcher").chmod(mode)
    assert grades(checks.check_folders(somewhere, Settings()))["state folder"] == grade


def test_socket(node: NodeMaker, tmp_path: Path) -> None:
    settings = Settings(socket=Path("/cri.sock"))
    path = tmp_path / "cri.sock"
    assert only(checks.check_socket(node({}), settings)).grade == "ok"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        path.chmod(0o600)
        assert only(checks.check_socket(node({}), settings)).grade == "hint"
        listener.listen()
        assert "a daemon answers" in only(checks.check_socket(node({}), settings)).message
        path.chmod(0o666)
        finding = only(checks.check_socket(node({}), settings))
        assert (finding.grade, finding.mend) == ("broken", f"chmod 0600 {path}")


def test_port_in_use(node: NodeMaker) -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        settings = Settings(metrics_address=listener.getsockname(), socket=Path("/cri.sock"))
        assert only(checks.check_port(node({}), settings)).grade == "broken"
    assert only(checks.check_port(node({}), settings)).grade == "ok"
    assert only(checks.check_port(node({}), Settings())).grade == "ok"


def test_kubelet_that_talks_to_another_runtime(node: NodeMaker) -> None:
    assert only(checks.check_kubelet(node({}), Settings())).grade == "ok"
    somewhere = node({"/var/lib/kubelet/config.yaml": "kind: X\ncontainerRuntimeEndpoint: unix:///run/crio.sock\n"})
    finding = only(checks.check_kubelet(somewhere, Settings()))
    assert finding.grade == "hint"
    assert "unix:///run/dispatcher/cri.sock" in finding.mend


@pytest.fixture
def config_file(tmp_path: Path) -> Path:
    (tmp_path / "policy.yaml").write_text("apiVersion: dispatcher/v1\ndefault: {refuse: nothing runs here}\n")
    path = tmp_path / "dispatcher.yaml"
    path.write_text(f"policy: {tmp_path}/policy.yaml\nplugins: {{enabled: []}}\nmetrics: {{enabled: false}}\n")
    return path


def run(*words: str) -> tuple[int, str]:
    out = io.StringIO()
    args = cli.build_parser().parse_args(words)
    return cli.run(args, Console(out, io.StringIO(), as_json=args.output == "json")), out.getvalue()


def test_exit_code_and_json(node: NodeMaker, config_file: Path) -> None:
    root = node({}).root
    code, text = run("doctor", "--config", str(config_file), "--root", str(root), "-o", "json")
    report = json.loads(text)
    assert code == 1
    assert report["healthy"] is False
    broken = [check for check in report["checks"] if check["grade"] == "broken"]
    assert {"cgroups", "cni"} <= {check["check"] for check in broken}
    assert all(check["mend"] for check in broken)


def test_a_check_that_fails_hides_no_other(config_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(_node: Node, _settings: Settings) -> Iterator[Finding]:
        raise OSError("no such thing")

    monkeypatch.setattr(checks, "CHECKS", (("odd", broken), ("kvm", checks.check_kvm)))
    findings = checks.run_checks(Node(), str(config_file))
    assert [finding.check for finding in findings] == ["config", "odd", "kvm"]
    assert "no such thing" in findings[1].message


def test_real_node_is_looked_at_without_a_change(config_file: Path) -> None:
    before = sorted(os.listdir(config_file.parent))
    code, text = run("doctor", "--config", str(config_file))
    assert code in (0, 1)
    assert "checks:" in text
    assert sorted(os.listdir(config_file.parent)) == before
