"""Limits of a running container that the engine has no word for, written to its cgroup. Versions 1 and 2.

The engine makes and removes these folders; we only write limits into the container's own one. Which folder it is comes
from the kernel (/proc/PID/cgroup), never from a name that we compute.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

from dispatcher.api import CgroupFolders, effect
from dispatcher.errors import InvalidRequest, NotSupported
from dispatcher.model import HugepageLimit

ROOT = Path("/sys/fs/cgroup")
_KEY = re.compile(r"(memory|cpu|cpuset|io|pids|hugetlb|misc|rdma)\.[a-z0-9_.]{1,48}", re.IGNORECASE)
_PAGE_SIZE = re.compile(r"[1-9][0-9]{0,6}(KB|MB|GB)")


def has_hugetlb(page_size: str, root: Path = ROOT) -> bool:
    """True where the host limits huge pages of this size, in either version."""
    if (root / "hugetlb" / f"hugetlb.{page_size}.limit_in_bytes").exists():
        return True
    controllers = root / "cgroup.controllers"
    folder = Path("/sys/kernel/mm/hugepages") / f"hugepages-{_kilobytes(page_size)}kB"
    return controllers.exists() and "hugetlb" in controllers.read_text(encoding="ascii").split() and folder.exists()


def check_extra(
    hugepages: tuple[HugepageLimit, ...],
    unified: Mapping[str, str],
    *,
    version: int,
    root: Path = ROOT,
) -> tuple[str, ...]:
    """Refuse at creation what could not be written after the start; returns notes.

    A limit of 0 on a host without the controller asks for nothing that could be used, and passes with a note.

    Raises:
        NotSupported: the host lacks the controller or cgroup version 2.
        InvalidRequest: a key or value that is none.
    """
    notes = []
    for limit in hugepages:
        if not _PAGE_SIZE.fullmatch(limit.page_size):
            raise InvalidRequest(f"huge page size {limit.page_size!r} is not of the form 2MB")
        if has_hugetlb(limit.page_size, root):
            continue
        if limit.limit_bytes:
            raise NotSupported(f"this host cannot limit huge pages of {limit.page_size}: no hugetlb controller for it")
        notes.append(f"huge pages of {limit.page_size}: no limit set, this host has no hugetlb controller for them")
    for key, value in unified.items():
        if version != 2:
            raise NotSupported(f"cgroup key {key} needs cgroup version 2, which this host's engine does not use")
        if not _KEY.fullmatch(key) or not value.isprintable() or len(value) > 256:
            raise InvalidRequest(f"cgroup key {key!r} with value {value!r} is not one that a container may set")
    return tuple(notes)


@effect("docker.write_cgroup")
def write_extra(where: CgroupFolders, hugepages: tuple[HugepageLimit, ...], unified: Mapping[str, str]) -> None:
    """Write huge page limits and raw version 2 keys of a container that just started.

    Raises:
        NotSupported: the kernel refused a value; its own error is the cause.
    """
    for path, value in _extra(where, hugepages, unified):
        _write(path, value)


@contextlib.contextmanager
def extra_kept_if_done(
    where: CgroupFolders, hugepages: tuple[HugepageLimit, ...], unified: Mapping[str, str]
) -> Iterator[None]:
    """Write as `write_extra` does, and put back what stood before if that, or the block, fails."""
    before = [(path, _value(path)) for path, _ in _extra(where, hugepages, unified)]
    try:
        write_extra(where, hugepages, unified)
        yield
    except BaseException:
        with contextlib.suppress(NotSupported):
            _put_back(before)
        raise


@effect("docker.restore_cgroup")
def _put_back(before: list[tuple[Path, str]]) -> None:
    for path, value in before:
        if value and _value(path) != value:
            _write(path, value)


def _extra(
    where: CgroupFolders, hugepages: tuple[HugepageLimit, ...], unified: Mapping[str, str]
) -> Iterator[tuple[Path, str]]:
    folder = where.folder("hugetlb")
    for limit in hugepages:
        names = ["limit_in_bytes"] if where.version == 1 else ["max", "rsvd.max"]
        for name in names:
            path = folder / f"hugetlb.{limit.page_size}.{name}" if folder else None
            if path is not None and path.exists():
                yield path, str(limit.limit_bytes)
    if where.version == 2 and where.unified is not None:
        for key, value in unified.items():
            yield where.unified / key, value


def _value(path: Path) -> str:
    """What a file of one value holds; "" for those of several, which cannot be put back as they were read."""
    try:
        text = path.read_text(encoding="ascii").strip()
    except OSError:
        return ""
    return "" if "\n" in text else text


def _write(path: Path, value: str) -> None:
    try:
        with path.open("w", encoding="ascii") as file:
            file.write(value)
    except OSError as error:
        raise NotSupported(f"the kernel refused {value!r} for {path.name}: {error.strerror}") from error


def _kilobytes(page_size: str) -> int:
    return int(page_size[:-2]) * {"KB": 1, "MB": 1024, "GB": 1024 * 1024}[page_size[-2:]]
