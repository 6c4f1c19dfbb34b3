"""The distributions fit each other, and what they need is pinned by version and hash."""

from __future__ import annotations

import re
import tomllib
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from dispatcher.api import API_VERSION, ENTRY_POINT_GROUP
from dispatcher.config import OWN_PLUGINS

ROOT = Path(__file__).parents[3]
LOCKS = sorted((ROOT / "requirements").glob("*.lock"))
PLUGINS = sorted(path.parent for path in ROOT.glob("plugins/*/pyproject.toml"))
# What plugins share, or what enrols nothing yet: a distribution without an entry point of a plugin.
LIBRARIES = [
    folder
    for folder in PLUGINS
    if ENTRY_POINT_GROUP
    not in tomllib.loads((folder / "pyproject.toml").read_text())["project"].get("entry-points", {})
]


def read_project(folder: Path) -> dict[str, Any]:
    """The [project] table of a distribution."""
    project: dict[str, Any] = tomllib.loads((folder / "pyproject.toml").read_text())["project"]
    return project


def read_pins(lock: Path) -> dict[str, Version]:
    """Names and versions of a requirements file."""
    entries = re.findall(r"^([A-Za-z0-9._-]+)==(\S+)", lock.read_text(), re.MULTILINE)
    return {canonicalize_name(name): Version(version) for name, version in entries}


@pytest.mark.parametrize("lock", LOCKS, ids=lambda path: path.name)
def test_lock_holds_names_versions_and_hashes_only(lock: Path) -> None:
    """Each entry has hashes; no entry says where a package comes from."""
    entries = re.split(r"\n(?=\S)", lock.read_text().strip())
    for entry in entries:
        first, *rest = entry.split("\\\n")
        assert re.fullmatch(r"[A-Za-z0-9._-]+==[A-Za-z0-9.]+( ; [^\n]+)? ?", first), first
        assert rest, f"{first} has no hash"
        assert all(re.fullmatch(r"\s+--hash=sha256:[0-9a-f]{64} ?\n?", line) for line in rest), first


def test_everything_declared_is_pinned() -> None:
    """Each dependency of each distribution is in the lock files, in a version that its range admits."""
    runtime = read_pins(ROOT / "requirements" / "runtime.lock")
    dev = read_pins(ROOT / "requirements" / "dev.lock")
    for folder in [ROOT, *PLUGINS]:
        for text in read_project(folder).get("dependencies", []):
            requirement = Requirement(text)
            name = canonicalize_name(requirement.name)
            if not name.startswith("cri-dispatcher"):
                assert requirement.specifier.contains(runtime[name]), text
    assert {name: dev[name] for name in runtime} == runtime


@pytest.mark.parametrize("folder", PLUGINS, ids=lambda path: path.name)
def test_plugin_distribution(folder: Path) -> None:
    """A plugin's folder, distribution, import and entry point carry one name. Of ours it needs the core and libraries."""
    project = read_project(folder)
    name = folder.name
    assert project["name"] == "cri-dispatcher-" + name.replace("_", "-")
    if folder not in LIBRARIES:
        assert project["entry-points"][ENTRY_POINT_GROUP] == {name: f"dispatcher_{name}.plugin:plugin"}
    assert (folder / "src" / f"dispatcher_{name}" / "py.typed").exists()
    ours = {Requirement(text).name for text in project["dependencies"] if text.startswith("cri-dispatcher")}
    libraries = {read_project(library)["name"] for library in LIBRARIES if library != folder}
    assert "cri-dispatcher" in ours <= {"cri-dispatcher", *libraries}
    assert project["license"] == read_project(ROOT)["license"] == "Apache-2.0"


def test_our_plugins_are_installed() -> None:
    """One command has installed them all: each enabled by default is found by its entry point, and speaks this API."""
    found = {point.name: point for point in metadata.entry_points(group=ENTRY_POINT_GROUP)}
    assert set(OWN_PLUGINS) == {folder.name for folder in PLUGINS if folder not in LIBRARIES}
    for name in OWN_PLUGINS:
        plugin = found[name].load()
        assert plugin.name == name
        assert plugin.API[0] == API_VERSION[0]
        assert plugin.API <= API_VERSION


def test_command_is_installed() -> None:
    """The distribution brings the command."""
    (command,) = metadata.entry_points(group="console_scripts", name="dispatcher")
    assert callable(command.load())
