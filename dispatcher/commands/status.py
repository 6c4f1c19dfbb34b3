"""Show whether the node can run pods: conditions, runtimes, policy, the last recovery.

Ends with 1 when a condition that a kubelet needs is false.
"""

from __future__ import annotations

import argparse
import asyncio
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from dispatcher.commands.connection import add_endpoint, add_json, connect, parse_info, positive_seconds
from dispatcher.commands.output import Console, Exit, Failure

if TYPE_CHECKING:
    from dispatcher.cri.client import CriClient

_NEEDED = ("RuntimeReady", "NetworkReady")
_POLL_S = 0.5


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the options."""
    add_json(parser)
    add_endpoint(parser)
    parser.add_argument("--config", action="store_true", help="show the configuration in effect as well")
    parser.add_argument(
        "--wait", metavar="SECONDS", type=positive_seconds, help="wait up to this time for the node to become ready"
    )


async def execute(args: argparse.Namespace, console: Console) -> int:
    """Run the command."""
    deadline = time.monotonic() + (args.wait or 0)
    told = False
    while True:
        try:
            found = await _ask(args)
        except Failure:
            if time.monotonic() >= deadline:
                raise
            found = {}
        if found and (is_ready(found) or time.monotonic() >= deadline):
            break
        if not told:
            console.say("waiting for the node to become ready")
            told = True
        await asyncio.sleep(_POLL_S)
    if not args.config:
        found["info"].pop("config", None)
    if console.as_json:
        console.data(found)
    else:
        _show(found, console)
    return Exit.OK if is_ready(found) else Exit.FAILED


async def _ask(args: argparse.Namespace) -> dict[str, Any]:
    async with connect(args) as client:
        return await ask(client)


async def ask(client: CriClient) -> dict[str, Any]:
    """Return what the daemon says of itself: conditions, handlers, and all of its verbose info."""
    version, reply = await asyncio.gather(client.call("Version"), client.call("Status", verbose=True))
    return {
        "endpoint": client.endpoint.path,
        "version": f"{version.runtime_name} {version.runtime_version}",
        "conditions": [
            {"type": item.type, "status": item.status, "reason": item.reason, "message": item.message}
            for item in reply.status.conditions
        ],
        "handlers": [handler.name for handler in reply.runtime_handlers],
        "info": parse_info(reply.info),
    }


def is_ready(found: Mapping[str, Any]) -> bool:
    """Say whether the conditions that a kubelet needs hold."""
    states = {item["type"]: item["status"] for item in found["conditions"]}
    return all(states.get(name, False) for name in _NEEDED)


def _show(found: Mapping[str, Any], console: Console) -> None:
    info = found["info"]
    console.fields([("daemon", found["version"]), ("socket", found["endpoint"])])
    console.line()
    console.table(
        ("CONDITION", "STATUS", "REASON", "MESSAGE"),
        [(item["type"], _yes(item["status"]), item["reason"], item["message"]) for item in found["conditions"]],
    )
    runtimes = info.get("runtimes")
    if isinstance(runtimes, dict) and runtimes:
        console.line()
        console.table(
            ("RUNTIME", "READY", "ENGINE", "REASON", "MESSAGE"),
            [
                (name, _yes(health.get("ready")), health.get("engine"), health.get("reason"), _with_notes(health))
                for name, health in sorted(runtimes.items())
                if isinstance(health, dict)
            ],
        )
    for title in ("policy", "recovery"):
        section = info.get(title)
        if section:
            console.line()
            console.line(f"{title}:")
            for line in outline(section):
                console.line(f"  {line}")
    if "config" in info:
        console.line()
        console.line("config:")
        for line in outline(info["config"]):
            console.line(f"  {line}")


def _yes(value: object) -> str:
    return "yes" if value else "no"


def _with_notes(health: Mapping[str, Any]) -> str:
    return "; ".join(str(part) for part in [health.get("message"), *(health.get("notes") or ())] if part)


def outline(value: Any, indent: str = "") -> list[str]:
    """Return nested values as indented "name: value" lines, without those that are empty."""
    from dispatcher.commands.output import printable

    lines: list[str] = []
    if isinstance(value, dict):
        for key, item in value.items():
            if item in (None, "", [], {}):
                continue
            if isinstance(item, dict | list):
                lines.append(f"{indent}{printable(key)}:")
                lines += outline(item, indent + "  ")
            else:
                lines.append(f"{indent}{printable(key)}: {printable(item)}")
    elif isinstance(value, list):
        for item in value:
            if isinstance(item, dict | list):
                nested = outline(item, indent + "  ")
                if nested:
                    lines.append(f"{indent}- {nested[0].lstrip()}")
                    lines += nested[1:]
            else:
                lines.append(f"{indent}- {printable(item)}")
    else:
        lines.append(f"{indent}{printable(value)}")
    return lines
