"""Which cgroup driver the kubelet is told, and when it is told to ask again."""

from __future__ import annotations

from pathlib import Path

import pytest

from dispatcher.api import RuntimeHealth
from dispatcher.cgroup_driver import choose_cgroup_driver
from dispatcher.errors import RuntimeDown

UNMET = RuntimeHealth(ready=False, reason="EngineDown", message="no answer")
MET = RuntimeHealth(ready=True, cgroup_driver="cgroupfs")
AWAY = RuntimeHealth(ready=False, reason="EngineDown", message="no answer", cgroup_driver="cgroupfs")
WITHOUT_ONE = RuntimeHealth(ready=True)


@pytest.fixture
def booted(tmp_path: Path) -> Path:
    """The mark of a machine whose init is systemd."""
    return tmp_path


def test_what_is_configured_needs_no_engine(booted: Path) -> None:
    assert choose_cgroup_driver("cgroupfs", {"docker": UNMET}, ["docker"], mark=booted) == "cgroupfs"


def test_an_engine_decides_also_while_it_is_away(booted: Path) -> None:
    for state in (MET, AWAY):
        health = {"other": WITHOUT_ONE, "docker": state}
        assert choose_cgroup_driver("auto", health, ["docker"], mark=booted) == "cgroupfs"


def test_nothing_is_guessed_before_a_required_engine_was_met(booted: Path) -> None:
    with pytest.raises(RuntimeDown, match='"docker"'):
        choose_cgroup_driver("auto", {"other": WITHOUT_ONE, "docker": UNMET}, ["docker"], mark=booted)


def test_an_engine_that_is_not_required_is_not_waited_for(booted: Path, tmp_path: Path) -> None:
    health = {"other": WITHOUT_ONE, "docker": UNMET}
    assert choose_cgroup_driver("auto", health, ["other"], mark=booted) == "systemd"
    assert choose_cgroup_driver("auto", health, ["other"], mark=tmp_path / "none") == "cgroupfs"
    assert choose_cgroup_driver("auto", {}, ["missing"], mark=booted) == "systemd"
