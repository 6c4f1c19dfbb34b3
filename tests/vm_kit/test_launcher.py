"""The launcher, looked at from outside: where its process is, as whom, with what."""

from __future__ import annotations

import asyncio
import os
import resource
import signal
from collections.abc import AsyncIterator, Callable
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import pytest

from dispatcher_vm_kit.exec import Child, spawn
from dispatcher_vm_kit.launcher import SHARE_CAPABILITIES, LaunchPlan, NodePrograms, open_plan
from dispatcher_vm_kit.leaf import LeafLimits, find_leaf, make_leaf, open_for_joining, remove_leaf
from dispatcher_vm_kit.process import find_holder, identify, is_held, make_lock, open_process, wait_ended
from dispatcher_vm_kit.share import make_share, remove_share
from tests.lab.child import has_capability, wait_until
from tests.lab.wire import Wire, bind_mount

BUSYBOX = "/usr/bin/busybox"
USER = 1_900_000_123
CAP_SYS_RESOURCE = 24
Run = Callable[..., Child]


@pytest.fixture
async def run(programs: NodePrograms, folder: Path) -> AsyncIterator[Run]:
    """Start a program by the launcher; what it prints is in `out`. Ended with the test."""
    launcher = await programs.launcher()
    children: list[Child] = []

    def start(plan: LaunchPlan, *argv: str) -> Child:
        with open_plan(plan) as plan_fd, (folder / "out").open("wb") as out:
            fds = (*plan.fds, plan_fd)
            children.append(spawn([str(launcher), str(plan_fd), *argv], pass_fds=fds, output_fd=out.fileno()))
        return children[-1]

    yield start
    for child in children:
        if (identity := identify(child.pid)) is not None and (handle := open_process(identity)) is not None:
            signal.pidfd_send_signal(handle, signal.SIGKILL)
            os.close(handle)
        child.reap()


def become(child: Child) -> dict[str, str]:
    """Wait until the launcher has become the program; its status file."""

    def is_program() -> bool:
        return os.path.basename(os.readlink(f"/proc/{child.pid}/exe")).startswith("busybox")

    wait_until(is_program, timeout_s=30, what="the program runs")
    lines = Path(f"/proc/{child.pid}/status").read_text().splitlines()
    return {name: value.strip() for name, _, value in (line.partition(":") for line in lines)}


WAIT = (BUSYBOX, "tail", "-f", "/dev/null")


async def test_user_capabilities_and_limits(run: Run) -> None:
    """Another user without any right, who can gain none, and cannot write a core."""
    limits = ((resource.RLIMIT_CORE, 0, 0), (resource.RLIMIT_NOFILE, 77, 88))
    status = become(child := run(LaunchPlan(uid=USER, gid=USER, groups=(44,), limits=limits), *WAIT))
    assert status["Uid"].split() == [str(USER)] * 4
    assert status["Gid"].split() == [str(USER)] * 4
    assert status["Groups"].split() == ["44"]
    assert {status[f"Cap{kind}"] for kind in ("Inh", "Prm", "Eff", "Bnd", "Amb")} == {"0" * 16}
    assert status["NoNewPrivs"] == "1"
    assert status["THP_enabled"] == "0"
    told = Path(f"/proc/{child.pid}/limits").read_text().splitlines()
    found = {line[:26].strip(): line[26:].split()[:2] for line in told}
    assert (found["Max open files"], found["Max core file size"]) == (["77", "88"], ["0", "0"])
    environment = Path(f"/proc/{child.pid}/environ").read_bytes().split(b"\0")
    assert set(environment) == {b"PATH=/usr/sbin:/usr/bin:/sbin:/bin", b"MALLOC_ARENA_MAX=1", b"TMPDIR=/tmp", b""}
    assert os.getsid(child.pid) == child.pid


async def test_chosen_capabilities_stay(run: Run) -> None:
    """What a machine with a shared folder needs, and not one more."""
    status = become(run(LaunchPlan(uid=USER, gid=USER, capabilities=SHARE_CAPABILITIES), *WAIT))
    assert {status[f"Cap{kind}"] for kind in ("Inh", "Prm", "Eff", "Bnd", "Amb")} == {"000000000000001f"}


