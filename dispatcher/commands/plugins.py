"""List the plugins that the daemon knows: what each offers, whether it is active, and why it failed.

Ends with 1 when an enabled plugin failed.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from typing import Any

from dispatcher.commands.connection import add_endpoint, add_json, connect, parse_info
from dispatcher.commands.output import Console, Exit, Failure


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the options."""
    add_json(parser)
    add_endpoint(parser)


async def execute(args: argparse.Namespace, console: Console) -> int:
    """Run the command."""
    async with connect(args) as client:
        reply = await client.call("Status", verbose=True)
    plugins = parse_info(reply.info).get("plugins")
    if not isinstance(plugins, list):
        raise Failure("this daemon does not report its plugins", hint="is it another CRI runtime? see -e")
    if console.as_json:
        console.data(plugins)
    else:
        console.table(
            ("PLUGIN", "VERSION", "STATE", "OFFERS", "MESSAGE"),
            [
                (
                    plugin.get("name"),
                    plugin.get("version"),
                    plugin.get("state"),
                    _offers(plugin),
                    plugin.get("error") or plugin.get("message"),
                )
                for plugin in plugins
            ],
        )
    return Exit.FAILED if any(plugin.get("error") for plugin in plugins) else Exit.OK


def _offers(plugin: Mapping[str, Any]) -> str:
    offers = plugin.get("offers") or ()
    if isinstance(offers, dict):
        return ", ".join(f"{kind}: {', '.join(map(str, names))}" for kind, names in offers.items() if names)
    return ", ".join(str(offer) for offer in offers)
