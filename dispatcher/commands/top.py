"""Show what pods and their containers use now: CPU, memory, and network where it is measured.

CPU is in thousandths of a core over the last interval, as `kubectl top` shows it; memory is the working set, by which
the kubelet evicts. A pod's line holds the sum of its containers where its runtime measures no pods. What a runtime
cannot measure is "-", and absent with -o json. Runs until it is interrupted; --once measures over one interval and ends.
Without --once, -o json prints one document per line and interval.
"""

from __future__ import annotations

import argparse
import asyncio
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from dispatcher.commands.connection import (
    add_endpoint,
    add_json,
    connect,
    list_pods,
    match_pod,
    positive_seconds,
)
from dispatcher.commands.output import Console, Exit, Failure, short_id

if TYPE_CHECKING:
    from dispatcher.cri.client import CriClient

_SORTS = ("cpu", "memory", "name")
_CLEAR = "\x1b[H\x1b[2J"


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the options."""
    parser.add_argument("pod", nargs="?", metavar="POD", help="an id, its beginning, a name or namespace/name")
    parser.add_argument("--once", action="store_true", help="print once and end")
    parser.add_argument("--pods", action="store_true", help="leave containers out")
    parser.add_argument(
        "--interval", metavar="SECONDS", type=positive_seconds, default=2.0, help="time between two looks (default: 2)"
    )
    parser.add_argument("--sort", choices=_SORTS, default="cpu", help="what stands first (default: cpu)")
    add_json(parser)
    add_endpoint(parser)


async def execute(args: argparse.Namespace, console: Console) -> int:
    """Run the command."""
    async with connect(args) as client:
        if args.pod and match_pod(args.pod, await list_pods(client)) is None:
            raise Failure(f"no pod {args.pod!r}", hint="`dispatcher ps` lists them", code=Exit.NOT_FOUND)
        before = await measure(client)
        while True:
            await asyncio.sleep(args.interval)
            now = await measure(client)
            rows = compare(before, now, sort=args.sort)
            if args.pod:
                # A pod that is gone by now is an empty table, as for any other.
                chosen = match_pod(args.pod, now.pods)
                rows = [row for row in rows if chosen is not None and row["id"] == chosen.id]
            _show(rows, console, args)
            if args.once:
                return Exit.OK
            before = now


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """What one look found: pods, and the stats of containers and (where they are served) of pods, by id."""

    pods: Sequence[Any]
    containers: Mapping[str, Any]
    container_pods: Mapping[str, str]
    pod_stats: Mapping[str, Any]


async def measure(client: CriClient) -> Sample:
    """Look once."""
    pods, containers, stats, pod_stats = await asyncio.gather(
        list_pods(client),
        client.call("ListContainers"),
        client.call("ListContainerStats"),
        _pod_stats(client),
    )
    return Sample(
        pods=[pod for pod in pods if pod.state == 0],
        containers={item.attributes.id: item for item in stats.stats},
        container_pods={item.id: item.pod_sandbox_id for item in containers.containers},
        pod_stats=pod_stats,
    )


async def _pod_stats(client: CriClient) -> dict[str, Any]:
    from dispatcher.cri.client import CallFailed

    try:
        reply = await client.call("ListPodSandboxStats")
    except CallFailed as error:
        if error.code == "UNIMPLEMENTED":
            return {}
        raise
    return {item.attributes.id: item for item in reply.stats}


def compare(before: Sample, now: Sample, *, sort: str = "name") -> list[dict[str, Any]]:
    """Return a row per pod, each with its containers: what two looks say together. Unknown figures are left out."""
    of_pod: dict[str, list[dict[str, Any]]] = {}
    for container_id, stats in now.containers.items():
        old = before.containers.get(container_id)
        row = {"id": container_id, "name": stats.attributes.metadata.name, **_usage(old, stats)}
        if stats.HasField("writable_layer") and stats.writable_layer.HasField("used_bytes"):
            row["writable_layer_bytes"] = stats.writable_layer.used_bytes.value
        of_pod.setdefault(now.container_pods.get(container_id, ""), []).append(row)
    rows = []
    for pod in now.pods:
        containers = _sorted(of_pod.get(pod.id, []), sort)
        sums: dict[str, Any] = {}
        for key in ("cpu_millicores", "memory_bytes"):
            known = [row[key] for row in containers if key in row]
            if known:
                sums[key] = round(sum(known), 1)
        stats = now.pod_stats.get(pod.id)
        if stats is not None:
            old = before.pod_stats.get(pod.id)
            sums |= _usage(old.linux if old is not None else None, stats.linux) | _network(old, stats)
        rows.append(
            {
                "id": pod.id,
                "namespace": pod.metadata.namespace,
                "name": pod.metadata.name,
                **sums,
                "containers": containers,
            }
        )
    return _sorted(rows, sort)


def _sorted(rows: Iterable[dict[str, Any]], sort: str) -> list[dict[str, Any]]:
    rows = sorted(rows, key=lambda row: (row.get("namespace", ""), row["name"], row["id"]))
    key = {"cpu": "cpu_millicores", "memory": "memory_bytes"}.get(sort)
    return rows if key is None else sorted(rows, key=lambda row: row.get(key, -1), reverse=True)


def _usage(old: Any, new: Any) -> dict[str, Any]:
    found: dict[str, Any] = {}
    if old is not None and new.cpu.HasField("usage_core_nano_seconds"):
        elapsed_ns = new.cpu.timestamp - old.cpu.timestamp
        used_ns = new.cpu.usage_core_nano_seconds.value - old.cpu.usage_core_nano_seconds.value
        if elapsed_ns > 0 and used_ns >= 0:  # less than before: it was restarted in between
            found["cpu_millicores"] = round(1000 * used_ns / elapsed_ns, 1)
    if new.memory.HasField("working_set_bytes"):
        found["memory_bytes"] = new.memory.working_set_bytes.value
    return found


def _network(old: Any, new: Any) -> dict[str, Any]:
    """Totals over the interfaces of a pod, and rates where both looks know them."""
    if not new.linux.HasField("network"):
        return {}
    received, sent = _bytes(new)
    found = {"network_received_bytes": received, "network_sent_bytes": sent}
    if old is not None and old.linux.HasField("network"):
        elapsed_s = (new.linux.network.timestamp - old.linux.network.timestamp) / 1e9
        before = _bytes(old)
        if elapsed_s > 0 and received >= before[0] and sent >= before[1]:
            found["network_received_bytes_per_s"] = round((received - before[0]) / elapsed_s)
            found["network_sent_bytes_per_s"] = round((sent - before[1]) / elapsed_s)
    return found


def _bytes(stats: Any) -> tuple[int, int]:
    network = stats.linux.network
    named = {item.name: item for item in network.interfaces}
    if network.HasField("default_interface"):
        named[network.default_interface.name] = network.default_interface
    return sum(item.rx_bytes.value for item in named.values()), sum(item.tx_bytes.value for item in named.values())


def _show(rows: Sequence[dict[str, Any]], console: Console, args: argparse.Namespace) -> None:
    if args.pods:
        rows = [{key: value for key, value in row.items() if key != "containers"} for row in rows]
    if console.as_json:
        if args.once:
            console.data(rows)
        else:
            console.line(json.dumps(rows, ensure_ascii=False))
            console.out.flush()
        return
    if not args.once and console.out.isatty():
        console.out.write(_CLEAR)
    console.table(("ID", "POD", "CONTAINER", "CPU(m)", "MEMORY", "RX/s", "TX/s"), list(_lines(rows)))
    if not args.once and not console.out.isatty():
        console.line()
    console.out.flush()


def _lines(rows: Sequence[dict[str, Any]]) -> Iterable[tuple[object, ...]]:
    for row in rows:
        yield (
            short_id(row["id"]),
            f"{row['namespace']}/{row['name']}",
            "",
            *_figures(row),
            size(row.get("network_received_bytes_per_s")),
            size(row.get("network_sent_bytes_per_s")),
        )
        for item in row.get("containers", ()):
            yield (short_id(item["id"]), "", item["name"], *_figures(item), "", "")


def _figures(row: Mapping[str, Any]) -> tuple[str, str]:
    cpu = row.get("cpu_millicores")
    return "" if cpu is None else f"{cpu:.0f}", size(row.get("memory_bytes"))


def size(count: int | None) -> str:
    """Return bytes in a unit that leaves at most four digits, such as "12.5Mi"; "" for None."""
    if count is None:
        return ""
    value = float(count)
    for unit in ("", "Ki", "Mi", "Gi"):
        if value < 1024:
            return f"{value:.0f}{unit}" if unit == "" or value >= 100 else f"{value:.1f}{unit}"
        value /= 1024
    return f"{value:.1f}Ti"
