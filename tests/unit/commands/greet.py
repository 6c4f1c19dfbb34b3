"""A plugin's command, for a test."""

from __future__ import annotations

import argparse

from dispatcher.commands.output import Console
from dispatcher.errors import NotFound


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("whom")


def execute(args: argparse.Namespace, console: Console) -> int:
    if args.whom == "nobody":
        raise NotFound("nobody is here")
    console.line(f"hello {args.whom}")
    return 0
