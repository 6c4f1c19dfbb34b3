"""Run the daemon in the foreground, until SIGTERM or SIGINT. Pods go on running without it.

Under systemd it reports being ready, its state and its watchdog. SIGHUP reads the policy file again, which a change of
the file does as well.
"""

from __future__ import annotations

import argparse

from dispatcher.commands.config_files import add_config, load
from dispatcher.commands.output import Console, Exit, Failure


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the options."""
    add_config(parser)
    parser.add_argument("--log-level", choices=("debug", "info", "warning", "error"), help="wins over the file")
    parser.add_argument("--log-format", choices=("auto", "json", "text"), help="wins over the file")


def execute(args: argparse.Namespace, console: Console) -> int:
    """Run the command."""
    import asyncio
    import gc

    # Imports make much and throw nothing away: looking for garbage meanwhile is a tenth of a start for nothing.
    gc.disable()
    from dispatcher.app import serve
    from dispatcher.errors import DispatcherError
    from dispatcher.observability import configure_logging

    del console
    loaded = load(args.config)
    logging = loaded.config.logging
    configure_logging(level=args.log_level or logging.level, style=args.log_format or logging.format)
    gc.freeze()
    gc.enable()
    try:
        asyncio.run(serve(loaded))
    except DispatcherError as error:
        raise Failure(error.message) from error
    return Exit.OK
