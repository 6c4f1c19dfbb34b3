"""Where the time of one call goes: a tree of named, timed steps, recorded only where somebody asked for it.

Theory of operation. `Recording` opens the root of a call and puts it into a context variable, so tasks and threads that
are started meanwhile add to the same tree. `step` adds a span below the current one; without a recording it does
nothing and costs a fraction of a microsecond. Every `@effect` is a step by itself, so a plugin's acts show without any
code of its own.

A tree ends when its root and all steps below it have ended: work that outlives its client is still recorded. Then it is
handed on, once, and later steps of tasks that still carry the context (a log that is followed) are no longer recorded.

Invariant: a tree is bounded, whatever happens in it. Equal steps in a row become one with a count, and what comes after
`MAX_SPANS` is only counted. Nothing here knows where trees go.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextvars import ContextVar, Token
from types import TracebackType
from typing import Final, Self

MAX_SPANS: Final = 256
MAX_FACTS: Final = 16
MAX_TEXT: Final = 300

Fact = str | int | float | bool


class Span:
    """One step. Times are nanoseconds since the tree began; `ended_ns` is -1 while it runs.

    `count` is how many equal steps in a row this one stands for, and `busy_ns` their time without what lay between.
    """

    __slots__ = ("busy_ns", "count", "ended_ns", "error", "facts", "name", "parent", "resumed_ns", "started_ns", "tree")

    def __init__(self, tree: Tree, parent: Span | None, name: str, started_ns: int) -> None:
        self.tree = tree
        self.parent = parent
        self.name = name
        self.started_ns = self.resumed_ns = started_ns
        self.ended_ns = -1
        self.busy_ns = 0
        self.count = 1
        self.error = ""
        self.facts: dict[str, Fact] = {}

    def annotate(self, facts: dict[str, Fact]) -> None:
        """Add facts; long texts are cut, and beyond `MAX_FACTS` nothing is added."""
        for key, value in facts.items():
            if len(self.facts) < MAX_FACTS or key in self.facts:
                self.facts[key] = value[:MAX_TEXT] if isinstance(value, str) else value


class Tree:
    """All spans of one call, the root first. `began_ns` is the wall clock's time of its beginning."""

    __slots__ = ("_clock_ns", "_on_end", "_open", "began_ns", "closed", "dropped", "remote", "spans")

    def __init__(self, name: str, on_end: Callable[[Tree], None], remote: str) -> None:
        self.began_ns = time.time_ns()
        self._clock_ns = time.perf_counter_ns()
        self._on_end = on_end
        self._open = 1
        self.closed = False
        self.dropped = 0
        self.remote = remote
        self.spans = [Span(self, None, name, 0)]

    @property
    def root(self) -> Span:
        """The call itself."""
        return self.spans[0]

    def now_ns(self) -> int:
        """The time since the beginning."""
        return time.perf_counter_ns() - self._clock_ns

    def begin(self, parent: Span, name: str) -> Span | None:
        """Add a span below another, or go on with the one before it if it is the same step again. None: no room."""
        now_ns = self.now_ns()
        last = self.spans[-1]
        if last.name == name and last.parent is parent and last.ended_ns >= 0 and not last.facts and not last.error:
            last.count += 1
            last.ended_ns, last.resumed_ns = -1, now_ns
            self._open += 1
            return last
        if len(self.spans) >= MAX_SPANS:
            self.dropped += 1
            return None
        span = Span(self, parent, name, now_ns)
        self.spans.append(span)
        self._open += 1
        return span

    def end(self, span: Span, error: BaseException | None) -> None:
        """End a span; the last one ends the tree."""
        span.ended_ns = self.now_ns()
        span.busy_ns += span.ended_ns - span.resumed_ns
        if error is not None:
            span.error = f"{type(error).__name__}: {error}"[:MAX_TEXT]
        self._open -= 1
        if self._open == 0 and not self.closed:
            self.closed = True
            self._on_end(self)

    def take_spans(self) -> list[Span]:
        """Return the spans and let go of them, since contexts of long-lived tasks keep the tree itself."""
        spans, self.spans = self.spans, self.spans[:1]
        return spans


_CURRENT: ContextVar[Span | None] = ContextVar("dispatcher_span", default=None)


class Recording:
    """Records the call in its block: `with Recording("RunPodSandbox", keep): ...`.

    Args:
        name: of the root.
        on_end: takes the tree when it is complete; on the thread where that happened. Must not raise.
        remote: the caller's own trace context as it was sent (W3C traceparent), "" for none.
        facts: on the root.
    """

    __slots__ = ("_token", "tree")

    def __init__(self, name: str, on_end: Callable[[Tree], None], *, remote: str = "", **facts: Fact) -> None:
        self.tree = Tree(name, on_end, remote)
        self.tree.root.annotate(facts)
        self._token: Token[Span | None] | None = None

    def __enter__(self) -> Self:
        self._token = _CURRENT.set(self.tree.root)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._token is not None
        _CURRENT.reset(self._token)
        self.finish(error)

    def finish(self, error: BaseException | None = None) -> None:
        """End a recording that is no block: the call alone was timed, without steps."""
        self.tree.end(self.tree.root, error)


class step:  # noqa: N801 - it reads as a statement: with step("netns"): ...
    """Times its block as a step of the call that is being recorded; does nothing where none is.

    Args:
        name: a constant, such as "netns" or "docker.start_container". Names never come from users.
        facts: what tells this step from others of the name.
    """

    __slots__ = ("_facts", "_name", "_span", "_token")

    def __init__(self, name: str, **facts: Fact) -> None:
        self._name = name
        self._facts = facts
        self._span: Span | None = None
        self._token: Token[Span | None] | None = None

    def __enter__(self) -> None:
        parent = _CURRENT.get()
        if parent is None or parent.tree.closed:
            return
        self._span = span = parent.tree.begin(parent, self._name)
        if span is not None:
            if self._facts:
                span.annotate(self._facts)
            self._token = _CURRENT.set(span)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._span is not None and self._token is not None:
            _CURRENT.reset(self._token)
            self._span.tree.end(self._span, error)


def is_recording() -> bool:
    """Say whether a step begun now would be recorded."""
    current = _CURRENT.get()
    return current is not None and not current.tree.closed


def annotate(**facts: Fact) -> None:
    """Add facts to the current step. Does nothing where nothing is recorded."""
    current = _CURRENT.get()
    if current is not None and not current.tree.closed:
        current.annotate(facts)


def annotate_call(**facts: Fact) -> None:
    """Add facts to the root of the call that is being recorded, such as the pod that it turned out to be about."""
    current = _CURRENT.get()
    if current is not None and not current.tree.closed:
        current.tree.root.annotate(facts)
