"""A daemon in small, to be killed: one pod is attached and detached, its plan on record before the network is touched.

    python -m tests.cni.crash_child ROOT POD_ID

The record is ROOT/record, as the core keeps it in its database.
"""

from __future__ import annotations

import asyncio
import json
import sys
from pathlib import Path

from dispatcher.model import NetworkPlan, PodId, PortMapping
from dispatcher.netns import ensure_namespace, remove_namespace
from tests.cni.net import World, make_spec


def read_record(root: Path) -> NetworkPlan | None:
    """The plan on record, None where the daemon did not get that far."""
    path = root / "record"
    return NetworkPlan(**json.loads(path.read_text())) if path.exists() else None


async def live(world: World, pod_id: PodId) -> None:
    """Attach and detach the pod."""
    network = world.make_network()
    network.open_journal()
    netns = world.netns_dir / pod_id
    spec = make_spec(port_mappings=(PortMapping(container_port=80, host_port=8080),))
    plan = network.plan(pod_id, spec, str(netns))
    record = world.root / "record.new"
    record.write_text(json.dumps({"plugin": plan.plugin, "netns_path": plan.netns_path, "content": plan.content}))
    record.replace(world.root / "record")
    await ensure_namespace(netns)
    attachment = await network.add(plan)
    await network.delete(plan, attachment)
    await remove_namespace(netns)


if __name__ == "__main__":
    asyncio.run(live(World(root=Path(sys.argv[1])), PodId(sys.argv[2])))
