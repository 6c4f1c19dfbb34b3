"""Run a command in a running container, and end with its exit code.

Without -i and -t the output comes when the command has ended, at most 16 MiB of it; --timeout kills a command that takes
too long, and the exit code is then 124. With -i the command gets this input, with -t a terminal, and output comes as it
is written; that needs a runtime that streams. 125 means that the command could not be run.
"""

from __future__ import annotations

import argparse
import math
import sys
from typing import TYPE_CHECKING

from dispatcher.commands.connection import add_endpoint, as_failure, connect, find_container, positive_seconds
from dispatcher.commands.output import Console, Exit, Failure

if TYPE_CHECKING:
    from dispatcher.cri.client import CriClient

EPILOG = """\
examples:
  dispatcher exec web -- ls -l /
  dispatcher exec -it web sh
  dispatcher exec kube-system/proxy -c main --timeout 5 -- cat /etc/resolv.conf
"""


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the options."""
    parser.add_argument("-c", "--container", metavar="NAME", default="", help="which container of the pod")
    parser.add_argument("-i", "--stdin", action="store_true", help="pass this input on to the command")
    parser.add_argument("-t", "--tty", action="store_true", help="give the command a terminal")
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
    if (args.stdin or args.tty) and args.timeout:
        raise Failure("--timeout is for commands without -i and -t", code=Exit.USAGE)
    limit_s = math.ceil(args.timeout)
    args.timeout = 30.0
    async with connect(args) as client:
        container = await find_container(client, args.target, args.container, running=True)
        if args.stdin or args.tty:
            return await _open_session(client, container.id, command, args)
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


async def _open_session(client: CriClient, container_id: str, command: list[str], args: argparse.Namespace) -> int:
    from dispatcher.commands.stream_session import run_session
    from dispatcher.cri.client import CallFailed

    try:
        reply = await client.call(
            "Exec",
            container_id=container_id,
            cmd=command,
            tty=args.tty,
            stdin=args.stdin,
            stdout=True,
            stderr=not args.tty,  # a terminal has one output only
        )
    except CallFailed as error:
        failure = as_failure(error)
        failure.code = Exit.NO_RESULT
        raise failure from error
    return await run_session(reply.url, stdin=args.stdin, terminal=args.tty)
