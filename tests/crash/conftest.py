"""What crash tests share: the check that nothing of a node's pods is left."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.lab.node import Node


def leftovers(node: Node) -> list[str]:
    """Everything of pods that still stands: on record, in the engine, in the kernel, on disk."""
    found = []
    client = node.client()
    found += [f"pod on record {p.id[:12]}" for p in client.pods()]
    found += [f"container on record {c.id[:12]}" for c in client.containers()]
    uuid = json.loads(client.status(verbose=True).info["node"])["uuid"]
    for container in node.engine.containers():
        if uuid in json.dumps(container):
            found.append(f"engine container {container.get('Names')}")
    found += [f"namespace {p.name[:12]}" for p in (node.run_dir / "netns").glob("*")]
    found += [f"folder {p.name[:12]}" for p in (node.state_dir / "pods").glob("*")]
    found += [f"address {p.name}" for p in (node.root / "ipam").glob("*/*.*.*.*")]
    ports = subprocess.run(
        ["ip", "-o", "link", "show", "master", node.bridge], capture_output=True, text=True, check=False
    )
    found += [f"link {line.split()[1]}" for line in ports.stdout.splitlines()]
    found += [
        f"mount {line}" for line in Path("/proc/self/mounts").read_text().splitlines() if str(node.run_dir) in line
    ]
    return found


@pytest.fixture
def nothing_left() -> Callable[[Node], None]:
    """Assert that a node holds nothing of any pod."""

    def check(node: Node) -> None:
        found = leftovers(node)
        assert not found, "\n".join(found)

    return check
