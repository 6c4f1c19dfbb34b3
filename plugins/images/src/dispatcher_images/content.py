"""Files of the store: blobs by digest, blobs that are arriving, trees, erofs files, layouts. All effects on disk.

Blocking: call it in a thread. The invariant: a file under its final name is whole, verified and durable; all else lies
in `arriving/`, `tmp/` or `garbage/`, which the next start empties. Whatever is killed at any point leaves nothing else.
What may be large goes in two steps: renamed into `garbage/` at once, removed by `empty_garbage` when there is time.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import secrets
import shutil
import threading
from collections.abc import Collection, Iterator
from pathlib import Path

from dispatcher.api import effect
from dispatcher.errors import OutOfResources, PullFailed

_LAYOUT = b'{"imageLayoutVersion":"1.0.0"}'


class Content:
    """The store's folder. Digests are "sha256:<hex>" and were validated by whoever parsed them."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._blobs = root / "blobs" / "sha256"
        self._arriving = root / "arriving"
        self._tmp = root / "tmp"
        self._trees = root / "trees"
        self._erofs = root / "erofs"
        self._layouts = root / "layouts"
        self._garbage = root / "garbage"
        self._emptying = threading.Lock()
        self._unfinished = (self._arriving, self._tmp)
        self._folders = (self._blobs, self._trees, self._erofs, self._layouts, self._garbage, *self._unfinished)

    def prepare(self) -> None:
        """Make the folders and put everything unfinished aside. Nobody else uses the store now."""
        for folder in (self.root, *self._folders):
            _make_folder(folder)
        mark = self.root / "oci-layout"
        if not mark.exists() or not mark.stat().st_size:
            write_durably(mark, _LAYOUT)
        for folder in self._unfinished:
            for left in [*folder.iterdir()]:
                self.discard(left)

    def empty_garbage(self) -> None:
        """Remove what was put aside. May take long; calls at once wait for each other."""
        with self._emptying:
            for left in [*self._garbage.iterdir()]:
                remove(left)

    def sweep(
        self, *, blobs: Collection[str], trees: Collection[str], erofs: Collection[str], layouts: Collection[str]
    ) -> int:
        """Put aside every file that the index does not know; returns how many. Called at start, after `prepare`."""
        wanted = (
            (self._blobs, {_hex(item) for item in blobs}),
            (self._trees, {_hex(item) for item in trees}),
            (self._erofs, {f"{_hex(item)}.erofs" for item in erofs}),
            (self._layouts, {_hex(item) for item in layouts}),
        )
        removed = 0
        for folder, names in wanted:
            for file in [*folder.iterdir()]:
                if file.name not in names:
                    self.discard(file)
                    removed += 1
        return removed

    # ------------------------------------------------------------------------------------------------------ blobs
    def blob(self, digest: str) -> Path:
        """Where a blob lies, if it is there."""
        return self._blobs / _hex(digest)

    def has(self, digest: str, size: int) -> bool:
        """Whether a whole blob is there."""
        try:
            return self.blob(digest).stat().st_size == size
        except FileNotFoundError:
            return False

    def read(self, digest: str, limit: int) -> bytes:
        """Read a small blob and verify it. Raises FileNotFoundError, or ValueError for damaged content."""
        with self.blob(digest).open("rb") as file:
            content = file.read(limit + 1)
        if f"sha256:{hashlib.sha256(content).hexdigest()}" != digest:
            raise ValueError(f"the blob {digest} is damaged on disk")
        return content

    def arrive(self, digest: str, size: int) -> Arrival:
        """Begin to write a blob."""
        return Arrival(self._arriving / f"{_hex(digest)}.{secrets.token_hex(4)}", self.blob(digest), digest, size)

    def remove_blobs(self, digests: Collection[str]) -> None:
        """Remove blobs; missing ones are fine."""
        for digest in digests:
            remove(self.blob(digest))

    def free_bytes(self) -> int:
        """Bytes that the store may still take."""
        status = os.statvfs(self.root)
        return status.f_bavail * status.f_frsize

    # ---------------------------------------------------------------------------------------------------- derived
    def tree(self, image_id: str) -> Path:
        """Where an image's unpacked root file system lies."""
        return self._trees / _hex(image_id)

    def erofs(self, image_id: str) -> Path:
        """Where an image's erofs file lies."""
        return self._erofs / f"{_hex(image_id)}.erofs"

    def layout(self, image_id: str) -> Path:
        """Where an image's own OCI layout folder lies."""
        return self._layouts / _hex(image_id)

    @contextlib.contextmanager
    def scratch(self) -> Iterator[Path]:
        """A fresh folder that is gone afterwards, unless its parts were moved away."""
        folder = self._tmp / secrets.token_hex(8)
        _make_folder(folder)
        try:
            yield folder
        finally:
            remove(folder)

    def scratch_file(self, suffix: str) -> Path:
        """A fresh path for a file that its user unlinks; a crash leaves it to the next start."""
        return self._tmp / f"{secrets.token_hex(8)}{suffix}"

    def keep(self, made: Path, final: Path) -> None:
        """Move something finished to its final name, durably. An older one of that name goes away."""
        if final.exists() and final.is_dir():
            self.discard(final)
        rename_durably(made, final)

    def discard(self, path: Path) -> None:
        """Put a tree or file aside, if it is there; `empty_garbage` removes it."""
        if os.path.lexists(path):
            rename_durably(path, self._garbage / secrets.token_hex(8))

    def make_layout(self, image_id: str, index: bytes, digests: Collection[str]) -> Path:
        """Make an OCI layout folder of hard links to blobs, once."""
        final = self.layout(image_id)
        if (final / "index.json").exists():
            return final
        with self.scratch() as folder:
            made = folder / "layout"
            blobs = made / "blobs" / "sha256"
            _make_folder(blobs)
            for digest in digests:
                _link(self.blob(digest), blobs / _hex(digest))
            write_durably(made / "oci-layout", _LAYOUT)
            write_durably(made / "index.json", index)
            self.keep(made, final)
        return final

    def usage(self, trees: Collection[tuple[int, int]]) -> tuple[int, int]:
        """Bytes and inodes of the store; `trees` are the figures taken when those were unpacked."""
        total, inodes = sum(size for size, _ in trees), sum(count for _, count in trees)
        for folder in (self.root, *self._folders):
            if folder == self._trees or not folder.is_dir():
                continue
            for file in folder.iterdir():
                with contextlib.suppress(FileNotFoundError):
                    status = file.lstat()
                    # A layout's blobs are hard links: counted where the blobs are.
                    total += status.st_blocks * 512
                    inodes += 1
        return total, inodes


