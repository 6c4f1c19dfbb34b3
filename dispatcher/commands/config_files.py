"""Finding, loading and checking dispatcher.yaml and the policy file for commands that work on files."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from dispatcher.commands.output import Failure

if TYPE_CHECKING:
    from dispatcher.config import LoadedConfig


def add_config(parser: argparse.ArgumentParser) -> None:
    """Add the option that names dispatcher.yaml."""
    parser.add_argument(
        "--config",
        metavar="FILE",
        help="dispatcher.yaml (default: /etc/dispatcher/dispatcher.yaml; without that file, all defaults)",
    )


def load(path: str | None) -> LoadedConfig:
    """Load dispatcher.yaml. Without a name and without a file at the usual place, all defaults hold.

    Raises:
        Failure: with every problem of the file.
    """
    from dispatcher.config import DEFAULT_PATH, load_config, parse_config
    from dispatcher.yaml_marks import YamlError

    try:
        if path is None and not DEFAULT_PATH.exists():
            return parse_config("", "defaults")
        return load_config(Path(path) if path is not None else DEFAULT_PATH)
    except YamlError as error:
        raise Failure(str(error), hint="`dispatcher config check` checks the whole file") from error


def check_files(path: str | None) -> tuple[list[str], list[str]]:
    """Return every problem and every warning of the configuration, each as "file:line:column: message"."""
    from dispatcher.commands.offline import check_policy
    from dispatcher.registry.registry import check_sections

    try:
        loaded = load(path)
    except Failure as failure:
        return failure.message.splitlines(), []
    problems = [str(problem) for problem in check_sections(loaded)]
    errors, warnings = check_policy(loaded, loaded.config.policy)
    return problems + [str(error) for error in errors], [str(warning) for warning in warnings]
