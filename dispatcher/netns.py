"""The pod's network namespace: a file of ours that holds it, `lo`, and the `net.*` sysctls inside.

Theory of operation. A namespace lives as long as something refers to it; here that is a bind mount of it on a file
under the run folder, so it outlives the daemon and every process of the pod, and a runtime joins it by path. The
threads of a process may stand in different namespaces: each act inside a pod's namespace happens in a thread made for
it and ended after it, so that the loop's thread, and any child that is started from it, never leave the host's.

Invariant: a name in the folder is either a mounted namespace or an empty file that a crash left, which counts as
absent. Nothing here knows CNI or runtimes.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import errno
import fcntl
import os
import re
import socket
import struct
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from dispatcher.effects import effect
from dispatcher.errors import InvalidRequest, NotFound

R = TypeVar("R")

_LIBC = ctypes.CDLL(None, use_errno=True)
_CLONE_NEWNET = 0x40000000
_MS_BIND = 0x1000
_MNT_DETACH = 2
_UMOUNT_NOFOLLOW = 8
_SIOCGIFFLAGS = 0x8913
_SIOCSIFFLAGS = 0x8914
_IFF_UP = 1
_OWN = Path("/proc/thread-self/ns/net")  # not /proc/self: that names the main thread's


# ------------------------------------------------------------------------------------------------ sysctls, as values
@dataclass(frozen=True, slots=True, kw_only=True)
class NetSysctl:
    """One checked `net.*` setting: the parts of its path below /proc/sys, and its value."""

    parts: tuple[str, ...]
    value: str

    @property
    def name(self) -> str:
        """The dotted name."""
        return ".".join(self.parts)


_PART = re.compile(r"[a-z0-9][a-z0-9_]{0,63}")
_INTERFACE_PART = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,14}")
_INTEGERS = re.compile(r"-?[0-9]{1,19}(?:[ \t]+-?[0-9]{1,19}){0,2}")
_PORTS = re.compile(r"(?:[0-9]{1,5}(?:-[0-9]{1,5})?(?:,[0-9]{1,5}(?:-[0-9]{1,5})?){0,255})?")
_WORDS = re.compile(r"[a-z0-9_]{1,32}(?: [a-z0-9_]{1,32}){0,15}")
# The few settings of a namespace whose value is not made of one to three integers.
_OTHER_TYPES: Mapping[str, re.Pattern[str]] = {
    "net.ipv4.ip_local_reserved_ports": _PORTS,
    "net.ipv4.tcp_congestion_control": _WORDS,
    "net.ipv4.tcp_allowed_congestion_control": _WORDS,
    "net.ipv4.tcp_fastopen_key": re.compile(r"[0-9a-f]{8}(?:-[0-9a-f]{8}){3}(?:,[0-9a-f]{8}(?:-[0-9a-f]{8}){3})?"),
}
_FAMILIES = frozenset({"core", "ipv4", "ipv6", "mptcp", "netfilter", "sctp", "unix"})


def make_net_sysctls(sysctls: Mapping[str, str]) -> tuple[NetSysctl, ...]:
    """Check the `net.*` entries of a pod's sysctls; others are left out, they belong to other namespaces.

    Whether a pod may set an unsafe one was the kubelet's decision. Here is decided only that a name stays below
    /proc/sys/net and that a value has the setting's type; a namespace shows no setting that is not its own.

    Raises:
        InvalidRequest: a name or value that cannot be one.
    """
    return tuple(_make_net_sysctl(name, value) for name, value in sysctls.items() if re.split("[./]", name)[0] == "net")


def _make_net_sysctl(name: str, value: str) -> NetSysctl:
    parts = tuple(name.split("."))
    per_interface = len(parts) == 5 and parts[2] in {"conf", "neigh"}
    fine = len(parts) >= 3 and parts[1] in _FAMILIES
    for position, part in enumerate(parts):
        form = _INTERFACE_PART if per_interface and position == 3 else _PART
        fine = fine and form.fullmatch(part) is not None
    if not fine:
        raise InvalidRequest(f"{name!r} is not the name of a network sysctl of a pod.", sysctl=name)
    if not _OTHER_TYPES.get(name, _INTEGERS).fullmatch(value):
        raise InvalidRequest(f"{value!r} is not a value for the sysctl {name}.", sysctl=name)
    return NetSysctl(parts=parts, value=value)


# -------------------------------------------------------------------------------------------------- threads and calls
def _call(function: str, *arguments: object) -> None:
    if getattr(_LIBC, function)(*arguments) != 0:
        code = ctypes.get_errno()
        raise OSError(code, f"{function}: {os.strerror(code)}")


async def _in_own_thread(function: Callable[[], R]) -> R:
    """Run `function` in a thread made for it. A cancelled caller still waits for the end: nothing acts behind it."""
    loop = asyncio.get_running_loop()
    done: asyncio.Future[R] = loop.create_future()

    def deliver(result: R | None, error: BaseException | None) -> None:
        if done.done():
            return
        if error is not None:
            done.set_exception(error)
        else:
            done.set_result(result)  # type: ignore[arg-type]

    def run() -> None:
        result: R | None = None
        failure: BaseException | None = None
        try:
            result = function()
        except BaseException as error:  # noqa: BLE001 - carried to the caller, whatever it is
            failure = error
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits any more
            loop.call_soon_threadsafe(deliver, result, failure)

    threading.Thread(target=run, name="netns", daemon=True).start()
    try:
        return await asyncio.shield(done)
    except asyncio.CancelledError:
        await asyncio.wait([done])
        if not done.cancelled():
            done.exception()  # seen: the cancellation is what the caller hears of
        raise


def _enter(path: Path) -> None:
    """Move the calling thread, which must be a throw-away one, into the namespace at `path`."""
    try:
        handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        raise NotFound(f"There is no network namespace at {path}.") from None
    try:
        if os.fstat(handle).st_dev != _OWN.stat().st_dev:
            raise NotFound(f"There is no network namespace at {path}.")
        _call("setns", handle, _CLONE_NEWNET)
    finally:
        os.close(handle)


async def run_in_namespace(path: Path, function: Callable[[], R]) -> R:
    """Run a short blocking function inside the namespace at `path` and return its result.

    Sockets that it opens, and everything below /proc/thread-self/net and /proc/sys/net, are the namespace's. It must
    not start threads or processes that outlive it. What it raises is raised here. Cancellation waits for its end.

    Raises:
        NotFound: no namespace is mounted there.
    """

    def inside() -> R:
        _enter(path)
        return function()

    return await _in_own_thread(inside)


async def read_in_namespaces(paths: Sequence[Path], read: Callable[[], R]) -> list[R | None]:
    """Run a short blocking reader inside each of these namespaces, one after the other in one thread.

    Returns what it returned, in the order of `paths`; None where no namespace is mounted (any more) or the reader
    raised OSError. The rules of `run_in_namespace` hold.
    """

    def inside() -> list[R | None]:
        found: list[R | None] = []
        for path in paths:
            try:
                _enter(path)
                found.append(read())
            except (NotFound, OSError):
                found.append(None)
        return found

    return await _in_own_thread(inside)


# ------------------------------------------------------------------------------------------------- making and removing
def find_namespace_inode(path: Path) -> int | None:
    """Return the inode of the namespace mounted at `path`, which tells it from every other one, or None."""
    try:
        status = path.stat()
    except FileNotFoundError:
        return None
    return status.st_ino if status.st_dev == _OWN.stat().st_dev else None


def list_namespaces(folder: Path) -> tuple[str, ...]:
    """Return the names in the folder, mounted or left by a crash, sorted; recovery compares them with its records."""
    try:
        return tuple(sorted(entry.name for entry in folder.iterdir()))
    except FileNotFoundError:
        return ()


def _set_loopback_up() -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as control:
        request = struct.pack("16sh22x", b"lo", 0)
        flags = struct.unpack("16sh22x", fcntl.ioctl(control, _SIOCGIFFLAGS, request))[1]
        fcntl.ioctl(control, _SIOCSIFFLAGS, struct.pack("16sh22x", b"lo", flags | _IFF_UP))


@effect("netns.ensure")
async def ensure_namespace(path: Path) -> int:
    """Make a network namespace with `lo` up, held by a mount on the file `path`, and return its inode.

    Idempotent: one that is already mounted there is kept. The folder is made, with mode 0700. The caller holds the
    pod's operation lock; `remove_namespace` undoes every half-done state.
    """

    def inside() -> int:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        os.close(os.open(path, os.O_RDONLY | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600))
        if find_namespace_inode(path) is not None:
            _enter(path)
        else:
            _call("unshare", _CLONE_NEWNET)
            _call("mount", os.fsencode(_OWN), os.fsencode(path), b"none", _MS_BIND, None)
        _set_loopback_up()
        return path.stat().st_ino

    return await _in_own_thread(inside)


@effect("netns.sysctl")
async def apply_sysctls(path: Path, settings: tuple[NetSysctl, ...]) -> None:
    """Write the settings inside the namespace. Idempotent.

    Call it after the network was attached, as other CRI runtimes do: a setting may name the pod's interface, and a
    `default` one must not change what the network plugins meet.

    Raises:
        InvalidRequest: this kernel has no such setting in a namespace, or refuses the value.
        NotFound: no namespace is mounted there.
    """
    if not settings:
        return

    def inside() -> None:
        for setting in settings:
            try:
                with Path("/proc/sys", *setting.parts).open("wb", buffering=0) as file:
                    file.write(setting.value.encode())
            except OSError as error:
                if error.errno in {errno.EINVAL, errno.ERANGE}:
                    sentence = f"The kernel refuses {setting.value!r} for the sysctl {setting.name}."
                else:
                    sentence = f"The sysctl {setting.name} cannot be set in a pod's namespace on this kernel."
                raise InvalidRequest(sentence, sysctl=setting.name) from error

    await run_in_namespace(path, inside)


@effect("netns.remove")
async def remove_namespace(path: Path) -> None:
    """Unmount the namespace and remove its file. Idempotent; what still runs inside keeps it alive until it ends."""

    def inside() -> None:
        while True:
            try:
                _call("umount2", os.fsencode(path), _MNT_DETACH | _UMOUNT_NOFOLLOW)
            except OSError as error:
                if error.errno in {errno.EINVAL, errno.ENOENT}:  # no mount (any more), no file
                    break
                raise
        path.unlink(missing_ok=True)

    await _in_own_thread(inside)
