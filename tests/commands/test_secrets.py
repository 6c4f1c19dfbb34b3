"""A password that a user gives reaches the registry, and nothing else: no log line, no metric, no status."""

from __future__ import annotations

import base64
import json
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.commands.test_pods import Commands
from tests.lab.child import PartMissingError
from tests.lab.images import TestImages
from tests.lab.node import Node
from tests.lab.registry import PASSWORD, USER, Auth, Registry

pytestmark = [pytest.mark.lab, pytest.mark.timeout(120)]


@pytest.fixture(scope="module")
def guarded() -> Iterator[Registry]:
    try:
        registry = Registry(auth=Auth.BASIC)
        registry.start()
    except PartMissingError as missing:
        pytest.skip(str(missing))
    try:
        TestImages(registry).push_shell()
        yield registry
    finally:
        registry.close()


def test_credentials(node: Callable[..., Node], guarded: Registry, tmp_path: Path) -> None:
    metrics = "127.0.0.1:19479"
    own = node(config={"metrics": {"listen": metrics}, "logging": {"level": "debug", "format": "json"}})
    command = Commands(own, tmp_path / "pods")
    image = f"{guarded.address}/e2e-test-images/busybox:1.29-2"
    secret = base64.b64encode(f"{USER}:{PASSWORD}".encode()).decode()
    auth = tmp_path / "config.json"
    auth.write_text(json.dumps({"auths": {guarded.address: {"auth": secret}}}))

    refused = command("run", image, "true")
    assert refused.returncode == 125
    done = command("run", "--auth-file", str(auth), image, "echo", "in")
    assert (done.returncode, done.stdout) == (0, "in\n"), done.stderr

    with urllib.request.urlopen(f"http://{metrics}/metrics", timeout=10) as reply:
        exposed = reply.read().decode()
    status = command("status", "--config", "-o", "json").stdout
    for word in (PASSWORD, secret):
        for text in (own.log_text(), exposed, status, done.stderr, refused.stderr):
            assert word not in text
    # The lines are there all the same, each an object that tells of its call.
    lines = [json.loads(line) for line in own.log_text().splitlines()]
    assert any(line.get("rpc") == "RunPodSandbox" and line.get("correlation_id") for line in lines)
    assert 'dispatcher_image_pulls_total{outcome="PullFailed"} 1.0' in exposed
    assert 'dispatcher_image_pulls_total{outcome="ok"} 1.0' in exposed
    assert 'dispatcher_cni_steps_total{command="ADD",outcome="ok",plugin="bridge"} 1.0' in exposed
    assert (
        'dispatcher_route_decisions_total{outcome="routed",phase="pod",rule="default",runtime="docker"} 1.0' in exposed
    )
    with urllib.request.urlopen(f"http://{metrics}/readyz", timeout=10) as reply:
        assert reply.status == 200
