"""Decides whether the engine's word on an exit may still lack "killed by the OOM killer".

The engine hears of the kill and of the exit on two ways, and the exit may come first. The kernel's own counter tells
whether there was any such kill just now: only then is it worth to wait a moment for the engine's flag.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

from dispatcher_docker_shim import host

_RECENT_S = 5.0
_KILLED = 137


class OomWitness:
    """Watches the host's count of OOM kills. `settle_s` bounds the wait per container."""

    def __init__(
        self,
        settle_s: float,
        *,
        count: Callable[[], int] = host.oom_kill_count,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._settle_s = settle_s
        self._count = count
        self._clock = clock
        self._seen = count()
        self._rose_at = -1e9
        self._waiting: dict[str, float] = {}

    def look(self) -> None:
        """Take note of kills up to now."""
        now = self._count()
        if now != self._seen:
            self._seen, self._rose_at = now, self._clock()

    def may_be_late(self, name: str, state: Mapping[str, Any]) -> bool:
        """True while the facts of an exit should not be believed yet to be complete."""
        killed = state.get("Status") == "exited" and state.get("ExitCode") == _KILLED
        if not killed or state.get("OOMKilled"):
            self._waiting.pop(name, None)
            return False
        self.look()
        if self._clock() - self._rose_at > _RECENT_S:
            return False
        until = self._waiting.setdefault(name, self._clock() + self._settle_s)
        if self._clock() < until:
            return True
        # Told once: later looks at the same exit find the kill too old, or wait this long at most once more.
        self._waiting.pop(name, None)
        return False
