"""Run a command in a running container and print its output when it has ended.

The exit code is the command's; 124 when it did not end within --timeout and was killed, 125 when it could not be run.
Output comes at the end and is limited to 16 MiB; sessions with a terminal or with input need a streaming client.
"""

from __future__ import annotations

import argparse
import math
import sys

from dispatcher.commands.connection import add_endpoint, as_failure, connect, find_container, positive_seconds
from dispatcher.commands.output import Console, Exit, Failure

EPILOG = """\
examples:
  dispatcher exec web -- ls -l /
  dispatcher exec kube-system/proxy -c main --timeout 5 -- cat /etc/resolv.conf
"""


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the options."""
    parser.add_argument("-c", "--container", metavar="NAME", default="", help="which container of the pod")
    parser.add_argument("-i", "--stdin", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("-t", "--tty", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument(
        "--timeout",
        metavar="SECONDS",
        type=positive_seconds,
        default=0.0,
        help="kill the command after this time, in whole seconds (default: never)",
    )
    add_endpoint(parser, with_timeout=False)
    parser.add_argument("target", metavar="POD|CONTAINER", help="an id, its beginning, or a pod's name")
    parser.add_argument(
        "command_line", metavar="COMMAND", nargs=argparse.REMAINDER, help="the command and its arguments"
    )


async def execute(args: argparse.Namespace, console: Console) -> int:
    """Run the command."""
    from dispatcher.cri.client import CallFailed

    command = args.command_line[1:] if args.command_line[:1] == ["--"] else args.command_line
    if not command:
        raise Failure("no command given", hint="dispatcher exec POD -- COMMAND...", code=Exit.USAGE)
    if args.stdin or args.tty:
        raise Failure(
            "-i and -t are not available here: exec runs a command without input and without a terminal",
            hint="use `crictl exec -it` or `kubectl exec -it` for a session",
            code=Exit.USAGE,
        )
    limit_s = math.ceil(args.timeout)
    args.timeout = 30.0
    async with connect(args) as client:
        container = await find_container(client, args.target, args.container, running=True)
        try:
            reply = await client.call(
                "ExecSync",
                # The daemon kills at the limit; the margin lets its answer arrive.
                timeout_s=limit_s + 30 if limit_s else 0,
                container_id=container.id,
                cmd=command,
                timeout=limit_s,
            )
        except CallFailed as error:
            if error.code == "DEADLINE_EXCEEDED":
                raise Failure(f"{command[0]}: {error.message}", code=Exit.TIMED_OUT) from error
            failure = as_failure(error)
            failure.code = Exit.NO_RESULT
            raise failure from error
    del console
    sys.stdout.buffer.write(reply.stdout)
    sys.stdout.buffer.flush()
    sys.stderr.buffer.write(reply.stderr)
    sys.stderr.buffer.flush()
    return int(reply.exit_code)
