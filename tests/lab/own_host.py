"""A host of its own for a test: network and mounts that end with it, in a thread of the test session.

A network plugin changes the host that it runs on: bridges, addresses, firewall rules. Here "the host" is a network
namespace made for the test. The threads of a process may stand in different namespaces, and what a thread starts, a
child or another thread, begins in the namespaces of its starter; so the whole test, event loop and plugins included,
runs in one thread that left the machine's. Nothing of it needs to be undone: when the thread and its children are
gone, so is the host.
"""

from __future__ import annotations

import asyncio
import ctypes
import functools
import os
import subprocess
import threading
from collections.abc import Awaitable, Callable, Iterable
from pathlib import Path
from typing import ParamSpec

import pytest

from tests.lab import census
from tests.lab.child import SYSTEM_PATH, PartMissingError, find_program, require_root

P = ParamSpec("P")

_CLONE_NEWNET, _CLONE_NEWNS = 0x40000000, 0x00020000
_MS_REC, _MS_PRIVATE = 0x4000, 1 << 18
_LIBC = ctypes.CDLL(None, use_errno=True)


def own_host(test: Callable[P, Awaitable[None]]) -> Callable[P, None]:
    """Run an async test on a host of its own, with `lo` up and a private `/var/lib/cni`. Skips where not root."""

    @functools.wraps(test)
    def run(*args: P.args, **kwargs: P.kwargs) -> None:
        try:
            require_root()
            find_program("ip")
        except PartMissingError as missing:
            pytest.skip(str(missing))
        failure: list[BaseException] = []

        def on_own_host() -> None:
            try:
                _leave_the_machine()
                asyncio.run(_await(test(*args, **kwargs)))
            except BaseException as error:  # noqa: BLE001 - raised again in the test's own thread
                failure.append(error)

        thread = threading.Thread(target=on_own_host, name=f"own-host-{test.__name__}")
        thread.start()
        thread.join()
        if failure:
            raise failure[0]

    return run


async def _await(awaitable: Awaitable[None]) -> None:
    await awaitable


def _leave_the_machine() -> None:
    if _LIBC.unshare(_CLONE_NEWNET | _CLONE_NEWNS) != 0:
        pytest.skip(f"namespaces cannot be made here: {os.strerror(ctypes.get_errno())}")
    if _LIBC.mount(b"none", b"/", None, _MS_REC | _MS_PRIVATE, None) != 0:
        raise OSError(ctypes.get_errno(), "mount --make-rprivate /")
    Path("/var/lib/cni").mkdir(parents=True, exist_ok=True)
    if _LIBC.mount(b"none", b"/var/lib/cni", b"tmpfs", 0, None) != 0:
        raise OSError(ctypes.get_errno(), "mount /var/lib/cni")
    run("ip link set lo up")


def run(command: str, *, netns: Path | None = None, check: bool = True) -> str:
    """Run a command line (blanks separate, no shell) on this host, or in a namespace of it; returns what it printed."""
    prefix = ["nsenter", f"--net={netns}"] if netns is not None else []
    environment = {**os.environ, "PATH": os.environ.get("PATH", "") + ":" + SYSTEM_PATH}
    done = subprocess.run([*prefix, *command.split()], capture_output=True, text=True, check=False, env=environment)
    if check and done.returncode != 0:
        raise AssertionError(f"{command}: {done.stderr.strip()}")
    return done.stdout


def take_census(*folders: Path) -> dict[str, frozenset[str]]:
    """What this host has: links, addresses, routes and firewall rules; below `folders` files and mounted namespaces.

    What the kernel adds by itself for IPv6 is left out: it comes and goes with the first and last port of a bridge.
    """
    scope = census.Scope(files=folders)
    kinds = (census.links, census.addresses, census.routes, census.iptables, census.nft, census.files)
    found = {kind.__name__: frozenset(kind(scope)) for kind in kinds}
    found["addresses"] = frozenset(entry for entry in found["addresses"] if " fe80:" not in entry)
    found["routes"] = frozenset(
        entry for entry in found["routes"] if not (entry.startswith("-6") and "protocol kernel" in entry)
    )
    return found | {"namespaces": frozenset(_mounted_namespaces(folders))}


def _mounted_namespaces(folders: Iterable[Path]) -> Iterable[str]:
    """Only those below the folders: the mounts of the machine were copied when this host was made."""
    for line in Path("/proc/thread-self/mountinfo").read_text().splitlines():
        fields = line.split()
        if "nsfs" in fields[fields.index("-") :] and any(Path(fields[4]).is_relative_to(top) for top in folders):
            yield f"{fields[3]} at {fields[4]}"
