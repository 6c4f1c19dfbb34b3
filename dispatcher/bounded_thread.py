"""One daemon thread for calls that may block for ever: a hook of a plugin, a look at a path on a dead file system.

A call that does not end in time is left behind and costs this thread until it ends: nothing else, neither the event
loop nor the end of the process, waits for it.
"""

from __future__ import annotations

import asyncio
import contextlib
import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future, wait
from typing import Any, TypeVar

T = TypeVar("T")


class BoundedThread:
    """Runs one call at a time. `call` blocks its caller, `ask` suspends it; use one of the two on an object.

    Args:
        name: of the thread, which is started at the first call.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._jobs: queue.SimpleQueue[tuple[Callable[[], Any], Future[Any]]] = queue.SimpleQueue()
        self._stuck: Future[Any] | None = None
        self._turn = asyncio.Lock()
        self._started = False

    def call(self, function: Callable[[], T], time_limit_s: float) -> T:
        """Return the result, or raise what it raised.

        Raises:
            TimeoutError: this call, or the one before it, has not ended.
        """
        answer = self._submit(function)
        wait((answer,), timeout=time_limit_s)
        if not answer.done():
            raise self._late(answer, time_limit_s)
        return answer.result()

    async def ask(self, function: Callable[[], T], time_limit_s: float) -> T:
        """Do the same without holding the event loop. Callers take turns, and the limit counts from one's own turn.

        Cancelling the caller leaves the call behind as one that did not end in time.
        """
        loop = asyncio.get_running_loop()
        async with self._turn:
            answer = self._submit(function)
            ended = asyncio.Event()

            def tell(_answer: Future[T]) -> None:
                with contextlib.suppress(RuntimeError):  # the loop is gone: nobody waits any more
                    loop.call_soon_threadsafe(ended.set)

            answer.add_done_callback(tell)
            try:
                async with asyncio.timeout(time_limit_s):
                    await ended.wait()
            except TimeoutError:
                raise self._late(answer, time_limit_s) from None
            except asyncio.CancelledError:
                self._stuck = answer
                raise
            return answer.result()

    def _submit(self, function: Callable[[], T]) -> Future[T]:
        if self._stuck is not None:
            if not self._stuck.done():
                raise TimeoutError("an earlier call has not ended")
            self._stuck = None
        if not self._started:
            threading.Thread(target=self._work, name=self._name, daemon=True).start()
            self._started = True
        answer: Future[T] = Future()
        self._jobs.put((function, answer))
        return answer

    def _late(self, answer: Future[Any], time_limit_s: float) -> TimeoutError:
        self._stuck = answer
        return TimeoutError(f"no answer within {time_limit_s:g} s")

    def _work(self) -> None:
        while True:
            function, answer = self._jobs.get()
            try:
                answer.set_result(function())
            except BaseException as error:  # noqa: BLE001 - carried over to the caller
                answer.set_exception(error)
            del function, answer
