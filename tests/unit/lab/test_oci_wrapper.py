"""The wrapper takes from a process what the host cannot grant, and nothing else."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from pathlib import Path

from tests.lab import oci_wrapper

PROCESS = {
    "args": ["sh"],
    "capabilities": {"bounding": ["CAP_CHOWN", "CAP_SYS_RESOURCE"], "ambient": None, "effective": []},
    "oomScoreAdj": -998,
    "rlimits": [
        {"type": "RLIMIT_NOFILE", "hard": 1 << 20, "soft": 1 << 20},
        {"type": "RLIMIT_CORE", "hard": 5, "soft": 5},
    ],
}


def test_ungrantable_parts_are_reduced_to_the_host() -> None:
    process = copy.deepcopy(PROCESS)
    oci_wrapper.clamp_process(process, own_oom_score=0, hard_limits={"RLIMIT_NOFILE": 1024, "RLIMIT_CORE": -1})
    assert process == {
        "args": ["sh"],
        "capabilities": {"bounding": ["CAP_CHOWN"], "ambient": None, "effective": []},
        "oomScoreAdj": 0,
        "rlimits": [
            {"type": "RLIMIT_NOFILE", "hard": 1024, "soft": 1024},
            {"type": "RLIMIT_CORE", "hard": 5, "soft": 5},
        ],
    }


def test_a_grantable_process_is_unchanged() -> None:
    process = {"args": ["sh"], "oomScoreAdj": 500, "rlimits": [{"type": "RLIMIT_NOFILE", "hard": 10, "soft": 10}]}
    before = copy.deepcopy(process)
    oci_wrapper.clamp_process(process, own_oom_score=0, hard_limits={"RLIMIT_NOFILE": 1024})
    assert process == before


def test_the_bundle_of_create_and_the_file_of_exec_are_edited_before_the_runtime_runs(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"process": PROCESS, "root": {}}))
    (tmp_path / "process.json").write_text(json.dumps(PROCESS))
    for arguments in (
        ["--log", "l", "create", "--bundle", str(tmp_path), "id"],
        ["exec", "-p", str(tmp_path / "process.json"), "id"],
    ):
        wrapper = [sys.executable, oci_wrapper.__file__, "/bin/echo"]
        done = subprocess.run([*wrapper, *arguments], capture_output=True, text=True, check=True)
        assert done.stdout.split() == arguments
    assert "CAP_SYS_RESOURCE" not in (tmp_path / "config.json").read_text() + (tmp_path / "process.json").read_text()
