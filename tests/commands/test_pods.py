"""`run`, `play`, `logs`, `exec`, `ps`, `explain`, `rm` against a real daemon with a real engine and network."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.lab.child import wait_until
from tests.lab.client import unique
from tests.lab.images import BUSYBOX, TestImages
from tests.lab.node import Node

pytestmark = [pytest.mark.lab, pytest.mark.timeout(180)]

Result = subprocess.CompletedProcess[str]


class Commands:
    """Runs commands against one node, with a folder for its pods."""

    def __init__(self, node: Node, pods_dir: Path) -> None:
        self.node = node
        self.pods_dir = pods_dir
        self.env = {
            **os.environ,
            "DISPATCHER_ENDPOINT": f"unix://{node.socket}",
            "DISPATCHER_PODS_DIR": str(pods_dir),
        }

    def argv(self, *words: str) -> list[str]:
        return [sys.executable, "-m", "dispatcher", *words]

    def __call__(self, *words: str, stdin: str | None = None) -> Result:
        return subprocess.run(
            self.argv(*words), capture_output=True, text=True, check=False, timeout=120, env=self.env, input=stdin
        )

    def begin(self, *words: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            self.argv(*words), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=self.env
        )

    def rows(self, *words: str) -> list[dict[str, object]]:
        done = self("ps", "-o", "json", *words)
        assert done.returncode == 0, done.stderr
        rows: list[dict[str, object]] = json.loads(done.stdout)
        return rows


@pytest.fixture(scope="module")
def shared(node: Callable[..., Node], test_images: TestImages) -> Node:
    del test_images
    policy = {
        "apiVersion": "dispatcher/v1",
        "default": {"runtime": "docker"},
        "handlers": {"docker": {"runtime": "docker"}},
        "rules": [
            {"name": "no-dangerous", "match": {"namespace": "dangerous"}, "refuse": "this namespace is closed"},
        ],
    }
    return node(policy=policy)


@pytest.fixture
def command(shared: Node, tmp_path: Path) -> Iterator[Commands]:
    commands = Commands(shared, tmp_path / "pods")
    yield commands
    commands("rm", "--all", "-f", "--time", "0")


def test_run_prints_both_streams_and_ends_with_the_containers_code(command: Commands) -> None:
    done = command("run", BUSYBOX, "sh", "-c", "echo out $0 '$HOME'; echo err >&2; printf end; exit 7")
    assert (done.returncode, done.stdout) == (7, "out sh $HOME\nend")
    assert "err\n" in done.stderr
    assert command.rows() == []
    assert not list(command.pods_dir.iterdir())


def test_run_with_a_runtime_goes_by_the_policy(command: Commands) -> None:
    assert command("run", "--runtime", "docker", BUSYBOX, "true").returncode == 0
    done = command("run", "--runtime", "hyper_vm", BUSYBOX, "true")
    assert done.returncode == 2
    assert "no handler of the policy leads to the runtime 'hyper_vm'" in done.stderr


def test_a_refusal_names_the_rule_and_has_its_own_code(command: Commands) -> None:
    done = command("run", "--namespace", "dangerous", BUSYBOX, "true")
    assert done.returncode == 5
    assert "no-dangerous" in done.stderr
    assert command.rows() == []


def test_a_program_that_is_not_there(command: Commands) -> None:
    done = command("run", BUSYBOX, "no-such-program")
    assert done.returncode == 128
    assert "no-such-program" in done.stderr
    assert command.rows() == []


def test_an_image_that_is_not_there_leaves_nothing(command: Commands) -> None:
    done = command("run", "registry.k8s.io/no/such:image", "true")
    assert done.returncode == 125
    assert "PullImage" in done.stderr
    assert not list(command.pods_dir.iterdir()) if command.pods_dir.exists() else True
    assert command("run", "--pull", "never", "registry.k8s.io/no/such:image", "true").returncode == 125


@pytest.mark.parametrize(("signals", "code"), [(1, 5), (2, 137)])
def test_interrupts_end_and_then_kill(command: Commands, signals: int, code: int) -> None:
    handler = "echo bye; exit 5" if signals == 1 else ":"
    script = f"trap '{handler}' TERM; echo up; while :; do sleep 0.05; done"
    child = command.begin("run", BUSYBOX, "sh", "-c", script)
    assert child.stdout is not None
    assert child.stdout.readline() == "up\n"
    child.send_signal(signal.SIGINT)
    if signals == 2:
        assert child.stderr is not None
        while "once more kills" not in child.stderr.readline():
            pass
        child.send_signal(signal.SIGINT)
    out, _ = child.communicate(timeout=60)
    assert child.returncode == code
    assert out == ("bye\n" if signals == 1 else "")
    assert command.rows() == []


def test_detached_pods_are_listed_followed_asked_and_removed(command: Commands) -> None:
    name = unique("web")
    script = "i=0; while :; do echo line $i; i=$((i+1)); sleep 0.1; done"
    started = command("run", "-d", "--name", name, "--label", "app=web", BUSYBOX, "sh", "-c", script)
    assert started.returncode == 0, started.stderr
    pod_id = started.stdout.strip()

    (row,) = command.rows()
    assert (row["id"], row["name"], row["state"], row["runtime"], row["rule"]) == (
        pod_id,
        name,
        "ready",
        "docker",
        "default",
    )
    assert row["running"] == 1
    assert row["ip"]
    (container,) = command.rows("-c", name)
    assert (container["name"], container["state"], container["image"]) == ("main", "running", BUSYBOX)

    explained = json.loads(command("explain", name, "-o", "json").stdout)
    assert (explained["runtime"], explained["rule"]) == ("docker", "default")
    assert explained["route_reason"]

    follower = command.begin("logs", "-f", name)
    assert follower.stdout is not None
    assert [follower.stdout.readline() for _ in range(3)] == ["line 0\n", "line 1\n", "line 2\n"]

    done = command("exec", name, "--", "sh", "-c", "echo hi; echo no >&2; exit 3")
    assert (done.returncode, done.stdout, done.stderr) == (3, "hi\n", "no\n")
    assert command("exec", "--timeout", "1", name, "sleep", "60").returncode == 124
    assert command("exec", name, "--", "no-such-program").returncode in (125, 126, 127)

    refused = command("rm", name)
    assert refused.returncode == 1
    assert "still runs" in refused.stderr
    assert command("rm", "-f", "--time", "0", pod_id[:10]).returncode == 0
    follower.communicate(timeout=30)
    assert follower.returncode == 0
    assert command.rows() == []
    assert not list(command.pods_dir.iterdir())
    assert command("rm", name).returncode == 4


MANIFEST = """\
apiVersion: v1
kind: Pod
metadata: {{name: {name}}}
spec:
  restartPolicy: OnFailure
  terminationGracePeriodSeconds: 2
  volumes: [{{name: v, emptyDir: {{}}}}, {{name: c, configMap: {{name: cm}}}}]
  initContainers:
  - {{name: one, image: {image}, command: [sh, -c, "echo init; echo x > /v/f"],
     volumeMounts: [{{name: v, mountPath: /v}}]}}
  - name: side
    image: {image}
    restartPolicy: Always
    command: [sh, -c, "trap 'echo side down; exit 0' TERM; echo up > /v/side; while :; do sleep 0.05; done"]
    volumeMounts: [{{name: v, mountPath: /v}}]
  containers:
  - name: main
    image: {image}
    command: [sh, -c]
    args:
    - until test -f /v/side; do sleep 0.05; done; cat /c/k; echo $(MODE); echo x >> /v/f; test $(wc -l < /v/f) -gt 2
    env: [{{name: MODE, valueFrom: {{configMapKeyRef: {{name: cm, key: mode}}}}}}]
    volumeMounts: [{{name: v, mountPath: /v}}, {{name: c, mountPath: /c}}]
