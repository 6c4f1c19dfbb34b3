"""Check configuration files without a daemon.

`config check` reads dispatcher.yaml, the sections of the enabled plugins, and the policy file with its own tests. Every
problem is printed as file:line:column: message; ends with 1 when there is one.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from dispatcher.commands.connection import add_json
from dispatcher.commands.output import Console, Exit, Failure

if TYPE_CHECKING:
    from dispatcher.commands.doctor_checks import Settings
    from dispatcher.config import LoadedConfig


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


def add_config(parser: argparse.ArgumentParser) -> None:
    """Add the option that names dispatcher.yaml."""
    parser.add_argument(
        "--config",
        metavar="FILE",
        help="dispatcher.yaml (default: /etc/dispatcher/dispatcher.yaml; without that file, all defaults)",
    )


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


def read_settings(path: str | None) -> Settings | None:
    """Return what `doctor` needs of the configuration, None when it cannot be loaded."""
    from dispatcher.commands.doctor_checks import Settings

    try:
        config = load(path).config
    except Failure:
        return None
    defaults = Settings()
    docker, cni = config.plugins.section("docker_shim"), config.plugins.section("cni")
    default_network = cni.get("default_network")
    return Settings(
        socket=config.socket.path,
        state_dir=config.state_dir,
        run_dir=config.run_dir,
        metrics_address=(config.metrics.host, config.metrics.port) if config.metrics.enabled else None,
        cgroup_driver=config.cgroup_driver,
        plugins=tuple(config.plugins.enabled),
        docker_socket=Path(str(docker.get("socket", defaults.docker_socket))),
        cni_conf_dirs=_paths(cni.get("conf_dirs"), defaults.cni_conf_dirs),
        cni_bin_dirs=_paths(cni.get("bin_dirs"), defaults.cni_bin_dirs),
        cni_default_allowed=isinstance(default_network, dict) and default_network.get("allow") is True,
    )


def _paths(value: object, default: tuple[Path, ...]) -> tuple[Path, ...]:
    return tuple(Path(str(item)) for item in value) if isinstance(value, list) else default
