"""Applying layers to a root file system. Runs in the worker process only, chrooted into the tree that it makes.

Theory of operation. The process stands in the tree as its root, so no path of an image can lead out of it, whatever
symbolic links say, and an entry below a linked folder lands where a container would see it. For each entry the worker
changes into the entry's parent, asks the kernel for its real path, and then works on the bare last name, never
following a link there. The real path gives three things: a bound on the depth, the set of paths that this layer made
(whiteouts must spare them), and short names in every call.

Kept: owners within range, set-id bits, mtimes, hard links, fifos, sparse files, file capabilities and `user.*`
attributes. Left out and counted: device nodes, other extended attributes, aufs metadata. Refused: the rest.
"""

from __future__ import annotations

import errno
import os
import shutil
import stat
import struct
import tarfile
from dataclasses import dataclass, field
from typing import IO

from dispatcher_images.hostile import BadImage, Limits
from dispatcher_images.layers import Entries, LayerReader

_WHITEOUT = ".wh."
_OPAQUE = ".wh..wh..opq"
_AUFS_METADATA = ".wh..wh."
_MAX_ID = 2**32 - 2  # 2**32 - 1 means "leave as it is" to chown, which would make the file root's
_MAX_TIME_S = 2**34 - 1  # what ext4 keeps
_XATTR_PREFIX = "SCHILY.xattr."
_MAX_XATTR_BYTES = 64 << 10
# Errors that only an image's own names and links can cause here; ENOSPC, EIO and the like are the node's.
_IMAGES_FAULT = frozenset(
    {errno.ELOOP, errno.ENAMETOOLONG, errno.EINVAL, errno.EPERM, errno.EMLINK, errno.EFBIG, errno.EXDEV, errno.ERANGE}
)
_CAPABILITY_SIZES = {0x01000000: (12,), 0x02000000: (20,), 0x03000000: (24,)}


@dataclass(slots=True)
class Report:
    """What unpacking did. `skipped` counts what was left out on purpose, by kind."""

    entries: int = 0
    file_bytes: int = 0
    skipped: dict[str, int] = field(default_factory=dict)

    def skip(self, kind: str) -> None:
        """Count one thing that was left out."""
        self.skipped[kind] = self.skipped.get(kind, 0) + 1


