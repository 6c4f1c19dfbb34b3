"""One-time tokens, with a clock of the test's own."""

from __future__ import annotations

import pytest

from dispatcher.errors import OutOfResources
from dispatcher_streaming.tokens import Tokens


def test_a_token_works_once_for_its_kind_within_its_time() -> None:
    now = [0.0]
    tokens: Tokens[str] = Tokens(lambda: now[0], lifetime_s=60, limit=2)
    first = tokens.grant("exec", "a")
    assert tokens.take("attach", first) is None
    assert tokens.take("exec", "unknown") is None
    assert tokens.take("exec", first) == "a"
    assert tokens.take("exec", first) is None
    late = tokens.grant("exec", "b")
    now[0] = 60.0
    assert tokens.take("exec", late) is None
    assert len(tokens) == 0


def test_too_many_unused_tokens_are_refused_until_they_expire() -> None:
    now = [0.0]
    tokens: Tokens[int] = Tokens(lambda: now[0], lifetime_s=60, limit=1000)
    for number in range(1000):
        tokens.grant("exec", number)
    for _ in range(9000):
        with pytest.raises(OutOfResources):
            tokens.grant("exec", 0)
    assert len(tokens) == 1000
    now[0] = 61.0
    assert tokens.grant("exec", 0)
    assert len(tokens) == 1