---
apiVersion: v1
kind: ConfigMap
metadata: {{name: cm}}
data: {{k: "from config\\n", mode: fast}}
"""


def test_play_runs_init_containers_sidecars_and_restarts(command: Commands) -> None:
    name = unique("play")
    done = command("play", "-", stdin=MANIFEST.format(name=name, image=BUSYBOX))
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0] == f"[{name}/one] init"
    assert lines[1:5] == [f"[{name}/main] from config", f"[{name}/main] fast"] * 2  # it fails once, and is run again
    assert lines[-1] == f"[{name}/side] side down"
    assert "starting again" in done.stderr
    assert command.rows() == []


def test_play_stops_at_an_init_container_that_fails(command: Commands) -> None:
    manifest = MANIFEST.format(name=unique("init"), image=BUSYBOX)
    manifest = manifest.replace("OnFailure", "Never").replace('"echo init; echo x > /v/f"', '"exit 9"')
    done = command("play", "-", stdin=manifest)
    assert done.returncode == 9
    assert "from config" not in done.stdout
    assert command.rows() == []


def test_play_refuses_an_unknown_field_by_its_name(command: Commands, tmp_path: Path) -> None:
    file = tmp_path / "pod.yaml"
    file.write_text(
        MANIFEST.format(name="x", image=BUSYBOX).replace("restartPolicy: OnFailure", "restartPolice: Never")
    )
    done = command("play", str(file))
    assert done.returncode == 1
    assert done.stderr.startswith(f"dispatcher: {file}:5:3: ")
    assert "restartPolice" in done.stderr


def test_play_survives_a_restart_of_the_daemon(command: Commands, shared: Node) -> None:
    script = "echo one; until test -f /v/go; do sleep 0.05; done; echo two; exit 4"
    child = command.begin("run", "-v", f"{shared.root}:/v", BUSYBOX, "sh", "-c", script)
    assert child.stdout is not None
    assert child.stdout.readline() == "one\n"
    shared.kill()
    shared.start()
    (shared.root / "go").touch()
    out, err = child.communicate(timeout=90)
    (shared.root / "go").unlink()
    assert (child.returncode, out) == (4, "two\n"), err
    assert command.rows() == []


def test_keep_leaves_the_pod_for_its_log(command: Commands) -> None:
    name = unique("kept")
    assert command("run", "--keep", "--name", name, BUSYBOX, "echo", "still here").returncode == 0
    assert command("logs", name).stdout == "still here\n"
    assert command.rows()[0]["running"] == 0
    assert command("rm", name).returncode == 0


def test_status_plugins_and_version(command: Commands) -> None:
    status = command("status", "-o", "json")
    assert status.returncode == 0, status.stderr
    found = json.loads(status.stdout)
    assert {"RuntimeReady", "NetworkReady"} <= {item["type"] for item in found["conditions"]}
    assert found["info"]["policy"]["handlers"]["docker"] == ["docker"]
    assert "config" not in found["info"]
    assert "docker" in command("status").stdout

    plugins = command("plugins", "-o", "json")
    listed = {plugin["name"]: plugin for plugin in json.loads(plugins.stdout)}
    assert all(not listed[name]["error"] for name in ("docker_shim", "cni", "images"))
    assert plugins.returncode == (1 if any(plugin["error"] for plugin in listed.values()) else 0)

    version = command("version", "-o", "json")
    assert json.loads(version.stdout)["daemon"].startswith("dispatcher ")
    assert version.returncode == 0


def test_a_daemon_that_is_not_there(tmp_path: Path) -> None:
    begun = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-m", "dispatcher", "ps", "-e", f"unix://{tmp_path}/no.sock"],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert done.returncode == 3
    assert "does not exist" in done.stderr
    assert "dispatcher serve" in done.stderr
    assert time.monotonic() - begun < 10


def test_ready_pods_answer_over_the_network(command: Commands) -> None:
    name = unique("net")
    assert command("run", "-d", "--name", name, BUSYBOX, "sleep", "1000").returncode == 0
    (row,) = command.rows()
    done = command("exec", name, "--", "ip", "-4", "addr", "show", "eth0")
    assert f"inet {row['ip']}/" in done.stdout
    wait_until(lambda: command.rows()[0]["state"] == "ready", timeout_s=10, what="the pod is not ready")


def test_a_pod_of_a_plugin_that_is_gone_can_only_be_forgotten(
    node: Callable[..., Node], test_images: TestImages, tmp_path: Path
) -> None:
    del test_images
    own = node()
    command = Commands(own, tmp_path / "pods")
    name = unique("left")
    before = {container["Id"] for container in own.engine.containers()}
    pod_id = command("run", "-d", "--name", name, BUSYBOX, "sleep", "1000").stdout.strip()
    loaded = command("forget", "--yes", name)
    assert loaded.returncode == 1
    assert "is loaded" in loaded.stderr

    settings = own.settings["plugins"]
    own.settings["plugins"] = {**settings, "enabled": ["cni", "images"]}
    own.write_policy({"apiVersion": "dispatcher/v1", "default": {"refuse": "no runtime"}})
    own.restart()
    assert [row["id"] for row in command.rows()] == [pod_id]
    assert command("rm", "-f", name).returncode != 0
    shown = command("forget", name)
    assert shown.returncode == 1
    assert "engine_id" in shown.stdout
    assert command("forget", "--yes", name).stdout.strip() == pod_id
    assert command.rows() == []

    # What only the runtime could remove stays behind, as the command says.
    left = {container["Id"] for container in own.engine.containers()} - before
    assert len(left) == 2
    for container_id in left:
        own.engine.request("DELETE", f"/containers/{container_id}?force=1&v=1")
    own.settings["plugins"] = settings
    own.write_policy({"apiVersion": "dispatcher/v1", "default": {"runtime": "docker"}})
    own.restart()
    assert command.rows() == []
