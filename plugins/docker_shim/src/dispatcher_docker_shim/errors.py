"""Errors of the engine in our classes, chosen by HTTP code and never by text."""

from __future__ import annotations

from dispatcher.errors import DispatcherError, InvalidRequest, NotFound, NotSupported, RuntimeDown, WrongState


class EngineAway(RuntimeDown):
    """The engine cannot be reached or does not answer in time."""


class EngineRefused(InvalidRequest):
    """The engine calls the request itself wrong (400)."""


class EngineForbids(NotSupported):
    """The engine is not allowed or not built to do this (403, 405, 501)."""


class EngineLacks(NotFound):
    """The engine does not have what was named (404)."""


class EngineConflict(WrongState):
    """The engine's object is in another state, or its name is taken (409)."""


class EngineFailed(WrongState):
    """The engine tried and failed (500). Its own words are the message: a full disk, an OCI runtime's complaint."""


_BY_STATUS: dict[int, type[DispatcherError]] = {
    400: EngineRefused,
    403: EngineForbids,
    404: EngineLacks,
    405: EngineForbids,
    409: EngineConflict,
    501: EngineForbids,
    503: EngineAway,
}


def from_status(status: int, words: str, *, doing: str) -> DispatcherError:
    """Make the error for an engine's answer. `doing` names the attempt, such as "create container"."""
    kind = _BY_STATUS.get(status, EngineRefused if 400 <= status < 500 else EngineFailed)
    said = " ".join(words.split())[:2000] or f"HTTP {status}"
    return kind(f"Docker Engine could not {doing}: {said}", status=status)
