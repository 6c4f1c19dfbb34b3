"""Check this node and print how to mend what is wrong.

Works without the daemon. Ends with 1 when something is broken, and with 0 when there are only hints.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from dispatcher.commands.config_files import add_config
from dispatcher.commands.connection import add_json
from dispatcher.commands.output import Console, Exit, printable

_MARKS = {"ok": "ok    ", "hint": "hint  ", "broken": "BROKEN"}


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the options."""
    add_json(parser)
    add_config(parser)
    parser.add_argument("-q", "--quiet", action="store_true", help="print only what is not well")
    parser.add_argument("--root", metavar="DIR", default="/", help=argparse.SUPPRESS)


async def execute(args: argparse.Namespace, console: Console) -> int:
    """Run the command."""
    from dispatcher.commands.doctor_checks import Node, run_checks

    findings = run_checks(Node(root=Path(args.root)), args.config)
    broken = [finding for finding in findings if finding.grade == "broken"]
    if console.as_json:
        console.data(
            {
                "healthy": not broken,
                "checks": [
                    {"check": item.check, "grade": item.grade, "message": item.message, "mend": item.mend}
                    for item in findings
                ],
            }
        )
        return Exit.FAILED if broken else Exit.OK
    width = max(len(finding.check) for finding in findings)
    for finding in findings:
        if args.quiet and finding.grade == "ok":
            continue
        console.line(f"{_MARKS[finding.grade]}  {finding.check:<{width}}  {printable(finding.message)}")
        for line in finding.mend.splitlines():
            console.line(f"{'':8}{'':<{width}}  -> {printable(line)}")
    hints = sum(finding.grade == "hint" for finding in findings)
    console.line(f"{len(findings)} checks: {len(broken)} broken, {hints} with a hint")
    return Exit.FAILED if broken else Exit.OK
