"""Build what virtual machines boot, and show what was built.

`guest build` fetches a kernel's Debian package with apt, unpacks it (nothing is installed), compiles the agent with gcc,
and writes kernel, initramfs and manifest into a folder named after the guest. A rule of the policy chooses one by
`with: {kernel: NAME}`; without that it is "default". Virtual machines that run keep the guest that they booted.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol

from dispatcher_hyper_vm.guest.build import build_agent, kernel_of_files, kernel_of_package, make_guest, place_guest
from dispatcher_hyper_vm.guest.debian import fetch_kernel, read_package
from dispatcher_hyper_vm.guest.exec import BuildFailed
from dispatcher_hyper_vm.guest.registry import DEFAULT, DEFAULT_FOLDER, Guest, find_guest, is_guest_name, list_guests

DEFAULT_PACKAGE = "linux-image-amd64"


class Console(Protocol):
    """Where a command writes; the command line hands it in."""

    as_json: bool

    def data(self, value: Any) -> None:
        """Print a value as JSON."""

    def table(self, header: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
        """Print columns."""

    def say(self, text: str) -> None:
        """Tell the user something that is no data."""


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the subcommands."""
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    build = commands.add_parser("build", help="build a guest, or build it anew", description=__doc__.split("\n\n")[1])
    _common(build)
    build.add_argument("--name", default=DEFAULT, help=f"the guest's name (default: {DEFAULT})")
    source = build.add_mutually_exclusive_group()
    source.add_argument(
        "--package",
        default=DEFAULT_PACKAGE,
        help=f"Debian package of the kernel (default: {DEFAULT_PACKAGE}; linux-image-cloud-amd64 is smaller and has no 9p)",
    )
    source.add_argument("--deb", metavar="FILE", type=Path, help="a kernel's package that was fetched before")
    source.add_argument("--kernel", metavar="FILE", type=Path, help="a kernel of your own: bzImage or vmlinux")
    build.add_argument("--modules", metavar="FOLDER", type=Path, help="its modules, as in /lib/modules/RELEASE")
    build.set_defaults(execute=_build)
    listing = commands.add_parser("list", help="list the guests that were built")
    _common(listing)
    listing.set_defaults(execute=_list)


def _common(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("-o", "--output", choices=("text", "json"), default="text", help="form of the output")
    parser.add_argument(
        "--folder", type=Path, default=Path(DEFAULT_FOLDER), help=f"where guests are kept (default: {DEFAULT_FOLDER})"
    )


def execute(args: argparse.Namespace, console: Console) -> int:
    """Run the subcommand; argparse has seen to it that there is one."""
    return int(args.execute(args, console))


def _build(args: argparse.Namespace, console: Console) -> int:
    if not is_guest_name(args.name):
        raise BuildFailed(f"{args.name!r} is no name of a guest: small letters, digits, '.', '_' and '-'.")
    if args.modules and not args.kernel:
        raise BuildFailed("--modules goes with --kernel.")
    try:
        if args.kernel:
            kernel = kernel_of_files(args.kernel, args.modules)
        elif args.deb:
            kernel = kernel_of_package(read_package(args.deb))
        else:
            console.say(f"fetching {args.package}")
            with tempfile.TemporaryDirectory(prefix="guest-") as place:
                kernel = kernel_of_package(fetch_kernel(args.package, Path(place)))
        console.say(f"building from kernel {kernel.release or args.kernel}")
        place_guest(make_guest(kernel, build_agent()), args.folder / args.name)
    except OSError as error:
        raise BuildFailed(f"The guest cannot be written: {error.strerror}, {error.filename}.") from error
    _show(console, (find_guest(args.folder, args.name),))
    return 0


def _list(args: argparse.Namespace, console: Console) -> int:
    _show(console, list_guests(args.folder))
    return 0


def _show(console: Console, guests: tuple[Guest, ...]) -> None:
    if console.as_json:
        console.data(
            [
                {
                    "name": guest.name,
                    "release": guest.release,
                    "package": guest.package,
                    "digest": guest.digest,
                    "kernel": str(guest.kernel),
                    "initramfs": str(guest.initramfs),
                    "bytes": guest.bytes,
                    "modules": list(guest.modules),
                }
                for guest in guests
            ]
        )
    else:
        console.table(
            ("NAME", "RELEASE", "KERNEL", "MIB", "DIGEST"),
            [(g.name, g.release, g.package, f"{g.bytes / (1 << 20):.0f}", g.digest[:12]) for g in guests],
        )
