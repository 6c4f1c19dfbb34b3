"""Tap and redirect with real frames: what enters the pod's interface leaves by the tap, and the other way."""

from __future__ import annotations

import asyncio
import os
import socket
from pathlib import Path
from typing import Any

import pytest

from dispatcher.errors import NotFound, RuntimeDown
from dispatcher.netns import run_in_namespace
from dispatcher_vm_kit.redirect import Joint, join_interfaces, part_interfaces
from dispatcher_vm_kit.tap import make_tap, tap_name
from tests.lab.wire import Wire, packet_socket, read_frame

BROADCAST = b"\xff" * 6
MINE = bytes.fromhex("020000000007")
KIND = b"\x88\xb5"  # for local experiments
JOINT = Joint(tap="cri-tap0", interface="eth0")


def frame(text: bytes) -> bytes:
    return BROADCAST + MINE + KIND + text.ljust(60, b".")


def addresses(interface: str) -> set[str]:
    from pyroute2 import IPRoute

    with IPRoute() as link:
        (index,) = link.link_lookup(ifname=interface)
        return {str(each.get_attr("IFA_ADDRESS")) for each in link.get_addr(index=index)}


def mtu(interface: str) -> int:
    from pyroute2 import IPRoute

    with IPRoute() as link:
        return int(link.link("get", ifname=interface)[0].get_attr("IFLA_MTU"))


def filters(interface: str) -> int:
    from pyroute2 import IPRoute

    with IPRoute() as link:
        (index,) = link.link_lookup(ifname=interface)
        return len([each for each in link.get_qdiscs(index=index) if each.get_attr("TCA_KIND") == "ingress"])


async def exchange(wire: Wire, tap: int) -> None:
    """A frame each way, whole."""
    far = await run_in_namespace(wire.far, lambda: packet_socket("eth9"))
    with far:
        os.write(tap, bytes(10) + frame(b"from the guest"))
        await asyncio.to_thread(_await_frame, lambda: far.recv(65536), b"from the guest")
        far.send(frame(b"to the guest"))
        await asyncio.to_thread(_await_frame, lambda: read_frame(tap), b"to the guest")


def _await_frame(receive: Any, text: bytes) -> None:
    while receive() != frame(text):
        pass


async def test_frames_pass_both_ways(wire: Wire) -> None:
    """Joined twice as well as once; the interface's addresses go, its MTU becomes the tap's."""
    tap = await make_tap(wire.pod, 0)
    try:
        assert "10.88.0.2" in await run_in_namespace(wire.pod, lambda: addresses("eth0"))
        for _ in range(2):
            await join_interfaces(wire.pod, [JOINT])
            await exchange(wire, tap)
        assert await run_in_namespace(wire.pod, lambda: addresses("eth0")) == set()
        assert await run_in_namespace(wire.pod, lambda: addresses(tap_name(0))) == set()
        assert await run_in_namespace(wire.pod, lambda: mtu(tap_name(0))) == 1400
    finally:
        os.close(tap)


async def test_the_namespace_does_not_answer_for_the_guest(wire: Wire) -> None:
    """An ARP question for the pod's address reaches the guest, and nobody else replies."""
    tap = await make_tap(wire.pod, 0)
    try:
        await join_interfaces(wire.pod, [JOINT])

        def ask() -> None:
            with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
                sender.sendto(b"hello", ("10.88.0.2", 7))

        await run_in_namespace(wire.far, ask)
        question = await asyncio.to_thread(_await_arp, tap)
        assert question[38:42] == socket.inet_aton("10.88.0.2")
    finally:
        os.close(tap)


def _await_arp(tap: int) -> bytes:
    while (found := read_frame(tap))[12:14] != b"\x08\x06":
        pass
    return found


async def test_a_closed_tap_goes_and_can_be_made_again(wire: Wire) -> None:
    """Nothing of a machine has to be removed but the interface's half, which a new machine replaces."""
    for _ in range(2):
        tap = await make_tap(wire.pod, 0)
        with pytest.raises(RuntimeDown):
            await make_tap(wire.pod, 0)
        await join_interfaces(wire.pod, [JOINT])
        await exchange(wire, tap)
        os.close(tap)


async def test_parting_is_idempotent(wire: Wire) -> None:
    """Also for interfaces that never were, and before anything was joined."""
    await part_interfaces(wire.pod, ["eth0", "nope"])
    tap = await make_tap(wire.pod, 0)
    try:
        await join_interfaces(wire.pod, [JOINT])
        assert await run_in_namespace(wire.pod, lambda: filters("eth0")) == 1
        for _ in range(2):
            await part_interfaces(wire.pod, ["eth0"])
            assert await run_in_namespace(wire.pod, lambda: filters("eth0")) == 0
    finally:
        os.close(tap)


async def test_missing_parts_are_named(wire: Wire, folder: Path) -> None:
    """Which interface, which namespace."""
    with pytest.raises(RuntimeDown, match="no interface cri-tap0"):
        await join_interfaces(wire.pod, [JOINT])
    with pytest.raises(NotFound):
        await make_tap(folder / "none", 0)
