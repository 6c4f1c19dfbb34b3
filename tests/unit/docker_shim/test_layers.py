"""Measuring writable layers: what is counted, what is bounded, and when it happens."""

from __future__ import annotations

import asyncio
import math
import os
import resource
import subprocess
import time
from collections.abc import AsyncIterator, Mapping
from pathlib import Path

import pytest

from dispatcher.errors import RuntimeDown
from dispatcher_docker_shim import layers
from dispatcher_docker_shim.layers import Layer, LayerMeter, Walk


def whole(folder: Path) -> tuple[int, int]:
    walk = Walk(str(folder))
    assert walk.step(math.inf)
    walk.close()
    return walk.used_bytes, walk.inodes


def make_tree(folder: Path) -> None:
    (folder / "a/b").mkdir(parents=True)
    (folder / "a/file").write_bytes(b"x" * 10_000)
    (folder / "a/b/sparse").write_bytes(b"x")
    os.truncate(folder / "a/b/sparse", 1 << 30)
    os.link(folder / "a/file", folder / "a/b/second-name")
    (folder / "a/outside").symlink_to("/")
    os.mkfifo(folder / "a/pipe")


def test_it_counts_as_du_does(tmp_path: Path) -> None:
    """Blocks, not lengths; a file with two names once; no link is followed and no pipe is opened."""
    make_tree(tmp_path)
    used, inodes = whole(tmp_path)
    said = subprocess.run(["du", "-s", "--block-size=1", str(tmp_path)], capture_output=True, text=True, check=True)
    assert used == int(said.stdout.split()[0])
    assert inodes == 7


def test_steps_add_up_to_the_whole(tmp_path: Path) -> None:
    make_tree(tmp_path)
    walk = Walk(str(tmp_path))
    steps = 1
    while not walk.step(0):
        steps += 1
    assert steps > 7
    assert (walk.used_bytes, walk.inodes) == whole(tmp_path)


def test_a_deep_tree_costs_no_descriptors(tmp_path: Path) -> None:
    """A container may nest folders for ever; the walk stops, and lets go of all that it opened."""
    fd = os.open(tmp_path, os.O_RDONLY)
    for _ in range(1000):
        os.mkdir("d", dir_fd=fd)
        below = os.open("d", os.O_RDONLY, dir_fd=fd)
        os.close(fd)
        fd = below
    os.close(fd)
    before = len(os.listdir("/proc/self/fd"))
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (before + 300, hard))
    try:
        _, inodes = whole(tmp_path)
        abandoned = Walk(str(tmp_path))
        for _ in range(50):
            abandoned.step(0)
        abandoned.close()
        abandoned.close()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert inodes == 129
    assert len(os.listdir("/proc/self/fd")) == before
    while (tmp_path / "d").exists():  # deeper than a path may be long
        subprocess.run(["rm", "-rf", str(tmp_path / "d")], check=True)


class Setup:
    """A meter over folders, with an engine that knows sizes."""

    def __init__(self) -> None:
        self.folders: dict[str, str] = {}
        self.sizes: dict[str, int] = {}
        self.asked = asyncio.Event()
        self.is_down = False
        self.meter = LayerMeter(self.folders, self.ask, now_ns=lambda: 5)

    async def ask(self) -> Mapping[str, int]:
        self.asked.set()
        if self.is_down:
            raise RuntimeDown("away")
        return self.sizes


@pytest.fixture
async def setup() -> AsyncIterator[Setup]:
    setup = Setup()
    yield setup
    await setup.meter.aclose()


async def test_a_small_new_layer_has_a_figure_at_once(setup: Setup, tmp_path: Path) -> None:
    make_tree(tmp_path)
    setup.folders["a"] = str(tmp_path)
    assert (await setup.meter.measure(["a"]))["a"] == Layer(5, *whole(tmp_path))
    setup.folders["b"] = str(tmp_path / "a")
    assert set(await setup.meter.measure(["b"])) == {"a", "b"}
    del setup.folders["a"]
    assert set(await setup.meter.measure()) == {"b"}, "what is removed is forgotten"


async def test_a_large_layer_is_measured_beside_the_questions(
    setup: Setup, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first answer does not wait for it, and later ones do not try again."""
    make_tree(tmp_path)
    setup.folders["a"] = str(tmp_path)
    tried: list[str] = []

    def begin(folder: str) -> Walk:
        tried.append(folder)
        return Walk(folder)

    monkeypatch.setattr(layers, "_AT_ONCE_S", -1)
    monkeypatch.setattr(layers, "_STEP_S", 0)
    monkeypatch.setattr(layers, "Walk", begin)
    assert "a" not in await setup.meter.measure(["a"])
    async with asyncio.timeout(20):
        while "a" not in (found := await setup.meter.measure(["a"])):
            await asyncio.sleep(0)
    assert found["a"] == Layer(5, *whole(tmp_path))
    assert len(tried) == 2, "once at the first question, once in the background"


async def test_layers_that_are_no_folders_are_asked_for(setup: Setup) -> None:
    setup.folders["a"] = ""
    setup.sizes["a"] = 77
    await setup.meter.measure()
    async with asyncio.timeout(20):
        while not (found := await setup.meter.measure()):
            await asyncio.sleep(0)
    assert found == {"a": Layer(5, 77, 0)}


async def test_an_engine_that_is_away_costs_nothing(setup: Setup) -> None:
    setup.folders["a"] = ""
    setup.is_down = True
    await setup.meter.measure()
    async with asyncio.timeout(20):
        await setup.asked.wait()
    assert await setup.meter.measure() == {}


async def test_a_layer_that_is_gone_is_left_out(setup: Setup, tmp_path: Path) -> None:
    setup.folders["a"] = str(tmp_path / "gone")
    assert await setup.meter.measure() == {}


async def test_ending_in_the_middle_of_a_walk(setup: Setup, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No descriptor stays open, and no thread works on."""
    for number in range(2000):
        (tmp_path / str(number)).touch()
    monkeypatch.setattr(layers, "_AT_ONCE_S", -1)
    monkeypatch.setattr(layers, "_STEP_S", 0)
    setup.folders["a"] = str(tmp_path)
    before = len(os.listdir("/proc/self/fd"))
    await setup.meter.measure()
    until = time.monotonic() + 20
    while len(os.listdir("/proc/self/fd")) == before and time.monotonic() < until:
        await asyncio.sleep(0)
    await setup.meter.aclose()
    assert len(os.listdir("/proc/self/fd")) == before
