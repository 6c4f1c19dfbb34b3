"""Measures CRI sockets with the same work, and prints ratios. Run `python bench/cri.py --help`; see README.md beside it.

Theory of operation. A `Socket` is one endpoint under test. Each measurement is a function from a socket to samples in
milliseconds; rounds go over all sockets in turn (A B A B ...), so that whatever else the machine does meets all of them
alike. Medians are compared, never single values. For RPCs that are answered from memory, a third server takes part: one
that does nothing but return the bytes that the first socket answered (`floor.py`), which is the least that a Python
gRPC server can cost.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import re
import shlex
import signal
import socket
import statistics
import struct
import subprocess
import sys
import tempfile
import time
import urllib.request
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from dispatcher.cri import api_pb2 as pb
from dispatcher.cri.client import BlockingCriClient, CallFailed

Samples = list[float]
LABEL = "dispatcher-bench"
NAMESPACE = "bench"


# ------------------------------------------------------------------------------------------------------------- sockets
class Socket:
    """One endpoint under test, with the pods that were made on it."""

    def __init__(self, name: str, address: str, *, start: str = "", metrics: str = "", handler: str = "") -> None:
        self.name = name
        self.address = address
        self.start_command = start
        self.metrics = metrics
        self.handler = handler
        self.client = BlockingCriClient(address, timeout_s=300)
        self.population: list[str] = []
        self.population_containers: list[str] = []
        self.image_id = ""

    @property
    def pid(self) -> int:
        """The pid of the process that listens on the socket."""
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
            probe.settimeout(10)
            probe.connect(self.client.endpoint.path)
            credentials = probe.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
        return int(struct.unpack("3i", credentials)[0])

    def version(self) -> str:
        """Name and version of what answers."""
        reply = self.client.call("Version")
        return f"{reply.runtime_name} {reply.runtime_version}"

    def prepare_image(self, image: str) -> None:
        """Have the image, as a kubelet would."""
        spec = {"image": image}
        found = self.client.call("ImageStatus", image=spec).image
        if not found.id:
            self.client.call("PullImage", timeout_s=0, image=spec)
            found = self.client.call("ImageStatus", image=spec).image
        self.image_id = found.id

    def pod_config(self, *, host_network: bool) -> pb.PodSandboxConfig:
        """A fresh pod."""
        uid = str(uuid.uuid4())
        config = pb.PodSandboxConfig(
            metadata=pb.PodSandboxMetadata(name=f"bench-{uid[:8]}", namespace=NAMESPACE, uid=uid),
            labels={LABEL: str(os.getpid()), "io.kubernetes.pod.uid": uid},
            linux=pb.LinuxPodSandboxConfig(),
        )
        options = config.linux.security_context.namespace_options
        options.pid = pb.CONTAINER
        options.network = pb.NODE if host_network else pb.POD
        if not host_network:
            config.hostname = config.metadata.name
        return config

    def run_pod(self, config: pb.PodSandboxConfig) -> str:
        """RunPodSandbox."""
        return str(self.client.call("RunPodSandbox", config=config, runtime_handler=self.handler).pod_sandbox_id)

    def create_container(self, pod_id: str, config: pb.PodSandboxConfig, name: str) -> str:
        """CreateContainer, with a process that sleeps."""
        container = pb.ContainerConfig(
            metadata=pb.ContainerMetadata(name=name),
            image=pb.ImageSpec(image=self.image_id),
            command=["sleep", "100000"],
            labels={LABEL: str(os.getpid()), "io.kubernetes.pod.uid": config.metadata.uid},
            linux=pb.LinuxContainerConfig(),
        )
        reply = self.client.call("CreateContainer", pod_sandbox_id=pod_id, config=container, sandbox_config=config)
        return str(reply.container_id)

    def remove_pod(self, pod_id: str) -> None:
        """Stop and remove."""
        self.client.call("StopPodSandbox", pod_sandbox_id=pod_id)
        self.client.call("RemovePodSandbox", pod_sandbox_id=pod_id)

    def populate(self, count: int, with_container: int, say: Callable[[str], None]) -> None:
        """Have `count` pods on the node's network, the first ones with a running container each."""
        while len(self.population) < count:
            config = self.pod_config(host_network=True)
            pod_id = self.run_pod(config)
            self.population.append(pod_id)
            if len(self.population) <= with_container:
                container_id = self.create_container(pod_id, config, "main")
                self.client.call("StartContainer", container_id=container_id)
                self.population_containers.append(container_id)
            if len(self.population) % 50 == 0:
                say(f"{self.name}: {len(self.population)} pods")

    def clean(self) -> None:
        """Remove every pod of this run, as far as the daemon answers."""
        with contextlib.suppress(CallFailed):
            listed = self.client.call("ListPodSandbox", filter={"label_selector": {LABEL: str(os.getpid())}})
            for pod in listed.items:
                with contextlib.suppress(CallFailed):
                    self.remove_pod(pod.id)
        self.population, self.population_containers = [], []

    def wait_until_served(self, timeout_s: float) -> float:
        """Wait until Version is answered; returns the seconds that it took."""
        began = time.monotonic()
        while True:
            try:
                self.client.call("Version", timeout_s=1)
                return time.monotonic() - began
            except CallFailed:
                if time.monotonic() - began > timeout_s:
                    raise
                time.sleep(0.01)


