"""`dispatcher ...` and `python -m dispatcher ...`."""

from __future__ import annotations

import sys

from dispatcher.commands.cli import main as run_command


def main() -> None:
    """Run the command line; the process ends with its exit code."""
    sys.exit(run_command())


if __name__ == "__main__":
    main()
