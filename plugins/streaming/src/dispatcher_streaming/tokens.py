"""One-time tokens: the only thing that lets a client of the streaming port in.

A token is 256 random bits, names one operation, works once and within a minute; at most so many wait unused, half of them
for one container or pod, so that who asks in a loop leaves room for others. The clock is handed in, so that a test needs
no waiting.
"""

from __future__ import annotations

import secrets
from collections import Counter, OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

from dispatcher.errors import OutOfResources

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class _Granted(Generic[T]):
    kind: str
    request: T
    owner: str
    size: int
    until_s: float


class Tokens(Generic[T]):
    """Requests that were granted a URL and not fetched yet.

    Args:
        clock_s: a monotonic clock, in seconds.
        lifetime_s: how long an unused token works.
        limit: how many unused tokens there may be.
        max_bytes: how much memory their requests may take, by the sizes that `grant` is told.
    """

    def __init__(
        self,
        clock_s: Callable[[], float],
        *,
        lifetime_s: float = 60.0,
        limit: int = 1000,
        max_bytes: int = 16 << 20,
    ) -> None:
        self._clock_s = clock_s
        self._lifetime_s = lifetime_s
        self._limit = limit
        self._max_bytes = max_bytes
        self._bytes = 0
        self._granted: OrderedDict[str, _Granted[T]] = OrderedDict()
        self._owned: Counter[str] = Counter()

    def __len__(self) -> int:
        """How many tokens are kept, unused."""
        self._drop_old()
        return len(self._granted)

    def grant(self, kind: str, request: T, *, owner: str = "", size: int = 0) -> str:
        """Return a token for one operation of this kind.

        Args:
            kind: "exec", "attach" or "portforward": the token works for it only.
            request: what `take` returns.
            owner: the container or pod that it leads to. It may have half of all tokens; "" is nobody.
            size: how many bytes of memory the request takes, about.

        Raises:
            OutOfResources: too many wait unused, or they take too much memory.
        """
        self._drop_old()
        own_limit = max(1, self._limit // 2) if owner else self._limit
        if len(self._granted) >= self._limit or self._owned[owner] >= own_limit:
            count = len(self._granted) if len(self._granted) >= self._limit else self._owned[owner]
            raise OutOfResources(f"{count} streaming requests wait for their client already; try again later.")
        if self._bytes and self._bytes + size > self._max_bytes:
            raise OutOfResources("The commands of streaming requests that wait take too much memory; try again later.")
        token = secrets.token_urlsafe(32)
        self._granted[token] = _Granted(kind, request, owner, size, self._clock_s() + self._lifetime_s)
        self._owned[owner] += 1
        self._bytes += size
        return token

    def take(self, kind: str, token: str) -> T | None:
        """Return the request of a token and forget it, or None: unknown, used, expired or of another kind."""
        self._drop_old()
        granted = self._granted.get(token)
        if granted is None or granted.kind != kind:
            return None
        del self._granted[token]
        self._forget(granted)
        return granted.request

    def _drop_old(self) -> None:
        now = self._clock_s()
        while self._granted and next(iter(self._granted.values())).until_s <= now:
            self._forget(self._granted.popitem(last=False)[1])

    def _forget(self, granted: _Granted[T]) -> None:
        self._bytes -= granted.size
        self._owned[granted.owner] -= 1
        if not self._owned[granted.owner]:
            del self._owned[granted.owner]
