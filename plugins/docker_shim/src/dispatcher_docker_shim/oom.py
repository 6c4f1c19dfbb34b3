"""Decides whether an exit was the work of the kernel's OOM killer, also where the engine does not know (yet).

The engine hears of the kill and of the exit on two ways. The exit may come first, and with cgroup version 1 the kill is
not heard at all when the cgroup is gone before it is looked at. So the kernel is asked as well: its log names the
cgroup of each victim, and its counter tells whether there was any kill just now, when it is worth to wait a moment for
the engine's flag. Records that a process wrote into the log itself carry another facility and do not count.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from dispatcher_docker_shim import host

_RECENT_S = 5.0
_KILLED = 137
_KEPT = 4096
_AT_ONCE = 100_000  # more than any kernel keeps
_USER_FACILITY = 8  # the kernel's own records have a priority below
_VICTIM = re.compile(rb"oom-kill:constraint=[^;]*?,task_memcg=[^,]*?([0-9a-f]{64})[^,]*,task=")


def find_victims(records: Iterable[bytes]) -> set[str]:
    """The engine ids of containers that the kernel's log names as victims. Pure."""
    victims = set()
    for record in records:
        head, _, text = record.partition(b";")
        priority = head.partition(b",")[0]
        found = _VICTIM.match(text)
        if found and priority.isdigit() and int(priority) < _USER_FACILITY:
            victims.add(found[1].decode("ascii"))
    return victims


class KernelLog:
    """New records of the kernel's log; none where it may not be read."""

    def __init__(self, path: str = "/dev/kmsg") -> None:
        try:
            self._fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        except OSError:
            self._fd = -1

    def read(self) -> list[bytes]:
        """All records since the last call, from the oldest that is kept on. Overwritten ones are passed over."""
        records: list[bytes] = []
        while self._fd >= 0 and len(records) < _AT_ONCE:
            try:
                record = os.read(self._fd, 8192)
            except BrokenPipeError:
                continue
            except OSError:
                break
            if not record:
                break
            records.append(record)
        return records

    def close(self) -> None:
        """Let go. Idempotent."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


class OomWitness:
    """What is known of OOM kills on this host. `settle_s` bounds the wait per container for the engine's flag."""

    def __init__(
        self,
        settle_s: float,
        *,
        count: Callable[[], int] = host.oom_kill_count,
        clock: Callable[[], float] = time.monotonic,
        log: KernelLog | None = None,
    ) -> None:
        self._settle_s = settle_s
        self._count = count
        self._clock = clock
        self._log = log or KernelLog()
        self._seen = -1
        self._rose_at = -1e9
        self._waiting: dict[str, float] = {}
        self._victims: dict[str, None] = {}

    def look(self) -> None:
        """Take note of kills up to now."""
        now = self._count()
        if now == self._seen:
            return
        if self._seen >= 0:
            self._rose_at = self._clock()
        self._seen = now
        self._victims.update(dict.fromkeys(find_victims(self._log.read())))
        while len(self._victims) > _KEPT:
            del self._victims[next(iter(self._victims))]

    def complete(self, found: Mapping[str, Any]) -> None:
        """Add to a container's inspection what the kernel knows and the engine missed."""
        state = found["State"]
        if state.get("Status") == "exited" and state.get("ExitCode") == _KILLED and not state.get("OOMKilled"):
            self.look()
            state["OOMKilled"] = found.get("Id") in self._victims

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

    def close(self) -> None:
        """Let go of the kernel's log."""
        self._log.close()
