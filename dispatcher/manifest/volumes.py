"""The folders and files that a kubelet prepares for a pod: first as a plan (pure), then on disk (one function)."""

from __future__ import annotations

import contextlib
import os
import shutil
import stat
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from dispatcher.errors import InvalidRequest, WrongState
from dispatcher.manifest import schema
from dispatcher.manifest.pods import ObjectData, PodManifest

_VERSION_DIR = "..version-1"  # Kubernetes keeps the files behind a link, so that a program can follow `..data`


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedFile:
    """A regular file. An existing one is kept when `content` is None."""

    path: str
    mode: int
    content: bytes | None = field(default=None, repr=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedFolder:
    """A folder; `root` is what it has to stay in after all links are followed ("" where nothing can be linked).

    `is_shared` says whether the plan's group gets it.
    """

    path: str
    mode: int
    root: str = ""
    is_shared: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedLink:
    """A symbolic link."""

    path: str
    target: str


@dataclass(frozen=True, slots=True, kw_only=True)
class RequiredPath:
    """A path of the node that has to be there, of a hostPath type, or is made where the type ends in OrCreate."""

    path: str
    type: str


Step = PlannedFile | PlannedFolder | PlannedLink | RequiredPath


@dataclass(frozen=True, slots=True, kw_only=True)
class VolumePlan:
    """What to prepare, in order. `group` gets all of it (fsGroup), or nobody with None."""

    steps: tuple[Step, ...] = ()
    group: int | None = None


def volume_path(manifest: PodManifest, name: str, pod_dir: str) -> str:
    """Return where a volume of the pod lies on the node."""
    volume = next(volume for volume in manifest.spec.volumes if volume.name == name)
    if volume.host_path is not None:
        return volume.host_path.path
    kind = "empty-dir" if volume.empty_dir is not None else "configmap" if volume.config_map is not None else "secret"
    return f"{pod_dir}/volumes/kubernetes.io~{kind}/{name}"


def termination_log_path(pod_dir: str, container: str, attempt: int) -> str:
    """Return the node's file that the container sees as its termination message path."""
    return f"{pod_dir}/containers/{container}/{attempt}"


def plan_volumes(manifest: PodManifest, pod_dir: str) -> VolumePlan:
    """Plan all volumes of a pod. To be written once, before the first container is created."""
    steps: list[Step] = [PlannedFolder(path=pod_dir, mode=0o750, is_shared=False)]
    for volume in manifest.spec.volumes:
        path = volume_path(manifest, volume.name, pod_dir)
        if volume.host_path is not None:
            steps.append(RequiredPath(path=path, type=volume.host_path.type))
        elif volume.empty_dir is not None:
            steps.append(PlannedFolder(path=path, mode=0o777))
        elif volume.config_map is not None:
            data = manifest.objects.get(("ConfigMap", volume.config_map.name), ObjectData())
            steps += _object_steps(path, data, volume.config_map)
        elif volume.secret is not None:
            data = manifest.objects.get(("Secret", volume.secret.secret_name), ObjectData())
            steps += _object_steps(path, data, volume.secret)
    return VolumePlan(steps=tuple(steps), group=manifest.spec.security_context.fs_group)


def plan_container_files(manifest: PodManifest, container: schema.Container, pod_dir: str, attempt: int) -> VolumePlan:
    """Plan what one attempt of a container needs beside the volumes: its termination log, and missing sub-paths."""
    log = termination_log_path(pod_dir, container.name, attempt)
    steps: list[Step] = [
        PlannedFolder(path=str(Path(log).parent), mode=0o750),
        PlannedFile(path=log, mode=0o666),
    ]
    for mount in container.volume_mounts:
        if mount.sub_path is not None:
            root = volume_path(manifest, mount.name, pod_dir)
            steps.append(PlannedFolder(path=f"{root}/{mount.sub_path}", mode=0o755, root=root))
    return VolumePlan(steps=tuple(steps))


def _object_steps(path: str, data: ObjectData, source: schema.ConfigMapVolume | schema.SecretVolume) -> Iterator[Step]:
    wanted = [(item.key, item.path, item.mode) for item in source.items] or [(key, key, None) for key in data.files]
    files = {place: (data.files[key], mode) for key, place, mode in wanted if key in data.files}
    yield PlannedFolder(path=path, mode=0o755)
    yield PlannedFolder(path=f"{path}/{_VERSION_DIR}", mode=0o755)
    folders = {str(Path(_VERSION_DIR, place).parent) for place in files} - {_VERSION_DIR}
    for folder in sorted(folders):
        yield PlannedFolder(path=f"{path}/{folder}", mode=0o755)
    for place, (content, mode) in sorted(files.items()):
        chosen = source.default_mode if mode is None else mode
        yield PlannedFile(path=f"{path}/{_VERSION_DIR}/{place}", mode=chosen, content=content)
    yield PlannedLink(path=f"{path}/..data", target=_VERSION_DIR)
    for top in sorted({place.split("/")[0] for place in files}):
        yield PlannedLink(path=f"{path}/{top}", target=f"..data/{top}")


# ---------------------------------------------------------------------------------------------------------------- disk
def write_volumes(plan: VolumePlan) -> None:
    """Make everything of a plan. May be called again with the same plan.

    Raises:
        WrongState: a hostPath is not what its type says.
        InvalidRequest: a subPath leads out of its volume by a link.
    """
    for step in plan.steps:
        match step:
            case PlannedFolder():
                _make_folder(step, plan.group)
            case PlannedFile():
                _make_file(step, plan.group)
            case PlannedLink():
                with contextlib.suppress(FileExistsError):
                    Path(step.path).symlink_to(step.target)
            case RequiredPath():
                _require(step)


def remove_pod_dir(pod_dir: str) -> None:
    """Remove what `write_volumes` made below a pod's folder, and what containers left there. Idempotent."""
    if os.path.lexists(pod_dir):
        shutil.rmtree(pod_dir)


def _make_folder(step: PlannedFolder, group: int | None) -> None:
    path = Path(step.path)
    if step.root:
        root = Path(step.root).resolve()
        if not path.resolve().is_relative_to(root):
            raise InvalidRequest(f"The sub-path {step.path} leads out of its volume.")
        if path.exists():
            return  # a sub-path may name a file, too
    path.mkdir(parents=True, exist_ok=True)
    path.chmod(step.mode)
    if group is not None and step.is_shared:
        os.chown(path, -1, group)
        path.chmod(step.mode | 0o2070)


def _make_file(step: PlannedFile, group: int | None) -> None:
    flags = os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
    descriptor = os.open(step.path, flags if step.content is None else flags | os.O_TRUNC, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        if step.content is not None:
            file.write(step.content)
        os.fchmod(descriptor, step.mode if group is None else step.mode | 0o040)
        if group is not None:
            os.fchown(descriptor, -1, group)


def _require(step: RequiredPath) -> None:
    path = Path(step.path)
    if step.type == "DirectoryOrCreate" and not path.exists():
        path.mkdir(parents=True, mode=0o755)
    elif step.type == "FileOrCreate" and not path.exists():
        path.touch(mode=0o644)
    checks = {
        "Directory": stat.S_ISDIR,
        "DirectoryOrCreate": stat.S_ISDIR,
        "File": stat.S_ISREG,
        "FileOrCreate": stat.S_ISREG,
        "Socket": stat.S_ISSOCK,
        "CharDevice": stat.S_ISCHR,
        "BlockDevice": stat.S_ISBLK,
    }
    try:
        mode = path.stat().st_mode
    except OSError as error:
        raise WrongState(f"The host path {step.path} cannot be used: {error.strerror}.") from error
    if step.type and not checks[step.type](mode):
        raise WrongState(f"The host path {step.path} is no {step.type.removesuffix('OrCreate')}.")
