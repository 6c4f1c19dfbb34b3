"""Talking QMP to a QEMU: the only module that knows the library for it.

One connection at a time: QEMU serves its monitor socket to one client after the other, which is what lets a new daemon
adopt a machine. Descriptors travel with the command that uses them, so such pairs are sent under a lock.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import os
import socket
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import Any

from qemu.qmp import EventListener, ExecuteError, QMPClient, QMPError

from dispatcher.api import effect
from dispatcher.errors import RuntimeDown

_EVENTS = ("DEVICE_DELETED", "SHUTDOWN", "GUEST_PANICKED", "MIGRATION")
_POLL_S = 0.001
_QUIET = "dispatcher_vm_kit.qmp_library"


class QmpRefused(Exception):
    """QEMU answered a command with an error; the text is QEMU's own."""


class Qmp:
    """A connection to one monitor. Made by `connect`; `aclose` lets go of it, the machine runs on.

    Attributes:
        ended_by: why the machine said it shuts down ("guest-shutdown", "guest-reset", "guest-panic", "host-signal",
            ...), or "" while it has not.
    """

    def __init__(self, client: QMPClient, listener: EventListener) -> None:
        self._client = client
        self._listener = listener
        self._lock = asyncio.Lock()
        self._deleted: dict[str, asyncio.Event] = {}
        self._reader = asyncio.create_task(self._read_events())
        self.ended_by = ""

    @classmethod
    async def connect(cls, path: Path, *, timeout_s: float) -> Qmp:
        """Connect to the monitor at a UNIX socket.

        The socket listens from before QEMU's start, so this waits for QEMU to come to it. The path may be longer than
        a socket's address holds.

        Raises:
            RuntimeDown: nobody answers, within the time or any more.
        """
        client = QMPClient("machine")
        client.logger = logging.getLogger(_QUIET)
        client.logger.setLevel(logging.CRITICAL)
        listener = EventListener(names=_EVENTS)
        client.register_listener(listener)
        try:
            async with asyncio.timeout(timeout_s):
                await client.connect(await connect_socket(path))
        except (QMPError, OSError, TimeoutError) as error:
            with contextlib.suppress(QMPError, OSError, asyncio.CancelledError):
                await client.disconnect()
            raise RuntimeDown(f"the machine monitor at {path} does not answer") from error
        return cls(client, listener)

    async def _read_events(self) -> None:
        async for message in self._listener:
            data = message.get("data")
            fields = data if isinstance(data, dict) else {}
            if message.get("event") == "DEVICE_DELETED":
                # Only the one with the id counts: some devices announce their inner parts as well, without an id.
                if (name := fields.get("device")) in self._deleted:
                    self._deleted[str(name)].set()
            elif message.get("event") == "GUEST_PANICKED":
                self.ended_by = "guest-panic"
            elif message.get("event") == "SHUTDOWN":
                self.ended_by = self.ended_by or str(fields.get("reason", "unknown"))[:64]

    async def execute(
        self, command: str, arguments: Mapping[str, Any] | None = None, *, timeout_s: float = 10.0
    ) -> Any:
        """Run one command and return its value.

        Raises:
            QmpRefused: QEMU answered with an error.
            RuntimeDown: the connection is lost, or there was no answer in time.
        """
        async with self._lock:
            return await self._execute(command, arguments, timeout_s)

    @effect("vm.qmp")
    async def _execute(self, command: str, arguments: Mapping[str, Any] | None, timeout_s: float) -> Any:
        try:
            async with asyncio.timeout(timeout_s):
                return await self._client.execute(command, arguments)
        except ExecuteError as error:
            raise QmpRefused(f"{command}: {error}") from error
        except (QMPError, OSError, TimeoutError) as error:
            raise RuntimeDown(f"the machine monitor did not answer {command}") from error

    async def give_fd(self, descriptor: int, name: str, *, timeout_s: float = 10.0) -> None:
        """Hand a descriptor over under a name, for a command that takes one. Ours stays open and ours."""
        async with self._lock:
            self._client.send_fd_scm(descriptor)
            await self._execute("getfd", {"fdname": name}, timeout_s)

    async def give_to_set(self, descriptor: int, number: int, *, timeout_s: float = 10.0) -> None:
        """Hand a descriptor over as `/dev/fdset/<number>`, for what takes a file name."""
        async with self._lock:
            self._client.send_fd_scm(descriptor)
            await self._execute("add-fd", {"fdset-id": number}, timeout_s)

    @contextlib.asynccontextmanager
    async def expect_deleted(self, device: str) -> AsyncIterator[asyncio.Event]:
        """An event that is set once the guest has let go of this device; start it before asking for the removal."""
        event = self._deleted[device] = asyncio.Event()
        try:
            yield event
        finally:
            self._deleted.pop(device, None)

    async def wait_migrated(self, *, timeout_s: float) -> None:
        """Wait until a state was read or written.

        Raises:
            QmpRefused: it failed; the text says why.
            RuntimeDown: no end in time, or the machine is gone.
        """
        async with asyncio.timeout(timeout_s):
            while True:
                answer = await self.execute("query-migrate")
                status = answer.get("status") if isinstance(answer, dict) else None
                if status == "completed":
                    return
                if status in {"failed", "cancelled"}:
                    raise QmpRefused(f"the machine's state: {answer.get('error-desc', status)}")
                await asyncio.sleep(_POLL_S)

    async def aclose(self) -> None:
        """Disconnect. Idempotent; the machine runs on."""
        self._reader.cancel()
        with contextlib.suppress(QMPError, OSError, EOFError):
            await self._client.disconnect()
        with contextlib.suppress(asyncio.CancelledError):
            await self._reader


async def connect_socket(path: Path) -> socket.socket:
    """Connect to a UNIX stream socket whose path may be longer than an address holds. The caller closes it.

    Raises:
        OSError: nobody listens there.
    """
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK)
    folder = os.open(path.parent, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        address = f"/proc/self/fd/{folder}/{path.name}"
        while True:
            try:
                connection.connect(address)
            except BlockingIOError as error:  # a full queue: a listener that is busy
                if error.errno != errno.EAGAIN:
                    raise
                await asyncio.sleep(0.01)
            else:
                return connection
    except BaseException:
        connection.close()
        raise
    finally:
        os.close(folder)


@effect("vm.listen")
def listen_socket(path: Path, *, backlog: int = 8) -> socket.socket:
    """Make a listening UNIX socket, private to root, that a machine monitor gets by descriptor. The caller closes it.

    It listens at once: clients that come before the monitor wait in the queue.
    """
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    folder = os.open(path.parent, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        listener.bind(f"/proc/self/fd/{folder}/{path.name}")
        listener.listen(backlog)
    except BaseException:
        listener.close()
        raise
    finally:
        os.close(folder)
    return listener