def timed(action: Callable[..., Any], *args: Any) -> float:
    """Return how long an action takes, in milliseconds."""
    began = time.perf_counter()
    action(*args)
    return (time.perf_counter() - began) * 1000


# -------------------------------------------------------------------------------------------------------- measurements
@dataclass(slots=True)
class Results:
    """All samples by measurement and socket, and facts that are no samples."""

    samples: dict[str, dict[str, Samples]] = field(default_factory=dict)
    facts: dict[str, dict[str, Any]] = field(default_factory=dict)

    def add(self, name: str, who: str, values: Sequence[float]) -> None:
        """Keep samples."""
        self.samples.setdefault(name, {}).setdefault(who, []).extend(values)

    def note(self, name: str, who: str, value: Any) -> None:
        """Keep a fact."""
        self.facts.setdefault(name, {})[who] = value


def cycle(target: Socket, results: Results) -> None:
    """The life of one pod on the pod network with one container: each step is a sample."""
    who = target.name
    config = target.pod_config(host_network=False)
    pod_id = ""

    def run() -> None:
        nonlocal pod_id
        pod_id = target.run_pod(config)

    before = scrape(target.metrics) if target.metrics else {}
    results.add("RunPodSandbox", who, [timed(run)])
    parts = own_share(before, scrape(target.metrics)) if target.metrics else None
    for part, value in (parts or {}).items():
        results.add(f"  {part}", who, [value])
    try:
        container_id = ""

        def create() -> None:
            nonlocal container_id
            container_id = target.create_container(pod_id, config, "main")

        call = target.client.call
        results.add("CreateContainer", who, [timed(create)])
        results.add("StartContainer", who, [timed(lambda: call("StartContainer", container_id=container_id))])
        exec_sync: dict[str, Any] = {"container_id": container_id, "cmd": ["true"], "timeout": 10}
        results.add("ExecSync", who, [timed(lambda: call("ExecSync", **exec_sync)) for _ in range(3)])
        results.add("StopContainer", who, [timed(lambda: call("StopContainer", container_id=container_id, timeout=0))])
        results.add("RemoveContainer", who, [timed(lambda: call("RemoveContainer", container_id=container_id))])
        results.add("StopPodSandbox", who, [timed(lambda: call("StopPodSandbox", pod_sandbox_id=pod_id))])
    finally:
        target.client.call("StopPodSandbox", pod_sandbox_id=pod_id)
        results.add(
            "RemovePodSandbox", who, [timed(lambda: target.client.call("RemovePodSandbox", pod_sandbox_id=pod_id))]
        )


