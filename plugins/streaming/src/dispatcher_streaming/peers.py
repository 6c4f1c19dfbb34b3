"""Whether the client of a connection has gone, asked without reading from it.

Theory of operation. A connection that is not read (its process takes no input) does not show its end: the end waits
behind the bytes, and where the kernel's window is shut it does not even arrive. But the client is on this node: its own
end of the connection is in the kernel's table, and says so when it was closed. Source: proc(5), /proc/net/tcp; the
states are those of the kernel's tcp_states.h.
"""

from __future__ import annotations

import asyncio
import ipaddress
import socket
import struct
import sys
import time
from pathlib import Path

_ESTABLISHED = 1
_FRESH_S = 1.0
_TABLES = {socket.AF_INET: Path("/proc/net/tcp"), socket.AF_INET6: Path("/proc/net/tcp6")}

Ends = tuple[str, str]


class PeerTable:
    """The connections of this network namespace, read at most once a second however many ask."""

    def __init__(self) -> None:
        self._lock = asyncio.Lock()
        self._read: dict[socket.AddressFamily, tuple[float, dict[Ends, int]]] = {}

    async def has_left(self, connection: socket.socket) -> bool:
        """Whether the other end of a TCP connection was closed by its owner. False where that cannot be told."""
        try:
            own_state = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1)[0]
            ends = connection.getpeername()[:2], connection.getsockname()[:2]
        except OSError:
            return True
        if own_state != _ESTABLISHED:
            return True
        table = await self._table(connection.family)
        peer, own = (_as_in_table(address, port) for address, port in ends)
        return table.get((peer, own), _ESTABLISHED) != _ESTABLISHED

    async def _table(self, family: int) -> dict[Ends, int]:
        kind = socket.AddressFamily(family)
        async with self._lock:
            read_s, table = self._read.get(kind, (0.0, {}))
            if not read_s or time.monotonic() - read_s > _FRESH_S:
                table = await asyncio.to_thread(_read_table, _TABLES[kind])
                self._read[kind] = time.monotonic(), table
            return table


def _as_in_table(address: str, port: int) -> str:
    """An address as the kernel prints it: words in the machine's order, in hexadecimal."""
    packed = ipaddress.ip_address(address).packed
    words = struct.unpack(f"{'<' if sys.byteorder == 'little' else '>'}{len(packed) // 4}I", packed)
    return "".join(f"{word:08X}" for word in words) + f":{port:04X}"


def _read_table(path: Path) -> dict[Ends, int]:
    """Both ends of each connection, with its state."""
    try:
        lines = path.read_text().splitlines()[1:]
    except OSError:
        return {}
    fields = (line.split(maxsplit=4) for line in lines)
    return {(found[1], found[2]): int(found[3], 16) for found in fields if len(found) == 5}
