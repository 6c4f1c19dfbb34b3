"""The command line as a whole: which commands there are, how one is run, how its errors end."""

from __future__ import annotations

import argparse
import asyncio
import importlib
import inspect
import logging
import os
import sys
from collections.abc import Sequence
from importlib import metadata
from types import ModuleType
from typing import Any

from dispatcher.commands.output import Console, Exit, Failure
from dispatcher.errors import DispatcherError, NotFound
from dispatcher.version import program_version

# name -> (module, one line); the order is the order of the help.
COMMANDS: tuple[tuple[str, str, str], ...] = (
    ("serve", "serve", "run the daemon"),
    ("status", "status", "show whether the node can run pods, and why not"),
    ("ps", "ps", "list pods or containers with their real state and route"),
    ("explain", "explain", "show which runtime a pod goes to, and why"),
    ("top", "top", "show what pods and containers use now"),
    ("trace", "trace", "show where the time of a pod's start went"),
    ("plugins", "plugins", "list plugins, what they offer and what failed"),
    ("config", "config_check", "check configuration files without a daemon"),
    ("run", "run", "run one container in a pod of its own, like `docker run`"),
    ("play", "play", "run the pods of a Kubernetes manifest"),
    ("logs", "logs", "print or follow the log of a container"),
    ("exec", "exec", "run a command in a running container"),
    ("rm", "rm", "stop and remove pods or containers"),
    ("doctor", "doctor", "check this node and print how to mend what is wrong"),
    ("diag", "diag", "put what a support case needs into one archive, without secrets"),
    ("forget", "forget", "drop the record of a pod whose plugin is gone"),
    ("version", "version", "print the versions of this program and of the daemon"),
)

EXIT_CODES = """\
exit codes:
  0    done, and all is well
  1    something is wrong: what was asked about is not well, or a call failed
  2    the command line cannot be understood
  3    the daemon cannot be reached, or an engine that it needs is away
  4    no such pod or container
  5    refused by policy
  124  exec: the command did not end in its time
  125  run, play, exec: the dispatcher could not get a result from the container
  130  interrupted
run, play and exec otherwise end with the exit code of the container or command.
"""


COMMANDS_GROUP = "dispatcher.commands"


def plugin_commands() -> dict[str, metadata.EntryPoint]:
    """Commands that installed plugins bring, by name. Nothing is imported; a name of ours stays ours."""
    found = {point.name: point for point in metadata.entry_points(group=COMMANDS_GROUP)}
    return {name: found[name] for name in sorted(found) if name not in {core for core, _, _ in COMMANDS}}


def build_parser(argv: Sequence[str] = ()) -> argparse.ArgumentParser:
    """Return the parser with all commands of ours, and the plugin's command that `argv` asks for.

    Raises:
        Failure: that command cannot be loaded.
    """
    parser = argparse.ArgumentParser(
        prog="dispatcher",
        description="One CRI endpoint for a Kubernetes node that routes every pod to the runtime that suits it.",
        epilog=EXIT_CODES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"dispatcher {program_version()}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", dest="command", required=True)
    for name, module_name, line in COMMANDS:
        module = _module(module_name)
        command = commands.add_parser(
            name,
            help=line,
            description=inspect.cleandoc(module.__doc__ or ""),
            epilog=getattr(module, "EPILOG", None),
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        module.configure(command)
        if command.get_default("execute") is None:
            command.set_defaults(execute=module.execute)
    brought = plugin_commands()
    if brought:
        parser.epilog = f"commands of plugins: {', '.join(brought)}\n\n{EXIT_CODES}"
    wanted = next((word for word in argv if not word.startswith("-")), "")
    if wanted in brought:
        _add_plugin_command(commands, wanted, brought[wanted])
    return parser


def _add_plugin_command(commands: Any, name: str, point: metadata.EntryPoint) -> None:
    """Add a command that lives in a plugin: a module like ours, which only its own command imports."""
    try:
        module = point.load()
        command = commands.add_parser(
            name,
            description=inspect.cleandoc(module.__doc__ or ""),
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        module.configure(command)
        if command.get_default("execute") is None:
            command.set_defaults(execute=module.execute)
    except Exception as error:
        raise Failure(f"the command {name} of {point.value} cannot be loaded: {error}") from error


def _module(name: str) -> ModuleType:
    return importlib.import_module(f"dispatcher.commands.{name}")


def run(args: argparse.Namespace, console: Console) -> int:
    """Run a parsed command and return its exit code; what went wrong is said on the console."""
    try:
        result: Any = args.execute(args, console)
        return asyncio.run(result) if inspect.iscoroutine(result) else int(result)
    except Failure as failure:
        console.complain(failure)
        return failure.code
    except DispatcherError as error:  # of a plugin's command
        console.complain(Failure(error.message))
        return Exit.NOT_FOUND if isinstance(error, NotFound) else Exit.FAILED
    except KeyboardInterrupt:
        return Exit.INTERRUPTED
    except BrokenPipeError:
        # The reader (`head`) has what it wanted. Python must not complain again when it closes standard output.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return Exit.OK


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit code."""
    # What loaded plugins log belongs to the daemon's log; commands say themselves what matters. `serve` sets it anew.
    logging.getLogger().addHandler(logging.NullHandler())
    words = sys.argv[1:] if argv is None else argv
    try:
        args = build_parser(words).parse_args(words)
    except Failure as failure:
        Console().complain(failure)
        return failure.code
    return run(args, Console(as_json=getattr(args, "output", "text") == "json"))