def repeat_bytes(client: BlockingCriClient, rpc: str, request: bytes, times: int) -> Samples:
    """Call one RPC again and again without decoding its answer."""
    return [timed(client.call_bytes, rpc, request) for _ in range(times)]


def pleg_tick(client: BlockingCriClient) -> None:
    """What a kubelet asks every second when nothing happens."""
    client.call_bytes("ListPodSandbox")
    client.call_bytes("ListContainers")


def relist_requests(target: Socket) -> list[tuple[str, bytes]]:
    """What a kubelet asks when every pod has changed: both lists, then the status of each pod and container."""
    requests = [("ListPodSandbox", b""), ("ListContainers", b"")]
    for pod_id in target.population[: len(target.population_containers)]:
        requests.append(("PodSandboxStatus", pb.PodSandboxStatusRequest(pod_sandbox_id=pod_id).SerializeToString()))
    for container_id in target.population_containers:
        requests.append(("ContainerStatus", pb.ContainerStatusRequest(container_id=container_id).SerializeToString()))
    return requests


def ask_all(client: BlockingCriClient, requests: Sequence[tuple[str, bytes]]) -> None:
    """Make calls one after the other."""
    for rpc, request in requests:
        client.call_bytes(rpc, request)


def check_freshness(target: Socket, results: Results, times: int) -> None:
    """A change must be visible in the next list after its RPC returned. Counts the times that it was not."""
    stale = 0
    for _ in range(times):
        pod_id = target.run_pod(target.pod_config(host_network=True))
        ids = {pod.id for pod in target.client.call("ListPodSandbox").items}
        stale += pod_id not in ids
        target.remove_pod(pod_id)
        stale += pod_id in {pod.id for pod in target.client.call("ListPodSandbox").items}
    results.note(f"stale lists (of {2 * times})", target.name, stale)


@contextlib.contextmanager
def floor_of(target: Socket, requests: Sequence[tuple[str, bytes]]) -> Iterator[BlockingCriClient]:
    """Start a server that returns what `target` answers to these requests, from a table."""
    with tempfile.TemporaryDirectory(prefix="bench-floor-") as folder:
        answers = [
            [rpc, request.hex(), target.client.call_bytes(rpc, request).hex()]
            for rpc, request in dict.fromkeys([*requests, ("Version", b"")])
        ]
        table = Path(folder, "answers.json")
        table.write_text(json.dumps(answers), encoding="utf-8")
        path = Path(folder, "floor.sock")
        script = Path(__file__).with_name("floor.py")
        child = subprocess.Popen([sys.executable, str(script), str(path), str(table)])
        try:
            client = BlockingCriClient(str(path), timeout_s=30)
            deadline = time.monotonic() + 20
            while True:
                try:
                    client.call_bytes("Version")
                    break
                except CallFailed:
                    if time.monotonic() > deadline:
                        raise
                    time.sleep(0.05)
            with client:
                yield client
        finally:
            child.terminate()
            child.wait(10)


# -------------------------------------------------------------------------------------------------------------- memory
def memory_of(pid: int) -> dict[str, Any]:
    """Return resident and proportional memory of a process in MiB."""
    text = Path(f"/proc/{pid}/smaps_rollup").read_text(encoding="ascii")
    values = {
        key: int(value) / 1024 for key, value in re.findall(r"^(Rss|Pss|Private_Dirty):\s+(\d+) kB", text, re.MULTILINE)
    }
    return {"rss_mib": round(values["Rss"], 1), "pss_mib": round(values["Pss"], 1)}


def shims_memory(path: str) -> float:
    """Return the proportional memory in MiB of the shims of the containerd at `path`: what it pays per pod."""
    total = 0.0
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError, KeyError):
            if not entry.name.isdigit() or not (entry / "comm").read_text().startswith("containerd-shim"):
                continue
            if path.encode() in (entry / "cmdline").read_bytes().split(b"\0"):
                total += memory_of(int(entry.name))["pss_mib"]
    return round(total, 1)


