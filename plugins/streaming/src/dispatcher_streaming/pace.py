"""Reading a client more slowly whose bytes take long to understand, so that it cannot keep the loop from others.

A read of 64 KiB of data costs some hundred microseconds; filled with the smallest frames there are (pings, sizes of a
terminal, empty fragments) it costs up to a hundred milliseconds, and so does the next. Each session may use so much time at
once, and from then on a small share of one processor; what it sends meanwhile waits in the kernel.
"""

from __future__ import annotations

import asyncio
import time
from types import TracebackType
from typing import Self

FREE_S = 100e-6  # of processor time for each read
FREE_BYTE_S = 15e-9  # for each byte: 1 ms for 64 KiB
BURST_S = 0.005  # some hundred connections of a port-forward session that are opened at once
SHARE = 0.02  # of one processor
MOST_S = 2.0  # that is slept at a time


class Pace:
    """Measures what stands in `with pace.reading(size):`; `rest` sleeps where that was too much."""

    def __init__(self) -> None:
        self._began_s = 0.0
        self._free_s = 0.0
        self._debt_s = 0.0
        self._paid_s = time.monotonic()

    def reading(self, size: int) -> Self:
        """Say how many bytes the block is about."""
        self._free_s = FREE_S + FREE_BYTE_S * size
        return self

    def __enter__(self) -> None:
        self._began_s = time.thread_time()  # not of the clock: a busy machine is not the client's fault

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        now_s = time.monotonic()
        self._debt_s = max(0.0, self._debt_s - (now_s - self._paid_s) * SHARE)
        self._debt_s += max(0.0, time.thread_time() - self._began_s - self._free_s)
        self._paid_s = now_s

    async def rest(self) -> None:
        """Sleep until the time that was used is paid off, but for the burst."""
        over_s = self._debt_s - BURST_S
        if over_s > 0:
            await asyncio.sleep(min(over_s / SHARE, MOST_S))
