"""The guests of a node: a folder for each kernel, named as policy rules name it (`with: {kernel: NAME}`)."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path

from dispatcher.errors import NotFound
from dispatcher_hyper_vm.guest.build import INITRAMFS, KERNEL, MANIFEST, MANIFEST_SCHEMA

DEFAULT = "default"
DEFAULT_FOLDER = "/var/lib/dispatcher/guests"
_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,62}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Guest:
    """A guest that was built. `digest` changes with the kernel, the agent and the modules: templates are keyed by it."""

    name: str
    kernel: Path
    initramfs: Path
    digest: str
    release: str
    package: str  # name and version of the kernel's package, or the path of the operator's image
    modules: tuple[str, ...]
    bytes: int


def is_guest_name(name: str) -> bool:
    """Whether a guest may have this name. Names become folders: nothing else passes."""
    return _NAME.fullmatch(name) is not None


def find_guest(folder: Path, name: str) -> Guest:
    """Return a guest by its name.

    Raises:
        NotFound: it was not built; the message says how to.
    """
    if not is_guest_name(name):
        raise NotFound(f"{name!r} is no name of a guest.")
    try:
        manifest = json.loads((folder / name / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise NotFound(f"There is no guest {name!r}; `dispatcher guest build --name {name}` makes it.") from error
    if manifest.get("schema") != MANIFEST_SCHEMA:
        raise NotFound(
            f"The guest {name!r} is of another version; `dispatcher guest build --name {name}` makes it anew."
        )
    files, kernel = manifest["files"], manifest["kernel"]
    return Guest(
        name=name,
        kernel=folder / name / KERNEL,
        initramfs=folder / name / INITRAMFS,
        digest=f"{files[KERNEL]['sha256'][:32]}{files[INITRAMFS]['sha256'][:32]}",
        release=kernel["release"],
        package=" ".join(filter(None, (kernel.get("package"), kernel.get("version")))) or kernel.get("image", ""),
        modules=tuple(manifest["modules"]),
        bytes=sum(item["bytes"] for item in files.values()),
    )


def list_guests(folder: Path) -> tuple[Guest, ...]:
    """Return all guests that can be used, by name."""
    found = []
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        if is_guest_name(path.name):
            try:
                found.append(find_guest(folder, path.name))
            except NotFound:
                continue
    return tuple(found)
