"""Run the pods of a Kubernetes manifest in the foreground, with their init containers, sidecars and restart policies.

The file holds Pods, and the ConfigMaps and Secrets that they use. A field that is not supported is refused by its name,
with its line and column. Ends with the exit code of the first container that failed. With restartPolicy Always (the
default of Kubernetes) it runs until it is interrupted. With -d everything is started once and left running; nobody
restarts it then.

A kubelet that runs on this node removes pods that it does not know, these too.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from dispatcher.commands.output import Console, Exit, Failure
from dispatcher.commands.sessions import add_session_options, run_pods

if TYPE_CHECKING:
    from dispatcher.manifest import PodManifest

EPILOG = """\
examples:
  dispatcher play pod.yaml
  kubectl create ... --dry-run=client -o yaml | dispatcher play -
"""


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the options."""
    add_session_options(parser)
    parser.add_argument(
        "--runtime", metavar="R", default="", help="ask for this runtime, by a handler of the policy that leads to it"
    )
    parser.add_argument("file", metavar="FILE", help="the manifest, - for standard input")


async def execute(args: argparse.Namespace, console: Console) -> int:
    """Run the command."""
    manifests = read_pods(args.file)
    return await run_pods(args, console, manifests, args.runtime)


def read_pods(name: str) -> tuple[PodManifest, ...]:
    """Read a manifest from a file or from standard input. Raises Failure with all that is wrong in it."""
    from dispatcher.manifest import read_manifest
    from dispatcher.yaml_marks import YamlError

    try:
        text = sys.stdin.buffer.read() if name == "-" else Path(name).read_bytes()
    except OSError as error:
        raise Failure(f"{name}: {error.strerror}", code=Exit.USAGE) from error
    try:
        return read_manifest(text, "standard input" if name == "-" else name)
    except YamlError as error:
        raise Failure(str(error)) from error
