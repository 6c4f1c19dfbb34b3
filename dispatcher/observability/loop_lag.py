"""Measures how late the event loop wakes up, and says what held it.

Everything runs in one loop, so one blocking call delays every pod of the node. The probe sleeps, looks at the clock,
and reports the difference. A thread beside it looks from outside: when the loop has not turned for the alarm time, it
logs the loop's stack while the culprit is still on it.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import sys
import threading
import time
import traceback

from dispatcher.observability.metrics import Metrics

_log = logging.getLogger(__name__)


class LoopProbe:
    """Watches the loop that `run` runs in.

    Args:
        metrics: where lag is counted.
        interval_s: time between two looks.
        alarm_s: lag from which on a warning with the loop's stack is logged (once per episode).
    """

    def __init__(self, metrics: Metrics, *, interval_s: float = 0.5, alarm_s: float = 0.5) -> None:
        self._metrics = metrics
        self._interval_s = interval_s
        self._alarm_s = alarm_s
        self._turned = time.monotonic()
        self._stop = threading.Event()
        self.last_lag_s = 0.0

    async def run(self) -> None:
        """Measure until cancelled."""
        self._stop.clear()
        self._turned = time.monotonic()
        watcher = threading.Thread(target=self._watch, args=(threading.get_ident(),), name="loop-probe", daemon=True)
        watcher.start()
        try:
            while True:
                due = time.monotonic() + self._interval_s
                await asyncio.sleep(self._interval_s)
                self._turned = time.monotonic()
                self.last_lag_s = max(0.0, self._turned - due)
                self._metrics.loop_lagged(self.last_lag_s, alarm=self.last_lag_s >= self._alarm_s)
        finally:
            self._stop.set()

    def is_turning(self, within_s: float = 30.0) -> bool:
        """Say whether the loop turned lately; for a watchdog that runs outside of the loop."""
        return time.monotonic() - self._turned < within_s

    def _watch(self, loop_thread: int) -> None:
        reported = 0.0
        while not self._stop.wait(self._interval_s):
            turned = self._turned
            late_s = time.monotonic() - turned - self._interval_s
            if late_s < self._alarm_s or turned == reported:
                continue
            reported = turned
            stack = ""
            with contextlib.suppress(KeyError):
                frame = sys._current_frames()[loop_thread]  # noqa: SLF001 - the documented way to see another stack
                stack = "".join(traceback.format_stack(frame, limit=12))
            _log.warning(
                "the event loop has been held for %.2f s", late_s, extra={"data": {"late_s": late_s, "stack": stack}}
            )
