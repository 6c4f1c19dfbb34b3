"""List pods with their real state, the runtime that each was routed to, and the rule that chose it.

The state is the dispatcher's own (creating, ready, stopping, unknown, ...), which says more than CRI's READY and
NOTREADY. With -c, containers are listed. A word after the command keeps what belongs to that pod.
"""

from __future__ import annotations

import argparse
import asyncio
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from dispatcher.commands.connection import (
    add_endpoint,
    add_json,
    connect,
    find_pod,
    list_containers,
    list_pods,
    parse_info,
    pod_name,
)
from dispatcher.commands.output import Console, Exit, age, short_id

if TYPE_CHECKING:
    from dispatcher.cri.client import CriClient

_POD_STATES = {0: "ready", 1: "notready"}
_CONTAINER_STATES = {0: "created", 1: "running", 2: "exited", 3: "unknown"}
_AT_ONCE = 16


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the options."""
    parser.add_argument("pod", nargs="?", metavar="POD", help="an id, its beginning, a name or namespace/name")
    parser.add_argument("-c", "--containers", action="store_true", help="list containers instead of pods")
    parser.add_argument("-q", "--quiet", action="store_true", help="print ids only")
    parser.add_argument("--no-trunc", action="store_true", help="print whole ids")
    add_json(parser)
    add_endpoint(parser)


async def execute(args: argparse.Namespace, console: Console) -> int:
    """Run the command."""
    async with connect(args) as client:
        if args.pod:
            pods: Sequence[Any] = [await find_pod(client, args.pod)]
        else:
            pods = await list_pods(client)
        containers = await list_containers(client)
        if args.containers:
            rows = _containers(pods, containers)
        else:
            rows = await _pods(client, pods, containers)
    if console.as_json:
        console.data(rows)
    elif args.quiet:
        for row in rows:
            console.line(row["id"])
    elif args.containers:
        _show_containers(rows, console, whole=args.no_trunc)
    else:
        _show_pods(rows, console, whole=args.no_trunc)
    return Exit.OK


async def _pods(client: CriClient, pods: Sequence[Any], containers: Sequence[Any]) -> list[dict[str, Any]]:
    gate = asyncio.Semaphore(_AT_ONCE)

    async def describe(pod: Any) -> dict[str, Any] | None:
        from dispatcher.cri.client import CallFailed

        async with gate:
            try:
                reply = await client.call("PodSandboxStatus", pod_sandbox_id=pod.id, verbose=True)
            except CallFailed as error:
                if error.code == "NOT_FOUND":  # removed since the list was made
                    return None
                raise
        ours = parse_info(reply.info).get("dispatcher")
        facts = ours if isinstance(ours, dict) else {}
        return {
            "id": pod.id,
            "namespace": pod.metadata.namespace,
            "name": pod.metadata.name,
            "uid": pod.metadata.uid,
            "attempt": pod.metadata.attempt,
            "state": facts.get("state") or _POD_STATES.get(pod.state, "unknown"),
            "runtime": facts.get("runtime", ""),
            "rule": facts.get("rule", ""),
            "ip": reply.status.network.ip,
            "created_at_ns": pod.created_at,
            "containers": sum(item.pod_sandbox_id == pod.id for item in containers),
            "running": sum(item.pod_sandbox_id == pod.id and item.state == 1 for item in containers),
        }

    described = await asyncio.gather(*(describe(pod) for pod in pods))
    return [row for row in described if row is not None]


def _containers(pods: Sequence[Any], containers: Sequence[Any]) -> list[dict[str, Any]]:
    names = {pod.id: pod_name(pod.metadata) for pod in pods}
    return [
        {
            "id": item.id,
            "name": item.metadata.name,
            "attempt": item.metadata.attempt,
            "pod_id": item.pod_sandbox_id,
            "pod": names[item.pod_sandbox_id],
            "state": _CONTAINER_STATES.get(item.state, "unknown"),
            "image": item.image.user_specified_image or item.image.image,
            "created_at_ns": item.created_at,
        }
        for item in containers
        if item.pod_sandbox_id in names
    ]


def _show_pods(rows: Sequence[dict[str, Any]], console: Console, *, whole: bool) -> None:
    console.table(
        ("POD", "NAMESPACE", "NAME", "STATE", "RUNTIME", "RULE", "IP", "RUNNING", "AGE"),
        [
            (
                row["id"] if whole else short_id(row["id"]),
                row["namespace"],
                row["name"],
                row["state"],
                row["runtime"],
                row["rule"],
                row["ip"],
                f"{row['running']}/{row['containers']}",
                age(row["created_at_ns"]),
            )
            for row in rows
        ],
    )


def _show_containers(rows: Sequence[dict[str, Any]], console: Console, *, whole: bool) -> None:
    console.table(
        ("CONTAINER", "POD", "NAME", "ATTEMPT", "STATE", "IMAGE", "AGE"),
        [
            (
                row["id"] if whole else short_id(row["id"]),
                row["pod"],
                row["name"],
                row["attempt"],
                row["state"],
                row["image"],
                age(row["created_at_ns"]),
            )
            for row in rows
        ],
    )
