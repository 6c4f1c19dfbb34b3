"""How the containers of a machine ended, kept on the host: what only the guest knew must outlive the guest.

One small file in the pod's folder, written whole before the machine is switched off. Recovery reads it where the
machine is gone and the record does not know the exit yet.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path

from dispatcher.api import effect
from dispatcher.model import ContainerId, Liveness, ObservedContainer

_NAME = "exits.json"
_LIMIT = 4 << 20


@effect("vm.keep_exits")
def keep_exits(folder: Path, ended: Iterable[ObservedContainer]) -> None:
    """Add facts of containers that ended. Idempotent; a later fact on the same container replaces the earlier one.

    Raises:
        OSError: the folder cannot be written to.
    """
    known = {item.id: item for item in (*read_exits(folder), *ended)}
    rows = [
        {
            "id": item.id,
            "started_at_ns": item.started_at_ns,
            "finished_at_ns": item.finished_at_ns,
            "exit_code": item.exit_code,
            "oom_killed": item.oom_killed,
            "reason": item.reason,
            "message": item.message,
        }
        for item in known.values()
        if item.liveness is Liveness.EXITED
    ]
    work = folder / f"{_NAME}.new"
    with work.open("w", encoding="utf-8") as file:
        json.dump(rows, file)
        file.flush()
        os.fsync(file.fileno())
    work.replace(folder / _NAME)


def read_exits(folder: Path) -> tuple[ObservedContainer, ...]:
    """The facts that are kept; none where there is no file. A file that makes no sense counts as none."""
    try:
        with (folder / _NAME).open(encoding="utf-8") as file:
            rows = json.loads(file.read(_LIMIT))
        return tuple(_read(row) for row in rows)
    except (OSError, ValueError, KeyError, TypeError):
        return ()


def _read(row: dict[str, object]) -> ObservedContainer:
    code = row["exit_code"]
    return ObservedContainer(
        id=ContainerId(str(row["id"])),
        liveness=Liveness.EXITED,
        started_at_ns=int(str(row["started_at_ns"])),
        finished_at_ns=int(str(row["finished_at_ns"])),
        exit_code=None if code is None else int(str(code)),
        oom_killed=bool(row["oom_killed"]),
        reason=str(row["reason"]),
        message=str(row["message"]),
    )
