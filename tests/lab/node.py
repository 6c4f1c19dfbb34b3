"""The product under test: `dispatcher serve` as a child, with a configuration and folders of its own.

A node owns its bridge and its CNI chains; `close` takes them away again, so that a session leaves the host as it was.
"""

from __future__ import annotations

import ipaddress
import itertools
import json
import os
import shlex
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import grpc

from dispatcher.config import OWN_PLUGINS
from tests.lab.child import Child, find_program, lab_folder, patient, require_root
from tests.lab.client import CriClient
from tests.lab.engine import CGROUP_DRIVER, Engine, engine_section
from tests.lab.images import UPSTREAM_HOSTS
from tests.lab.registry import Registry
from tests.lab.sweep import bridge_of, sweep

_numbers = itertools.count(1)
CNI_BIN_DIRS = ("/opt/cni/bin", "/usr/lib/cni")

# A node that is meant for virtual machines enables "hyper_vm" as well: others do not have to look for QEMU and KVM.
LAB_PLUGINS = tuple(name for name in OWN_PLUGINS if name != "hyper_vm")


class Node:
    """One daemon. `start` returns when it is ready; its records and pods outlive `kill`, `stop` and `restart`."""

    def __init__(
        self,
        *,
        engine: Engine,
        registry: Registry,
        default_runtime: str = "docker",
        policy: Mapping[str, object] | None = None,
        config: Mapping[str, object] | None = None,
        env: Mapping[str, str] | None = None,
    ) -> None:
        """Write the configuration; nothing runs yet.

        Args:
            engine: The Docker Engine for Docker pods.
            registry: Where the upstream registries' names lead.
            default_runtime: The default route of the policy.
            policy: A whole policy file instead of the one with only that default.
            config: Keys of dispatcher.yaml that are merged over the generated ones, section by section.
            env: More environment for the daemon.

        Raises:
            PartMissingError: No root, or no CNI plugins.
        """
        require_root()
        self.engine = engine
        self.registry = registry
        self.root = lab_folder("node")
        self.socket = self.root / "run/cri.sock"
        self.state_dir = self.root / "state"
        self.run_dir = self.root / "run"
        self.cni_dir = self.root / "cni"
        self.config_path = self.root / "dispatcher.yaml"
        self.policy_path = self.root / "policy.yaml"
        self.bridge = bridge_of(self.root)
        self.network = f"lab-{self.bridge}"
        self.subnet = _subnet()
        self._env = dict(env or {})
        self._clients: list[CriClient] = []
        self._child: Child | None = None

        self.cni_dir.mkdir()
        self.write_conflist(self.bridge_conflist())
        self.write_policy(policy or {"apiVersion": "dispatcher/v1", "default": {"runtime": default_runtime}})
        self.settings = _merged(self._settings(), config or {})
        self._chains_before = cni_chains()

    def _settings(self) -> dict[str, object]:
        mirrors = {host: {"mirrors": [self.registry.url], "origin": False} for host in UPSTREAM_HOSTS}
        return {
            "socket": {"path": str(self.socket)},
            "state_dir": str(self.state_dir),
            "run_dir": str(self.run_dir),
            "policy": str(self.policy_path),
            "metrics": {"listen": "127.0.0.1:0"},
            "cgroup_driver": CGROUP_DRIVER,
            "logging": {"level": "debug", "format": "text"},
            "plugins": {
                "enabled": list(LAB_PLUGINS),
                "docker_shim": engine_section(self.engine.socket),
                "images": {"mirrors": mirrors},
                "cni": {"conf_dirs": [str(self.cni_dir)], "bin_dirs": list(CNI_BIN_DIRS)},
            },
        }

    # ------------------------------------------------------------------------------------------------- configuration

    def bridge_conflist(self) -> dict[str, object]:
        """The node's usual network: a bridge of its own with host ports."""
        subnet = str(self.subnet)
        ipam = {
            "type": "host-local",
            "ranges": [[{"subnet": subnet}]],
            "routes": [{"dst": "0.0.0.0/0"}],
            "dataDir": str(self.root / "ipam"),
        }
        bridge = {"type": "bridge", "bridge": self.bridge, "isGateway": True, "ipMasq": True, "ipam": ipam}
        portmap = {"type": "portmap", "capabilities": {"portMappings": True}}
        return {"cniVersion": "1.0.0", "name": self.network, "plugins": [bridge, portmap]}

    def write_conflist(self, conflist: Mapping[str, object], name: str = "10-lab.conflist") -> None:
        """Put a network configuration into the node's folder."""
        _replace(self.cni_dir / name, json.dumps(conflist, indent=1))

    def write_policy(self, policy: Mapping[str, object] | str) -> None:
        """Put a policy file in place, atomically, as an operator's tool would. JSON is YAML."""
        _replace(self.policy_path, policy if isinstance(policy, str) else json.dumps(policy, indent=1))

    def command(self, *arguments: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
        """Run `dispatcher ARGUMENTS` with this interpreter and the node's socket in its environment."""
        return subprocess.run(
            [sys.executable, "-m", "dispatcher", *arguments],
            input=stdin,
            capture_output=True,
            text=True,
            check=False,
            timeout=patient(120),
            env={**os.environ, "DISPATCHER_ENDPOINT": f"unix://{self.socket}"},
        )

    # -------------------------------------------------------------------------------------------------------- life

    @property
    def pid(self) -> int:
        """The pid of the daemon."""
        assert self._child is not None
        return self._child.pid

    @property
    def running(self) -> bool:
        """Whether the daemon runs."""
        return self._child is not None and self._child.running

    def start(self, *, env: Mapping[str, str] | None = None, timeout_s: float = 30, wait: bool = True) -> None:
        """Start the daemon and wait for its readiness message to the service manager.

        Args:
            env: More environment for this start only, such as DISPATCHER_FAILPOINTS.
            timeout_s: Limit for getting ready.
            wait: Return without waiting when False, for a daemon that is expected to die.
        """
        self.config_path.write_text(json.dumps(self.settings, indent=1))
        notify = self.root / "notify.sock"
        notify.unlink(missing_ok=True)
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as receiver:
            receiver.bind(str(notify))
            receiver.setblocking(False)
            argv = [sys.executable, "-m", "dispatcher", "serve", "--config", str(self.config_path)]
            environment = {**self._env, **(env or {}), "NOTIFY_SOCKET": str(notify)}
            self._child = Child(argv, log=self.root / "dispatcher.log", env=environment)
            self._child.start()
            if wait:
                self._child.wait_ready(lambda: _said_ready(receiver), timeout_s=timeout_s)

    def stop(self) -> int:
        """End the daemon with SIGTERM; pods stay. Returns its exit code."""
        return self._child.stop() if self._child is not None else 0

    def kill(self) -> None:
        """End the daemon with SIGKILL; pods stay."""
        if self._child is not None:
            self._child.kill()

    def wait_dead(self, *, timeout_s: float = 60) -> None:
        """Wait until the daemon has ended by itself, as it does at an armed failpoint."""
        from tests.lab.child import wait_until

        wait_until(lambda: not self.running, timeout_s=timeout_s, what="the daemon lives on")

    def restart(self, *, env: Mapping[str, str] | None = None) -> None:
        """Stop if running, then start."""
        self.stop()
        self.start(env=env)

    def client(self, *, handler: str = "", timeout_s: float = 60) -> CriClient:
        """A client of this node; closed with the node at the latest."""
        client = CriClient(self.socket, handler=handler, timeout_s=timeout_s)
        self._clients.append(client)
        return client

    def log_text(self) -> str:
        """What the daemon printed over all its starts."""
        return self._child.log_text() if self._child is not None else ""

    def close(self) -> None:
        """Remove the pods, end the daemon, and take away what it left by design: bridge, chains, folders."""
        if not self.root.exists():
            return
        with suppress(grpc.RpcError, OSError, RuntimeError, TimeoutError):
            if not self.running:
                self.start()
            with CriClient(self.socket, timeout_s=30) as client:
                client.remove_all_pods()
        for client in self._clients:
            client.close()
        self.stop()
        keep_logs = os.environ.get("DISPATCHER_LAB_LOGS")
        if keep_logs and (self.root / "dispatcher.log").exists():
            shutil.copy(self.root / "dispatcher.log", Path(keep_logs) / f"{self.root.name}.log")
        remove_network_rules(self.network, keep=self._chains_before)
        sweep(self.root)


def cni_chains() -> set[tuple[str, str, str]]:
    """The chains of CNI plugins, as (program, table, chain)."""
    return {(program, table, line[1:].split()[0]) for program, table, line in _rules() if line.startswith(":CNI-")}


def remove_network_rules(network: str, *, keep: set[tuple[str, str, str]]) -> None:
    """Remove the rules and chains that CNI plugins made for one network, and nothing of another's.

    Plugins share their top chains and never take them away. Those that are not in `keep` go as well, unless somebody
    has a host port in them.
    """
    mark = f'name: \\"{network}\\"'
    rules = list(_rules())
    own = {(at[0], at[1], at[2].split()[1]) for at in rules if mark in at[2] and at[2].startswith("-A CNI-")}
    own = {chain for chain in own if not chain[2].startswith("CNI-HOSTPORT-")}
    in_use = {(program, line.split()[1]) for program, _table, line in rules if line.startswith("-A CNI-HOSTPORT-DNAT")}
    for program in ("iptables", "ip6tables"):
        if (program, "CNI-HOSTPORT-DNAT") not in in_use:
            own |= {chain for chain in cni_chains() - keep if chain[0] == program and "-HOSTPORT-" in chain[2]}
    for program, table, line in rules:
        words = shlex.split(line)
        leads_to_own = words[-2:-1] == ["-j"] and (program, table, words[-1]) in own
        if words[0] == "-A" and (leads_to_own or mark in line):
            _output([program, "-w", "-t", table, "-D", *words[1:]])
    for flag in ("-F", "-X"):
        for program, table, chain in own:
            _output([program, "-w", "-t", table, flag, chain])


def _rules() -> Iterator[tuple[str, str, str]]:
    """Every line of the rule sets, as (program, table, line)."""
    for program in ("iptables", "ip6tables"):
        table = ""
        for line in _output([f"{program}-save"]):
            table = line[1:] if line.startswith("*") else table
            yield program, table, line


def _output(command: Sequence[str]) -> list[str]:
    done = subprocess.run([find_program(command[0]), *command[1:]], capture_output=True, text=True, check=False)
    return done.stdout.splitlines()


def _subnet() -> ipaddress.IPv4Network:
    """A /24 of a range that is rarely used; nodes of one session and of parallel sessions differ."""
    number = (os.getpid() * 7 + next(_numbers)) % (1 << 12)
    return ipaddress.IPv4Network((int(ipaddress.IPv4Address("10.208.0.0")) + (number << 8), 24))


def _said_ready(receiver: socket.socket) -> bool:
    with suppress(BlockingIOError):
        while True:
            if b"READY=1" in receiver.recv(65536).splitlines():
                return True
    return False


def _replace(path: Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(text)
    temporary.rename(path)


def _merged(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in over.items():
        both = isinstance(value, Mapping) and isinstance(merged.get(key), Mapping)
        merged[key] = _merged(merged[key], value) if both else value
    return merged
