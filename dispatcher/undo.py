"""Acquisitions and their undo, in one block. The record comes first, `push` before the act, `keep` at the end.

    async with Undo() as undo:
        undo.push(network.delete, plan, None)      # before add: ADD can half-succeed, and DEL is idempotent
        attachment = await network.add(plan)
        ...
        undo.keep()                                # from here on everything belongs to the record

A block that is left without `keep` runs its steps in reverse order. A step that fails or hangs does not stop the rest,
and a second cancellation does not abandon them; `failures` tells afterwards whether the record may be forgotten.
"""

from __future__ import annotations

import asyncio
import inspect
import logging
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class UndoFailure:
    """A step that did not succeed."""

    step: str
    error: BaseException


class Undo:
    """See the module. `step_timeout_s` bounds each step, so that the whole undo is bounded.

    `failures` holds the steps that failed, in the order in which they ran; empty means that nothing is left behind.
    """

    def __init__(self, step_timeout_s: float = 30.0) -> None:
        self.failures: list[UndoFailure] = []
        self._step_timeout_s = step_timeout_s
        self._steps: list[tuple[str, Callable[[], Any]]] = []

    def push(self, step: Callable[..., Any], /, *args: Any, **kwargs: Any) -> None:
        """Register a step, plain or async, that must be idempotent and must work when its act never happened."""
        name = getattr(step, "__qualname__", None) or type(step).__name__
        self._steps.append((name, lambda: step(*args, **kwargs)))

    def keep(self) -> None:
        """Forget all steps: what was acquired stays."""
        self._steps.clear()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if not self._steps:
            return
        # In a task of its own: a cancellation that arrives now waits until everything was tried.
        running = asyncio.create_task(self._run(), name="undo")
        cancelled: asyncio.CancelledError | None = None
        while not running.done():
            try:
                await asyncio.wait([running])
            except asyncio.CancelledError as late:
                cancelled = late
        if cancelled is not None and kind is not asyncio.CancelledError:
            raise cancelled

    async def _run(self) -> None:
        while self._steps:
            name, step = self._steps.pop()
            try:
                async with asyncio.timeout(self._step_timeout_s):
                    result = step()
                    if inspect.isawaitable(result):
                        await result
            except (Exception, asyncio.CancelledError) as error:  # noqa: BLE001 - reported in `failures`; the rest must run
                self.failures.append(UndoFailure(name, error))
                _log.warning("undo step failed", exc_info=error, extra={"step": name})
