"""Run one container in a pod of its own and print its output; ends with the container's exit code.

The pod goes the way of any other: the policy file decides on its runtime, and the image is pulled when it is missing.
COMMAND replaces the image's CMD, --entrypoint its ENTRYPOINT. The pod is removed when it has ended, unless --keep says
otherwise. An interrupt asks the container to end, a second one kills it.

A kubelet that runs on this node removes pods that it does not know, these too.
"""

from __future__ import annotations

import argparse
import json
import re
import secrets
from typing import Any

from dispatcher.commands.output import Console, Exit, Failure
from dispatcher.commands.sessions import add_session_options, run_pods

EPILOG = """\
examples:
  dispatcher run busybox echo hello
  dispatcher run --runtime docker --memory 64Mi alpine sh -c 'exit 7'; echo $?
  dispatcher run -d --name web -p 8080:80 nginx
"""


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the options."""
    add_session_options(parser)
    parser.add_argument(
        "--runtime", metavar="R", default="", help="ask for this runtime, by a handler of the policy that leads to it"
    )
    parser.add_argument("--name", metavar="NAME", help="the pod's name (default: made from the image)")
    parser.add_argument("--namespace", metavar="NS", default="default", help="the pod's namespace (default: default)")
    parser.add_argument("--entrypoint", metavar="PROGRAM", help="run this instead of the image's entry point")
    parser.add_argument("--env", metavar="NAME=VALUE", action="append", default=[], help="set a variable")
    parser.add_argument("-v", "--volume", metavar="HOST:PATH[:ro]", action="append", default=[], help="mount a path")
    parser.add_argument(
        "-p", "--publish", metavar="HOST:PORT[/PROTO]", action="append", default=[], help="publish a port"
    )
    parser.add_argument("-w", "--workdir", metavar="DIR", default="", help="working directory")
    parser.add_argument("-u", "--user", metavar="UID[:GID]", help="run as these numeric ids")
    parser.add_argument("--memory", metavar="QUANTITY", help="memory limit, such as 64Mi")
    parser.add_argument("--cpus", metavar="QUANTITY", help="CPU limit, such as 0.5 or 500m")
    parser.add_argument("--label", metavar="NAME=VALUE", action="append", default=[], help="label the pod")
    parser.add_argument("--annotation", metavar="NAME=VALUE", action="append", default=[], help="annotate the pod")
    parser.add_argument("--privileged", action="store_true", help="full access to the node, where policy allows it")
    parser.add_argument("--host-network", action="store_true", help="use the node's network")
    parser.add_argument("--read-only", action="store_true", help="read-only root file system")
    parser.add_argument("-i", "--interactive", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("-t", "--tty", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("image", metavar="IMAGE", help="the image, by any kind of reference")
    parser.add_argument("arguments", metavar="COMMAND", nargs=argparse.REMAINDER, help="the command and its arguments")


async def execute(args: argparse.Namespace, console: Console) -> int:
    """Run the command."""
    from dispatcher.manifest import read_manifest
    from dispatcher.yaml_marks import YamlError

    if args.interactive or args.tty:
        raise Failure(
            "-i and -t are not available here: run has no input and no terminal",
            hint="start it with -d, and open a session with `dispatcher exec -it`",
            code=Exit.USAGE,
        )
    try:
        manifests = read_manifest(json.dumps(make_document(args)), "command line")
    except YamlError as error:
        message = "\n".join(problem.message for problem in error.problems)
        raise Failure(message, code=Exit.USAGE) from error
    return await run_pods(args, console, manifests, args.runtime)


def make_document(args: argparse.Namespace) -> dict[str, Any]:
    """Return the Pod manifest that the options stand for. Pure but for the random part of a default name."""
    name = args.name or default_name(args.image)
    command = args.arguments[1:] if args.arguments[:1] == ["--"] else args.arguments
    security: dict[str, Any] = {"privileged": args.privileged, "readOnlyRootFilesystem": args.read_only}
    if args.user:
        user, _, group = args.user.partition(":")
        security["runAsUser"] = _number(user, "--user")
        if group:
            security["runAsGroup"] = _number(group, "--user")
    limits = {key: value for key, value in (("memory", args.memory), ("cpu", args.cpus)) if value}
    mounts, volumes = [], []
    for index, text in enumerate(args.volume):
        host, target, read_only = parse_volume(text)
        volumes.append({"name": f"v{index}", "hostPath": {"path": host}})
        mounts.append({"name": f"v{index}", "mountPath": target, "readOnly": read_only})
    container = {
        "name": "main",
        "image": args.image,
        "command": [_literal(args.entrypoint)] if args.entrypoint else [],
        "args": [_literal(word) for word in command],
        "workingDir": args.workdir,
        "env": [{"name": key, "value": _literal(value)} for key, value in _pairs(args.env, "--env").items()],
        "ports": [parse_port(text) for text in args.publish],
        "resources": {"limits": limits},
        "volumeMounts": mounts,
        "securityContext": security,
        # `run` asks for the tag that the node has, as docker does; a manifest's `latest` would be pulled each time.
        "imagePullPolicy": "IfNotPresent",
    }
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {
            "name": name,
            "namespace": args.namespace,
            "labels": _pairs(args.label, "--label"),
            "annotations": _pairs(args.annotation, "--annotation"),
        },
        "spec": {
            "restartPolicy": "Never",
            "hostNetwork": args.host_network,
            "terminationGracePeriodSeconds": 10,
            "volumes": volumes,
            "containers": [container],
        },
    }


def default_name(image: str) -> str:
    """Return a pod name that shows the image, with a random ending."""
    last = image.partition("@")[0].rpartition("/")[2].partition(":")[0].lower()
    stem = re.sub(r"[^a-z0-9]+", "-", last).strip("-")[:40] or "pod"
    return f"{stem}-{secrets.token_hex(3)}"


def parse_volume(text: str) -> tuple[str, str, bool]:
    """Parse HOST:PATH[:ro|rw]."""
    host, _, rest = text.partition(":")
    target, _, mode = rest.partition(":")
    if not host.startswith("/") or not target.startswith("/") or mode not in ("", "ro", "rw"):
        raise Failure(f"-v {text!r} is not HOST:PATH[:ro], both absolute", code=Exit.USAGE)
    return host, target, mode == "ro"


def parse_port(text: str) -> dict[str, Any]:
    """Parse HOST:PORT[/PROTO]."""
    match = re.fullmatch(r"(\d{1,5}):(\d{1,5})(?:/(tcp|udp|sctp))?", text, re.ASCII)
    if match is None:
        raise Failure(f"-p {text!r} is not HOST:PORT[/tcp|udp|sctp]", code=Exit.USAGE)
    return {"hostPort": int(match[1]), "containerPort": int(match[2]), "protocol": (match[3] or "tcp").upper()}


def _literal(text: str) -> str:
    """Protect `$` from the expansion of $(NAME) that manifests have."""
    return text.replace("$", "$$")


def _pairs(items: list[str], option: str) -> dict[str, str]:
    pairs = {}
    for item in items:
        key, equals, value = item.partition("=")
        if not equals or not key:
            raise Failure(f"{option} {item!r} is not NAME=VALUE", code=Exit.USAGE)
        pairs[key] = value
    return pairs


def _number(text: str, option: str) -> int:
    if not text.isascii() or not text.isdigit():
        raise Failure(f"{option} takes numbers, not {text!r}", code=Exit.USAGE)
    return int(text)