async def test_no_descriptor_is_left_open(run: Run, folder: Path) -> None:
    """The program has its three, the lock and what is on the list, even though others were inheritable."""
    with ExitStack() as stack:
        files = [os.open(folder / name, os.O_RDWR | os.O_CREAT) for name in ("lock", "kept", "other")]
        for descriptor in files:
            stack.callback(os.close, descriptor)
        lock, kept, other = files
        # The plan itself and `other` reach the launcher, and no further.
        child = run(LaunchPlan(lock_fd=lock, kept_fds=(kept,), share_fd=other), *WAIT)
        become(child)
        names = {os.path.basename(os.readlink(entry.path)) for entry in os.scandir(f"/proc/{child.pid}/fd")}
    assert names == {"null", "out", "lock", "kept"}


async def test_lock_tells_who_lives(run: Run, folder: Path) -> None:
    """Held exactly as long as the process lives, and naming it; a copy of the name alone proves nothing."""
    path = folder / "lock"
    lock = make_lock(path)
    child = run(LaunchPlan(lock_fd=lock), *WAIT)
    os.close(lock)
    become(child)
    assert is_held(path)
    with pytest.raises(BlockingIOError):
        make_lock(path)
    identity = find_holder(path)
    assert identity is not None
    assert identity.pid == child.pid
    handle = open_process(identity)
    assert handle is not None
    assert open_process(replace(identity, start_ticks=identity.start_ticks + 1)) is None
    signal.pidfd_send_signal(handle, signal.SIGKILL)
    async with asyncio.timeout(30):
        await wait_ended(handle)
        await wait_ended(handle)
    os.close(handle)
    child.reap()
    assert not is_held(path)
    assert find_holder(path) is None
    path.write_text(f"{os.getpid()}\n")
    assert find_holder(path) is None
    assert open_process(identity) is None


async def test_leaf_is_joined_before_the_program(run: Run) -> None:
    """All controllers that the host has, with their limits; removed when the process is gone."""
    leaf = find_leaf("", "ab" * 20 + "0001")
    make_leaf(leaf, LeafLimits(memory_bytes=64 << 20, pids=50))
    try:
        with open_for_joining(leaf) as cgroups:
            child = run(LaunchPlan(cgroup_fds=cgroups), *WAIT)
        become(child)
        inside = [line for line in Path(f"/proc/{child.pid}/cgroup").read_text().splitlines() if leaf.name in line]
        assert len(inside) == len({folder.resolve() for _, folder in leaf.folders})
        assert inside
        handle = os.pidfd_open(child.pid)
        signal.pidfd_send_signal(handle, signal.SIGKILL)
        await wait_ended(handle)
        os.close(handle)
    finally:
        await remove_leaf(leaf)
    assert not leaf.exists()


async def test_network_namespaces(run: Run, wire: Wire) -> None:
    """The pod's where one is given, an empty one where it is asked for."""
    descriptor = os.open(wire.pod, os.O_RDONLY)
    become(child := run(LaunchPlan(netns_fd=descriptor), *WAIT))
    os.close(descriptor)
    assert os.stat(f"/proc/{child.pid}/ns/net").st_ino == wire.pod.stat().st_ino
    become(child := run(LaunchPlan(own_net=True), *WAIT))
    devices = Path(f"/proc/{child.pid}/net/dev").read_text().splitlines()[2:]
    assert [line.partition(":")[0].strip() for line in devices] == ["lo"]


