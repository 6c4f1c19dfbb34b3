"""Where a cgroup is, in either version, and in the mixed layout where version 2 stands beside version 1.

Where a process is comes from the kernel (/proc/PID/cgroup), never from a name that was computed. Where a pod is comes
from the kubelet, which made the pod's cgroup and sends its name.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path, PurePosixPath

ROOT = Path("/sys/fs/cgroup")
_CONTROLLERS = ("cpu", "cpuacct", "memory", "pids", "blkio", "hugetlb")


@dataclass(frozen=True, slots=True, kw_only=True)
class CgroupFolders:
    """The folders of one cgroup.

    Version 1 has one per controller in `paths`; `unified` is then its folder in a version 2 hierarchy without
    controllers that stands beside, or None. Version 2 has `unified` only. `name` is the path below the root.
    """

    version: int
    paths: Mapping[str, Path]
    unified: Path | None
    name: str = ""

    def folder(self, controller: str) -> Path | None:
        """The folder of a controller, or None where the host does not have it."""
        return self.unified if self.version == 2 else self.paths.get(controller)


def find_cgroup_of_process(pid: int, root: Path = ROOT, *, owner: str = "") -> CgroupFolders | None:
    """The cgroup of a process, or None where it is gone or its cgroups are not visible here.

    A container may divide its cgroup and put its processes into the parts, as an init system does. With `owner`, the id
    that an engine puts into its cgroups' names, the whole is found; None where the process is in no such cgroup.
    """
    try:
        with open(f"/proc/{pid}/cgroup", "rb", buffering=0) as file:
            text = file.read()
    except OSError:
        return None
    return _parse(text, root, owner)


@lru_cache(maxsize=1024)
def _parse(text: bytes, root: Path, owner: str) -> CgroupFolders | None:
    """The membership of a process hardly ever changes, and is asked for again and again."""
    return parse_membership(text.decode("utf-8", "surrogateescape").splitlines(), root, owner=owner)


def parse_membership(lines: Iterable[str], root: Path = ROOT, *, owner: str = "") -> CgroupFolders | None:
    """Read the lines of /proc/PID/cgroup; `owner` as in `find_cgroup_of_process`."""
    names: dict[str, str] = {}
    unified: str | None = None
    for line in lines:
        number, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        relative = _up_to(owner, path.strip("/")) if owner else path.strip("/")
        if relative is None:
            continue
        if number == "0" and not controllers:
            unified = relative
        else:
            for controller in controllers.split(","):
                names[controller.removeprefix("name=")] = relative
    if "memory" in names or "cpu" in names:
        beside = root / "unified" / unified if unified else None
        paths = {controller: root / controller / relative for controller, relative in names.items()}
        name = names.get("memory", names.get("cpu", ""))
        return CgroupFolders(version=1, paths=paths, unified=beside, name=f"/{name}")
    if unified is not None:
        return CgroupFolders(version=2, paths={}, unified=root / unified, name=f"/{unified}")
    return None


def _up_to(owner: str, path: str) -> str | None:
    """The path to the first part that has the owner's id in its name. What lies below is the container's own doing."""
    parts = path.split("/")
    return next(("/".join(parts[: at + 1]) for at, part in enumerate(parts) if owner in part), None)


def find_cgroup_of_parent(cgroup_parent: str, root: Path = ROOT) -> CgroupFolders | None:
    """The cgroup that a kubelet names as a pod's `cgroup_parent`, or None where there is none to be read."""
    relative = expand_cgroup_parent(cgroup_parent)
    if relative is None:
        return None
    name = f"/{relative}"
    if (root / "cgroup.controllers").exists():
        unified = root / relative
        return CgroupFolders(version=2, paths={}, unified=unified, name=name) if unified.is_dir() else None
    folders = {controller: root / controller / relative for controller in _CONTROLLERS}
    paths = {controller: folder for controller, folder in folders.items() if folder.is_dir()}
    beside = root / "unified" / relative
    if not paths:
        return None
    return CgroupFolders(version=1, paths=paths, unified=beside if beside.is_dir() else None, name=name)


def expand_cgroup_parent(cgroup_parent: str) -> PurePosixPath | None:
    """Return the path below a hierarchy's root that a `cgroup_parent` stands for, or None for none or a bad one.

    Under the systemd driver it may be a bare slice name: `a-b.slice` lies in `a.slice`.
    """
    parts = [part for part in cgroup_parent.split("/") if part]
    if not parts or ".." in parts or "." in parts or "\0" in cgroup_parent:
        return None
    if len(parts) == 1 and parts[0].endswith(".slice"):
        stem = parts[0].removesuffix(".slice")
        pieces = stem.split("-")
        if stem == "" or "" in pieces:  # "-.slice" is systemd's name for the root
            return None
        parts = ["-".join(pieces[:count]) + ".slice" for count in range(1, len(pieces) + 1)]
    return PurePosixPath(*parts)