class Unpacker:
    """Applies layers, lowest first, to the root of this process. The caller has chrooted into an empty folder."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._made: set[str] = set()  # real paths that the current layer made
        self._above_made: set[str] = set()  # every folder above one of them
        self._devices: set[str] = set()  # device nodes that were left out, for hard links to them
        self._folder_times: dict[str, int] = {}
        self._parent = ""  # as the archive named it; this process stands there
        self._real_parent = "/"
        self.report = Report()

    def apply(self, blob: IO[bytes]) -> str:
        """Apply one layer and return the digest of its uncompressed bytes. Raises BadImage."""
        reader = LayerReader(blob, self._limits)
        entries = Entries(reader, self._limits)
        self._made.clear()
        self._above_made.clear()
        self._folder_times.clear()
        self._forget_parent()
        for entry in entries:
            try:
                self._apply(entry, entries)
            except (FileNotFoundError, NotADirectoryError, IsADirectoryError, FileExistsError) as error:
                raise BadImage("a layer names a path that cannot be made") from error
            except OSError as error:
                if error.errno in _IMAGES_FAULT:
                    raise BadImage(f"a layer holds an entry that the kernel refuses ({error.strerror})") from error
                raise
            except (ValueError, OverflowError) as error:
                raise BadImage("a layer holds an entry with impossible attributes") from error
        self._set_folder_times()
        return reader.finish()

    # ------------------------------------------------------------------------------------------------ one entry
    def _apply(self, entry: tarfile.TarInfo, entries: Entries) -> None:
        self._count_entry()
        parts = _split(entry.name)
        if not parts:
            if not entry.isdir():
                raise BadImage("a layer replaces the root folder")
            self._enter(())
            self._set_attributes("/", entry)
            self._folder_times["/"] = _time_ns(entry)
            return
        if any(part.startswith(_AUFS_METADATA) for part in parts[:-1]):
            self.report.skip("aufs metadata")
            return
        if any(part.startswith(_WHITEOUT) for part in parts[:-1]):
            raise BadImage("a layer holds a path below a whiteout")
        self._enter(parts[:-1])
        name = parts[-1]
        if name.startswith(_WHITEOUT):
            self._whiteout(name)
            return
        path = self._path(name)
        if entry.isdir():
            self._make_folder(name, path)
            self._folder_times[path] = _time_ns(entry)
        elif entry.ischr() or entry.isblk():
            self._clear(name)
            self._devices.add(path)
            self.report.skip("device")
            return
        elif entry.islnk() and "/" + "/".join(_split(entry.linkname)) in self._devices:
            self.report.skip("device")
            return
        else:
            self._clear(name)
            self._make(entry, name, entries)
        self._mark(path)
        if entry.islnk():
            return  # its attributes are those of the file that it names
        self._set_attributes(name, entry)
        if not entry.isdir():
            time_ns = _time_ns(entry)
            os.utime(name, ns=(time_ns, time_ns), follow_symlinks=False)

    def _make(self, entry: tarfile.TarInfo, name: str, entries: Entries) -> None:
        if entry.islnk():
            target = _split(entry.linkname)
            if not target:
                raise BadImage("a layer holds a hard link to the root folder")
            # Absolute, so a linked folder on the way is followed within the root; the last part is not followed.
            os.link("/" + "/".join(target), name, follow_symlinks=False)
        elif entry.issym():
            os.symlink(entry.linkname, name)
        elif entry.isfifo():
            os.mkfifo(name, 0o600)
        elif entry.isreg() or entry.issparse():
            self._write(entry, name, entries)
        else:
            raise BadImage("a layer holds an entry of an unknown kind")

    def _write(self, entry: tarfile.TarInfo, name: str, entries: Entries) -> None:
        self.report.file_bytes += entry.size
        if entry.size > self._limits.max_file_bytes or self.report.file_bytes > self._limits.max_bytes:
            raise BadImage(f"the image unpacks to more than {self._limits.max_bytes} bytes")
        fd = os.open(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
        try:
            for offset, data in entries.data(entry):
                written = 0
                while written < len(data):
                    written += os.pwrite(fd, data[written:], offset + written)
            os.ftruncate(fd, entry.size)
        finally:
            os.close(fd)

    def _make_folder(self, name: str, path: str) -> None:
        if path.count("/") > self._limits.max_depth:
            raise BadImage(f"a layer nests folders deeper than {self._limits.max_depth}")
        if not _is_folder(name):
            self._clear(name)
            os.mkdir(name, 0o755)

    def _set_attributes(self, name: str, entry: tarfile.TarInfo) -> None:
        if not (0 <= entry.uid <= _MAX_ID and 0 <= entry.gid <= _MAX_ID):
            raise BadImage(f"a layer holds a file of owner {entry.uid}:{entry.gid}")
        os.chown(name, entry.uid, entry.gid, follow_symlinks=False)
        if not entry.issym():
            os.chmod(name, entry.mode & 0o7777)
        for key, value in entry.pax_headers.items():
            if key.startswith(_XATTR_PREFIX):
                self._set_xattr(name, entry, key.removeprefix(_XATTR_PREFIX), value)

    def _set_xattr(self, name: str, entry: tarfile.TarInfo, attribute: str, text: str) -> None:
        value = text.encode("utf-8", "surrogateescape")
        if not _is_allowed_xattr(entry, attribute, value):
            self.report.skip("xattr")
            return
        try:
            os.setxattr(name, attribute, value, follow_symlinks=False)
        except OSError:
            if not attribute.startswith("user."):
                raise
            self.report.skip("xattr")  # no room in the inode, or the host's file system has none

    # ------------------------------------------------------------------------------------------------ whiteouts
    def _whiteout(self, name: str) -> None:
        if name == _OPAQUE:
            for child in os.listdir("."):
                self._clear_older(child, self._path(child))
        elif name.startswith(_AUFS_METADATA):
            self.report.skip("aufs metadata")
        else:
            hidden = name.removeprefix(_WHITEOUT)
            if hidden in {"", ".", ".."}:
                raise BadImage("a layer holds a whiteout of a parent folder")
            self._clear_older(hidden, self._path(hidden))

    def _clear_older(self, relative: str, real: str) -> None:
        """Remove what lower layers left at a path; what this layer made there or below stays."""
        if real not in self._made and real not in self._above_made:
            self._forget_parent()
            _remove(relative)
        elif _is_folder(relative):
            for child in os.listdir(relative):
                self._clear_older(f"{relative}/{child}", f"{real.rstrip('/')}/{child}")

    def _mark(self, path: str) -> None:
        self._made.add(path)
        above = path.rpartition("/")[0]
        while above and above not in self._above_made:
            self._above_made.add(above)
            above = above.rpartition("/")[0]

    # ---------------------------------------------------------------------------------------------------- paths
    def _enter(self, parents: tuple[str, ...]) -> None:
        """Stand in the folder that an entry's parents name, making those that are missing."""
        wanted = "/" + "/".join(parents)
        if wanted == self._parent:
            return
        try:
            os.chdir(wanted)
        except FileNotFoundError:
            os.chdir("/")
            for part in parents:
                self._enter_or_make(part)
        try:
            self._real_parent = os.getcwd()
        except OSError as error:
            raise BadImage("a layer nests folders too deeply") from error
        if not self._real_parent.startswith("/"):
            raise BadImage("a layer leads out of the root folder")  # never seen: the kernel marks it "(unreachable)"
        self._parent = wanted

    def _enter_or_make(self, part: str) -> None:
        try:
            os.chdir(part)
        except FileNotFoundError:
            path = f"{os.getcwd().rstrip('/')}/{part}"
            if path.count("/") > self._limits.max_depth:
                raise BadImage(f"a layer nests folders deeper than {self._limits.max_depth}") from None
            self._count_entry()
            os.mkdir(part, 0o755)  # a dangling link here is FileExistsError: the image's fault
            self._mark(path)
            os.chdir(part)

    def _path(self, name: str) -> str:
        return f"{self._real_parent.rstrip('/')}/{name}"

    def _forget_parent(self) -> None:
        self._parent = ""

    def _clear(self, name: str) -> None:
        """Make way for `name`. What goes may have been a link or folder on the way to the current parent's name."""
        if _remove(name):
            self._forget_parent()

    def _count_entry(self) -> None:
        self.report.entries += 1
        if self.report.entries > self._limits.max_entries:
            raise BadImage(f"the image holds more than {self._limits.max_entries} files")

    def _set_folder_times(self) -> None:
        for path, time_ns in self._folder_times.items():
            if _is_folder(path):  # else it was replaced later in the same layer
                os.utime(path, ns=(time_ns, time_ns), follow_symlinks=False)