def cpu_seconds(pid: int) -> float:
    """Return the CPU time that a process has used."""
    fields = Path(f"/proc/{pid}/stat").read_text(encoding="ascii").rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


# ----------------------------------------------------------------------------------------------------------- own share
def scrape(url: str) -> dict[str, float]:
    """Return all samples of a metrics endpoint by name with labels."""
    with urllib.request.urlopen(f"{url}/metrics", timeout=10) as reply:
        text = reply.read().decode()
    found = re.findall(r"^([a-z_]+(?:\{[^}]*\})?) ([0-9.eE+-]+)$", text, re.MULTILINE)
    return {name: float(value) for name, value in found}


def own_share(before: dict[str, float], after: dict[str, float]) -> dict[str, float] | None:
    """Return what RunPodSandbox cost between two scrapes, per call in ms: its parts in runtime and network, and the rest,
    which is our own share.
    """
    rpc = 'dispatcher_rpc_duration_seconds_%s{rpc="RunPodSandbox"}'

    def delta(name: str) -> float:
        return after.get(name, 0.0) - before.get(name, 0.0)

    calls = delta(rpc % "count")
    if not calls:
        return None
    parts = {}
    prefix = "dispatcher_provider_call_duration_seconds_sum"
    for name in after:
        match = re.match(prefix + r'\{kind="(\w+)",method="(\w+)",provider="([^"]*)"\}', name)
        wanted = {("runtime", "create_pod"), ("runtime", "prepare_pod"), ("network", "add")}
        if match and (match[1], match[2]) in wanted:
            parts[f"{match[3]}.{match[2]}"] = delta(name) / calls * 1000
    own = delta(rpc % "sum") / calls * 1000 - sum(parts.values())
    return {f"of it {name}": value for name, value in parts.items()} | {"of it our own": own}


