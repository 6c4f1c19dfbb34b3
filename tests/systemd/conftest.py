"""Tests against a real systemd and a real cgroup v2. Most machines of developers lack one of them."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

HERE = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    missing = reason_to_skip()
    for item in items:
        if missing and HERE in item.path.parents:
            item.add_marker(pytest.mark.skip(reason=missing))


def reason_to_skip() -> str:
    """Why these tests cannot run here; empty where they can.

    They change the machine as an operator would, so being able to is not enough: the virtual machine says so.
    """
    if not Path("/run/systemd/system").is_dir() or not Path("/sys/fs/cgroup/cgroup.controllers").exists():
        return "needs systemd as PID 1 and cgroup version 2: make test-vm"
    if os.environ.get("DISPATCHER_TEST_VM") != "1":
        return "changes the machine: runs in make test-vm only"
    return ""
