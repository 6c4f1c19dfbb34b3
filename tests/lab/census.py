"""What exists on this machine that a test could leave behind, taken before and after and compared.

One script for every test that claims to clean up, and by hand:

    python -m tests.lab.census take FILE [--files DIR]... [--engine SOCKET]...
    python -m tests.lab.census compare BEFORE AFTER [--ignore REGEX]...

Each kind is a set of one-line entries, so a difference reads as a list of what is new and what is gone. Counters,
times and other things that move by themselves are left out of the entries. Every kind has a negative control in
tests/unit/lab: a test makes such a thing, and the comparison must show it.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final
from urllib.parse import quote

from tests.lab.child import SYSTEM_PATH
from tests.lab.http import request

_TCP_LISTEN: Final = "0A"
_UDP_OPEN: Final = "07"


@dataclass(frozen=True, slots=True, kw_only=True)
class Scope:
    """What a census looks at beyond the machine-wide kinds.

    Attributes:
        files: Folders whose whole content counts.
        engines: Sockets of Docker Engines whose containers count.
        mine: Our own pid: this process, its ancestors and threads are never counted.
    """

    files: Sequence[Path] = ()
    engines: Sequence[Path] = ()
    mine: int = field(default_factory=os.getpid)


@dataclass(frozen=True, slots=True)
class Census:
    """A snapshot: entries by kind."""

    kinds: Mapping[str, frozenset[str]]

    def to_json(self) -> str:
        """The snapshot as text."""
        return json.dumps({kind: sorted(entries) for kind, entries in self.kinds.items()}, indent=1)

    @classmethod
    def from_json(cls, text: str) -> Census:
        """Read what `to_json` wrote."""
        return cls({kind: frozenset(entries) for kind, entries in json.loads(text).items()})


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """What came and what went of one kind."""

    kind: str
    added: tuple[str, ...]
    removed: tuple[str, ...]

    def __str__(self) -> str:
        lines = [f"{self.kind}:"]
        lines += [f"  + {entry}" for entry in self.added]
        lines += [f"  - {entry}" for entry in self.removed]
        return "\n".join(lines)


def take(scope: Scope | None = None) -> Census:
    """Take a snapshot of everything."""
    scope = scope or Scope()
    return Census({kind: frozenset(read(scope)) for kind, read in KINDS.items()})


def compare(before: Census, after: Census, *, ignore: Iterable[str] = ()) -> list[Difference]:
    """The kinds that differ. Entries that match one of the `ignore` expressions are left out."""
    patterns = [re.compile(expression) for expression in ignore]

    def wanted(entries: Iterable[str]) -> tuple[str, ...]:
        return tuple(sorted(entry for entry in entries if not any(pattern.search(entry) for pattern in patterns)))

    found = []
    for kind in sorted({*before.kinds, *after.kinds}):
        old, new = before.kinds.get(kind, frozenset()), after.kinds.get(kind, frozenset())
        added, removed = wanted(new - old), wanted(old - new)
        if added or removed:
            found.append(Difference(kind=kind, added=added, removed=removed))
    return found


def assert_clean(
    before: Census,
    scope: Scope | None = None,
    *,
    ignore: Iterable[str] = (),
    kinds: Iterable[str] | None = None,
    settle_s: float = 10,
) -> None:
    """Assert that nothing differs from `before`, giving the kernel and init a while to take things away.

    Args:
        before: The snapshot to return to.
        scope: As for `take`; the same as for `before`.
        ignore: Expressions of entries that belong to others.
        kinds: Only these kinds count; all by default.
        settle_s: How long a difference may last. Init here and there reaps orphans only every other second.

    Raises:
        AssertionError: With the differences.
    """
    chosen = set(kinds) if kinds is not None else None
    ignore = list(ignore)
    deadline = time.monotonic() + settle_s
    while True:
        found = [part for part in compare(before, take(scope), ignore=ignore) if chosen is None or part.kind in chosen]
        if not found:
            return
        if time.monotonic() > deadline:
            raise AssertionError("left behind or taken away:\n" + "\n".join(map(str, found)))
        time.sleep(0.2)


# ------------------------------------------------------------------------------------------------------------- kinds


def namespaces(scope: Scope) -> Iterable[str]:
    """Namespaces that a process, a mount or an ip-netns name keeps alive."""
    own = _own_pids(scope)
    for pid in _pids():
        if pid in own:
            continue
        for name in ("net", "mnt", "ipc", "uts", "pid", "user", "cgroup"):
            with suppress(OSError):
                yield str(Path(f"/proc/{pid}/ns/{name}").readlink())
    for fields in _mountinfo():
        if "nsfs" in fields[fields.index("-") :]:
            yield f"pinned {fields[3]} at {fields[4]}"
    for folder in ("/run/netns", "/run/docker/netns"):
        with suppress(OSError):
            for entry in os.scandir(folder):
                yield f"named {entry.path}"


def links(_scope: Scope) -> Iterable[str]:
    """Network devices of our network namespace."""
    for link in _ip("link"):
        kind = link.get("linkinfo", {}).get("info_kind", link.get("link_type", ""))
        master = f" master {link['master']}" if "master" in link else ""
        yield f"{link['ifname']} {kind}{master}"


def addresses(_scope: Scope) -> Iterable[str]:
    """Addresses of our network namespace."""
    for link in _ip("address"):
        for address in link.get("addr_info", []):
            yield f"{link['ifname']} {address['local']}/{address['prefixlen']}"


def routes(_scope: Scope) -> Iterable[str]:
    """Routes of all tables, and routing rules."""
    for family in ("-4", "-6"):
        for route in _ip(family, "route", table=True):
            parts = (f"{key} {route[key]}" for key in ("dst", "gateway", "dev", "table", "protocol") if key in route)
            yield f"{family} " + " ".join(parts)
        for rule in _ip(family, "rule"):
            yield f"{family} rule " + json.dumps(rule, sort_keys=True)


def iptables(_scope: Scope) -> Iterable[str]:
    """Chains and rules that the iptables programs show, of both back-ends, without counters."""
    seen = set()
    for name in ("iptables-save", "ip6tables-save", "iptables-legacy-save", "ip6tables-legacy-save"):
        for line in _lines(name):
            if line.startswith("*"):
                table = line
            elif line.startswith(":"):
                chain, policy = line.split()[:2]
                # Programs make the built-in chains of a table by merely looking at it.
                if policy == "-":
                    seen.add(f"{name} {table} {chain}")
            elif line.startswith("-"):
                seen.add(f"{name} {table} {line}")
    return seen


def nft(_scope: Scope) -> Iterable[str]:
    """Tables, chains, sets and rules of nftables, without handles and counters."""
    text = "\n".join(_lines("nft", "-j", "list", "ruleset"))
    for item in json.loads(text).get("nftables", []) if text else []:
        for kind, value in item.items():
            if kind != "metainfo":
                if kind in {"table", "chain"} and _is_empty_standard(kind, value):
                    continue
                yield f"{kind} " + json.dumps(_without_numbers(value), sort_keys=True)


def mounts(_scope: Scope) -> Iterable[str]:
    """Mounts of our mount namespace."""
    for fields in _mountinfo():
        after = fields[fields.index("-") + 1 :]
        shared = [part for part in fields[6 : fields.index("-")] if not part.startswith(("shared:", "master:"))]
        yield " ".join([fields[4], fields[3], after[0], after[1], *shared])


def cgroups(_scope: Scope) -> Iterable[str]:
    """Control groups of every hierarchy."""
    for folder, _names, _files in os.walk("/sys/fs/cgroup"):
        yield folder


def containers(scope: Scope) -> Iterable[str]:
    """Containers of the engines in the scope."""
    for socket in scope.engines:
        with suppress(OSError):
            for container in request(socket, "GET", "/containers/json?all=1").json():
                yield f"{socket} {container['Id']} {' '.join(container['Names'])}"


def processes(scope: Scope) -> Iterable[str]:
    """Processes with their start time, so that a reused pid is another process. Kernel threads do not count."""
    own = _own_pids(scope)
    for pid in _pids():
        with suppress(OSError, ValueError):
            text = Path(f"/proc/{pid}/stat").read_text()
            after = text.rpartition(")")[2].split()
            if pid in own or pid == 2 or after[1] == "2":
                continue
            argv = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
            yield f"{pid}@{after[19]} {argv or text[text.index('(') : text.rindex(')') + 1]}"


def sockets(_scope: Scope) -> Iterable[str]:
    """Listening TCP, open UDP and named UNIX sockets of our network namespace."""
    for name in ("tcp", "tcp6", "udp", "udp6"):
        with suppress(OSError):
            for line in Path(f"/proc/net/{name}").read_text().splitlines()[1:]:
                _slot, local, _remote, state = line.split()[:4]
                if state == (_TCP_LISTEN if name.startswith("tcp") else _UDP_OPEN):
                    yield f"{name} {local}"
    with suppress(OSError):
        for line in Path("/proc/net/unix").read_text().splitlines()[1:]:
            parts = line.split(maxsplit=7)
            # Flag 00010000 marks a listening socket; the peers that it accepted carry the same path.
            if len(parts) == 8 and (parts[3] == "00010000" or parts[4] == "0002"):
                yield f"unix {quote(parts[7], safe='/@.-_:')}"


def files(scope: Scope) -> Iterable[str]:
    """Everything below the folders of the scope, with type and, for links, target."""
    for top in scope.files:
        for folder, names, leaves in os.walk(top):
            for name in (*names, *leaves):
                path = Path(folder, name)
                with suppress(OSError):
                    mode = path.lstat().st_mode
                    target = f" -> {path.readlink()}" if stat.S_ISLNK(mode) else ""
                    yield f"{stat.filemode(mode)[0]} {path}{target}"


KINDS: Final[Mapping[str, Callable[[Scope], Iterable[str]]]] = {
    "namespaces": namespaces,
    "links": links,
    "addresses": addresses,
    "routes": routes,
    "iptables": iptables,
    "nft": nft,
    "mounts": mounts,
    "cgroups": cgroups,
    "containers": containers,
    "processes": processes,
    "sockets": sockets,
    "files": files,
}


# ----------------------------------------------------------------------------------------------------------- reading


def _pids() -> list[int]:
    return [int(folder.name) for folder in Path("/proc").iterdir() if folder.name.isdigit()]


def _own_pids(scope: Scope) -> set[int]:
    """The census itself and its ancestors: their coming and going is the test's own."""
    own, pid = set(), scope.mine
    while pid > 1:
        own.add(pid)
        try:
            pid = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
        except OSError:
            break
    return own


