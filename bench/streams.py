"""Measures exec and port-forward over SPDY, as a kubelet uses them, on our daemon beside containerd.

Both are private, on one machine and in one run, with the same client and the same containers; rounds alternate. The client
is Python and takes its share of the time on both sides, so real ratios are a little further from 1 than what is printed.
Needs what `lab.py` needs. `python bench/streams.py --help`.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench import cri
from bench.lab import lab
from dispatcher.cri import api_pb2 as pb
from tests.lab.child import PartMissingError, wait_until
from tests.lab.images import BUSYBOX
from tests.lab.streams import Forwarding, RemoteCommand, SpdySession

MIB = 1 << 20
BLOCK = b"x" * 32768  # what a Go client writes at a time
WAIT_S = 120.0
SEND_PORT, TAKE_PORT, ECHO_PORT = 7001, 7002, 7003


@dataclass(frozen=True, slots=True)
class Scene:
    """A pod on one socket with a container that sleeps and three that listen."""

    socket: cri.Socket
    pod_id: str
    container_id: str
    mib: int

    def exec(self, *command: str, stdin: bool = False) -> RemoteCommand:
        """Begin an exec."""
        reply = self.socket.client.call(
            "Exec", container_id=self.container_id, cmd=list(command), stdin=stdin, stdout=True, stderr=True
        )
        return RemoteCommand(reply.url, stdin=stdin, timeout_s=WAIT_S)

    def forward(self) -> Forwarding:
        """Begin a port-forward session."""
        return Forwarding(self.socket.client.call("PortForward", pod_sandbox_id=self.pod_id).url)


@contextlib.contextmanager
def scene(socket: cri.Socket, mib: int) -> Iterator[Scene]:
    """Make the pod, wait until its ports listen, remove it."""
    socket.prepare_image(BUSYBOX)
    config = socket.pod_config(host_network=False)
    pod_id = socket.run_pod(config)
    try:
        container_id = socket.create_container(pod_id, config, "main")
        socket.client.call("StartContainer", container_id=container_id)
        count = mib * MIB
        servers = {
            SEND_PORT: f"dd if=/dev/zero bs=65536 count={count // 65536} 2>/dev/null",
            TAKE_PORT: f"head -c {count} >/dev/null; echo taken",
            ECHO_PORT: "cat",
        }
        for port, script in servers.items():
            start_server(socket, pod_id, config, port, script)
        made = Scene(socket, pod_id, container_id, mib)
        wait_until(lambda: listens(made), timeout_s=30, what=f"{socket.name}: the servers do not listen")
        yield made
    finally:
        socket.remove_pod(pod_id)


def start_server(socket: cri.Socket, pod_id: str, config: pb.PodSandboxConfig, port: int, script: str) -> None:
    """Start a container that runs a script for each connection to a port."""
    container = pb.ContainerConfig(
        metadata=pb.ContainerMetadata(name=f"port-{port}"),
        image=pb.ImageSpec(image=socket.image_id),
        command=["nc", "-ll", "-p", str(port), "-e", "sh", "-c", script],
        linux=pb.LinuxContainerConfig(),
    )
    reply = socket.client.call("CreateContainer", pod_sandbox_id=pod_id, config=container, sandbox_config=config)
    socket.client.call("StartContainer", container_id=reply.container_id)


def listens(made: Scene) -> bool:
    """Whether all three ports of the pod are open."""
    reply = made.socket.client.call("ExecSync", container_id=made.container_id, cmd=["netstat", "-ltn"], timeout=10)
    return all(f":{port} ".encode() in reply.stdout for port in (SEND_PORT, TAKE_PORT, ECHO_PORT))


# ---------------------------------------------------------------------------------------------------------------- work
def exec_round_trip(made: Scene) -> None:
    """From the Exec call to the status of `true`."""
    with made.exec("true") as command:
        expect(command.result()["status"] == "Success", "exec failed")


def exec_output(made: Scene) -> None:
    """Output of a command."""
    with made.exec("dd", "if=/dev/zero", "bs=65536", f"count={made.mib * MIB // 65536}") as command:
        expect(len(command.read_all(command.stdout)) == made.mib * MIB, "output is missing")
        expect(command.result()["status"] == "Success", "exec failed")


def exec_input(made: Scene) -> None:
    """Input of a command, until it has counted all."""
    with made.exec("wc", "-c", stdin=True) as command:
        send(command, command.stdin, made.mib, fin=True)
        expect(int(command.read_all(command.stdout)) == made.mib * MIB, "input is missing")


def forward_output(made: Scene) -> None:
    """What a port of the pod sends."""
    with made.forward() as session:
        data, _error = session.connect(SEND_PORT)
        expect(len(session.read_all(data)) == made.mib * MIB, "forwarded output is missing")


def forward_input(made: Scene) -> None:
    """What a client sends to a port of the pod, until the pod says that it has all."""
    with made.forward() as session:
        data, _error = session.connect(TAKE_PORT)
        send(session, data, made.mib, fin=False)
        session.read_until(data, b"taken")


def forward_round_trip(made: Scene) -> None:
    """From the PortForward call to the echo of one line."""
    with made.forward() as session:
        data, _error = session.connect(ECHO_PORT)
        session.send(data, b"hello\n")
        session.read_until(data, b"hello\n")


def send(session: SpdySession, stream: int, mib: int, *, fin: bool) -> None:
    """Send so much in blocks."""
    for _ in range(mib * MIB // len(BLOCK)):
        session.send(stream, BLOCK)
    if fin:
        session.send(stream, b"", fin=True)


def expect(claim: bool, what: str) -> None:
    """End the run when the work that is timed was not done."""
    if not claim:
        raise SystemExit(f"bench: {what}")


# ----------------------------------------------------------------------------------------------------------------- run
def run(sockets: Sequence[cri.Socket], *, rounds: int, trips: int, mib: int, say: Callable[[str], None]) -> cri.Results:
    """Measure everything on all sockets, in turn."""
    results = cri.Results()
    with contextlib.ExitStack() as stack:
        scenes = []
        for socket in sockets:
            results.note("version", socket.name, socket.version())
            scenes.append(stack.enter_context(scene(socket, mib)))
        plan: list[tuple[str, Callable[[Scene], None], int]] = [
            ("exec round trip", exec_round_trip, trips),
            ("port-forward round trip", forward_round_trip, trips),
            (f"exec stdout {mib} MiB", exec_output, rounds),
            (f"exec stdin {mib} MiB", exec_input, rounds),
            (f"port-forward from pod {mib} MiB", forward_output, rounds),
            (f"port-forward to pod {mib} MiB", forward_input, rounds),
        ]
        for name, work, count in plan:
            say(f"{name}, {count} rounds")
            for made in scenes:
                work(made)  # once for nothing
            for _ in range(count):
                for made in scenes:
                    before, began = cri.cpu_seconds(made.socket.pid), time.monotonic()
                    work(made)
                    results.add(name, made.socket.name, [(time.monotonic() - began) * 1000])
                    if name.endswith("MiB"):  # the kernel counts in steps of 10 ms
                        used = cri.cpu_seconds(made.socket.pid) - before
                        results.add(f"  of it CPU: {name}", made.socket.name, [used * 1000])
    for name, by_socket in list(results.samples.items()):
        if name.endswith("MiB") and not name.startswith(" "):
            for who, times in by_socket.items():
                results.note(f"{name}, MiB/s", who, round(mib / statistics.median(times) * 1000))
    return results


def main() -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(description="Measure exec and port-forward on our daemon beside containerd.")
    parser.add_argument("--quick", action="store_true", help="few rounds: a look, not a figure")
    parser.add_argument("--no-peer", action="store_true", help="without containerd")
    parser.add_argument("--rounds", type=int, default=10, help="transfers of each kind per socket (default: 10)")
    parser.add_argument("--trips", type=int, default=50, help="round trips of each kind per socket (default: 50)")
    parser.add_argument("--mib", type=int, default=64, help="size of a transfer (default: 64)")
    parser.add_argument("-o", "--output", choices=("text", "json"), default="text")
    args = parser.parse_args()
    if not (0 < args.rounds <= 1000 and 0 < args.trips <= 1000 and 0 < args.mib <= 1024):
        raise SystemExit("--rounds and --trips stay within 1000, --mib within 1024")
    try:
        with lab(with_peer=not args.no_peer) as sockets:
            results = run(
                sockets,
                rounds=2 if args.quick else args.rounds,
                trips=5 if args.quick else args.trips,
                mib=args.mib,
                say=lambda text: print(f"bench: {text}", file=sys.stderr, flush=True),
            )
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
