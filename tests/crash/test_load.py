"""Fifty pods by eight clients at once, while another runtime fails at everything: nobody is hindered, nothing is left."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import grpc
import pytest

from dispatcher.cri import api_pb2 as pb
from tests.crash.kubelet import Kubelet, Life
from tests.lab import census
from tests.lab.child import wait_until
from tests.lab.client import refused
from tests.lab.engine import Engine
from tests.lab.images import BUSYBOX, TestImages
from tests.lab.node import Node

pytestmark = pytest.mark.timeout(600)

PLUGIN = '''
"""A runtime that fails at everything that it is asked."""
from dispatcher.api import RuntimeHealth
from dispatcher.model import Isolation


class Broken:
    name, isolation, version, facts_schema, option_keys = "broken", Isolation.VM, "1", 1, frozenset()

    async def start(self): pass
    async def aclose(self): raise RuntimeError("aclose")
    async def probe(self): return RuntimeHealth(ready=True)
    async def watch(self):
        raise RuntimeError("watch")
        yield
    async def output(self, container, after):
        raise RuntimeError("output")
        yield
    async def remove_pod(self, pod): pass


async def fail(self, *args, **kwargs):
    raise RuntimeError("broken on purpose")


for method in ("create_pod", "stop_pod", "create_container", "start_container", "stop_container",
               "remove_container", "inspect"):
    setattr(Broken, method, fail)


class Plugin:
    API, name = (1, 0), "broken_plugin"

    def register(self, registrar):
        registrar.runtime("broken", lambda section, services: Broken())


plugin = Plugin()
'''


def install_broken_plugin(folder: Path) -> str:
    """A distribution as pip would leave it, in a folder for PYTHONPATH."""
    (folder / "broken_plugin.py").write_text(PLUGIN)
    info = folder / "broken_plugin-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: broken-plugin\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[dispatcher.plugins]\nbroken_plugin = broken_plugin:plugin\n")
    return str(folder)


def left_of(ids: list[str], node: Node, before: census.Census, scope: census.Scope) -> list[str]:
    """Entries of a census that name one of these pods or containers, or the node's folder, and are new.

    Others may use the machine meanwhile, so only what bears our names is judged.
    """
    names = (*ids, str(node.root))
    return [
        f"{kind}: {entry}"
        for kind, entries in census.take(scope).kinds.items()
        for entry in entries - before.kinds.get(kind, frozenset())
        if any(name in entry for name in names)
    ]


def test_fifty_pods_by_eight_clients_beside_a_broken_runtime(
    node: Callable[..., Node],
    engine: Engine,
    test_images: TestImages,
    tmp_path: Path,
    nothing_left: Callable[[Node], None],
) -> None:
    plugins = tmp_path / "plugins"
    plugins.mkdir()
    current = node(
        env={"PYTHONPATH": install_broken_plugin(plugins)},
        config={"plugins": {"enabled": ["docker_shim", "cni", "images", "broken_plugin"]}},
        policy={
            "apiVersion": "dispatcher/v1",
            "handlers": {"broken": {"runtime": "broken"}},
            "default": {"runtime": "docker"},
        },
    )
    client = current.client()
    client.pull(BUSYBOX)
    # One pod first: the network's bridge and the shared chains of CNI plugins are made once, and stay.
    warm = Life(Kubelet(client), tmp_path / "warm", removes_image=False)
    warm.begin()
    warm.end()
    scope = census.Scope(files=(current.state_dir / "pods", current.run_dir / "netns", current.root / "ipam"))
    before = census.take(scope)
    ids: list[str] = []

    def live(number: int) -> None:
        life = Life(Kubelet(client), tmp_path / f"client-{number % 8}", removes_image=False)
        life.begin()
        life.check()
        life.wait_logged()
        life.end()
        ids.extend((life.pod_id[:12], life.container_id[:12]))

    def fail(number: int) -> None:
        with refused(grpc.StatusCode.INTERNAL):
            client.rpc(
                "RunPodSandbox",
                pb.RunPodSandboxRequest(config=client.pod_config(f"broken-{number}"), runtime_handler="broken"),
            )
        assert client.pods() is not None

    with ThreadPoolExecutor(8) as pool, ThreadPoolExecutor(2) as failing:
        lives = [pool.submit(live, number) for number in range(50)]
        failures = [failing.submit(fail, number) for number in range(20)]
        for future in (*lives, *failures):
            future.result()

    conditions = {c.type: c.status for c in client.status().status.conditions}
    assert conditions["RuntimeReady"], "a runtime that nobody needs made the node not ready"
    nothing_left(current)
    with suppress(TimeoutError):
        wait_until(lambda: not left_of(ids, current, before, scope), timeout_s=10, what="something is left")
    assert left_of(ids, current, before, scope) == []
