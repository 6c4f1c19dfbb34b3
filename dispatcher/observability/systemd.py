"""Tells systemd how the daemon is (sd_notify). Does nothing where NOTIFY_SOCKET is not set.

The protocol is one datagram of NAME=value lines to a UNIX socket; a leading "@" means the abstract name space. A
message that cannot be sent is dropped: the service manager's absence never harms pods.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
from collections.abc import Callable, Mapping


class Notifier:
    """Sends state to the service manager.

    Args:
        address: the value of NOTIFY_SOCKET, "" for none.
        watchdog_s: how often the service manager wants to hear from us at the latest, 0 for never.
    """

    def __init__(self, address: str = "", watchdog_s: float = 0.0) -> None:
        self._address = address
        self.watchdog_s = watchdog_s

    @classmethod
    def from_environment(cls, environ: Mapping[str, str] = os.environ) -> Notifier:
        """Read NOTIFY_SOCKET, and WATCHDOG_USEC where WATCHDOG_PID is ours or absent."""
        watchdog_s = 0.0
        if environ.get("WATCHDOG_PID", str(os.getpid())) == str(os.getpid()):
            with contextlib.suppress(ValueError):
                watchdog_s = max(0, int(environ.get("WATCHDOG_USEC", "0"))) / 1_000_000
        return cls(environ.get("NOTIFY_SOCKET", ""), watchdog_s)

    def ready(self, status: str = "") -> bool:
        """Start-up is finished. Returns whether a service manager was told."""
        return self._send("READY=1", *([f"STATUS={_line(status)}"] if status else []))

    def status(self, text: str) -> bool:
        """Set the sentence that `systemctl status` shows."""
        return self._send(f"STATUS={_line(text)}")

    def stopping(self) -> bool:
        """Shutdown began."""
        return self._send("STOPPING=1")

    def watchdog(self) -> bool:
        """Say that we are alive."""
        return self._send("WATCHDOG=1")

    async def run_watchdog(self, is_alive: Callable[[], bool]) -> None:
        """Report being alive at half the asked interval while `is_alive` says so. Ends at once where none was asked."""
        while self.watchdog_s > 0:
            if is_alive():
                self.watchdog()
            await asyncio.sleep(self.watchdog_s / 2)

    def _send(self, *lines: str) -> bool:
        if not self._address.startswith(("/", "@")):
            return False
        address = "\0" + self._address[1:] if self._address.startswith("@") else self._address
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sock:
                sock.setblocking(False)
                sock.sendto("\n".join(lines).encode(), address)
        except OSError:
            return False
        return True


def _line(text: str) -> str:
    return " ".join(text.split())[:512]
