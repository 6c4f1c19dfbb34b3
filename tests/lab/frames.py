"""The agent's own parsers behind a pipe, compiled with sanitizers."""

from __future__ import annotations

import subprocess
from pathlib import Path

from dispatcher_hyper_vm.guest.exec import CHECKED, SOURCES, WARNINGS, run

HARNESS = Path(__file__).resolve().parents[1] / "hyper_vm" / "frames.c"


def build_frames(folder: Path) -> Path:
    """Compile the harness with the agent's sources for frames, JSON and output."""
    program = folder / "frames"
    sources = [str(SOURCES / name) for name in ("base.c", "frame.c", "json.c", "output.c")]
    run(["gcc", *WARNINGS, *CHECKED, f"-I{SOURCES}", "-o", str(program), str(HARNESS), *sources])
    return program


def ask(program: Path, data: bytes, argument: str = "0") -> list[str]:
    """What it prints for an input. Raises AssertionError where it died: a sanitizer's words are in it."""
    done = subprocess.run([program, argument], input=data, capture_output=True, timeout=30, check=False)
    assert done.returncode == 0, done.stderr.decode("utf-8", "replace")[-3000:]
    return done.stdout.decode("ascii", "replace").splitlines()
