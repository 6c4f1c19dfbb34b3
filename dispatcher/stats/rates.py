"""How fast CPU time is used: the difference of two readings. The state between questions, bounded by what is on record."""

from __future__ import annotations

from dataclasses import dataclass

SHORTEST_NS = 1_000_000_000  # a rate over less is noise: the kernel's own counters are coarser on some hosts


@dataclass(frozen=True, slots=True)
class _Kept:
    at_ns: int
    used_ns: int
    rate: int | None


class CpuRates:
    """Rates by object id, in billionths of a core. Several clients that ask in turn do not disturb each other."""

    def __init__(self) -> None:
        self._kept: dict[str, _Kept] = {}

    def take(self, object_id: str, at_ns: int, used_ns: int | None) -> int | None:
        """Take note of a reading and return the rate over the last second or longer; None until that much was seen.

        A counter that fell (another cgroup under the same id) begins anew.
        """
        if used_ns is None:
            return None
        kept = self._kept.get(object_id)
        if kept is None or used_ns < kept.used_ns or at_ns < kept.at_ns:
            self._kept[object_id] = _Kept(at_ns, used_ns, None)
            return None
        elapsed = at_ns - kept.at_ns
        if elapsed < SHORTEST_NS:
            return kept.rate
        rate = (used_ns - kept.used_ns) * 1_000_000_000 // elapsed
        self._kept[object_id] = _Kept(at_ns, used_ns, rate)
        return rate

    def drop(self, object_id: str) -> None:
        """Forget an object that was removed."""
        self._kept.pop(object_id, None)
