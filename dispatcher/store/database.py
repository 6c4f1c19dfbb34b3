"""The SQLite file under the store: opening, migrating, saving from damage, and commits of many rows at once.

Blocking by design: every function here runs in the store's one thread. Rows are opaque bytes; what a record is, only
the codec knows. WAL with synchronous=FULL: once `commit` returns, the rows survive the loss of power. The file is
locked exclusively, so that a second daemon on the same state folder fails at once instead of writing beside the first.
"""

from __future__ import annotations

import os
import shutil
import sqlite3
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dispatcher.api import effect
from dispatcher.errors import DispatcherError, Internal, OutOfResources

# Marks the file as ours ("CriD"), so that a wrong path in the config cannot harm another program's database.
APPLICATION_ID = 0x43726944

Migration = Callable[[sqlite3.Connection], None]

_SCHEMA_1 = """
CREATE TABLE records (
    kind TEXT NOT NULL, id TEXT NOT NULL, version INTEGER NOT NULL, schema INTEGER NOT NULL, body BLOB NOT NULL,
    PRIMARY KEY (kind, id)
) WITHOUT ROWID;
CREATE TABLE settings (key TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE set_aside (
    kind TEXT NOT NULL, id TEXT NOT NULL, body BLOB, reason TEXT NOT NULL, at_ns INTEGER NOT NULL,
    PRIMARY KEY (kind, id)
) WITHOUT ROWID;
"""

# MIGRATIONS[i] turns schema i+1 into i+2, inside the transaction that also raises the number. A migration of record
# bodies goes over `records` with `rewrite_bodies`.
MIGRATIONS: tuple[Migration, ...] = ()


class StoreUnusableError(DispatcherError):
    """The state database cannot be used; the message says why and what to do. The daemon must not start."""


@dataclass(frozen=True, slots=True)
class Row:
    """One record as it stands in the file."""

    kind: str
    id: str
    version: int
    schema: int
    body: bytes


@dataclass(frozen=True, slots=True)
class Delete:
    """A row to delete; nothing happens where there is none."""

    kind: str
    id: str


@dataclass(frozen=True, slots=True)
class Setting:
    """A setting to write; `value` is JSON."""

    key: str
    value: str


Operation = Row | Delete | Setting


def rewrite_bodies(connection: sqlite3.Connection, kind: str, change: Callable[[bytes], bytes]) -> None:
    """Pass every body of one kind through `change`. For migrations."""
    rows = connection.execute("SELECT id, body FROM records WHERE kind = ?", (kind,)).fetchall()
    connection.executemany(
        "UPDATE records SET body = ? WHERE kind = ? AND id = ?", [(change(body), kind, row_id) for row_id, body in rows]
    )


@effect("store.quarantine")
def _quarantine(path: Path) -> Path:
    """Copy a damaged database with its write-ahead log, once per state of the file, and return where to."""
    target = path.with_name(f"{path.name}.corrupt-{path.stat().st_mtime_ns}")
    for suffix in ("", "-wal"):
        source = path.with_name(path.name + suffix)
        copy = target.with_name(target.name + suffix)
        if source.exists() and not copy.exists():
            shutil.copy2(source, copy)
    return target


@effect("store.replace")
def _replace(source: Path, path: Path) -> None:
    """Put a rebuilt database in the place of the damaged one."""
    path.with_name(path.name + "-wal").unlink(missing_ok=True)
    path.with_name(path.name + "-shm").unlink(missing_ok=True)
    source.replace(path)
    folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


