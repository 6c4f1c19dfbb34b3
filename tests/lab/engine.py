"""A private Docker Engine for tests: own folders, own socket, own bridge, no firewall rules, own cgroup parent.

The user's engine is never touched: an engine without any bridge would remove `docker0`, whoever made it, so this one
gets an idle bridge of its own. The engine can be killed and restarted; `close` removes every container, mount and
cgroup that it made.
"""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import stat
import subprocess
import sys
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.parse import quote

from tests.lab.child import (
    PATIENCE,
    Child,
    PartMissingError,
    find_program,
    has_capability,
    lab_folder,
    patient,
    require_root,
    wait_until,
)
from tests.lab.http import Reply, request
from tests.lab.sweep import bridge_of, slice_of, sweep

_CAP_SYS_RESOURCE = 24
# The cgroup driver of private engines, and so of the nodes that use them: cgroupfs, or systemd where it is PID 1.
CGROUP_DRIVER = os.environ.get("DISPATCHER_LAB_CGROUP_DRIVER") or "cgroupfs"
# Link-local and used by nobody: no container is ever attached to the engine's own bridge.
_BRIDGE_ADDRESS = "169.254.213.1/30"
# Up to this major version the daemon writes a key below /etc unless it is told another place.
_LAST_MAJOR_WITH_TRUST_KEY = 23


def engine_section(socket: Path) -> dict[str, object]:
    """The settings of a Docker runtime on a private engine: its socket, and deadlines as long as this machine is slow."""
    if PATIENCE == 1:
        return {"socket": str(socket)}
    # Limits of the schema bound them as well.
    deadlines = {
        "call_deadline_s": min(patient(30), 600),
        "ping_deadline_s": min(patient(2), 60),
        "kill_deadline_s": min(patient(15), 600),
    }
    return {"socket": str(socket), **deadlines}


