"""Drop the record of a pod whose plugin is gone, so that its node can go on without it.

Pods of a plugin that is not installed any more stay listed: only their plugin can remove what it made. To forget such a
pod frees what the dispatcher itself made for it (addresses, namespace, files), and leaves everything that its runtime
made (processes, virtual machines, images) to you. Refused for a pod whose plugin is loaded: use `rm`.
"""

from __future__ import annotations

import argparse

from dispatcher.commands.connection import add_endpoint, connect, find_pod, parse_info, pod_name
from dispatcher.commands.output import Console, Exit, Failure


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the options."""
    parser.add_argument("pod", metavar="POD", help="an id, its beginning, a name or namespace/name")
    parser.add_argument("--yes", action="store_true", help="do it; without this, only what is on record is shown")
    add_endpoint(parser)


async def execute(args: argparse.Namespace, console: Console) -> int:
    """Run the command."""
    from dispatcher.cri.handlers.pod_end import FORGET_KEY

    async with connect(args) as client:
        pod = await find_pod(client, args.pod)
        if not args.yes:
            reply = await client.call("PodSandboxStatus", pod_sandbox_id=pod.id, verbose=True)
            facts = parse_info(reply.info).get("dispatcher")
            console.data(facts)
            raise Failure(
                f"pod {pod_name(pod.metadata)} is still on record",
                hint="clean up what the record above names, then say it again with --yes",
            )
        await client.call("RemovePodSandbox", metadata=((FORGET_KEY, pod.id),), pod_sandbox_id=pod.id)
    console.line(pod.id)
    return Exit.OK
