"""Stop and remove pods with all of their containers, or single containers.

A pod or container that runs is removed only with -f. Folders that `run` and `play` made for a pod go with it. What a
kubelet wants running, it will start again.
"""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from dispatcher.commands.connection import add_endpoint, connect, find_named, list_containers, list_pods, pod_name
from dispatcher.commands.output import Console, Exit, Failure, short_id
from dispatcher.commands.pod_folders import add_pods_dir, remove_folders

if TYPE_CHECKING:
    from dispatcher.cri.client import CriClient

_RUNNING = 1


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the options."""
    parser.add_argument("targets", metavar="POD|CONTAINER", nargs="*", help="ids, their beginnings, or pods' names")
    parser.add_argument("-f", "--force", action="store_true", help="remove what is running as well")
    parser.add_argument("--all", action="store_true", help="all pods of the node; needs -f where one runs")
    parser.add_argument(
        "--time", metavar="SECONDS", type=int, default=10, help="grace for containers to end (default: 10)"
    )
    add_pods_dir(parser)
    add_endpoint(parser)


async def execute(args: argparse.Namespace, console: Console) -> int:
    """Run the command."""
    if bool(args.targets) == args.all:
        raise Failure("name what to remove, or say --all", code=Exit.USAGE)
    code = Exit.OK
    async with connect(args) as client:
        words = [pod.id for pod in await list_pods(client)] if args.all else args.targets
        for word in words:
            try:
                await _remove(client, word, args, console)
            except Failure as failure:
                if args.all and failure.code == Exit.NOT_FOUND:
                    continue
                console.complain(failure)
                code = failure.code
    return code


async def _remove(client: CriClient, word: str, args: argparse.Namespace, console: Console) -> None:
    named = await find_named(client, word)
    if named.container is not None:
        await _remove_container(client, named.container, args)
        console.line(named.container.id)
        return
    pod = named.pod
    running = [
        item for item in await list_containers(client) if item.pod_sandbox_id == pod.id and item.state == _RUNNING
    ]
    if running and not args.force:
        raise Failure(f"pod {pod_name(pod.metadata)} still runs ({len(running)} containers)", hint="use -f")
    console.say(f"removing pod {pod_name(pod.metadata)} ({short_id(pod.id)})")
    for container in running:
        await client.call("StopContainer", timeout_s=args.time + 60, container_id=container.id, timeout=args.time)
    await client.call("StopPodSandbox", pod_sandbox_id=pod.id)
    await client.call("RemovePodSandbox", pod_sandbox_id=pod.id)
    remove_folders(args.pods_dir, pod.metadata.uid)
    console.line(pod.id)


async def _remove_container(client: CriClient, container: Any, args: argparse.Namespace) -> None:
    if container.state == _RUNNING:
        if not args.force:
            raise Failure(f"container {container.metadata.name} is running", hint="use -f")
        await client.call("StopContainer", timeout_s=args.time + 60, container_id=container.id, timeout=args.time)
    await client.call("RemoveContainer", container_id=container.id)