# ------------------------------------------------------------------------------------------------------------ recovery
def measure_recovery(target: Socket, results: Results) -> None:
    """Kill the daemon with SIGKILL, start it again, and time it until a full list is served."""
    expected = set(target.population)
    pid = target.pid
    os.kill(pid, signal.SIGKILL)
    with contextlib.suppress(ChildProcessError):
        os.waitpid(pid, 0)
    while Path(f"/proc/{pid}").exists() and "Z" not in _state_of(pid):
        time.sleep(0.005)
    began = time.monotonic()
    child = subprocess.Popen(
        shlex.split(target.start_command), start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    RESTARTED.append(child)
    target.wait_until_served(120)
    while not expected <= {pod.id for pod in target.client.call("ListPodSandbox").items}:
        if time.monotonic() - began > 120:
            raise SystemExit(f"{target.name} lost pods over the restart")
        time.sleep(0.01)
    results.add(f"recovery after kill -9 ({len(expected)})", target.name, [(time.monotonic() - began) * 1000])
    # On a busy machine this says more than the time on the clock.
    results.add(f"  of it CPU of the daemon ({len(expected)})", target.name, [cpu_seconds(target.pid) * 1000])


def _state_of(pid: int) -> str:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text(encoding="ascii").rpartition(")")[2].split()[0]
    return "Z"


RESTARTED: list[subprocess.Popen[bytes]] = []


# ----------------------------------------------------------------------------------------------------------------- run
@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """How much to measure."""

    rounds: int
    calls: int
    relists: int
    pods: tuple[int, ...]
    with_container: int
    recoveries: int


def run(targets: Sequence[Socket], plan: Plan, image: str, say: Callable[[str], None]) -> Results:
    """Measure everything on all sockets, in turn."""
    results = Results()
    for target in targets:
        results.note("version", target.name, target.version())
        target.prepare_image(image)
        cycle(target, Results())  # once for nothing: first uses make caches, worker processes, bridges

    say(f"life of a pod, {plan.rounds} rounds")
    for _ in range(plan.rounds):
        for target in targets:
            cycle(target, results)
    for target in targets:
        check_freshness(target, results, 5)

    for count in plan.pods:
        for target in targets:
            target.populate(count, plan.with_container, say)
        measure_lists(targets, plan, results, count, say)
        if count == min(plan.pods):
            measure_stats(targets, plan, results, say)
        for target in targets:
            measure_footprint(target, results)
            if target.start_command:
                say(f"{target.name}: kill -9 with {count} pods")
                for _ in range(plan.recoveries):
                    measure_recovery(target, results)
    return results


def measure_lists(
    targets: Sequence[Socket], plan: Plan, results: Results, count: int, say: Callable[[str], None]
) -> None:
    """What is answered from memory, with `count` pods, against each other and against the floor."""
    say(f"lists with {count} pods")
    requests = {target.name: relist_requests(target) for target in targets}
    with floor_of(targets[0], requests[targets[0].name]) as floor:
        clients = [(target.name, target.client, requests[target.name]) for target in targets]
        clients.append(("floor", floor, requests[targets[0].name]))
        per_round = max(1, plan.calls // plan.relists)
        for _ in range(plan.relists):
            for name, client, asked in clients:
                if count == min(plan.pods):
                    results.add("Version", name, repeat_bytes(client, "Version", b"", per_round))
                    results.add(f"idle PLEG tick ({count})", name, [timed(pleg_tick, client)])
                    results.add(f"full relist ({len(asked) // 2 - 1})", name, [timed(ask_all, client, asked)])
                results.add(f"ListPodSandbox({count})", name, repeat_bytes(client, "ListPodSandbox", b"", per_round))


STATS = ("ListContainerStats", "ListPodSandboxStats", "ListPodSandboxMetrics")


def measure_stats(targets: Sequence[Socket], plan: Plan, results: Results, say: Callable[[str], None]) -> None:
    """What pods and containers use, read anew for every answer; an RPC that an endpoint lacks is left out there."""
    say("stats")
    for _ in range(plan.relists):
        for rpc in STATS:
            for target in targets:
                name = f"{rpc}({len(target.population_containers)})"
                with contextlib.suppress(CallFailed):
                    results.add(name, target.name, [timed(target.client.call_bytes, rpc)])


def measure_footprint(target: Socket, results: Results) -> None:
    """Memory, and CPU under a kubelet's idle questions, with all pods there."""
    pid = target.pid
    memory: dict[str, Any] = memory_of(pid)
    if "containerd" in target.version():
        memory["shims_pss_mib"] = shims_memory(target.client.endpoint.path)
    results.note(f"memory with {len(target.population)} pods", target.name, memory)
    before, began = cpu_seconds(pid), time.monotonic()
    for _ in range(5):
        pleg_tick(target.client)
        time.sleep(1)
    percent = (cpu_seconds(pid) - before) / (time.monotonic() - began) * 100
    results.note(f"CPU at rest with {len(target.population)} pods (% of a core)", target.name, round(percent, 2))


# -------------------------------------------------------------------------------------------------------------- report
def summary(results: Results, names: Sequence[str]) -> dict[str, Any]:
    """Return medians, 95th percentiles and ratios of the first socket to each other one."""
    rows = {}
    for name, by_socket in results.samples.items():
        row: dict[str, Any] = {}
        for who, values in by_socket.items():
            ordered = sorted(values)
            p95 = ordered[min(len(ordered) - 1, int(len(ordered) * 0.95))]
            row[who] = {"p50": round(statistics.median(values), 3), "p95": round(p95, 3), "n": len(values)}
        first = row.get(names[0])
        row["ratio"] = {
            who: round(first["p50"] / entry["p50"], 2)
            for who, entry in row.items()
            if first and who != names[0] and entry["p50"] > 0
        }
        rows[name] = row
    return {"measurements": rows, "facts": results.facts, "machine": machine()}


def machine() -> dict[str, Any]:
    """What it ran on."""
    return {"cpus": os.cpu_count(), "kernel": platform.release(), "python": platform.python_version()}


def show(report: dict[str, Any], names: Sequence[str]) -> None:
    """Print the report as text."""
    columns = [*names, "floor"]
    print(f"{'p50 in ms':<30}" + "".join(f"{name:>14}" for name in columns) + f"{'n':>7}   {names[0]} / other")
    for name, row in report["measurements"].items():
        cells = "".join(f"{row[who]['p50']:>14.3f}" if who in row else f"{'-':>14}" for who in columns)
        ratios = ", ".join(f"{who} {value}" for who, value in row["ratio"].items())
        print(f"{name:<30}{cells}{row[names[0]]['n']:>7}   {ratios}")
    for name, by_socket in report["facts"].items():
        print(f"{name}:")
        for who, value in by_socket.items():
            print(f"  {who}: {value}")


def build_parser() -> argparse.ArgumentParser:
    """Return the parser."""
    parser = argparse.ArgumentParser(description="Measure CRI sockets with the same work.")
    parser.add_argument("--ours", metavar="SOCKET", required=True, help="the socket that ratios are about")
    parser.add_argument("--peer", metavar="SOCKET", help="another CRI socket to compare with")
    parser.add_argument("--ours-name", default="dispatcher")
    parser.add_argument("--peer-name", default="peer")
    parser.add_argument("--handler", default="", help="runtime handler of the pods on --ours")
    parser.add_argument("--metrics", metavar="URL", default="", help="of --ours, such as http://127.0.0.1:9477")
    parser.add_argument("--ours-start", metavar="COMMAND", default="", help="starts --ours again; measures kill -9")
    parser.add_argument("--peer-start", metavar="COMMAND", default="", help="likewise for --peer")
    parser.add_argument("--image", default="registry.k8s.io/e2e-test-images/busybox:1.29-2", help="has `sleep`, `true`")
    parser.add_argument("--rounds", type=int, default=20, help="lives of a pod per socket")
    parser.add_argument("--calls", type=int, default=200, help="calls of each RPC that is answered from memory")
    parser.add_argument("--relists", type=int, default=20, help="full relists")
    parser.add_argument("--pods", default="100,500", help="population sizes, rising (default: 100,500); empty for none")
    parser.add_argument("--recoveries", type=int, default=3, help="kills, where --ours-start is given")
    parser.add_argument("-o", "--output", choices=("text", "json"), default="text")
    return parser


def main() -> int:
    """Run the command line."""
    args = build_parser().parse_args()
    pods = tuple(int(part) for part in args.pods.split(",") if part)
    if list(pods) != sorted(pods) or any(not 0 < count <= 1000 for count in pods) or not 0 < args.rounds <= 1000:
        raise SystemExit("--pods rises and stays within 1000, --rounds as well")
    targets = [Socket(args.ours_name, args.ours, start=args.ours_start, metrics=args.metrics, handler=args.handler)]
    if args.peer:
        targets.append(Socket(args.peer_name, args.peer, start=args.peer_start))
    plan = Plan(
        rounds=args.rounds,
        calls=args.calls,
        relists=args.relists,
        pods=pods,
        with_container=min(pods, default=0),
        recoveries=args.recoveries,
    )

    def say(text: str) -> None:
        print(f"bench: {text}", file=sys.stderr, flush=True)

    try:
        names = [target.name for target in targets]
        report = summary(run(targets, plan, args.image, say), names)
        if args.output == "json":
            print(json.dumps(report, indent=2), flush=True)
        else:
            show(report, names)
    finally:
        say("cleaning up")
        for target in targets:
            target.clean()
    return 0


if __name__ == "__main__":
    sys.exit(main())
