"""Measures what hostile clients of the streaming port cost the daemon, and whether others stay served meanwhile.

For each kind of client: the daemon's resident memory before, at its peak and some seconds after; and how long a plain
exec of another container took meanwhile (median, worst, how many failed). Runs a node of its own (root, Debian's docker.io
and containernetworking-plugins) and takes it away again. `python bench/hostile_streams.py --help`.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import socket
import statistics
import struct
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

import grpc

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench.lab import compile_sources
from dispatcher.cri import api_pb2 as pb
from dispatcher_streaming.spdy.frames import FIN, FrameType, control
from dispatcher_streaming.spdy.headers import HeaderCompressor
from tests.lab.child import PartMissingError
from tests.lab.client import ContainerHandle, CriClient
from tests.lab.engine import Engine
from tests.lab.images import TestImages
from tests.lab.node import Node
from tests.lab.registry import Registry
from tests.lab.streams import Forwarding, RemoteCommand

BLOCK = b"x" * 32768
SETTLE_S = 6.0
MIB = 1 << 20


@dataclass(frozen=True, slots=True)
class Scene:
    """The node, a container for the hostile clients, and how many of them there are."""

    client: CriClient
    victim: ContainerHandle
    count: int

    def exec_url(self, *command: str, **flags: bool) -> str:
        """A URL for an exec."""
        request = pb.ExecRequest(container_id=self.victim.id, cmd=command, stdout=True, **flags)
        return str(self.client.rpc("Exec", request).url)

    def forward_url(self) -> str:
        """A URL for a port-forward."""
        return str(self.client.rpc("PortForward", pb.PortForwardRequest(pod_sandbox_id=self.victim.pod.id)).url)

    def dial(self, url: str) -> socket.socket:
        """A bare connection to the streaming port."""
        where = urlsplit(url)
        return socket.create_connection((where.hostname, where.port or 80), timeout=10)


@dataclass(slots=True)
class Measured:
    """What one kind of client cost."""

    name: str
    before_mib: float
    peak_mib: float = 0.0
    after_mib: float = 0.0
    exec_ms: list[float] = field(default_factory=list)
    failed: int = 0


# ------------------------------------------------------------------------------------------------------ kinds of client
def endless_output(scene: Scene) -> None:
    """Commands that write for ever, and nobody who reads."""
    with contextlib.ExitStack() as stack:
        for _ in range(scene.count):
            stack.enter_context(RemoteCommand(scene.exec_url("yes"), stderr=False))
        time.sleep(5)


def unread_input(scene: Scene) -> None:
    """Commands that read nothing, and clients that send as much as is taken."""
    with contextlib.ExitStack() as stack:
        for _ in range(scene.count):
            session = stack.enter_context(
                RemoteCommand(scene.exec_url("sleep", "600", stdin=True), stdin=True, stderr=False)
            )
            session.feed(session.stdin, (BLOCK for _ in range(4096)))
        time.sleep(5)


def resize_flood(scene: Scene) -> None:
    """Terminals whose size changes without end."""
    with contextlib.ExitStack() as stack:
        sessions = [
            stack.enter_context(
                RemoteCommand(scene.exec_url("sleep", "600", stdin=True, tty=True), stdin=True, tty=True, stderr=False)
            )
            for _ in range(scene.count)
        ]
        sizes = b"".join(b'{"Width":%d,"Height":40}' % width for width in range(1, 2001))
        for _ in range(10):
            for session in sessions:
                session.send(session.resize, sizes)
        for session in sessions:
            session.send(session.resize, b"{" * (4 * MIB))


def http_header_bombs(scene: Scene) -> None:
    """Requests whose head does not end."""
    url = scene.exec_url("true")
    for _ in range(scene.count):
        with contextlib.suppress(OSError), scene.dial(url) as peer:
            peer.sendall(b"POST / HTTP/1.1\r\nHost: x\r\nX-Bomb: ")
            for _ in range(1024):
                peer.sendall(BLOCK)


def spdy_header_bombs(scene: Scene) -> None:
    """Header blocks that inflate to 16 MiB, and two thousand streams whose headers inflate to 60 KB each."""
    for number in range(scene.count):
        with contextlib.suppress(OSError), Forwarding(scene.forward_url()) as session:
            compressor = HeaderCompressor()
            for stream in range(1, 4_001, 2):
                headers = {"x": "y" * (16 * MIB if number % 2 and stream > 1000 else 60_000)}
                body = struct.pack(">IIBB", stream, 0, 0, 0) + compressor.compress(headers)
                session.raw(control(FrameType.SYN_STREAM, body, FIN))


def half_open_sockets(scene: Scene) -> None:
    """Connections that never say anything."""
    url = scene.exec_url("true")
    with contextlib.ExitStack() as stack:
        for _ in range(40 * scene.count):
            with contextlib.suppress(OSError):
                stack.enter_context(scene.dial(url))
        time.sleep(3)


def half_open_pairs(scene: Scene) -> None:
    """Port-forward sessions full of connections of which only one stream comes."""
    with contextlib.ExitStack() as stack:
        for _ in range(scene.count):
            session = stack.enter_context(Forwarding(scene.forward_url()))
            for number in range(1200):
                session.raw(session.opening({"streamtype": "error", "port": "80", "requestid": str(number)}))
        time.sleep(3)


def held_pipes(scene: Scene) -> None:
    """Commands that leave a child behind which holds their output. Docker gives each of a container's 2 s, in turn."""
    with contextlib.ExitStack() as stack:
        sessions = [
            stack.enter_context(RemoteCommand(scene.exec_url("sh", "-c", "sleep 86400 &"), stderr=False, timeout_s=120))
            for _ in range(scene.count)
        ]
        for session in sessions:
            session.result()
    scene.victim.sh("kill $(pidof sleep) 2>/dev/null; true")