class Engine:
    """One dockerd. `start` returns when it answers; `kill` leaves its containers to live-restore."""

    def __init__(self, *, live_restore: bool = True, extra: Mapping[str, object] | None = None) -> None:
        """Prepare the folders and the configuration; nothing runs yet.

        Args:
            live_restore: Whether containers outlive the daemon.
            extra: More keys for daemon.json.

        Raises:
            PartMissingError: No root, or no Docker Engine on this machine.
        """
        require_root()
        self.dockerd = os.environ.get("DISPATCHER_LAB_DOCKERD") or find_program("dockerd")
        find_program("containerd")
        find_program("ip")
        self.runc = find_program("runc")
        self.version = _version_of(self.dockerd)
        self.uses_wrapper = not has_capability(_CAP_SYS_RESOURCE)

        self.root = lab_folder("engine")
        self.socket = self.root / "docker.sock"
        self.cgroup_parent = f"/{self.root.name}" if CGROUP_DRIVER == "cgroupfs" else slice_of(self.root)
        self.bridge = bridge_of(self.root)
        self._config = self.root / "daemon.json"
        self._settings = self._make_settings(live_restore=live_restore, extra=extra or {})
        self._child = Child([self.dockerd, "--config-file", str(self._config)], log=self.root / "dockerd.log")

    def _make_settings(self, *, live_restore: bool, extra: Mapping[str, object]) -> dict[str, object]:
        settings: dict[str, object] = {
            "data-root": str(self.root / "data"),
            "exec-root": str(self.root / "exec"),
            "pidfile": str(self.root / "dockerd.pid"),
            "hosts": [self.url],
            "bridge": self.bridge,
            "iptables": False,
            "ip6tables": False,
            "ip-forward": False,
            "ip-masq": False,
            "userland-proxy": False,
            "live-restore": live_restore,
            "exec-opts": [f"native.cgroupdriver={CGROUP_DRIVER}"],
            "cgroup-parent": self.cgroup_parent,
            "log-level": "warn",
        }
        if self.version[0] <= _LAST_MAJOR_WITH_TRUST_KEY:
            settings["deprecated-key-path"] = str(self.root / "key.json")
        if self.uses_wrapper:
            settings["runtimes"] = {"clamped": {"path": str(self._write_wrapper())}}
            settings["default-runtime"] = "clamped"
        return {**settings, **extra}

    def _write_wrapper(self) -> Path:
        """Engines want one executable path, so the interpreter and the real runtime are named in a shell script.

        It also spares an interpreter for the many commands that have nothing to edit.
        """
        script = self.root / "oci-wrapper"
        wrapper = Path(__file__).with_name("oci_wrapper.py")
        script.write_text(
            "#!/bin/sh\n"
            'for word; do case "$word" in\n'
            f'create|run|exec) exec "{sys.executable}" -I -S "{wrapper}" "{self.runc}" "$@" ;;\n'
            "esac; done\n"
            f'exec "{self.runc}" "$@"\n'
        )
        script.chmod(script.stat().st_mode | stat.S_IXUSR | stat.S_IXGRP | stat.S_IXOTH)
        return script

    @property
    def url(self) -> str:
        """The address for DOCKER_HOST."""
        return f"unix://{self.socket}"

    @property
    def pid(self) -> int:
        """The pid of dockerd."""
        return self._child.pid

    @property
    def running(self) -> bool:
        """Whether dockerd runs."""
        return self._child.running

    def describe(self) -> str:
        """One line for the test report: version, and whether the wrapper runtime stands in."""
        text = f"Docker Engine {'.'.join(map(str, self.version))}"
        return text + (" through the OCI runtime wrapper (no CAP_SYS_RESOURCE here)" if self.uses_wrapper else "")

    def start(self, *, timeout_s: float = 60) -> None:
        """Start dockerd and wait until it answers."""
        self._config.write_text(json.dumps(self._settings, indent=1))
        # Not by /sys, which may show another network namespace than the one that we are in.
        if self.bridge not in {name for _index, name in socket.if_nameindex()}:
            _ip("link", "add", self.bridge, "type", "bridge")
            _ip("address", "add", _BRIDGE_ADDRESS, "dev", self.bridge)
        self._child.start()
        self._child.wait_ready(self._answers, timeout_s=timeout_s)

    def set_live_restore(self, *, enabled: bool) -> None:
        """Choose live-restore for the next start."""
        self._settings["live-restore"] = enabled

    def stop(self) -> None:
        """End dockerd with SIGTERM. Containers stay with live-restore, and are stopped without it."""
        self._child.stop(timeout_s=40)

    def kill(self) -> None:
        """End dockerd with SIGKILL and wait until its containerd is gone as well."""
        managed = self._containerd_pid()
        self._child.kill()
        if managed is not None:
            # dockerd asks the kernel to kill its containerd with it. A new dockerd takes even a zombie under that pid
            # for a running containerd and waits for it in vain, so wait until init has reaped it.
            with suppress(TimeoutError):
                wait_until(lambda: not Path(f"/proc/{managed}").exists(), timeout_s=10, what="containerd remains")

    def restart(self) -> None:
        """Stop if running, then start."""
        self.stop()
        self.start()

    def pause(self) -> None:
        """Freeze dockerd (SIGSTOP): calls to it hang instead of failing."""
        self._child.signal(signal.SIGSTOP)

    def resume(self) -> None:
        """Undo `pause`."""
        self._child.signal(signal.SIGCONT)

    def request(self, method: str, path: str, document: object = None) -> Reply:
        """Send one request to the engine's API."""
        body = b"" if document is None else json.dumps(document).encode()
        return request(self.socket, method, path, headers={"Content-Type": "application/json"}, body=body)

    def containers(self) -> list[dict[str, Any]]:
        """All containers of this engine, running or not, as its API lists them."""
        found: list[dict[str, Any]] = self.request("GET", "/containers/json?all=1").json()
        return found

    def inspect(self, container: str) -> dict[str, Any]:
        """One container as the API shows it.

        Raises:
            KeyError: There is no such container.
        """
        reply = self.request("GET", f"/containers/{quote(container)}/json")
        if reply.status != 200:
            raise KeyError(container)
        found: dict[str, Any] = reply.json()
        return found

    def images(self) -> list[dict[str, Any]]:
        """All images of this engine, as its API lists them."""
        found: list[dict[str, Any]] = self.request("GET", "/images/json?all=1").json()
        return found

    def remove_containers(self) -> None:
        """Kill and remove every container."""
        for container in self.containers():
            self.request("DELETE", f"/containers/{container['Id']}?force=1&v=1")

    def log_text(self) -> str:
        """What dockerd printed."""
        return self._child.log_text()

    def close(self) -> None:
        """Remove everything that this engine made. Idempotent."""
        if not self.root.exists():
            return
        with suppress(OSError, RuntimeError, TimeoutError):
            self.resume()
            if not self.running:
                self.start()
            self.remove_containers()
        self.stop()
        sweep(self.root)

    def _answers(self) -> bool:
        with suppress(OSError):
            return self.request("GET", "/_ping").status == 200
        return False

    def _containerd_pid(self) -> int | None:
        with suppress(OSError, ValueError):
            return int((self.root / "exec/containerd/containerd.pid").read_text())
        return None


def _ip(*arguments: str) -> None:
    subprocess.run([find_program("ip"), *arguments], check=True, capture_output=True)


def _version_of(dockerd: str) -> tuple[int, int]:
    text = subprocess.run([dockerd, "--version"], capture_output=True, text=True, check=True).stdout
    found = re.search(r"version (\d+)\.(\d+)", text)
    if found is None:
        raise PartMissingError(f"{dockerd} does not tell its version: {text!r}")
    return int(found[1]), int(found[2])
