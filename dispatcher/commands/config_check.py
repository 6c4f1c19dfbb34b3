"""Check configuration files without a daemon.

`config check` reads dispatcher.yaml, the sections of the enabled plugins, and the policy file with its own tests. Every
problem is printed as file:line:column: message; ends with 1 when there is one.
"""

from __future__ import annotations

import argparse

from dispatcher.commands.config_files import add_config, check_files
from dispatcher.commands.connection import add_json
from dispatcher.commands.output import Console, Exit


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the subcommand."""
    actions = parser.add_subparsers(title="actions", metavar="ACTION", dest="action", required=True)
    check = actions.add_parser(
        "check",
        help="check dispatcher.yaml, the plugins' sections and the policy file",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_config(check)
    add_json(check)
    check.set_defaults(execute=execute)


def execute(args: argparse.Namespace, console: Console) -> int:
    """Run the command."""
    problems, warnings = check_files(args.config)
    if console.as_json:
        console.data({"ok": not problems, "problems": problems, "warnings": warnings})
    else:
        for problem in problems:
            console.line(problem)
        for warning in warnings:
            console.line(f"{warning} (a warning)")
        if not problems:
            console.line("ok")
    return Exit.FAILED if problems else Exit.OK
