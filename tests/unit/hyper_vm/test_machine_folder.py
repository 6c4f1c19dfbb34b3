"""A machine's folder, and the users that machines run as."""

from __future__ import annotations

from pathlib import Path

import pytest

from dispatcher.errors import InvalidRequest, OutOfResources
from dispatcher_hyper_vm.drivers.folder import MachineFolder, UserRange, list_machines

ID = "0f" * 32


def test_record_survives(tmp_path: Path) -> None:
    """What is written is read, by the id alone."""
    MachineFolder(tmp_path, ID).make({"uid": 7})
    folder = MachineFolder(tmp_path, ID)
    assert folder.read() == {"id": ID, "uid": 7}
    folder.write({"uid": 8})
    assert folder.read() == {"id": ID, "uid": 8}
    assert folder.path.stat().st_mode & 0o777 == 0o700
    assert list_machines(tmp_path) == (ID,)
    folder.remove()
    folder.remove()
    assert list_machines(tmp_path) == ()
    assert folder.read() == {}


def test_half_written_record_is_none(tmp_path: Path) -> None:
    """A crash before the record leaves an empty one, no error."""
    folder = MachineFolder(tmp_path, ID)
    folder.make({})
    folder.record.write_text("[")
    assert folder.read() == {}
    folder.record.write_text("[]")
    assert folder.read() == {}


@pytest.mark.parametrize("machine_id", ["..", "", "a/b" * 4, "A" * 64, "a" * 65])
def test_odd_ids_are_refused(machine_id: str, tmp_path: Path) -> None:
    """An id never becomes a path."""
    with pytest.raises(InvalidRequest):
        MachineFolder(tmp_path, machine_id)


def test_foreign_names_are_not_machines(tmp_path: Path) -> None:
    """Only folders named by an id count."""
    (tmp_path / "abcdefgh").mkdir()
    (tmp_path / ("ab" * 8)).write_text("")
    (tmp_path / ("cd" * 8)).mkdir()
    (tmp_path / ".share-00").mkdir()
    assert list_machines(tmp_path) == ()
    assert list_machines(tmp_path / "none") == ()


def test_long_run_folder_is_refused(tmp_path: Path) -> None:
    """A socket's path holds 107 bytes: said at once, not at a connection."""
    with pytest.raises(InvalidRequest, match="too long"):
        MachineFolder(tmp_path / ("x" * 60), ID).make({})


def test_logs_are_bounded(tmp_path: Path) -> None:
    """The newest half stays readable beside a fresh log that its writer appends to."""
    folder = MachineFolder(tmp_path, ID)
    folder.make({})
    with folder.console_log.open("ab", buffering=0) as writer:
        writer.write(b"old" * 100 + b"new" * 100)
        folder.bound_console(limit=400)
        writer.write(b"later")
    assert folder.console_log.read_bytes() == b"later"
    assert folder.console_log.with_suffix(".log.1").read_bytes() == (b"old" * 100 + b"new" * 100)[-200:]
    folder.bound_console(limit=400)
    assert folder.console_log.read_bytes() == b"later"


def test_last_words_are_printable(tmp_path: Path) -> None:
    """What a monitor said ends up in messages: one line, no control characters."""
    folder = MachineFolder(tmp_path, ID)
    assert folder.last_words() == ""
    folder.make({})
    folder.monitor_log.write_bytes(b"x" * 900 + b"\nqemu: \x1b[31mno\xff\n")
    words = folder.last_words()
    assert words.endswith("qemu: [31mno\N{REPLACEMENT CHARACTER}")
    assert words.isprintable()
    assert len(words) <= 600


def test_users_are_not_shared() -> None:
    """Each machine has its own; the next free one when its place is taken; an error when all are."""
    users = UserRange(1000, 4)
    taken: list[int] = []
    for number in range(4):
        user = users.choose(f"{number % 2:064x}", taken)
        assert user is not None
        taken.append(user)
    assert sorted(taken) == [1000, 1001, 1002, 1003]
    with pytest.raises(OutOfResources):
        users.choose(ID, taken)
    assert UserRange(0, 0).choose(ID, []) is None
