"""Every act on the world outside our process passes here, so that a test can crash, fail or delay it.

It is also a step of the call that is being recorded, if one is: see `dispatcher.spans`.

Theory of operation. A function that touches something outside (a process, a mount, a file that is not the database,
an engine, netlink) carries `@effect("area.name")`. Each call then passes two failpoints, `area.name:before` and
`area.name:after`. Failpoints do nothing unless the environment variable DISPATCHER_FAILPOINTS arms them, which only
tests do: a comma-separated list of `NAME:WHEN=ACTION[@N]`, where ACTION is

    kill        SIGKILL to ourselves, as `kill -9` of the daemon would
    error       raise InjectedFailure
    hang        wait for ever (async functions only), as a plugin that does not answer
    trace       append the name to the file named by DISPATCHER_FAILPOINT_TRACE and go on

and @N means: at the N-th passage only (from 1). The name may be `*`. Keep this module free of anything else.
"""

from __future__ import annotations

import asyncio
import functools
import inspect
import os
import signal
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

from dispatcher.spans import is_recording, step

P = ParamSpec("P")
R = TypeVar("R")

_ENV = "DISPATCHER_FAILPOINTS"
_TRACE_ENV = "DISPATCHER_FAILPOINT_TRACE"


class InjectedFailure(Exception):
    """Raised by an armed failpoint with the action "error"."""


@dataclass(slots=True)
class _Armed:
    name: str
    when: str
    action: str
    at: int
    passed: int = 0


def _parse(text: str) -> list[_Armed]:
    armed = []
    for item in filter(None, (part.strip() for part in text.split(","))):
        point, _, action = item.partition("=")
        name, _, when = point.rpartition(":")
        action, _, at = action.partition("@")
        if when not in {"before", "after"} or action not in {"kill", "error", "hang", "trace"}:
            raise ValueError(f"{_ENV}: cannot read {item!r}")
        armed.append(_Armed(name, when, action, int(at or 0)))
    return armed


_ARMED = _parse(os.environ.get(_ENV, ""))
# Names of all decorated functions, for the test that walks every failpoint. Filled at import, read by tests only.
REGISTERED: set[str] = set()


def _fire(name: str, when: str) -> bool:
    """Pass a failpoint; True means: the caller has to hang."""
    for armed in _ARMED:
        if armed.name not in (name, "*") or armed.when != when:
            continue
        armed.passed += 1
        if armed.at and armed.passed != armed.at:
            continue
        if armed.action == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        elif armed.action == "error":
            raise InjectedFailure(f"{name}:{when}")
        elif armed.action == "hang":
            return True
        else:
            with Path(os.environ[_TRACE_ENV]).open("a", encoding="utf-8") as trace:
                trace.write(f"{name}:{when}\n")
    return False


def effect(name: str) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Mark a function (plain or async) as an act on the outside world named `area.name`.

    The name is unique per function. Costs one list check per call while nothing is armed. Arguments and results pass
    unchanged; in a plain function an armed "hang" raises InjectedFailure, since it must not block the loop.
    """

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        REGISTERED.add(name)
        if inspect.iscoroutinefunction(function):

            @functools.wraps(function)
            async def run_async(*args: P.args, **kwargs: P.kwargs) -> Any:
                if _ARMED and _fire(name, "before"):
                    await asyncio.Event().wait()
                if is_recording():
                    with step(name):
                        result = await function(*args, **kwargs)
                else:
                    result = await function(*args, **kwargs)
                if _ARMED and _fire(name, "after"):
                    await asyncio.Event().wait()
                return result

            return run_async  # type: ignore[return-value]

        @functools.wraps(function)
        def run(*args: P.args, **kwargs: P.kwargs) -> R:
            if _ARMED and _fire(name, "before"):
                raise InjectedFailure(f"{name}:before")
            if is_recording():
                with step(name):
                    result = function(*args, **kwargs)
            else:
                result = function(*args, **kwargs)
            if _ARMED and _fire(name, "after"):
                raise InjectedFailure(f"{name}:after")
            return result

        return run

    return decorate
