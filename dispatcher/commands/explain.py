"""Show which runtime a pod goes to, and why.

For a pod on this node: the decision that was stored when it was made, whatever the policy says now. For a manifest: what
the policy file says now, rule by rule, without a daemon and without running anything. Hooks of plugins have no say there,
which the output tells where the policy gives them one.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from dispatcher.commands.config_check import add_config, load
from dispatcher.commands.connection import add_endpoint, add_json, connect, find_pod, parse_info, pod_name
from dispatcher.commands.output import Console, Exit, Failure
from dispatcher.commands.play import read_pods
from dispatcher.commands.status import outline

EPILOG = """\
examples:
  dispatcher explain web
  dispatcher explain kube-system/proxy -o json
  dispatcher explain -f pod.yaml --policy policy.yaml
"""

_SHOWN = (
    ("state", "state"),
    ("reason", "state_reason"),
    ("message", "message"),
    ("runtime", "runtime"),
    ("isolation", "isolation"),
    ("rule", "rule"),
    ("why", "route_reason"),
    ("policy", "policy_hash"),
    ("decision", "decision_id"),
)


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the options."""
    parser.add_argument("pod", nargs="?", metavar="POD", help="an id, its beginning, a name or namespace/name")
    parser.add_argument("-f", "--file", metavar="FILE", help="a manifest with Pods, - for standard input")
    parser.add_argument("--policy", metavar="FILE", help="the policy file for -f (default: what --config says)")
    add_config(parser)
    add_json(parser)
    add_endpoint(parser)


async def execute(args: argparse.Namespace, console: Console) -> int:
    """Run the command."""
    if bool(args.pod) == bool(args.file):
        raise Failure("name a pod, or a manifest with -f", code=Exit.USAGE)
    if args.file:
        return _explain_manifest(args, console)
    async with connect(args) as client:
        pod = await find_pod(client, args.pod)
        reply = await client.call("PodSandboxStatus", pod_sandbox_id=pod.id, verbose=True)
    facts = parse_info(reply.info).get("dispatcher")
    if not isinstance(facts, dict):
        raise Failure("this daemon keeps no routes", hint="is it another CRI runtime? see -e")
    if console.as_json:
        console.data({"pod": pod_name(pod.metadata), "id": pod.id, **facts})
        return Exit.OK
    console.fields(
        [("pod", pod_name(pod.metadata)), ("id", pod.id), *((title, facts.get(key)) for title, key in _SHOWN)]
    )
    for title, key in (("votes of hooks", "votes"), ("notes", "notes"), ("network", "attachment"), ("facts", "facts")):
        if facts.get(key):
            console.line(f"{title}:")
            for line in outline(facts[key]):
                console.line(f"  {line}")
    return Exit.OK