def _mountinfo() -> list[list[str]]:
    return [line.split() for line in Path("/proc/self/mountinfo").read_text().splitlines()]


def _lines(*command: str) -> list[str]:
    """Output lines of a program; none when it is not installed or has nothing to say."""
    environment = {**os.environ, "PATH": os.environ.get("PATH", "") + ":" + SYSTEM_PATH}
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    except FileNotFoundError:
        return []
    return done.stdout.splitlines() if done.returncode == 0 else []


def _ip(*what: str, table: bool = False) -> list[dict[str, Any]]:
    text = "".join(_lines("ip", "-j", "-d", *what, "show", *(["table", "all"] if table else [])))
    found: list[dict[str, Any]] = json.loads(text) if text else []
    return [entry for entry in found if entry]


def _without_numbers(value: object) -> object:
    """An nftables object without what changes by itself."""
    if isinstance(value, dict):
        moving = {"handle", "packets", "bytes", "index"}
        return {key: _without_numbers(part) for key, part in value.items() if key not in moving}
    if isinstance(value, list):
        return [_without_numbers(part) for part in value]
    return value


def _is_empty_standard(kind: str, value: Mapping[str, object]) -> bool:
    """The iptables programs make their tables and built-in chains as soon as they look; those are nobody's."""
    standard = {"filter", "nat", "mangle", "raw", "security"}
    if kind == "table":
        return value.get("family") in {"ip", "ip6"} and value.get("name") in standard
    return value.get("table") in standard and value.get("policy") == "accept"


