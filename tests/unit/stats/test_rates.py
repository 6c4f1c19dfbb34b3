"""CPU rates between readings."""

from __future__ import annotations

from dispatcher.stats.rates import CpuRates

SECOND = 1_000_000_000


def test_a_rate_needs_a_second() -> None:
    rates = CpuRates()
    assert rates.take("a", 10 * SECOND, 5 * SECOND) is None
    assert rates.take("a", 10 * SECOND + 1, 6 * SECOND) is None, "too short to say"
    assert rates.take("a", 12 * SECOND, 6 * SECOND) == SECOND // 2
    assert rates.take("a", 12 * SECOND + 1, 9 * SECOND) == SECOND // 2, "a second client changes nothing"
    assert rates.take("a", 14 * SECOND, 10 * SECOND) == 2 * SECOND


def test_a_counter_that_fell_begins_anew() -> None:
    rates = CpuRates()
    rates.take("a", 10 * SECOND, 5 * SECOND)
    assert rates.take("a", 12 * SECOND, 1 * SECOND) is None
    assert rates.take("a", 14 * SECOND, 2 * SECOND) == SECOND // 2


def test_what_is_not_known_has_no_rate() -> None:
    rates = CpuRates()
    rates.take("a", SECOND, 0)
    assert rates.take("a", 3 * SECOND, None) is None
    rates.drop("a")
    assert rates.take("a", 5 * SECOND, SECOND) is None
