"""A machine's folder, which is what the driver remembers: in the run folder, 0700, gone after a boot of the host.

It is named by the first half of the id, since the path of a socket has little room, and appears with its record in it.

    lock          held by the monitor's processes for their life; holds the monitor's pid
    machine.json  what the machine is (written before it starts) and its facts (once it runs)
    monitor, agent, console          listening sockets of the monitor
    console.log, monitor.log         what the guest printed, what the monitor said
    root/         an empty folder on which the monitor's own file tree is mounted, in its namespace only

A template that is being made is such a machine, too.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import stat
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from dispatcher.api import effect
from dispatcher.errors import InvalidRequest, OutOfResources

_ID = re.compile(r"[0-9a-f]{8,64}")
_NAME = 32
_ADDRESS_SPACE = 107  # of a UNIX socket, without the final zero
CONSOLE_LOG_BYTES = 1 << 20


class MachineFolder:
    """The paths of one machine, and its record."""

    def __init__(self, run_folder: Path, machine_id: str) -> None:
        if not _ID.fullmatch(machine_id):
            raise InvalidRequest(f"{machine_id!r} is not an id of ours")
        self.id = machine_id
        self.path = run_folder / machine_id[:_NAME]
        self._made = run_folder / f".new-{machine_id[:_NAME]}"
        self.lock = self.path / "lock"
        self.record = self.path / "machine.json"
        self.monitor = self.path / "monitor"
        self.agent = self.path / "agent"
        self.console = self.path / "console"
        self.console_log = self.path / "console.log"
        self.monitor_log = self.path / "monitor.log"
        self.root = self.path / "root"

    @effect("hyper_vm.make_folder")
    def make(self, record: Mapping[str, Any]) -> None:
        """Make the folder and write the record. What a dead machine of this id left is removed first.

        Raises:
            InvalidRequest: the run folder's path is too long for sockets in it.
        """
        if len(os.fsencode(self.console)) > _ADDRESS_SPACE:
            raise InvalidRequest(f"the folder {self.path.parent} has too long a path for sockets in it")
        self.path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        self.remove()
        self._made.mkdir(mode=0o700)
        (self._made / self.root.name).mkdir(mode=0o700)
        (self._made / self.record.name).write_text(_as_text({**record, "id": self.id}), encoding="utf-8")
        os.rename(self._made, self.path)

    def write(self, record: Mapping[str, Any]) -> None:
        """Replace the record as one act."""
        self._write(_as_text({**record, "id": self.id}))

    @effect("hyper_vm.write_record")
    def _write(self, text: str) -> None:
        new = self.record.with_name(".machine.json.new")
        new.write_text(text, encoding="utf-8")
        os.replace(new, self.record)

    def read(self) -> dict[str, Any]:
        """The record, or an empty one where a crash came before it."""
        try:
            found = json.loads(self.record.read_bytes())
        except (OSError, ValueError):
            return {}
        return found if isinstance(found, dict) else {}

    @effect("hyper_vm.remove_folder")
    def remove(self) -> None:
        """Remove the folder. Idempotent."""
        for folder in (self.path, self._made):
            with contextlib.suppress(FileNotFoundError):
                shutil.rmtree(folder)

    @effect("hyper_vm.bound_console")
    def bound_console(self, limit: int = CONSOLE_LOG_BYTES) -> None:
        """Cut the logs back when they are over the limit: the newest half goes to the same name with ".1"."""
        for log in (self.console_log, self.monitor_log):
            with contextlib.suppress(FileNotFoundError):
                if log.stat().st_size > limit:
                    with log.open("r+b") as file:
                        file.seek(-limit // 2, os.SEEK_END)
                        newest = file.read()
                        file.truncate(0)  # the monitor appends: it goes on at the new end
                    log.with_suffix(".log.1").write_bytes(newest)

    def last_words(self, limit: int = 600) -> str:
        """The end of what the monitor said, for a message."""
        try:
            with self.monitor_log.open("rb") as file:
                file.seek(max(0, file.seek(0, os.SEEK_END) - limit))
                text = file.read(limit)
        except OSError:
            return ""
        return " ".join("".join(c if c.isprintable() else " " for c in text.decode("utf-8", "replace")).split())


def _as_text(record: Mapping[str, Any]) -> str:
    return json.dumps(record, sort_keys=True)


def list_machines(run_folder: Path) -> tuple[str, ...]:
    """The ids that have a folder, sorted."""
    try:
        with os.scandir(run_folder) as found:
            entries = list(found)
    except FileNotFoundError:
        return ()
    names = [
        e.name for e in entries if _ID.fullmatch(e.name) and len(e.name) <= _NAME and stat.S_ISDIR(e.stat().st_mode)
    ]
    ids = (MachineFolder(run_folder, name).read().get("id") for name in names)
    return tuple(sorted(each for each in ids if isinstance(each, str) and each[:_NAME] in names))


class UserRange:
    """Users of the host that belong to nobody: each machine runs as one of its own.

    Which are taken is read from the machines' records, so that it survives the daemon. An empty range means: as the
    daemon itself.
    """

    def __init__(self, first: int, count: int) -> None:
        self.first, self.count = first, count

    def choose(self, machine_id: str, taken: Iterable[int]) -> int | None:
        """The user of a new machine: where its id points, or the next free one after that. Pure.

        Raises:
            OutOfResources: all are taken.
        """
        if not self.count:
            return None
        used = set(taken)
        start = int(machine_id[:12], 16)
        for step in range(min(self.count, len(used) + 1)):
            user = self.first + (start + step) % self.count
            if user not in used:
                return user
        raise OutOfResources(f"all {self.count} users for machines are taken")
