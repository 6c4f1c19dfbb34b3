"""A CNI network to test with: configuration files, the provider, and pods on a host of their own."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import time
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from dispatcher.api import Services
from dispatcher.model import Attachment, NetworkPlan, PodId, PodMetadata, PodSpec, make_pod_id
from dispatcher.netns import ensure_namespace, remove_namespace
from dispatcher_cni.config import CniConfig
from dispatcher_cni.provider import CniNetwork

DEBIAN_PLUGINS = Path("/usr/lib/cni")
BRIDGE: Mapping[str, Any] = {
    "type": "bridge",
    "bridge": "br-test",
    "isGateway": True,
    "ipMasq": True,
    "hairpinMode": True,
    "ipam": {
        "type": "host-local",
        "ranges": [[{"subnet": "10.77.0.0/24"}], [{"subnet": "fd77::/64"}]],
        "routes": [{"dst": "0.0.0.0/0"}, {"dst": "::/0"}],
    },
}
PORTMAP: Mapping[str, Any] = {"type": "portmap", "capabilities": {"portMappings": True}, "snat": True}
FIREWALL: Mapping[str, Any] = {"type": "firewall"}


@dataclass(slots=True, kw_only=True)
class World:
    """One node's network: folders below `root`, and the provider over them."""

    root: Path
    settings: dict[str, Any] = field(default_factory=dict)
    notices: list[tuple[str, str]] = field(default_factory=list)
    steps: list[Mapping[str, str]] = field(default_factory=list)

    @property
    def conf_dir(self) -> Path:
        """The folder of configurations."""
        return self.root / "net.d"

    @property
    def bin_dir(self) -> Path:
        """The folder of the test's own plugins, looked in first."""
        return self.root / "bin"

    @property
    def netns_dir(self) -> Path:
        """The folder of pods' namespaces."""
        return self.root / "netns"

    @property
    def state_dir(self) -> Path:
        """The provider's own folder."""
        return self.root / "state"

    def configure(
        self, *plugins: Mapping[str, Any], name: str = "test", version: str = "1.0.0", file: str = ""
    ) -> Path:
        """Write a `.conflist`."""
        self.conf_dir.mkdir(exist_ok=True)
        path = self.conf_dir / (file or "10-test.conflist")
        path.write_text(json.dumps({"cniVersion": version, "name": name, "plugins": list(plugins)}))
        return path

    def add_plugin(self, name: str, script: str) -> Path:
        """Write a plugin as a shell script."""
        self.bin_dir.mkdir(exist_ok=True)
        path = self.bin_dir / name
        path.write_text("#!/bin/sh\n" + script)
        path.chmod(0o755)
        return path

    def link_plugins(self, *names: str) -> None:
        """Put Debian's plugins into the test's own folder, from where they can vanish."""
        self.bin_dir.mkdir(exist_ok=True)
        for name in names:
            (self.bin_dir / name).symlink_to(DEBIAN_PLUGINS / name)

    def make_network(self) -> CniNetwork:
        """Make a provider, as the daemon does at its start."""
        settings = {"conf_dirs": [str(self.conf_dir)], "bin_dirs": [str(self.bin_dir), str(DEBIAN_PLUGINS)]}
        services = Services(
            state_dir=self.state_dir,
            run_dir=self.root / "run",
            node_uuid="test",
            now_ns=lambda: 0,
            notify=lambda reason, message: self.notices.append((reason, message)),
            observe=lambda what, _value, labels: self.steps.append({"what": what, **labels}),
        )
        return CniNetwork(CniConfig.from_section({**settings, **self.settings}), services)

    @contextlib.asynccontextmanager
    async def network(self) -> AsyncIterator[CniNetwork]:
        """A provider, started and closed."""
        network = self.make_network()
        await network.start()
        try:
            yield network
        finally:
            await network.aclose()

    def leases(self, network: str = "test") -> dict[str, str]:
        """Addresses that host-local holds, with the container id of each."""
        folder = Path("/var/lib/cni/networks", network)
        return {
            path.name: path.read_text().split()[0]
            for path in (folder.iterdir() if folder.exists() else ())
            if path.name != "lock" and not path.name.startswith("last_reserved_ip")
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Pod:
    """A pod with its namespace and plan; `attachment` is None until it is attached."""

    id: PodId
    netns: Path
    plan: NetworkPlan
    attachment: Attachment | None = None


def make_spec(**changes: Any) -> PodSpec:
    """A pod as asked for."""
    return PodSpec(metadata=PodMetadata(name="web-0", namespace="default", uid="uid-1"), **changes)


async def plan_pod(world: World, network: CniNetwork, spec: PodSpec | None = None) -> Pod:
    """Make a pod's namespace and its plan."""
    pod_id = make_pod_id()
    netns = world.netns_dir / pod_id
    await ensure_namespace(netns)
    return Pod(id=pod_id, netns=netns, plan=network.plan(pod_id, spec or make_spec(), str(netns)))


async def attach_pod(world: World, network: CniNetwork, spec: PodSpec | None = None) -> Pod:
    """Make a pod and attach it."""
    pod = await plan_pod(world, network, spec)
    return Pod(id=pod.id, netns=pod.netns, plan=pod.plan, attachment=await network.add(pod.plan))


async def detach_pod(network: CniNetwork, pod: Pod) -> None:
    """Detach a pod and remove its namespace, in the order in which the core does."""
    await network.delete(pod.plan, pod.attachment)
    await remove_namespace(pod.netns)


def require_plugins(*names: str) -> None:
    """Skip where the reference plugins are not installed."""
    missing = [name for name in names if not os.access(DEBIAN_PLUGINS / name, os.X_OK)]
    if missing:
        pytest.skip(f"{', '.join(missing)} not in {DEBIAN_PLUGINS} (Debian: containernetworking-plugins)")


async def eventually(claim: Callable[[], bool], *, what: str, timeout_s: float = 10.0) -> None:
    """Wait until a claim about something that happens beside the test holds."""
    deadline = time.monotonic() + timeout_s
    while not claim():
        if time.monotonic() > deadline:
            raise AssertionError(f"not within {timeout_s:g} s: {what}")
        await asyncio.sleep(0.02)


def is_running(pid: int) -> bool:
    """Tell whether a process exists and is more than a zombie that nobody has reaped yet."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state not in {"Z", "X"}