class Arrival:
    """One blob on its way in. Close it by `commit` or `abort`; both may be called twice."""

    def __init__(self, path: Path, final: Path, digest: str, size: int) -> None:
        self._path = path
        self._final = final
        self._digest = digest
        self._size = size
        self._hash = hashlib.sha256()
        self._fd = _create(path)
        self.count = 0

    def write(self, data: bytes) -> None:
        """Append. Raises PullFailed beyond the promised size, OutOfResources when the disk is full."""
        if self.count + len(data) > self._size:
            raise PullFailed(f"The registry sends more than the {self._size} bytes that {self._digest} has.")
        self._hash.update(data)
        with disk_full_is_out_of_resources():
            _append(self._fd, data)
        self.count += len(data)

    def rewind(self) -> None:
        """Forget what arrived, to begin anew."""
        _empty(self._fd)
        self._hash = hashlib.sha256()
        self.count = 0

    def is_intact(self) -> bool:
        """Whether all of it arrived and it is what the digest says."""
        return self.count == self._size and f"sha256:{self._hash.hexdigest()}" == self._digest

    def commit(self) -> None:
        """Give it its final name, durably. Only for an intact arrival."""
        if not self.is_intact():
            raise AssertionError("an arrival that is not intact must not be kept")
        with disk_full_is_out_of_resources():
            os.fsync(self._fd)
        self._close()
        rename_durably(self._path, self._final)

    def abort(self) -> None:
        """Remove it, unless it was committed."""
        self._close()
        remove(self._path)

    def _close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


@contextlib.contextmanager
def disk_full_is_out_of_resources() -> Iterator[None]:
    """Translate the kernel's words for a full disk."""
    try:
        yield
    except OSError as error:
        if error.errno in {errno.ENOSPC, errno.EDQUOT}:
            raise OutOfResources("The disk of the image store is full.") from error
        raise


@effect("images.create_arrival")
def _create(path: Path) -> int:
    return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)


@effect("images.append_arrival")
def _append(fd: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]


@effect("images.empty_arrival")
def _empty(fd: int) -> None:
    os.ftruncate(fd, 0)
    os.lseek(fd, 0, os.SEEK_SET)


@effect("images.make_folder")
def _make_folder(path: Path) -> None:
    path.mkdir(mode=0o700, parents=True, exist_ok=True)


@effect("images.write_file")
def write_durably(path: Path, content: bytes) -> None:
    """Write a small file and its name to disk."""
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    _sync_folder(path.parent)


@effect("images.rename")
def rename_durably(old: Path, new: Path) -> None:
    """Rename, and write both folders to disk."""
    old.rename(new)
    _sync_folder(new.parent)
    if old.parent != new.parent:
        _sync_folder(old.parent)


@effect("images.link")
def _link(source: Path, target: Path) -> None:
    target.hardlink_to(source)


@effect("images.remove")
def remove(path: Path) -> None:
    """Remove a file or a whole tree; a missing one is fine. Links are not followed."""
    try:
        path.unlink()
    except FileNotFoundError:
        return
    except (IsADirectoryError, PermissionError):
        shutil.rmtree(path, ignore_errors=False)


def sync_file(path: Path) -> str:
    """Write a finished file to disk and return its digest."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
        os.fsync(file.fileno())
    return f"sha256:{digest.hexdigest()}"


def _sync_folder(folder: Path) -> None:
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _hex(digest: str) -> str:
    return digest.removeprefix("sha256:")
