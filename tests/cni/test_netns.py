"""The namespace of a pod: made once, kept over crashes, removed without a trace, entered by throw-away threads only."""

from __future__ import annotations

import asyncio
import os
import threading
from pathlib import Path

import pytest

from dispatcher.errors import InvalidRequest, NotFound
from dispatcher.netns import (
    apply_sysctls,
    ensure_namespace,
    find_namespace_inode,
    list_namespaces,
    make_net_sysctls,
    remove_namespace,
    run_in_namespace,
)
from tests.cni.net import eventually
from tests.lab.own_host import own_host, run, take_census

pytestmark = pytest.mark.lab


def own_inode() -> int:
    """The namespace of the calling thread."""
    return os.stat("/proc/thread-self/ns/net").st_ino


@own_host
async def test_namespace_has_loopback_up_and_is_made_once(tmp_path: Path) -> None:
    """A second call keeps the namespace that is there, with what is in it."""
    path = tmp_path / "netns" / "pod"
    inode = await ensure_namespace(path)
    assert "UP" in run("ip -o link show dev lo", netns=path)
    run("ip link add x type veth peer name y", netns=path)
    assert await ensure_namespace(path) == inode == find_namespace_inode(path)
    assert "x@y" in run("ip link show", netns=path)
    await remove_namespace(path)


@own_host
async def test_removal_leaves_nothing_and_may_be_repeated(tmp_path: Path) -> None:
    """Mount, file and namespace are gone; what never existed is removed, too."""
    before = take_census(tmp_path)
    path = tmp_path / "pod"
    await ensure_namespace(path)
    for _ in range(2):
        await remove_namespace(path)
        assert find_namespace_inode(path) is None
    await remove_namespace(tmp_path / "never" / "made")
    assert take_census(tmp_path) == before


@own_host
async def test_file_without_a_mount_counts_as_absent(tmp_path: Path) -> None:
    """A crash between the file and the mount, or a reboot, leaves such a file: it can be made good or removed."""
    path = tmp_path / "pod"
    path.touch()
    assert find_namespace_inode(path) is None
    assert list_namespaces(tmp_path) == ("pod",)
    with pytest.raises(NotFound, match="no network namespace at"):
        await run_in_namespace(path, own_inode)
    assert await ensure_namespace(path) == find_namespace_inode(path)
    await remove_namespace(path)
    path.touch()
    await remove_namespace(path)
    assert list_namespaces(tmp_path) == ()
    assert list_namespaces(tmp_path / "nowhere") == ()


@own_host
async def test_only_the_throw_away_thread_enters(tmp_path: Path) -> None:
    """The loop's thread, pool threads and threads that are there already stay in the host's namespace."""
    path = tmp_path / "pod"
    home = own_inode()
    assert await asyncio.to_thread(own_inode) == home
    inode = await ensure_namespace(path)
    assert await run_in_namespace(path, own_inode) == inode != home
    assert own_inode() == home
    assert await asyncio.to_thread(own_inode) == home
    with pytest.raises(ZeroDivisionError):
        await run_in_namespace(path, lambda: 1 // 0)
    await eventually(
        lambda: not [thread for thread in threading.enumerate() if thread.name == "netns"], what="no thread stays"
    )
    await remove_namespace(path)


@own_host
async def test_link_in_place_of_the_file_is_not_followed(tmp_path: Path) -> None:
    """A symbolic link at the path is refused: nothing is mounted on what it points to."""
    target = tmp_path / "target"
    target.touch()
    (tmp_path / "pod").symlink_to(target)
    with pytest.raises(OSError):
        await ensure_namespace(tmp_path / "pod")
    assert find_namespace_inode(target) is None
    await remove_namespace(tmp_path / "pod")
    assert target.exists()


@own_host
async def test_sysctls_are_set_inside_only(tmp_path: Path) -> None:
    """A pod's setting is the pod's; what the kernel refuses or does not have in a namespace is an invalid request."""
    path = tmp_path / "pod"
    await ensure_namespace(path)
    before = Path("/proc/sys/net/ipv4/ip_local_port_range").read_text()
    wanted = {
        "net.ipv4.ip_local_port_range": "2000 3000",
        "net.ipv4.conf.lo.rp_filter": "1",
        "kernel.shm_rmid_forced": "1",
    }
    await apply_sysctls(path, make_net_sysctls(wanted))
    assert run("sysctl -n net.ipv4.ip_local_port_range", netns=path).split() == ["2000", "3000"]
    assert run("sysctl -n net.ipv4.conf.lo.rp_filter", netns=path).split() == ["1"]
    assert Path("/proc/sys/net/ipv4/ip_local_port_range").read_text() == before
    for name, value, words in (
        ("net.ipv4.ip_unprivileged_port_start", "-1", "refuses '-1'"),
        ("net.ipv4.no_such_thing", "1", "cannot be set in a pod's namespace"),
        ("net.ipv4.conf.eth7.rp_filter", "1", "cannot be set in a pod's namespace"),
    ):
        with pytest.raises(InvalidRequest, match=words):
            await apply_sysctls(path, make_net_sysctls({name: value}))
    await remove_namespace(path)
    with pytest.raises(NotFound):
        await apply_sysctls(path, make_net_sysctls(wanted))
