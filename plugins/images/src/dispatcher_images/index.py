"""The store's index: a small SQLite file of images, their names, and what was made from them.

Blocking: call it in a thread. Content is made durable before the index names it, and the index forgets before content
goes, so that a crash leaves surplus files at worst, which the next start sweeps. An index that cannot be read is set
aside: images are only copies of what registries hold.
"""

from __future__ import annotations

import logging
import sqlite3
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from dispatcher.api import effect

log = logging.getLogger(__name__)

SCHEMA = 1
_TABLES = """
CREATE TABLE images (id TEXT PRIMARY KEY, manifest TEXT NOT NULL, hidden INTEGER NOT NULL) STRICT, WITHOUT ROWID;
CREATE TABLE names (reference TEXT PRIMARY KEY, image TEXT NOT NULL REFERENCES images) STRICT, WITHOUT ROWID;
CREATE TABLE layers (digest TEXT PRIMARY KEY, diff_id TEXT NOT NULL) STRICT, WITHOUT ROWID;
CREATE TABLE trees (image TEXT PRIMARY KEY, bytes INTEGER NOT NULL, inodes INTEGER NOT NULL) STRICT, WITHOUT ROWID;
CREATE TABLE erofs (image TEXT PRIMARY KEY, digest TEXT NOT NULL, bytes INTEGER NOT NULL) STRICT, WITHOUT ROWID;
CREATE TABLE forget (image TEXT PRIMARY KEY) STRICT, WITHOUT ROWID;
"""


@dataclass(slots=True, kw_only=True)
class Loaded:
    """Everything in the index at start."""

    images: dict[str, tuple[str, bool]] = field(default_factory=dict)  # id -> manifest digest, hidden
    names: dict[str, str] = field(default_factory=dict)  # canonical reference -> id
    layers: dict[str, str] = field(default_factory=dict)  # blob digest -> diff id, verified
    trees: dict[str, tuple[int, int]] = field(default_factory=dict)  # id -> bytes, inodes
    erofs: dict[str, tuple[str, int]] = field(default_factory=dict)  # id -> digest, bytes
    forget: set[str] = field(default_factory=set)  # ids whose engine copies still have to go


class Index:
    """The open index. One writer at a time; each method is one durable transaction."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lock = threading.Lock()
        self._database: sqlite3.Connection | None = None
        self.set_aside: Path | None = None  # where an unreadable index went

    def open(self) -> Loaded:
        """Open or make the index and read all of it."""
        try:
            return self._open()
        except (sqlite3.DatabaseError, ValueError) as error:
            self.close()
            aside = self._path.with_name(self._path.name + ".unreadable")
            log.error("the image index cannot be read and is set aside as %s: images are pulled anew: %s", aside, error)
            _set_aside(self._path, aside)
            self.set_aside = aside
            return self._open()

    def close(self) -> None:
        """Close it. Idempotent."""
        if self._database is not None:
            self._database.close()
            self._database = None

    def publish(self, image: str, manifest: str, names: tuple[str, ...], layers: Mapping[str, str]) -> None:
        """Make an image visible under names, which leave whatever image had them."""
        with self._transaction() as database:
            database.execute(
                "INSERT INTO images VALUES (?, ?, 0) ON CONFLICT (id) DO UPDATE SET hidden = 0", (image, manifest)
            )
            database.executemany(
                "INSERT INTO names VALUES (?, ?) ON CONFLICT (reference) DO UPDATE SET image = excluded.image",
                [(name, image) for name in names],
            )
            database.executemany("INSERT OR REPLACE INTO layers VALUES (?, ?)", list(layers.items()))
            database.execute("DELETE FROM forget WHERE image = ?", (image,))

    def hide(self, image: str) -> None:
        """Take all names from an image; its content stays."""
        with self._transaction() as database:
            database.execute("DELETE FROM names WHERE image = ?", (image,))
            database.execute("UPDATE images SET hidden = 1 WHERE id = ?", (image,))

    def delete(self, image: str, layers: tuple[str, ...]) -> None:
        """Forget an image and what was made from it; engines still have to be told."""
        with self._transaction() as database:
            database.execute("DELETE FROM names WHERE image = ?", (image,))
            database.execute("DELETE FROM images WHERE id = ?", (image,))
            database.execute("DELETE FROM trees WHERE image = ?", (image,))
            database.execute("DELETE FROM erofs WHERE image = ?", (image,))
            database.executemany("DELETE FROM layers WHERE digest = ?", [(digest,) for digest in layers])
            database.execute("INSERT OR IGNORE INTO forget VALUES (?)", (image,))

    def forgotten(self, image: str) -> None:
        """No engine holds a copy of this image any more."""
        with self._transaction() as database:
            database.execute("DELETE FROM forget WHERE image = ?", (image,))

    def add_tree(self, image: str, size: int, inodes: int) -> None:
        """An image was unpacked."""
        with self._transaction() as database:
            database.execute("INSERT OR REPLACE INTO trees VALUES (?, ?, ?)", (image, size, inodes))

    def add_erofs(self, image: str, digest: str, size: int) -> None:
        """An image's erofs file was made."""
        with self._transaction() as database:
            database.execute("INSERT OR REPLACE INTO erofs VALUES (?, ?, ?)", (image, digest, size))

    def _open(self) -> Loaded:
        database = sqlite3.connect(self._path, isolation_level=None, check_same_thread=False)
        self._database = database
        database.execute("PRAGMA journal_mode = WAL")
        database.execute("PRAGMA synchronous = FULL")
        (version,) = database.execute("PRAGMA user_version").fetchone()
        if version == 0:
            with self._transaction():
                for statement in filter(str.strip, _TABLES.split(";")):
                    database.execute(statement)
                database.execute(f"PRAGMA user_version = {SCHEMA:d}")
        elif version != SCHEMA:
            raise ValueError(f"it has schema {version}, this version reads {SCHEMA}")
        loaded = Loaded()
        for image, manifest, hidden in database.execute("SELECT id, manifest, hidden FROM images"):
            loaded.images[image] = (manifest, bool(hidden))
        loaded.names.update(database.execute("SELECT reference, image FROM names"))
        loaded.layers.update(database.execute("SELECT digest, diff_id FROM layers"))
        for image, size, inodes in database.execute("SELECT image, bytes, inodes FROM trees"):
            loaded.trees[image] = (size, inodes)
        for image, digest, size in database.execute("SELECT image, digest, bytes FROM erofs"):
            loaded.erofs[image] = (digest, size)
        loaded.forget.update(image for (image,) in database.execute("SELECT image FROM forget"))
        return loaded

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        with self._lock:
            assert self._database is not None
            self._database.execute("BEGIN IMMEDIATE")
            try:
                yield self._database
                _commit(self._database)
            except BaseException:
                if self._database.in_transaction:
                    self._database.execute("ROLLBACK")
                raise


@effect("images.commit_index")
def _commit(database: sqlite3.Connection) -> None:
    database.execute("COMMIT")


@effect("images.set_index_aside")
def _set_aside(path: Path, aside: Path) -> None:
    for suffix in ("-wal", "-shm"):
        path.with_name(path.name + suffix).unlink(missing_ok=True)
    path.rename(aside)
