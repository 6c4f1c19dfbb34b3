"""One-time tokens: the only thing that lets a client of the streaming port in.

A token is 256 random bits, names one operation, works once and within a minute; at most so many wait unused. The clock
is handed in, so that a test needs no waiting.
"""

from __future__ import annotations

import secrets
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

from dispatcher.errors import OutOfResources

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class _Granted(Generic[T]):
    kind: str
    request: T
    until_s: float


class Tokens(Generic[T]):
    """Requests that were granted a URL and not fetched yet.

    Args:
        clock_s: a monotonic clock, in seconds.
        lifetime_s: how long an unused token works.
        limit: how many unused tokens there may be.
    """

    def __init__(self, clock_s: Callable[[], float], *, lifetime_s: float = 60.0, limit: int = 1000) -> None:
        self._clock_s = clock_s
        self._lifetime_s = lifetime_s
        self._limit = limit
        self._granted: OrderedDict[str, _Granted[T]] = OrderedDict()

    def __len__(self) -> int:
        """How many tokens are kept, unused."""
        self._drop_old()
        return len(self._granted)

    def grant(self, kind: str, request: T) -> str:
        """Return a token for one operation of this kind. Raises OutOfResources when too many wait unused."""
        self._drop_old()
        if len(self._granted) >= self._limit:
            raise OutOfResources(f"{self._limit} streaming requests wait for their client already; try again later.")
        token = secrets.token_urlsafe(32)
        self._granted[token] = _Granted(kind, request, self._clock_s() + self._lifetime_s)
        return token

    def take(self, kind: str, token: str) -> T | None:
        """Return the request of a token and forget it, or None: unknown, used, expired or of another kind."""
        self._drop_old()
        granted = self._granted.get(token)
        if granted is None or granted.kind != kind:
            return None
        del self._granted[token]
        return granted.request

    def _drop_old(self) -> None:
        now = self._clock_s()
        while self._granted and next(iter(self._granted.values())).until_s <= now:
            self._granted.popitem(last=False)
