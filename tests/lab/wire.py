"""Two network namespaces with a wire between them, as a network plugin leaves a pod, and looking at frames on it."""

from __future__ import annotations

import contextlib
import ctypes
import os
import socket
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

from dispatcher.netns import ensure_namespace, remove_namespace, run_in_namespace

_MS_BIND = 4096


@dataclass(frozen=True, slots=True)
class Wire:
    """A pod's namespace with eth0 (10.88.0.2, fd88::2, MTU 1400), and another one with the far end, eth9."""

    pod: Path
    far: Path


@contextlib.asynccontextmanager
async def make_wire(folder: Path) -> AsyncIterator[Wire]:
    """Make both namespaces, held by files in the folder; they go at the end."""
    made = Wire(pod=folder / "pod", far=folder / "far")
    try:
        for path in (made.pod, made.far):
            await ensure_namespace(path)
        await run_in_namespace(made.pod, lambda: _plug(made.far))
        await run_in_namespace(made.far, lambda: _configure("eth9", ("10.88.0.1/24", "fd88::1/64")))
        await run_in_namespace(made.pod, lambda: _configure("eth0", ("10.88.0.2/24", "fd88::2/64")))
        yield made
    finally:
        for path in (made.pod, made.far):
            await remove_namespace(path)


def _plug(far: Path) -> None:
    from pyroute2 import IPRoute

    with IPRoute() as link, far.open() as namespace:
        link.link("add", ifname="eth0", kind="veth", mtu=1400, peer={"ifname": "eth9", "net_ns_fd": namespace.fileno()})


def _configure(name: str, addresses: tuple[str, ...]) -> None:
    from pyroute2 import IPRoute

    with contextlib.suppress(FileNotFoundError):
        Path("/proc/sys/net/ipv6/conf", name, "accept_dad").write_text("0")
    with IPRoute() as link:
        (index,) = link.link_lookup(ifname=name)
        for address in addresses:
            ip, _, length = address.partition("/")
            link.addr("add", index=index, address=ip, prefixlen=int(length))
        link.link("set", index=index, state="up")


def packet_socket(interface: str) -> socket.socket:
    """Sees every frame of an interface of the calling thread's namespace."""
    found = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(3))
    found.bind((interface, 0))
    found.settimeout(60)
    return found


def read_frame(tap: int) -> bytes:
    """The next frame of a tap, without its virtio header; waits for it."""
    os.set_blocking(tap, True)
    return os.read(tap, 65536)[10:]


def bind_mount(source: Path, target: Path) -> None:
    """Make the target and bind the source on it."""
    target.mkdir()
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.mount(os.fsencode(source), os.fsencode(target), None, ctypes.c_ulong(_MS_BIND), None) != 0:
        raise OSError(ctypes.get_errno(), f"bind mount on {target}")
