"""The commands that the pages for operators tell to type, typed as they stand there, on a node with a pod."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.lab.images import BUSYBOX, TestImages
from tests.lab.node import Node

pytestmark = [pytest.mark.lab, pytest.mark.timeout(300)]

DOCS = Path(__file__).parents[2] / "docs"
PAGES = ("kubelet.md", "operations.md")
# Typed by nobody here: the first serves until it is ended; the second is for pods whose plugin is gone for good.
LEFT_OUT = {"dispatcher serve", "dispatcher forget POD"}
LAST = "dispatcher rm --force --all"
IMAGE = "docker.io/library/busybox"
MANIFEST = """\
apiVersion: v1
kind: Pod
metadata: {name: from-file}
spec:
  restartPolicy: Never
  containers:
  - name: main
    image: %s
    command: [echo, hello]
"""


def commands() -> list[str]:
    """Every command of ours in the pages' code, each once, that which takes all pods away last."""
    found: list[str] = []
    for page in PAGES:
        text = (DOCS / page).read_text()
        lines = re.findall(r"^    (\S.*)$", text, re.MULTILINE) + re.findall(r"`([^`\n]+)`", text)
        for line in lines:
            found += [part.strip() for part in line.split("&&") if part.strip().startswith("dispatcher ")]
    return sorted(set(found) - LEFT_OUT, key=lambda command: (command == LAST, found.index(command)))


def test_the_list_is_not_empty() -> None:
    assert {"dispatcher status", "dispatcher explain POD", LAST} <= set(commands())


def test_every_documented_command_works(node: Callable[..., Node], test_images: TestImages, tmp_path: Path) -> None:
    """Each ends well. Names that stand for the reader's own become this node's; `doctor` may find fault with it."""
    current = node()
    pod = current.client().run_pod()
    pod.run()
    manifest = tmp_path / "pod.yaml"
    manifest.write_text(MANIFEST % test_images.need(BUSYBOX))
    own = {"POD": pod.id[:13], "pod.yaml": str(manifest), IMAGE: test_images.need(BUSYBOX)}
    environment = {
        **os.environ,
        "DISPATCHER_ENDPOINT": f"unix://{current.socket}",
        "DISPATCHER_PODS_DIR": str(tmp_path / "pods"),
    }
    for command in commands():
        words = [own.get(word, word) for word in command.split()[1:]]
        if words[0] in {"doctor", "config"}:
            words += ["--config", str(current.config_path)]
        if words[0] == "top":
            words += ["--once"]  # a reader ends it by Ctrl-C
        if words[:2] == ["explain", "-f"]:
            words += ["--policy", str(current.policy_path)]
        argv = [sys.executable, "-m", "dispatcher", *words]
        done = subprocess.run(argv, capture_output=True, text=True, check=False, timeout=120, env=environment)
        allowed = {0, 1} if words[0] == "doctor" else {0}
        assert done.returncode in allowed, f"{command}: {done.returncode}\n{done.stdout}\n{done.stderr}"
        assert done.stdout or words[0] == "rm", f"{command} printed nothing"
        assert "Traceback" not in done.stderr
    assert not current.client().pods()