# ------------------------------------------------------------------------------------------------------ command line


def main(arguments: Sequence[str] | None = None) -> int:
    """Take or compare snapshots. Exit code 1 means that they differ."""
    parser = argparse.ArgumentParser(prog="census", description="What exists on this machine, before and after.")
    commands = parser.add_subparsers(dest="command", required=True)
    taking = commands.add_parser("take", help="write a snapshot")
    taking.add_argument("file", type=Path)
    taking.add_argument("--files", type=Path, action="append", default=[], help="a folder whose content counts")
    taking.add_argument("--engine", type=Path, action="append", default=[], help="socket of a Docker Engine")
    comparing = commands.add_parser("compare", help="compare two snapshots")
    comparing.add_argument("before", type=Path)
    comparing.add_argument("after", type=Path)
    comparing.add_argument("--ignore", action="append", default=[], help="expression of entries to leave out")
    options = parser.parse_args(arguments)
    if options.command == "take":
        census = take(Scope(files=options.files, engines=options.engine))
        options.file.write_text(census.to_json())
        print(" ".join(f"{kind}={len(entries)}" for kind, entries in census.kinds.items()))
        return 0
    before, after = (Census.from_json(path.read_text()) for path in (options.before, options.after))
    found = compare(before, after, ignore=options.ignore)
    print("\n".join(map(str, found)) if found else "clean")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
