"""Which network this node has: the configuration folders, read again whenever something in them has changed.

Order. Folders as configured; within one, files by name (bytewise, as libcni sorts), whatever their ending. The first
file that can be used is the network; those before it that cannot are reported, not passed over in silence.

Looking is a listing and a `stat` per file (tens of microseconds), so it is done at every plan and every few
seconds: no watcher, no thread, and nothing to miss on file systems without notifications.
"""

from __future__ import annotations

import os
import stat
from dataclasses import dataclass
from pathlib import Path

from dispatcher_cni.conflist import BadConfig, NetworkConfig, parse_list, parse_single
from dispatcher_cni.strict_json import LIMIT_BYTES

ENDINGS = frozenset({".conf", ".conflist", ".json"})
_Stamp = tuple[int, int, int]  # inode, size, modification time in ns


@dataclass(frozen=True, slots=True, kw_only=True)
class _File:
    stamps: tuple[tuple[str, _Stamp], ...]
    network: NetworkConfig | None
    problem: str = ""


class Catalogue:
    """The network that the folders hold now. Not safe for threads; every method is quick and may run on the loop."""

    def __init__(self, folders: tuple[Path, ...]) -> None:
        self._folders = folders
        self._known: dict[Path, _File] = {}
        self._network: NetworkConfig | None = None
        self._problems: tuple[str, ...] = ()

    @property
    def network(self) -> NetworkConfig | None:
        """The network, as of the last `refresh`; None where no file can be used."""
        return self._network

    @property
    def problems(self) -> tuple[str, ...]:
        """Sentences on files that come first but cannot be used, and on folders that cannot be read."""
        return self._problems

    def refresh(self) -> bool:
        """Look at the folders. Returns whether the network or the problems are others than before.

        A file that served until now and has become unusable (half of it is written, say) goes on serving with its
        last good content while it exists: pods must not land on another network meanwhile.
        """
        before = self._network, self._problems
        seen: dict[Path, _File] = {}
        problems: list[str] = []
        found: NetworkConfig | None = None
        for folder in self._folders:
            for path in self._files(folder, problems):
                file = self._read(path)
                seen[path] = file
                found = file.network
                if file.problem:
                    problems.append(f"{path}: {file.problem}")
                if found is not None:
                    break
            if found is not None:
                break
        self._known, self._network, self._problems = seen, found, tuple(problems)
        return (self._network, self._problems) != before

    def _files(self, folder: Path, problems: list[str]) -> list[Path]:
        try:
            names = [name for name in os.listdir(folder) if os.path.splitext(name)[1] in ENDINGS]
        except FileNotFoundError:
            return []
        except OSError as error:
            problems.append(f"{folder}: The folder cannot be read: {error.strerror}.")
            return []
        paths = [folder / name for name in sorted(names, key=os.fsencode)]
        return [path for path in paths if not path.is_dir()]

    def _read(self, path: Path) -> _File:
        known = self._known.get(path)
        if known is not None and known.stamps == _stamps(tuple(Path(name) for name, _ in known.stamps)):
            return known
        stamps = [(str(path), _stamp(path))]

        def read_folder(network: str) -> dict[str, bytes]:
            folder = path.parent / network
            stamps.append((str(folder), _stamp(folder)))
            found = {}
            for extra in sorted(folder.glob("*.conf")) if folder.is_dir() else ():
                stamps.append((str(extra), _stamp(extra)))
                found[str(extra)] = _content(extra)
            return found

        try:
            data = _content(path)
            if path.suffix == ".conflist":
                network = parse_list(data, source=str(path), read_folder=read_folder)
            else:
                network = parse_single(data, source=str(path))
        except BadConfig as error:
            problem = str(error)
            if known is not None and known.network is not None and known.network is self._network:
                return _File(
                    stamps=tuple(stamps),
                    network=known.network,
                    problem=f"{problem} Its last good content stays in use until the file is mended or removed.",
                )
            return _File(stamps=tuple(stamps), network=None, problem=problem)
        return _File(stamps=tuple(stamps), network=network)


def _stamps(paths: tuple[Path, ...]) -> tuple[tuple[str, _Stamp], ...]:
    return tuple((str(path), _stamp(path)) for path in paths)


def _stamp(path: Path) -> _Stamp:
    try:
        status = path.stat()
    except OSError:
        return 0, 0, 0
    return status.st_ino, status.st_size, status.st_mtime_ns


def _content(path: Path) -> bytes:
    """Read a regular file, bounded; anything else in its place would block or never end."""
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        raise BadConfig(f"The file cannot be read: {error.strerror}.") from error
    with os.fdopen(handle, "rb") as file:
        if not stat.S_ISREG(os.fstat(handle).st_mode):
            raise BadConfig("This is not a regular file.")
        return file.read(LIMIT_BYTES + 1)
