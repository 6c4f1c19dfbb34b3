"""Which rules can never act: a syntactic proof that one `match:` covers another. Pure.

Only what is certain is claimed: `covers(a, b)` true means that every pod that b matches is matched by a, too; false
means nothing. So a finding is always right, and a rule that is unreachable for deeper reasons may go unnoticed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from dispatcher.policy.matching import glob
from dispatcher.policy.schema import CpuRange, Match, MemoryRange, PatternSet, ValueSet

_FLAGS = ("privileged", "host_network", "host_pid", "host_ipc", "userns", "seccomp_unconfined")
_SINGLE = ("namespace", "name", "handler", "runtime")
_MANY = ("sysctls", "image")
_SPELLED = ("capabilities", "devices", "host_mounts")  # compared in a normal form of their own: only lists are compared


def covers(wide: Sequence[Match] | None, narrow: Sequence[Match] | None) -> bool:
    """True if whatever one of `narrow` matches is certainly matched by one of `wide`."""
    if not wide:
        return True
    return all(any(_clause_covers(one, other) for one in wide) for other in narrow or [Match()])


def is_contradiction(match: Match) -> bool:
    """True if a clause certainly matches nothing, because its `not:` takes away all that the rest lets through."""
    return match.not_ is not None and covers(match.not_, [match.model_copy(update={"not_": None})])


def _clause_covers(wide: Match, narrow: Match) -> bool:
    for name in _FLAGS:
        wanted = getattr(wide, name)
        if wanted is not None and getattr(narrow, name) is not wanted:
            return False
    for name in _SINGLE:
        if not _patterns_cover(getattr(wide, name), getattr(narrow, name), is_single=True):
            return False
    for name in _MANY:
        if not _patterns_cover(getattr(wide, name), getattr(narrow, name), is_single=False):
            return False
    for name in _SPELLED:
        if not _lists_cover(getattr(wide, name), getattr(narrow, name)):
            return False
    if wide.qos is not None and (narrow.qos is None or not set(narrow.qos) <= set(wide.qos)):
        return False
    return (
        _range_covers(wide.cpu, narrow.cpu)
        and _range_covers(wide.memory, narrow.memory)
        and _entries_cover(wide.labels, narrow.labels)
        and _entries_cover(wide.annotations, narrow.annotations)
        and _negation_covers(wide, narrow)
    )


def _patterns_cover(wide: PatternSet | None, narrow: PatternSet | None, *, is_single: bool) -> bool:
    if wide is None or wide == narrow:
        return True
    if is_single and "*" in wide.any_of:
        return True  # there is always one value
    if narrow is None or wide.other_than or narrow.other_than:
        return False
    return all(any(_glob_covers(one, other) for one in wide.any_of) for other in narrow.any_of)


def _lists_cover(wide: PatternSet | None, narrow: PatternSet | None) -> bool:
    if wide is None or wide == narrow:
        return True
    if narrow is None or wide.other_than or narrow.other_than:
        return False
    return "*" in wide.any_of or set(narrow.any_of) <= set(wide.any_of)


def _glob_covers(wide: str, narrow: str) -> bool:
    if wide in (narrow, "*"):
        return True
    if "*" in narrow or "?" in narrow:
        # `abc*` covers `abcd*`: a literal beginning, then anything.
        return wide.endswith("*") and not set("*?") & set(wide[:-1]) and narrow.startswith(wide[:-1])
    return glob(wide)(narrow)


def _range_covers(wide: CpuRange | MemoryRange | None, narrow: CpuRange | MemoryRange | None) -> bool:
    if wide is None:
        return True
    if narrow is None:
        return wide.at_least is None and wide.at_most is None
    is_low = wide.at_least is None or (narrow.at_least is not None and narrow.at_least >= wide.at_least)
    is_high = wide.at_most is None or (narrow.at_most is not None and narrow.at_most <= wide.at_most)
    return is_low and is_high


def _entries_cover(wide: Mapping[str, ValueSet], narrow: Mapping[str, ValueSet]) -> bool:
    for key, wanted in wide.items():
        given = narrow.get(key)
        if given is None:
            return False
        if wanted == given:
            continue
        if wanted.exists is True and given.exists is None:
            continue  # any pattern needs the key to be there
        if wanted.exists is not None or given.exists is not None:
            return False
        if not _patterns_cover(wanted, given, is_single=False):
            return False
    return True


def _negation_covers(wide: Match, narrow: Match) -> bool:
    """What `wide` excludes has to be excluded by `narrow` as well."""
    if wide.not_ is None:
        return True
    return narrow.not_ is not None and covers(narrow.not_, wide.not_)
