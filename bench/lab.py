"""Runs `cri.py` against parts of its own: our daemon with a private Docker Engine, and a private containerd beside it.

Needs root and Debian's docker.io, containerd, docker-registry and containernetworking-plugins. Touches no running
engine, and takes away what it made. `python bench/lab.py --help`.
"""

from __future__ import annotations

import argparse
import compileall
import contextlib
import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench import cri
from tests.lab.child import Child, PartMissingError, find_program, lab_folder, wait_until
from tests.lab.engine import Engine
from tests.lab.images import BUSYBOX, PAUSE, UPSTREAM_HOSTS, TestImages
from tests.lab.node import Node
from tests.lab.registry import Registry

BRIDGE = "cribench0"
METRICS = "127.0.0.1:19477"


class Containerd:
    """A private containerd with its CRI plugin, on a bridge of its own."""

    def __init__(self, registry: Registry) -> None:
        self._program = find_program("containerd")
        self.root = lab_folder("containerd")
        self.socket = self.root / "c.sock"
        self._write_config(registry)
        self.argv = [self._program, "-c", str(self.root / "config.toml")]
        self.child = Child(self.argv, log=self.root / "log")

    def _write_config(self, registry: Registry) -> None:
        ipam = {"type": "host-local", "ranges": [[{"subnet": "10.207.0.0/16"}]], "dataDir": str(self.root / "ipam")}
        bridge = {"type": "bridge", "bridge": BRIDGE, "isGateway": True, "ipam": ipam}
        (self.root / "cni").mkdir()
        conflist = {"cniVersion": "1.0.0", "name": "bench", "plugins": [bridge]}
        (self.root / "cni/10-bench.conflist").write_text(json.dumps(conflist))
        section = 'plugins."io.containerd.grpc.v1.cri"'
        lines = [
            "version = 2",
            f'root = "{self.root}/root"',
            f'state = "{self.root}/state"',
            f'[grpc]\naddress = "{self.socket}"',
            f'[{section}]\nrestrict_oom_score_adj = true\nsandbox_image = "{PAUSE}"',
            f'[{section}.cni]\nbin_dir = "/usr/lib/cni"\nconf_dir = "{self.root}/cni"',
        ]
        lines += [f'[{section}.registry.mirrors."{host}"]\nendpoint = ["{registry.url}"]' for host in UPSTREAM_HOSTS]
        (self.root / "config.toml").write_text("\n".join(lines))

    def start(self) -> None:
        """Start it, and wait for its socket."""
        self.child.start()
        wait_until(self.socket.is_socket, timeout_s=30, what="containerd does not listen")

    def close(self) -> None:
        """End it, and take away its folders, mounts and bridge. Its pods have to be gone."""
        self.child.stop()
        points = [line.split()[4] for line in Path("/proc/self/mountinfo").read_text().splitlines()]
        for point in reversed([point for point in points if point.startswith(f"{self.root}/")]):
            subprocess.run(["umount", "-l", point], check=False, capture_output=True)
        subprocess.run([find_program("ip"), "link", "delete", BRIDGE], check=False, capture_output=True)
        shutil.rmtree(self.root, ignore_errors=True)


def compile_sources() -> None:
    """Have byte code for everything, as an installed program has, whatever PYTHONDONTWRITEBYTECODE says here."""
    root = Path(__file__).resolve().parent.parent
    for folder in (root / "dispatcher", *root.glob("plugins/*/src")):
        compileall.compile_dir(folder, quiet=2)


@contextlib.contextmanager
def lab(*, with_peer: bool) -> Iterator[list[cri.Socket]]:
    """Start everything, yield the sockets, end everything."""
    with contextlib.ExitStack() as stack:
        compile_sources()
        engine, registry = Engine(), Registry()
        stack.callback(engine.close)
        stack.callback(registry.close)
        engine.start()
        registry.start()
        TestImages(registry).push_all()
        config = {"metrics": {"listen": METRICS}, "logging": {"level": "info", "format": "json"}}
        node = Node(engine=engine, registry=registry, config=config)
        stack.callback(node.close)
        node.start()
        serve = f"{sys.executable} -m dispatcher serve --config {node.config_path}"
        sockets = [cri.Socket("dispatcher", f"unix://{node.socket}", start=serve, metrics=f"http://{METRICS}")]
        if with_peer:
            peer = Containerd(registry)
            stack.callback(peer.close)
            peer.start()
            sockets.append(cri.Socket("containerd", f"unix://{peer.socket}"))
        stack.callback(_stop_restarted)
        for socket in sockets:
            stack.callback(socket.clean)
        yield sockets


def _stop_restarted() -> None:
    """End what a measurement of recovery started: `Node.close` starts its own."""
    for child in cri.RESTARTED:
        child.terminate()
        child.wait(30)


def main() -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(description="Measure our daemon beside containerd, with parts of their own.")
    parser.add_argument("--quick", action="store_true", help="few rounds and pods: a look, not a figure")
    parser.add_argument("--no-peer", action="store_true", help="without containerd")
    parser.add_argument("-o", "--output", choices=("text", "json"), default="text")
    args = parser.parse_args()
    plan = cri.Plan(
        rounds=3 if args.quick else 20,
        calls=100 if args.quick else 200,
        relists=5 if args.quick else 20,
        pods=(10,) if args.quick else (100, 500),
        with_container=10 if args.quick else 100,
        recoveries=1 if args.quick else 3,
    )
    try:
        with lab(with_peer=not args.no_peer) as sockets:
            results = cri.run(sockets, plan, BUSYBOX, lambda text: print(f"bench: {text}", file=sys.stderr, flush=True))
            names = [socket.name for socket in sockets]
            report = cri.summary(results, names)
            if args.output == "json":
                print(json.dumps(report, indent=2), flush=True)
            else:
                cri.show(report, names)
    except PartMissingError as missing:
        raise SystemExit(f"bench: {missing}") from missing
    return 0


if __name__ == "__main__":
    sys.exit(main())
