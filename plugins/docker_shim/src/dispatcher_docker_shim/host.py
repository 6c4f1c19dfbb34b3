"""What the host's kernel knows of the engine's processes: /proc, pidfds and namespaces. Linux only, as root.

Container processes are hostile: a pid is only trusted together with its start time or a pidfd.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import resource
import signal
from dataclasses import dataclass
from pathlib import Path

from dispatcher.api import effect

_PROC = Path("/proc")
_CAP_SYS_RESOURCE = 24
_TREE_PASSES = 8  # each pass stops what it finds, so a tree that forks wildly still comes to an end


@dataclass(frozen=True, slots=True)
class Stat:
    """The fields of /proc/PID/stat that matter here. `started` is in clock ticks since boot."""

    pid: int
    state: str
    parent: int
    session: int
    started: int


def read_stat(pid: int) -> Stat | None:
    """The process's stat, or None where there is none."""
    try:
        text = (_PROC / str(pid) / "stat").read_text(encoding="ascii", errors="replace")
    except OSError:
        return None
    fields = text.rpartition(")")[2].split()
    return Stat(pid, fields[0], int(fields[1]), int(fields[3]), int(fields[19]))


def is_running(pid: int, started: int) -> bool:
    """True while the very process that had `pid` at start time `started` runs (a zombie does not)."""
    found = read_stat(pid)
    return found is not None and found.started == started and found.state not in "ZX"


