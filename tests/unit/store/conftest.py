"""Arming failpoints in this process."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from dispatcher import effects


@pytest.fixture
def arm() -> Iterator[Callable[[str], None]]:
    """Arm failpoints as DISPATCHER_FAILPOINTS would; what was armed before is forgotten."""

    def set_to(text: str) -> None:
        effects._ARMED[:] = effects._parse(text)

    yield set_to
    effects._ARMED.clear()
