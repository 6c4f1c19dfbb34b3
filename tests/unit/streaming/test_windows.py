"""Windows and the budget that they share."""

from __future__ import annotations

import asyncio

from dispatcher_streaming.windows import OWN, Budget, Share, Window


def left(budget: Budget) -> int:
    """How many bytes can still be taken, to 64 KiB."""
    count = 0
    while budget.take(OWN):
        count += 1
    budget.give(count * OWN)
    return count * OWN


async def test_bytes_come_out_in_order_and_then_the_end() -> None:
    window = Window(10, Budget(0))
    window.put(b"ab")
    window.put(b"")
    window.put(b"cd")
    window.end()
    window.end()
    window.put(b"behind the end")
    assert [await window.get() for _ in range(4)] == [b"ab", b"cd", b"", b""]
    assert window.moved == 2


async def test_a_reader_waits_for_bytes_and_a_writer_for_room() -> None:
    window = Window(4, Budget(0))
    reading = asyncio.ensure_future(window.get())
    await asyncio.sleep(0)
    assert not reading.done()
    window.put(b"12345")
    assert window.is_full
    waiting = asyncio.ensure_future(window.wait_room())
    assert await reading == b"12345"
    await waiting


async def test_a_window_is_full_where_the_budget_is_used_up() -> None:
    budget = Budget(3 * OWN)
    first, second = Window(10 * OWN, budget), Window(10 * OWN, budget)
    first.put(b"x" * 4 * OWN)
    assert not first.is_full
    assert left(budget) == 0
    second.put(b"x" * OWN)
    states = [second.is_full]  # its own part needs no budget
    second.put(b"x")
    states.append(second.is_full)
    assert states == [False, True]
    first.close()
    first.close()
    first.put(b"nobody reads this")
    assert left(budget) == 3 * OWN
    second.put(b"x" * OWN)
    assert not second.is_full
    second.close()
    assert left(budget) == 3 * OWN


def test_a_share_never_takes_more_than_there_is() -> None:
    budget = Budget(OWN)
    share, other = Share(budget), Share(budget)
    assert share.fit(OWN)
    assert share.fit(2 * OWN)
    assert not other.fit(OWN + 1)
    assert not share.fit(2 * OWN + 1)
    assert share.fit(0)
    assert other.fit(2 * OWN)
    assert other.fit(0)
    assert left(budget) == OWN