def _split(name: str) -> tuple[str, ...]:
    """Split an archive's path. Leading slashes mean nothing, as everywhere; parent references are refused."""
    parts = tuple(part for part in name.split("/") if part not in {"", "."})
    if ".." in parts:
        raise BadImage("a layer names a path with '..'")
    if any("\0" in part for part in parts):
        raise BadImage("a layer names a path with a zero byte")
    return parts


def _is_folder(name: str) -> bool:
    try:
        return stat.S_ISDIR(os.lstat(name).st_mode)
    except (FileNotFoundError, NotADirectoryError):
        return False


def _remove(name: str) -> bool:
    """Remove a file, link or tree without following links. Says whether there was one."""
    try:
        os.unlink(name)
    except FileNotFoundError:
        return False
    except (IsADirectoryError, PermissionError):
        # Never follows links, and the depth of what this process made is bounded.
        shutil.rmtree(name)
    return True


def _time_ns(entry: tarfile.TarInfo) -> int:
    mtime = float(entry.mtime)
    if mtime != mtime:  # NaN, from a pax header  # noqa: PLR0124
        mtime = 0.0
    return int(max(0.0, min(mtime, float(_MAX_TIME_S))) * 1_000_000_000)


def _is_allowed_xattr(entry: tarfile.TarInfo, attribute: str, value: bytes) -> bool:
    if not (entry.isreg() or entry.isdir()) or len(value) > _MAX_XATTR_BYTES or "\0" in attribute:
        return False
    if attribute == "security.capability":
        if not entry.isreg() or len(value) < 4:
            return False
        (magic,) = struct.unpack("<I", value[:4])
        return len(value) in _CAPABILITY_SIZES.get(magic & 0xFF000000, ())
    # user.overlay.* steers an overlay mounted with "userxattr"; trusted.* and the other security.* are the host's.
    return attribute.startswith("user.") and not attribute.startswith("user.overlay.") and len(attribute) <= 255