async def test_file_tree(run: Run, folder: Path) -> None:
    """Next to nothing is there, none of it writable; the share shows what the host binds into it later."""
    (folder / "root").mkdir()
    (folder / "secret").write_text("")
    (folder / "volume").mkdir()
    (folder / "volume" / "file").write_text("on the host")
    share = folder / "share"
    make_share(share)
    make_share(share)
    descriptors = [os.open(path, os.O_PATH) for path in (folder / "root", share)]
    try:
        plan = LaunchPlan(uid=USER, gid=USER, root_fd=descriptors[0], share_fd=descriptors[1])
        become(child := run(plan, *WAIT))
        root = Path(f"/proc/{child.pid}/root")
        assert {entry.name for entry in os.scandir(root)} <= {
            *["bin", "dev", "etc", "lib", "lib64", "proc", "share", "tmp", "usr"]
        }
        assert {entry.name for entry in os.scandir(root / "dev")} == {"null", "urandom"}
        assert {entry.name for entry in os.scandir(root / "etc")} <= {"ld.so.cache", "ld.so.conf", "ld.so.conf.d"}
        mounts = {line.split()[4]: line.split()[5] for line in _mounts(child)}
        assert all("ro" in mounts[name].split(",") for name in ("/usr", "/share"))
        bind_mount(folder / "volume", share / "volume")
        assert (root / "share" / "volume" / "file").read_text() == "on the host"
        assert not any(str(folder) in line.split()[4] for line in _mounts(child))
    finally:
        for descriptor in descriptors:
            os.close(descriptor)
        remove_share(share)
        remove_share(share)
    assert (folder / "volume" / "file").read_text() == "on the host"
    assert not share.exists()


def _mounts(child: Child) -> list[str]:
    return Path(f"/proc/{child.pid}/mountinfo").read_text().splitlines()


async def test_inside_view(run: Run, folder: Path) -> None:
    """From inside: no other process is visible, nothing can be written but the private folder for temporary files."""
    (folder / "root").mkdir()
    descriptor = os.open(folder / "root", os.O_PATH)
    words = "for f in /usr /etc /share / ; do touch $f/x 2>/dev/null && echo wrote $f; done; touch /tmp/x && echo tmp; busybox ls -d /proc/1"
    child = run(LaunchPlan(uid=USER, gid=USER, root_fd=descriptor), BUSYBOX, "sh", "-c", words)
    os.close(descriptor)
    child.reap()
    assert (folder / "out").read_text().splitlines() == ["tmp", "ls: /proc/1: No such file or directory"]


async def test_oom_score(run: Run) -> None:
    """Set where it may be; a lower one than ours is no failure where the capability is missing."""
    become(child := run(LaunchPlan(oom_score_adj=777), *WAIT))
    assert Path(f"/proc/{child.pid}/oom_score_adj").read_text() == "777\n"
    own = Path("/proc/self/oom_score_adj").read_text()
    become(child := run(LaunchPlan(oom_score_adj=-997), *WAIT))
    expected = "-997\n" if has_capability(CAP_SYS_RESOURCE) else own
    assert Path(f"/proc/{child.pid}/oom_score_adj").read_text() == expected


@pytest.mark.parametrize(
    ("make_plan", "program", "step", "words"),
    [
        (lambda file: LaunchPlan(netns_fd=file), BUSYBOX, 4, "setns"),
        (lambda file: LaunchPlan(root_fd=file), BUSYBOX, 5, "root folder"),
        (lambda _file: LaunchPlan(), "/usr/bin/none-such", 9, "/usr/bin/none-such"),
    ],
)
async def test_failures_are_named(
    run: Run, folder: Path, make_plan: Callable[[int], LaunchPlan], program: str, step: int, words: str
) -> None:
    """The exit code tells the step, the output what was the matter."""
    descriptor = os.open(folder / "file", os.O_RDWR | os.O_CREAT)
    child = run(make_plan(descriptor), program, "true")
    os.close(descriptor)
    assert child.reap() == 100 + step
    assert f"step {step}: {words}" in (folder / "out").read_text()


async def test_nonsense_instead_of_a_plan(programs: NodePrograms, folder: Path) -> None:
    """A record of another version is refused before anything is done."""
    launcher = await programs.launcher()
    for words in ([], ["x"], ["99999", BUSYBOX], ["0", BUSYBOX]):
        with (folder / "out").open("wb") as out:
            assert spawn([str(launcher), *words], pass_fds=(), output_fd=out.fileno()).reap() == 101
