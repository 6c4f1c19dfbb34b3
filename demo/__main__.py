"""Run the demo: `python -m demo`, or `make demo`, which installs first what is missing.

Everything that it starts lives in a network and mount namespace of its own and in temporary folders, so neither the
machine's network, nor its firewall, nor a Docker Engine of its user is touched. It cleans up when it ends, also by
Ctrl-C, and `--clean` (or the next run) removes what a killed run left.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import time
import urllib.request
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

import yaml

from dispatcher.cri import api_pb2 as pb
from tests.lab.child import PartMissingError, require_root
from tests.lab.engine import Engine
from tests.lab.images import BUSYBOX, TestImages
from tests.lab.node import Node
from tests.lab.registry import Registry
from tests.lab.sweep import sweep_stale

HERE = Path(__file__).parent
_INSIDE = "DISPATCHER_DEMO_INSIDE"
_ROUTED = {
    "default/web": ("docker", "default"),
    "kube-system/node-agent": ("docker", "host-access"),
    "default/by-class": ("docker", "handler:docker"),
}
_REFUSED = {
    "tenant-a/shop": "floor",
    "default/wants-gvisor": "gvisor",
    "default/tiny": "unikernel",
    "default/edits-the-node": "no-host-files",
}


class DemoFailedError(Exception):
    """Something did not come out as the demo says it does."""


def main() -> int:
    """Run or clean; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m demo", description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--clean", action="store_true", help="only remove what a killed demo or test run left")
    options = parser.parse_args()
    swept = [] if _INSIDE in os.environ else sweep_stale()
    if options.clean:
        print(f"demo: removed {len(swept)} folders of runs that were killed")
        return 0
    try:
        require_root()
        if _INSIDE not in os.environ:
            _enter_own_host()
        _own_loopback()
        # A shell that starts it in the background leaves SIGINT ignored; here it always means: clean up and end.
        signal.signal(signal.SIGINT, _interrupt)
        signal.signal(signal.SIGTERM, _interrupt)
        signal.signal(signal.SIGHUP, _interrupt)
        with ExitStack() as stack:
            try:
                Demo(stack).run()
            finally:
                for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
                    signal.signal(number, signal.SIG_IGN)  # an impatient second Ctrl-C must not stop the clean-up
    except PartMissingError as exc:
        print(f"demo: {exc}; `make demo` installs what is missing", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\ndemo: interrupted; everything it started is gone again", file=sys.stderr)
        return 130
    except DemoFailedError as exc:
        print(f"\ndemo: FAILED: {exc}", file=sys.stderr)
        return 1
    print("\ndemo: done; everything it started is gone again")
    return 0


def _enter_own_host() -> NoReturn:
    """Begin anew in fresh network and mount namespaces."""
    unshare = shutil.which("unshare")
    if unshare is None:
        raise PartMissingError("unshare is not installed")
    os.environ[_INSIDE] = "1"
    argv = [unshare, "--net", "--mount", "--propagation", "private", sys.executable, "-m", "demo", *sys.argv[1:]]
    os.execv(unshare, argv)


def _own_loopback() -> None:
    subprocess.run(["ip", "link", "set", "lo", "up"], check=True)


def _interrupt(_number: int, _frame: FrameType | None) -> None:
    raise KeyboardInterrupt


class Demo:
    """The parts, and the scenes that are played on them."""

    def __init__(self, stack: ExitStack) -> None:
        say("Starting a private Docker Engine, a registry and the endpoint")
        self.engine = Engine()
        stack.callback(self.engine.close)
        self.engine.start()
        self.registry = Registry()
        stack.callback(self.registry.close)
        self.registry.start()
        # Our own images stand in for those of public registries, whose names the node finds by its mirror table.
        TestImages(self.registry).push_shell()
        self.node = Node(
            engine=self.engine, registry=self.registry, policy=yaml.safe_load((HERE / "policy.yaml").read_text())
        )
        stack.callback(self.node.close)
        os.environ["DISPATCHER_PODS_DIR"] = str(self.node.root / "pods")
        self.node.start()
        print(f"engine:   {self.engine.describe()}, socket {self.engine.socket}")
        print(f"registry: {self.registry.url} in place of registry.k8s.io")
        print(f"endpoint: unix://{self.node.socket}")
        print(f"policy:   {HERE.name}/policy.yaml")

    def run(self) -> None:
        """Play all scenes."""
        try:
            self.routes()
            self.refusals()
            self.use()
            self.survive()
            self.by_hand()
            self.leave()
        except (DemoFailedError, KeyError, OSError, subprocess.SubprocessError, TimeoutError):
            print(textwrap.indent(self.node.log_text()[-4000:], "  daemon: "), file=sys.stderr)
            raise

    def routes(self) -> None:
        """Pods of a manifest, each routed by another part of the policy."""
        say("Three pods, and the decision that let each of them in")
        self.dispatcher("play", "-d", str(HERE / "pods.yaml"), quiet=True)
        self.dispatcher("ps")
        print()
        table = [("POD", "RUNTIME", "ISOLATION", "DECIDED BY", "WHY")]
        for pod, (runtime, rule) in _ROUTED.items():
            route = self.explain(pod)
            table.append((pod, route["runtime"], route["isolation"], route["rule"], route["route_reason"]))
            expect(
                (route["runtime"], route["rule"]) == (runtime, rule),
                f"{pod} went to {route['runtime']} by {route['rule']}",
            )
        show(table)

    def refusals(self) -> None:
        """Pods that may not run, and what their users are told."""
        say("Four pods that must not run here")
        with (HERE / "refused.yaml").open() as stream:
            manifests = list(yaml.safe_load_all(stream))
        for manifest in manifests:
            metadata = manifest["metadata"]
            pod = f"{metadata.get('namespace', 'default')}/{metadata['name']}"
            done = self.node.command("play", "-d", "-q", "-", stdin=yaml.safe_dump(manifest))
            print(f"{pod}: {(done.stderr or done.stdout).strip()}")
            expect(done.returncode != 0, f"{pod} was let in")
            expect(_REFUSED[pod] in done.stderr, f"{pod} was refused without the word {_REFUSED[pod]!r}")
        left = {row["name"] for row in self.pods()}
        expect(left == {pod.split("/")[1] for pod in _ROUTED}, f"refused pods left something: {sorted(left)}")

    def use(self) -> None:
        """The network, the volumes, exec and logs of a running pod."""
        say("The pod 'web': its network, its volumes, exec and logs")
        address = self.address("default/web")
        page = fetch(f"http://{address}/")
        print(f"http://{address}/ -> {page.strip()}")
        expect("ConfigMap" in page, "the page is another one")
        self.dispatcher("exec", "-c", "server", "web", "cat", "/prepared/note")
        wait_until(lambda: "line 3" in self.logs("counter"), "the counter does not count")
        self.dispatcher("logs", "--tail", "3", "-c", "counter", "web")

    def survive(self) -> None:
        """A daemon that is killed costs nothing: same processes, same addresses, no line of output lost."""
        say("kill -9 for the daemon, while the pods run")
        before = (self.address("default/web"), self.started())
        self.node.kill()
        print("the daemon is dead; the web server answers all the same:", end=" ")
        print(fetch(f"http://{before[0]}/").strip())
        time.sleep(1)  # long enough for the counter to write lines that nobody reads
        self.node.start()
        expect((self.address("default/web"), self.started()) == before, "an address or a start time has changed")
        seen = [line for line in self.logs("counter").splitlines() if line]
        wait_until(lambda: len(self.logs("counter").splitlines()) > len(seen) + 3, "the counter does not count")
        lines = [line for line in self.logs("counter").splitlines() if line]
        expected = [f"line {number}" for number in range(1, len(lines) + 1)]
        expect(lines == expected, "lines are lost, doubled or out of order")
        print(f"the daemon is back: same address {before[0]}, same start times, and {len(lines)} lines of output,")
        print("each exactly once and in order, those included that were written while it was dead")

    def by_hand(self) -> None:
        """`dispatcher run`, as with Docker."""
        say("One container by hand")
        self.dispatcher("run", "--quiet", BUSYBOX, "echo", "hello from a pod")
        done = self.node.command("run", "--quiet", BUSYBOX, "sh", "-c", "exit 7")
        print(f"... sh -c 'exit 7' -> exit code {done.returncode}")
        expect(done.returncode == 7, "the exit code was lost")

    def leave(self) -> None:
        """Everything is removed, and the engine holds nothing more."""
        say("Removing the pods")
        self.dispatcher("rm", "--force", "--all", "--time", "1", quiet=True)
        expect(self.pods() == [], "pods are left")
        expect(self.engine.containers() == [], "containers are left in the engine")
        print("no pod, no container, no network namespace is left")

    # ------------------------------------------------------------------------------------------------------- commands

    def dispatcher(self, *arguments: str, quiet: bool = False) -> str:
        """Run and show a command of ours; it has to succeed."""
        shown = " ".join(argument.removeprefix(f"{HERE.parent}/") for argument in arguments)
        print(f"$ dispatcher {shown}")
        done = self.node.command(*arguments)
        if not quiet or done.returncode:
            print(textwrap.indent((done.stdout + done.stderr).rstrip(), "  "))
        expect(done.returncode == 0, f"`dispatcher {shown}` ended with {done.returncode}")
        return done.stdout

    def read(self, *arguments: str) -> Any:
        """Run a command for its JSON."""
        done = self.node.command(*arguments, "-o", "json")
        expect(done.returncode == 0, f"`dispatcher {' '.join(arguments)}`: {done.stderr}")
        return json.loads(done.stdout)

    def pods(self) -> list[dict[str, Any]]:
        """What `ps` lists."""
        rows: list[dict[str, Any]] = self.read("ps")
        return rows

    def explain(self, pod: str) -> dict[str, Any]:
        """The stored decision on a pod, and its facts."""
        facts: dict[str, Any] = self.read("explain", pod)
        return facts

    def address(self, pod: str) -> str:
        """The pod's address, as the kubelet sees it."""
        pod_id = self.explain(pod)["id"]
        with self.node.client() as client:
            return str(
                client.rpc("PodSandboxStatus", pb.PodSandboxStatusRequest(pod_sandbox_id=pod_id)).status.network.ip
            )

    def started(self) -> dict[str, int]:
        """When each container was started."""
        with self.node.client() as client:
            ids = [container.id for container in client.containers()]
            requests = {one: pb.ContainerStatusRequest(container_id=one) for one in ids}
            return {one: client.rpc("ContainerStatus", request).status.started_at for one, request in requests.items()}

    def logs(self, container: str) -> str:
        """The whole log of a container of 'web'."""
        return self.node.command("logs", "-c", container, "web").stdout


def say(title: str) -> None:
    """Print the heading of a scene."""
    print(f"\n== {title}", flush=True)


def show(table: Sequence[tuple[str, ...]]) -> None:
    """Print rows in columns; the last one is as long as it is."""
    widths = [max(len(row[column]) for row in table) for column in range(len(table[0]) - 1)]
    for row in table:
        print("  ".join([*(cell.ljust(width) for cell, width in zip(row, widths, strict=False)), row[-1]]))


def expect(claim: bool, otherwise: str) -> None:
    """Stop the demo when something that it claims is not so."""
    if not claim:
        raise DemoFailedError(otherwise)


def wait_until(claim: Callable[[], bool], otherwise: str, *, timeout_s: float = 20) -> None:
    """Wait for something that other processes do."""
    deadline = time.monotonic() + timeout_s
    while not claim():
        expect(time.monotonic() < deadline, otherwise)
        time.sleep(0.1)


def fetch(url: str) -> str:
    """Get a page; a server that has just been started gets some time."""
    deadline = time.monotonic() + 10
    while True:
        try:
            with urllib.request.urlopen(url, timeout=5) as reply:
                text: str = reply.read().decode()
                return text
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.1)


if __name__ == "__main__":
    sys.exit(main())