def many_tokens(scene: Scene) -> None:
    """Ten thousand sessions that are asked for and never begun, each with a long command."""
    for _ in range(10_000):
        with contextlib.suppress(grpc.RpcError):
            scene.exec_url("true", "x" * 20_000)


def stuck_forwards(scene: Scene) -> None:
    """Forwarded connections to a port whose process reads nothing, each sent as much as is taken."""
    with contextlib.ExitStack() as stack:
        for _ in range(scene.count):
            session = stack.enter_context(Forwarding(scene.forward_url()))
            streams = [session.connect(9999)[0] for _ in range(20)]
            session.feed(streams[-1], _round_robin(session, streams))
        time.sleep(10)


def _round_robin(session: Forwarding, streams: list[int]) -> Iterator[bytes]:
    for _ in range(128):
        for stream in streams:
            session.send(stream, BLOCK)
    yield b""


def unfinished_messages(scene: Scene) -> None:
    """WebSocket messages of 16 MiB whose last byte does not come."""
    head = (
        "GET {path} HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\n"
        "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Protocol: v5.channel.k8s.io\r\n\r\n"
    )
    size = 16 * MIB - 1
    with contextlib.ExitStack() as stack:
        for _ in range(scene.count):
            url = scene.exec_url("sleep", "600", stdin=True)
            peer = stack.enter_context(scene.dial(url))
            peer.sendall(head.format(path=urlsplit(url).path).encode())
            peer.recv(4096)
            with contextlib.suppress(OSError):
                peer.sendall(b"\x82\xff" + size.to_bytes(8, "big") + b"\0\0\0\0\0" + b"x" * (size - 2))
        time.sleep(2)


KINDS: tuple[Callable[[Scene], None], ...] = (
    endless_output,
    unread_input,
    resize_flood,
    http_header_bombs,
    spdy_header_bombs,
    half_open_sockets,
    half_open_pairs,
    held_pipes,
    stuck_forwards,
    unfinished_messages,
    many_tokens,
)


# ------------------------------------------------------------------------------------------------------------ measuring
def resident_mib(pid: int) -> float:
    """The resident memory of a process."""
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGESIZE") / MIB


