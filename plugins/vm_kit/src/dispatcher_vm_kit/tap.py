"""The tap device of a machine, in the pod's network namespace.

The device lives exactly as long as its descriptor is open in someone: first in the daemon, then in the machine
monitor. Nothing has to be removed, whatever dies.
"""

from __future__ import annotations

import fcntl
import os
import socket
import struct
from pathlib import Path

from dispatcher.api import effect, run_in_namespace
from dispatcher.errors import RuntimeDown

_TUN = "/dev/net/tun"
_TUNSETIFF = 0x400454CA
_IFF_TAP, _IFF_NO_PI, _IFF_VNET_HDR = 0x0002, 0x1000, 0x4000
_SIOCSIFMTU, _SIOCGIFFLAGS, _SIOCSIFFLAGS = 0x8922, 0x8913, 0x8914
_IFF_UP = 1


def tap_name(index: int) -> str:
    """The name of the pod's tap of this number; it stands beside the names that network plugins give. Pure."""
    return f"cri-tap{index}"


@effect("vm.make_tap")
async def make_tap(netns_path: Path, index: int, *, mtu: int = 1500) -> int:
    """Make the tap of this number in the namespace, up, and return its open descriptor, which the caller closes.

    Frames carry a virtio header of 10 bytes, so that checksums and segmentation can be left to the other end. Fails
    where a tap of that name is still open in a machine. The namespace's own IPv6 says nothing on it.

    Raises:
        NotFound: no namespace is mounted there.
        RuntimeDown: the device cannot be made; the cause says why.
    """
    try:
        return await run_in_namespace(netns_path, lambda: _open_tap(tap_name(index), mtu))
    except OSError as error:
        raise RuntimeDown(f"the tap {tap_name(index)} cannot be made in {netns_path}: {error.strerror}") from error


def _open_tap(name: str, mtu: int) -> int:
    descriptor = os.open(_TUN, os.O_RDWR | os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        flags = _IFF_TAP | _IFF_NO_PI | _IFF_VNET_HDR
        fcntl.ioctl(descriptor, _TUNSETIFF, struct.pack("16sH22x", name.encode("ascii"), flags))
        silence_ipv6(name)
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as control:
            fcntl.ioctl(control, _SIOCSIFMTU, struct.pack("16si20x", name.encode("ascii"), mtu))
            request = struct.pack("16sh22x", name.encode("ascii"), 0)
            now = struct.unpack("16sh22x", fcntl.ioctl(control, _SIOCGIFFLAGS, request))[1]
            fcntl.ioctl(control, _SIOCSIFFLAGS, struct.pack("16sh22x", name.encode("ascii"), now | _IFF_UP))
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def silence_ipv6(interface: str, *, silent: bool = True) -> None:
    """Switch the namespace's own IPv6 off (or on) at an interface; the calling thread stands in the namespace."""
    setting = Path("/proc/sys/net/ipv6/conf") / interface / "disable_ipv6"
    try:
        descriptor = os.open(setting, os.O_WRONLY | os.O_CLOEXEC)
    except FileNotFoundError:  # a kernel without IPv6
        return
    try:
        os.write(descriptor, b"1" if silent else b"0")
    finally:
        os.close(descriptor)
