"""Writes docs/cli.md from the parsers of the commands: `python scripts/cli_docs.py` (with --check: only compares).

Everything comes from what the program itself uses: options from the parsers, texts from the modules, the fields of a
manifest from its schema. argparse's own formatter is not used, because its layout differs between Python versions.
"""

from __future__ import annotations

import argparse
import inspect
import sys
import typing
from collections.abc import Iterator
from pathlib import Path

from pydantic import BaseModel

from dispatcher.commands import cli
from dispatcher.commands.connection import DEFAULT_ENDPOINT, ENDPOINT_VARIABLE
from dispatcher.commands.pod_folders import DEFAULT_PODS_DIR, PODS_DIR_VARIABLE
from dispatcher.manifest import schema

TARGET = Path(__file__).resolve().parent.parent / "docs" / "cli.md"

INTRO = f"""\
# Command line

This page is written by `python scripts/cli_docs.py` from the program itself; a test compares the two.

`serve` runs the daemon. `config check`, `doctor` and `explain -f` work on files, without a daemon. All other commands
talk to a running daemon over its CRI socket, as a kubelet does. They print data to standard output and everything else
to standard error; with `-o json` the data is JSON.

| variable | meaning |
|---|---|
| `{ENDPOINT_VARIABLE}` | the daemon's socket, instead of `{DEFAULT_ENDPOINT}` |
| `{PODS_DIR_VARIABLE}` | where `run` and `play` keep volumes and logs, instead of `{DEFAULT_PODS_DIR}` |
| `NO_COLOR` | no colours in the daemon's log on a terminal |

A pod is named by its id, the beginning of its id, its name, or namespace/name. Where a name stands for several attempts
of one pod, the newest is meant. A container is named by its id or by its pod, with `-c` where the pod has several.

## Exit codes

"""


def commands() -> Iterator[tuple[str, argparse.ArgumentParser]]:
    """Yield all commands that can be run, with subcommands spelled in full."""
    yield from _below(cli.build_parser(), "")


def _below(parser: argparse.ArgumentParser, prefix: str) -> Iterator[tuple[str, argparse.ArgumentParser]]:
    for action in parser._actions:  # noqa: SLF001 - argparse has no public way to look at a parser
        if not isinstance(action, argparse._SubParsersAction):  # noqa: SLF001 - same
            continue
        for name, child in action.choices.items():
            inner = list(_below(child, f"{prefix}{name} "))
            yield from inner or [(f"{prefix}{name}", child)]


def visible(parser: argparse.ArgumentParser) -> list[argparse.Action]:
    """Return a parser's arguments but for help and hidden ones."""
    return [
        action
        for action in parser._actions  # noqa: SLF001 - as above
        if action.help != argparse.SUPPRESS and not isinstance(action, argparse._HelpAction)  # noqa: SLF001 - as above
    ]


def spell(action: argparse.Action) -> str:
    """Return an argument as it is typed."""
    value = ""
    if action.nargs != 0:
        value = action.metavar if isinstance(action.metavar, str) else "|".join(map(str, action.choices or ("VALUE",)))
    if not action.option_strings:
        return f"{value}..." if action.nargs in ("*", argparse.REMAINDER) else value
    return ", ".join(action.option_strings) + (f" {value}" if value else "")


def render_command(name: str, parser: argparse.ArgumentParser) -> str:
    """Return the section of one command."""
    arguments = visible(parser)
    positional = [action for action in arguments if not action.option_strings]
    options = [action for action in arguments if action.option_strings]
    words = [f"[{spell(a)}]" if a.nargs in ("?", "*") else spell(a) for a in positional]
    synopsis = " ".join(["dispatcher", name, *(["[OPTIONS]"] if options else []), *words])
    lines = [f"## {name}", "", f"    {synopsis}", "", inspect.cleandoc(parser.description or ""), ""]
    if arguments:
        lines += ["| argument | meaning |", "|---|---|"]
        for action in [*positional, *options]:
            text = (action.help or "").replace("|", "\\|")
            spelled = spell(action).replace("|", "\\|")
            lines.append(f"| `{spelled}` | {text} |")
        lines.append("")
    if parser.epilog:
        lines += ["    " + line if line else "" for line in parser.epilog.rstrip().splitlines()]
        lines.append("")
    return "\n".join(lines)


def manifest_fields() -> str:
    """Return the list of fields that a manifest may have."""
    lines = [
        "## Manifests",
        "",
        "`play` and `explain -f` read Pod, ConfigMap and Secret documents with these fields, whose meaning is that of",
        "Kubernetes. Every other field is refused by its name, with line and column.",
        "",
    ]
    for kind in ("Pod", "ConfigMap", "Secret"):
        lines += [f"    {kind}"]
        lines += [f"      {path}" for path in sorted(_fields(getattr(schema, kind), ""))]
        lines.append("")
    return "\n".join(lines)


def _fields(model: type[BaseModel], prefix: str) -> Iterator[str]:
    for name, info in model.model_fields.items():
        path = f"{prefix}{info.alias or name}"
        inner = list(_models(info.annotation))
        many = "[]" if typing.get_origin(info.annotation) is list else ""
        if not inner:
            yield path
        for child in inner:
            yield from _fields(child, f"{path}{many}.")


def _models(annotation: object) -> Iterator[type[BaseModel]]:
    if inspect.isclass(annotation) and typing.get_origin(annotation) is None:
        if issubclass(annotation, BaseModel):
            yield annotation
        return
    for argument in typing.get_args(annotation):
        yield from _models(argument)


def render() -> str:
    """Return the whole page."""
    codes = "\n".join("    " + line if line else "" for line in cli.EXIT_CODES.splitlines()[1:])
    sections = [render_command(name, parser) for name, parser in commands()]
    return "\n".join([INTRO + codes, "", *sections, manifest_fields()])


def main() -> int:
    """Write or compare."""
    page = render()
    if "--check" in sys.argv[1:]:
        return 0 if TARGET.read_text(encoding="utf-8") == page else 1
    TARGET.write_text(page, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