def measure(kind: Callable[[Scene], None], scene: Scene, pid: int, other: ContainerHandle) -> Measured:
    """Let one kind of client loose."""
    found = Measured(kind.__name__.replace("_", " "), resident_mib(pid))
    over = threading.Event()

    def watch() -> None:
        while not over.wait(0.02):
            found.peak_mib = max(found.peak_mib, resident_mib(pid))

    def use() -> None:
        request = pb.ExecRequest(container_id=other.id, cmd=["echo", "fine"], stdout=True)
        while not over.wait(0.1):
            began = time.perf_counter()
            try:
                with RemoteCommand(other.pod.client.rpc("Exec", request).url, stderr=False) as session:
                    assert session.read_all(session.stdout) == b"fine\n"
                    assert session.result()["status"] == "Success"
            except (OSError, AssertionError, ValueError, grpc.RpcError) as error:
                found.failed += 1
                print(f"bench: an exec failed: {error!r}", file=sys.stderr, flush=True)
            found.exec_ms.append((time.perf_counter() - began) * 1000)

    threads = [threading.Thread(target=work, daemon=True) for work in (watch, use)]
    for thread in threads:
        thread.start()
    try:
        kind(scene)
        time.sleep(0.5)
    except (OSError, AssertionError, ValueError) as error:
        print(f"bench: the clients themselves broke off: {error!r}", file=sys.stderr, flush=True)
    finally:
        over.set()
        for thread in threads:
            thread.join(30)
    time.sleep(SETTLE_S)
    found.after_mib = resident_mib(pid)
    return found


@contextlib.contextmanager
def node() -> Iterator[Node]:
    """A node of its own."""
    with contextlib.ExitStack() as stack:
        compile_sources()
        engine, registry = Engine(), Registry()
        stack.callback(engine.close)
        stack.callback(registry.close)
        engine.start()
        registry.start()
        TestImages(registry).push_all()
        made = Node(engine=engine, registry=registry, config={"logging": {"level": "info", "format": "json"}})
        stack.callback(made.close)
        made.start()
        yield made


def main() -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(description="Measure what hostile streaming clients cost the daemon.")
    parser.add_argument("--count", type=int, default=20, help="clients of each kind at once, at most 100")
    parser.add_argument("--only", choices=[kind.__name__ for kind in KINDS], help="one kind")
    parser.add_argument("-o", "--output", choices=("text", "json"), default="text")
    args = parser.parse_args()
    if not 1 <= args.count <= 100:
        parser.error("--count is from 1 to 100")
    try:
        with node() as served, CriClient(served.socket, timeout_s=60) as client:
            client.wait_ready()
            results = run(client, served.pid, args.count, [k for k in KINDS if args.only in (None, k.__name__)])
    except PartMissingError as missing:
        raise SystemExit(f"bench: {missing}") from missing
    if args.output == "json":
        print(json.dumps([_plain(found) for found in results], indent=2))
    else:
        show(results, args.count)
    return 0 if not any(found.failed for found in results) else 1


def run(client: CriClient, pid: int, count: int, kinds: list[Callable[[Scene], None]]) -> list[Measured]:
    """Measure each kind in turn, on containers of their own."""
    try:
        with client.run_pod() as hostile, client.run_pod() as friendly:
            other = friendly.run()
            results = []
            for kind in kinds:
                victim = hostile.run(command=["sh", "-c", "nc -ll -p 9999 -e sleep 600 & exec sleep 100000"])
                print(f"bench: {kind.__name__}", file=sys.stderr, flush=True)
                results.append(measure(kind, Scene(client, victim, count), pid, other))
                print(f"bench: {json.dumps(_plain(results[-1]))}", file=sys.stderr, flush=True)
                victim.stop()
                victim.remove()
            return results
    finally:
        client.remove_all_pods()


def _plain(found: Measured) -> dict[str, object]:
    return {
        "clients": found.name,
        "before_mib": round(found.before_mib, 1),
        "peak_mib": round(found.peak_mib, 1),
        "after_mib": round(found.after_mib, 1),
        "exec_ms_median": round(statistics.median(found.exec_ms), 1) if found.exec_ms else None,
        "exec_ms_worst": round(max(found.exec_ms), 1) if found.exec_ms else None,
        "execs": len(found.exec_ms),
        "failed": found.failed,
    }


def show(results: list[Measured], count: int) -> None:
    """Print a table."""
    print(f"{count} clients of each kind; memory of the daemon in MiB; another container's exec meanwhile, in ms")
    print(f"{'clients':<22}{'before':>8}{'peak':>8}{'after':>8}{'median':>9}{'worst':>9}{'execs':>7}{'failed':>8}")
    for found in map(_plain, results):
        print(
            f"{found['clients']:<22}{found['before_mib']:>8}{found['peak_mib']:>8}{found['after_mib']:>8}"
            f"{found['exec_ms_median']!s:>9}{found['exec_ms_worst']!s:>9}{found['execs']:>7}{found['failed']:>8}"
        )


if __name__ == "__main__":
    sys.exit(main())