def started_at_ns(pid: int) -> int:
    """When a process started, in nanoseconds since the epoch; 0 where it does not exist."""
    found = read_stat(pid)
    if found is None:
        return 0
    ticks = os.sysconf("SC_CLK_TCK")
    boot_ns = 0
    with contextlib.suppress(OSError, ValueError, StopIteration):
        lines = (_PROC / "stat").read_text(encoding="ascii").splitlines()
        boot_ns = int(next(line for line in lines if line.startswith("btime ")).split()[1]) * 1_000_000_000
    return boot_ns + found.started * (1_000_000_000 // ticks)


def engine_pid(peer_pid: int, pid_file: Path = Path("/run/docker.pid")) -> int:
    """The engine's process: the peer of its socket, or, where systemd made the socket, the one in its pid file.

    Returns 0 where it cannot be told.
    """
    candidates = [peer_pid]
    with contextlib.suppress(OSError, ValueError):
        candidates.append(int(pid_file.read_text(encoding="ascii")))
    for pid in candidates:
        with contextlib.suppress(OSError):
            if (_PROC / str(pid) / "comm").read_text(encoding="utf-8").startswith("dockerd"):
                return pid
    return 0


def netns_inode(path: str) -> int:
    """The inode of a namespace file. Raises OSError where it is none."""
    return os.stat(path).st_ino


def netns_inode_of(pid: int) -> int | None:
    """The inode of a process's network namespace, or None where the process is gone."""
    try:
        return (_PROC / str(pid) / "ns" / "net").stat().st_ino
    except OSError:
        return None


def processes_in_netns(inode: int) -> tuple[int, ...]:
    """All processes in a network namespace: a walk over /proc, for the rare moment when the engine cannot be asked."""
    return tuple(pid for pid in _all_pids() if netns_inode_of(pid) == inode)


def _all_pids() -> list[int]:
    return [int(name) for name in os.listdir(_PROC) if name.isdigit()]


def oom_kill_count() -> int:
    """How many processes the kernel's OOM killer ever killed on this host (0 where the kernel does not count)."""
    try:
        text = (_PROC / "vmstat").read_text(encoding="ascii")
    except OSError:
        return 0
    for line in text.splitlines():
        if line.startswith("oom_kill "):
            return int(line.split()[1])
    return 0


def oom_floor(engine_pid: int) -> int | None:
    """The lowest oom_score_adj that the engine's children may be given, None for any.

    Without CAP_SYS_RESOURCE a process cannot go below the value that it was born with. An engine whose process is not
    visible is judged by our own process.
    """
    for pid in (engine_pid, os.getpid()):
        try:
            status = (_PROC / str(pid) / "status").read_text(encoding="ascii", errors="replace")
            own = int((_PROC / str(pid) / "oom_score_adj").read_text(encoding="ascii"))
        except (OSError, ValueError):
            continue
        return None if _has_sys_resource(status) else own
    return None


def rlimit_caps(engine_pid: int) -> dict[str, int]:
    """Hard limits that the engine cannot raise, by name; empty where it may raise all."""
    try:
        status = (_PROC / str(engine_pid) / "status").read_text(encoding="ascii", errors="replace")
        if _has_sys_resource(status):
            return {}
    except OSError:
        return {}
    caps = {}
    for name in dir(resource):
        if not name.startswith("RLIMIT_") or name == "RLIMIT_OFILE":
            continue
        with contextlib.suppress(OSError, ValueError):
            hard = resource.prlimit(engine_pid, getattr(resource, name))[1]
            if hard != resource.RLIM_INFINITY:
                caps[name.removeprefix("RLIMIT_").lower()] = hard
    return caps


def _has_sys_resource(status: str) -> bool:
    effective = next((line.split()[1] for line in status.splitlines() if line.startswith("CapEff:")), "0")
    return bool(int(effective, 16) >> _CAP_SYS_RESOURCE & 1)


def is_in_container(pid: int, engine_id: str) -> bool:
    """True where the process's cgroup is that of the container with this engine id (always true without cgroups)."""
    try:
        text = (_PROC / str(pid) / "cgroup").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return False
    return not engine_id or engine_id in text


def open_pidfd(pid: int) -> int | None:
    """A descriptor of the process, or None where it is gone. The caller closes it."""
    try:
        return os.pidfd_open(pid)
    except (OSError, OverflowError):
        return None


async def wait_pidfd(fd: int) -> None:
    """Wait until the process of a pidfd has ended. Cancellation leaves the descriptor open."""
    loop = asyncio.get_running_loop()
    ended: asyncio.Future[None] = loop.create_future()
    loop.add_reader(fd, _resolve, ended)
    try:
        await ended
    finally:
        loop.remove_reader(fd)


def _resolve(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)


@effect("docker.kill_exec_tree")
def kill_tree(root: Stat, pidfd: int) -> int:
    """Kill a process, its descendants and its session; returns how many were signalled.

    A process that was reparented to the container's first process is still found by its session; one that left the
    session on purpose (a daemon) is not ours to kill. `pidfd` names the root, which may be gone already.
    """
    killed: set[tuple[int, int]] = set()
    for _ in range(_TREE_PASSES):
        fresh = [item for item in _members(root) if (item.pid, item.started) not in killed]
        if not fresh:
            break
        for item in fresh:
            _signal(item, signal.SIGSTOP)
        for item in fresh:
            _signal(item, signal.SIGKILL)
            killed.add((item.pid, item.started))
    with contextlib.suppress(ProcessLookupError):
        signal.pidfd_send_signal(pidfd, signal.SIGKILL)
    return len(killed)


def _members(root: Stat) -> list[Stat]:
    """The root, its descendants, and all of its session, each younger than the root."""
    stats = {pid: found for pid in _all_pids() if (found := read_stat(pid)) is not None}
    members: dict[int, Stat] = {}
    current = stats.get(root.pid)
    if current is not None and current.started == root.started:
        members[root.pid] = current
    if root.session == root.pid:  # the OCI runtime makes each exec the leader of a session of its own
        members.update({s.pid: s for s in stats.values() if s.session == root.pid and s.started >= root.started})
    grew = True
    while grew:
        more = {s.pid: s for s in stats.values() if s.parent in members and s.pid not in members}
        members.update(more)
        grew = bool(more)
    return [item for item in members.values() if item.state not in "ZX"]


def _signal(target: Stat, number: signal.Signals) -> None:
    fd = open_pidfd(target.pid)
    if fd is None:
        return
    try:
        found = read_stat(target.pid)
        if found is not None and found.started == target.started:
            signal.pidfd_send_signal(fd, number)
    except OSError:
        pass
    finally:
        os.close(fd)


def apparmor_profiles() -> frozenset[str] | None:
    """Names of loaded AppArmor profiles, None where the kernel has no AppArmor."""
    try:
        text = Path("/sys/kernel/security/apparmor/profiles").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    return frozenset(line.rpartition(" (")[0] for line in text.splitlines() if line)
