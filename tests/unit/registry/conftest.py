"""Plugins for tests: installed for real (a distribution's metadata on sys.path), found by the real loader."""

from __future__ import annotations

import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from dispatcher.config import parse_config
from dispatcher.registry import Registry

FAKES = Path(__file__).parents[2] / "plugins"

Install = Callable[..., str]
Load = Callable[..., Registry]


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Install]:
    """Install a plugin from source text under an entry point's name, in a distribution of its own."""
    made: list[str] = []

    def install(name: str, source: str, *, distribution: str = "") -> str:
        module = f"plugin_{name}_{len(made)}"
        folder = tmp_path / "site" / module
        info = folder / f"{(distribution or module).replace('-', '_')}-2.5.dist-info"
        info.mkdir(parents=True)
        (folder / f"{module}.py").write_text(textwrap.dedent(source))
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution or module}\nVersion: 2.5\n")
        (info / "entry_points.txt").write_text(f"[dispatcher.plugins]\n{name} = {module}:plugin\n")
        monkeypatch.syspath_prepend(str(folder))
        made.append(module)
        return module

    yield install
    for module in made:
        sys.modules.pop(module, None)


@pytest.fixture
def load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Load:
    """Load a registry from the text of a dispatcher.yaml, with the plugins `fake` and `other` installed."""
    monkeypatch.syspath_prepend(str(FAKES))

    def load(text: str, **arguments: Any) -> Registry:
        folders = f"state_dir: {tmp_path}/state\nrun_dir: {tmp_path}/run\n"
        return Registry.load(parse_config(folders + textwrap.dedent(text), "d.yaml").config, node_uuid="n", **arguments)

    return load