@effect("store.create")
def _create_file(path: Path) -> None:
    """Make the folder (0700) and the file (0600), so that SQLite does not make them readable for all."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))


@effect("store.backup")
def _backup(connection: sqlite3.Connection, path: Path, schema: int) -> None:
    """Keep the file as it was before a migration, for the daemon before this one."""
    target = path.with_name(f"{path.name}.v{schema}")
    target.unlink(missing_ok=True)
    connection.execute("VACUUM INTO ?", (str(target),))
    target.chmod(0o600)


class Database:
    """An open database. Not thread-safe: one thread at a time.

    `path` of None keeps everything in memory. `damage` is a sentence for a condition when the file was damaged and
    rebuilt from what could still be read, else "".
    """

    def __init__(self, path: Path | None, migrations: Sequence[Migration] = MIGRATIONS) -> None:
        self.path = path
        self.damage = ""
        self._migrations = tuple(migrations)
        self._connection = self._open()

    @property
    def schema(self) -> int:
        """The schema that this daemon writes."""
        return len(self._migrations) + 1

    # ------------------------------------------------------------------------------------------------------- opening
    def _open(self) -> sqlite3.Connection:
        if self.path is None:
            connection = sqlite3.connect(":memory:", isolation_level=None, check_same_thread=False)
            self._prepare(connection)
            return connection
        try:
            _create_file(self.path)
            return self._open_file(self.path)
        except sqlite3.DatabaseError as error:
            if not _is_damage(error):
                raise StoreUnusableError(_open_sentence(self.path, error)) from error
            self._rebuild(self.path, error)
            return self._open_file(self.path)
        except OSError as error:
            raise StoreUnusableError(f"The state database {self.path} cannot be opened: {error.strerror}.") from error

    def _open_file(self, path: Path) -> sqlite3.Connection:
        connection = sqlite3.connect(path, isolation_level=None, check_same_thread=False, timeout=2)
        try:
            # Exclusive before WAL: then the WAL index lives on our heap, and no shared-memory file is needed.
            connection.execute("PRAGMA locking_mode = EXCLUSIVE")
            connection.execute("PRAGMA journal_mode = WAL")
            connection.execute("PRAGMA synchronous = FULL")
            connection.execute("PRAGMA trusted_schema = OFF")
            connection.execute("BEGIN IMMEDIATE")
            connection.execute("ROLLBACK")
            check = connection.execute("PRAGMA quick_check(1)").fetchone()[0]
            if check != "ok":
                raise sqlite3.DatabaseError(f"database disk image is malformed: {check}")  # noqa: TRY301
            self._prepare(connection)
        except BaseException:
            connection.close()
            raise
        return connection

    def _prepare(self, connection: sqlite3.Connection) -> None:
        """Bring the schema to ours."""
        application = connection.execute("PRAGMA application_id").fetchone()[0]
        found = connection.execute("PRAGMA user_version").fetchone()[0]
        tables = connection.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]
        if tables == 0:
            self._in_transaction(connection, lambda: self._create_tables(connection))
            found = 1
        elif application != APPLICATION_ID:
            raise StoreUnusableError(f"{self.path} is a database of another program; correct state_dir.")
        if found > self.schema:
            raise StoreUnusableError(
                f"The state database {self.path} has schema {found} and this version reads up to {self.schema}: it was "
                f"written by a newer version. Install that version again, or restore {self.path}.v{self.schema} if it "
                f"exists. Running pods were left alone."
            )
        if found < self.schema and self.path is not None and tables:
            _backup(connection, self.path, found)
        for number in range(found, self.schema):
            self._in_transaction(connection, lambda number=number: self._migrate(connection, number))  # type: ignore[misc]

    def _create_tables(self, connection: sqlite3.Connection) -> None:
        for statement in filter(str.strip, _SCHEMA_1.split(";")):
            connection.execute(statement)
        connection.execute(f"PRAGMA application_id = {APPLICATION_ID}")
        connection.execute("PRAGMA user_version = 1")

    def _migrate(self, connection: sqlite3.Connection, number: int) -> None:
        self._migrations[number - 1](connection)
        connection.execute(f"PRAGMA user_version = {number + 1}")

    @staticmethod
    def _in_transaction(connection: sqlite3.Connection, act: Callable[[], None]) -> None:
        connection.execute("BEGIN IMMEDIATE")
        try:
            act()
            connection.execute("COMMIT")
        except BaseException:
            if connection.in_transaction:
                connection.execute("ROLLBACK")
            raise

    # -------------------------------------------------------------------------------------------------------- damage
    @effect("store.rebuild")
    def _rebuild(self, path: Path, error: sqlite3.DatabaseError) -> None:
        """Copy the damaged file away, and build a new one of all rows that can still be read.

        Where nothing at all can be read the damaged file stays in place and the daemon does not start: an empty
        database would forget every running pod, which only an operator may decide.
        """
        kept = _quarantine(path)
        fresh_path = path.with_name(path.name + ".rebuilt")
        fresh_path.unlink(missing_ok=True)
        rows, settings, aside = _salvage(path)
        if not rows and not settings:
            raise StoreUnusableError(
                f"The state database {path} is damaged ({error}) and nothing in it can be read. A copy is {kept}. "
                f"Restore a backup, or move the file away to start without any record: pods that run now would then "
                f"have to be removed by hand."
            ) from error
        fresh = Database(fresh_path, self._migrations)
        fresh.commit([*rows, *settings])
        fresh.put_aside(aside)
        fresh.close()
        _replace(fresh_path, path)
        self.damage = (
            f"The state database was damaged ({error}). {len(rows)} records were saved from it; a copy of the damaged "
            f"file is {kept}."
        )

    # ------------------------------------------------------------------------------------------------------- reading
    def rows(self) -> list[Row]:
        """Return all records."""
        found = self._connection.execute("SELECT kind, id, version, schema, body FROM records ORDER BY kind, id")
        return [Row(*row) for row in found]

    def settings(self) -> list[Setting]:
        """Return all settings."""
        return [Setting(*row) for row in self._connection.execute("SELECT key, value FROM settings")]

    def aside(self) -> list[tuple[str, str, str, int]]:
        """Return (kind, id, reason, at_ns) of all rows that were put aside, now or earlier."""
        return list(self._connection.execute("SELECT kind, id, reason, at_ns FROM set_aside ORDER BY at_ns, kind, id"))

    def read(self, keys: Iterable[tuple[str, str]]) -> dict[tuple[str, str], Row | None]:
        """Return what stands under these (kind, id) now."""
        found: dict[tuple[str, str], Row | None] = {}
        for key in keys:
            row = self._connection.execute(
                "SELECT kind, id, version, schema, body FROM records WHERE kind = ? AND id = ?", key
            ).fetchone()
            found[key] = Row(*row) if row else None
        return found

    # ------------------------------------------------------------------------------------------------------- writing
    @effect("store.commit")
    def commit(self, operations: Iterable[Operation]) -> None:
        """Write all of these durably, or none.

        Raises:
            OutOfResources: the disk is full.
            Internal: the file cannot be written for another reason.
        """
        try:
            self._in_transaction(self._connection, lambda: self._write(operations))
        except sqlite3.Error as error:
            raise self._translate(error) from error

    def _write(self, operations: Iterable[Operation]) -> None:
        for operation in operations:
            match operation:
                case Row(kind, row_id, version, schema, body):
                    self._connection.execute(
                        "INSERT INTO records (kind, id, version, schema, body) VALUES (?, ?, ?, ?, ?) "
                        "ON CONFLICT (kind, id) DO UPDATE SET version = excluded.version, schema = excluded.schema, "
                        "body = excluded.body",
                        (kind, row_id, version, schema, body),
                    )
                case Delete(kind, row_id):
                    self._connection.execute("DELETE FROM records WHERE kind = ? AND id = ?", (kind, row_id))
                case Setting(key, value):
                    self._connection.execute(
                        "INSERT INTO settings (key, value) VALUES (?, ?) "
                        "ON CONFLICT (key) DO UPDATE SET value = excluded.value",
                        (key, value),
                    )

    @effect("store.put_aside")
    def put_aside(self, rows: Iterable[tuple[Row, str]]) -> None:
        """Move unreadable rows, each with a reason, out of the records into the table of what was set aside."""
        now = time.time_ns()

        def move() -> None:
            for row, reason in rows:
                self._connection.execute(
                    "INSERT OR REPLACE INTO set_aside (kind, id, body, reason, at_ns) VALUES (?, ?, ?, ?, ?)",
                    (row.kind, row.id, row.body, reason, now),
                )
                self._connection.execute("DELETE FROM records WHERE kind = ? AND id = ?", (row.kind, row.id))

        try:
            self._in_transaction(self._connection, move)
        except sqlite3.Error as error:
            raise self._translate(error) from error

    def close(self) -> None:
        """Close the file. Idempotent."""
        self._connection.close()

    def _translate(self, error: sqlite3.Error) -> DispatcherError:
        code = getattr(error, "sqlite_errorcode", 0) & 0xFF
        if code == sqlite3.SQLITE_FULL or (code == sqlite3.SQLITE_IOERR and self._disk_is_full()):
            where = self.path.parent if self.path else "memory"
            return OutOfResources(f"The disk under {where} is full: free space there, then retry.")
        name = getattr(error, "sqlite_errorname", type(error).__name__)
        return Internal(f"The state database cannot be written ({name}).", path=str(self.path))

    def _disk_is_full(self) -> bool:
        if self.path is None:
            return False
        space = os.statvfs(self.path.parent)
        return space.f_bavail == 0 or space.f_favail == 0


def _is_damage(error: sqlite3.DatabaseError) -> bool:
    code = getattr(error, "sqlite_errorcode", None)
    if code is None:  # raised by ourselves after quick_check
        return "malformed" in str(error)
    return (code & 0xFF) in {sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB}


def _open_sentence(path: Path, error: sqlite3.DatabaseError) -> str:
    code = getattr(error, "sqlite_errorcode", 0) & 0xFF
    if code in {sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED}:
        return f"The state database {path} is in use: another dispatcher runs on this state folder."
    if code == sqlite3.SQLITE_FULL:
        return f"The state database {path} cannot be opened: the disk is full."
    return f"The state database {path} cannot be opened: {error}."


def _salvage(path: Path) -> tuple[list[Row], list[Setting], list[tuple[Row, str]]]:
    """Read what can still be read of a damaged file, from both ends, since a bad page ends a scan."""
    rows: dict[tuple[str, str], Row] = {}
    settings: dict[str, Setting] = {}
    aside: dict[tuple[str, str], tuple[Row, str]] = {}
    try:
        connection = sqlite3.connect(path, isolation_level=None)
    except sqlite3.Error:
        return [], [], []
    try:
        for order in ("ASC", "DESC"):
            records = f"SELECT kind, id, version, schema, body FROM records ORDER BY kind {order}, id {order}"  # noqa: S608
            for row in _scan(connection, records):
                rows[row[0], row[1]] = Row(*row)
            for row in _scan(connection, f"SELECT key, value FROM settings ORDER BY key {order}"):  # noqa: S608
                settings[row[0]] = Setting(*row)
            apart = f"SELECT kind, id, body, reason FROM set_aside ORDER BY kind {order}, id {order}"  # noqa: S608
            for kind, row_id, body, reason in _scan(connection, apart):
                aside[kind, row_id] = (Row(kind, row_id, 0, 0, body), reason)
    finally:
        connection.close()
    return list(rows.values()), list(settings.values()), list(aside.values())


def _scan(connection: sqlite3.Connection, query: str) -> Iterator[tuple[Any, ...]]:
    try:
        yield from connection.execute(query)
    except sqlite3.Error:
        return
