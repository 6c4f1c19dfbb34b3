"""Print the versions of this program, of its plugin interface, and of the daemon where one answers."""

from __future__ import annotations

import argparse
import platform

from dispatcher.commands.connection import add_endpoint, add_json, connect
from dispatcher.commands.output import Console, Exit, Failure


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the options."""
    add_json(parser)
    add_endpoint(parser)
    parser.add_argument("--client", action="store_true", help="do not ask the daemon")


async def execute(args: argparse.Namespace, console: Console) -> int:
    """Run the command."""
    from dispatcher.api import API_VERSION
    from dispatcher.version import program_version

    found: dict[str, object] = {
        "client": program_version(),
        "plugin_api": ".".join(str(part) for part in API_VERSION),
        "python": platform.python_version(),
    }
    code = Exit.OK
    if not args.client:
        try:
            async with connect(args) as client:
                reply = await client.call("Version", version="0.1.0")
                found["daemon"] = f"{reply.runtime_name} {reply.runtime_version}"
                found["cri"] = reply.runtime_api_version
        except Failure as failure:
            found["daemon"] = None
            found["daemon_error"] = failure.message
            code = failure.code
    if console.as_json:
        console.data(found)
    else:
        console.fields(
            [
                ("client", found["client"]),
                ("daemon", found.get("daemon") or f"none ({found['daemon_error']})" if not args.client else ""),
                ("CRI", found.get("cri", "")),
                ("plugin interface", found["plugin_api"]),
                ("Python", found["python"]),
            ]
        )
    return code
