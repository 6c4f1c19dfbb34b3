"""The cgroups of a running container: limits that the engine has no word for, and usage. Versions 1 and 2.

The engine makes and removes these folders; we only write limits into the container's own one and read. Which folder
it is comes from the kernel (/proc/PID/cgroup), never from a name that we compute.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from dispatcher.api import effect
from dispatcher.errors import InvalidRequest, NotSupported
from dispatcher.model import HugepageLimit

ROOT = Path("/sys/fs/cgroup")
_KEY = re.compile(r"(memory|cpu|cpuset|io|pids|hugetlb|misc|rdma)\.[a-z0-9_.]{1,48}", re.IGNORECASE)
_PAGE_SIZE = re.compile(r"[1-9][0-9]{0,6}(KB|MB|GB)")


@dataclass(frozen=True, slots=True, kw_only=True)
class Hierarchy:
    """Where a container's controllers are: `paths` by controller for version 1, `unified` for version 2."""

    version: int
    paths: Mapping[str, Path]
    unified: Path | None

    def folder(self, controller: str) -> Path | None:
        """The container's folder of a controller, or None where the host does not have it."""
        return self.unified if self.version == 2 else self.paths.get(controller)


@dataclass(frozen=True, slots=True, kw_only=True)
class Usage:
    """One reading; None for what the kernel does not tell."""

    cpu_usage_ns: int | None = None
    memory_usage_bytes: int | None = None
    memory_working_set_bytes: int | None = None
    memory_rss_bytes: int | None = None
    page_faults: int | None = None
    major_page_faults: int | None = None
    swap_bytes: int | None = None


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


def of_process(pid: int, root: Path = ROOT) -> Hierarchy | None:
    """The cgroup folders of a process, or None where it is gone or its cgroups are not visible here."""
    try:
        lines = Path(f"/proc/{pid}/cgroup").read_text(encoding="utf-8").splitlines()
    except OSError:
        return None
    return parse_membership(lines, root)


def parse_membership(lines: list[str], root: Path = ROOT) -> Hierarchy | None:
    """Read the lines of /proc/PID/cgroup."""
    paths: dict[str, Path] = {}
    unified: Path | None = None
    for line in lines:
        number, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        relative = path.lstrip("/")
        if number == "0" and not controllers:
            unified = root / relative
        else:
            for name in controllers.split(","):
                mount = name.removeprefix("name=")
                paths[mount] = root / mount / relative
    if "memory" in paths or "cpu" in paths:
        return Hierarchy(version=1, paths=paths, unified=None)
    if unified is not None:
        return Hierarchy(version=2, paths={}, unified=unified)
    return None


@effect("docker.write_cgroup")
def write_extra(where: Hierarchy, hugepages: tuple[HugepageLimit, ...], unified: Mapping[str, str]) -> None:
    """Write huge page limits and raw version 2 keys of a container that just started.

    Raises:
        NotSupported: the kernel refused a value; its own error is the cause.
    """
    for path, value in _extra(where, hugepages, unified):
        _write(path, value)


@contextlib.contextmanager
def extra_kept_if_done(
    where: Hierarchy, hugepages: tuple[HugepageLimit, ...], unified: Mapping[str, str]
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
    where: Hierarchy, hugepages: tuple[HugepageLimit, ...], unified: Mapping[str, str]
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


def usage(where: Hierarchy) -> Usage | None:
    """Read usage, or None where the container's cgroup is gone."""
    try:
        return _usage_v2(where) if where.version == 2 else _usage_v1(where)
    except (OSError, ValueError):
        return None


def _usage_v1(where: Hierarchy) -> Usage:
    memory = where.paths.get("memory")
    accounting = where.paths.get("cpuacct")
    cpu = int((accounting / "cpuacct.usage").read_text(encoding="ascii")) if accounting else None
    if memory is None:
        return Usage(cpu_usage_ns=cpu)
    used = int((memory / "memory.usage_in_bytes").read_text(encoding="ascii"))
    stat = _pairs(memory / "memory.stat")
    swap = None
    if (memory / "memory.memsw.usage_in_bytes").exists():
        swap = max(0, int((memory / "memory.memsw.usage_in_bytes").read_text(encoding="ascii")) - used)
    return Usage(
        cpu_usage_ns=cpu,
        memory_usage_bytes=used,
        memory_working_set_bytes=max(0, used - stat.get("total_inactive_file", 0)),
        memory_rss_bytes=stat.get("total_rss"),
        page_faults=stat.get("total_pgfault"),
        major_page_faults=stat.get("total_pgmajfault"),
        swap_bytes=swap,
    )


def _usage_v2(where: Hierarchy) -> Usage:
    assert where.unified is not None
    folder = where.unified
    cpu = _pairs(folder / "cpu.stat").get("usage_usec")
    used = int((folder / "memory.current").read_text(encoding="ascii"))
    stat = _pairs(folder / "memory.stat")
    swap_path = folder / "memory.swap.current"
    return Usage(
        cpu_usage_ns=None if cpu is None else cpu * 1000,
        memory_usage_bytes=used,
        memory_working_set_bytes=max(0, used - stat.get("inactive_file", 0)),
        memory_rss_bytes=stat.get("anon"),
        page_faults=stat.get("pgfault"),
        major_page_faults=stat.get("pgmajfault"),
        swap_bytes=int(swap_path.read_text(encoding="ascii")) if swap_path.exists() else None,
    )


def _pairs(path: Path) -> dict[str, int]:
    pairs = (line.split() for line in path.read_text(encoding="ascii").splitlines())
    return {pair[0]: int(pair[1]) for pair in pairs if len(pair) == 2}


def _kilobytes(page_size: str) -> int:
    return int(page_size[:-2]) * {"KB": 1, "MB": 1024, "GB": 1024 * 1024}[page_size[-2:]]
