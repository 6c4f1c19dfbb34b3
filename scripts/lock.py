"""Write the pinned requirement files from what the distributions declare.

`requirements/runtime.lock` is what a node installs, `dev.lock` adds tests and checks, `proto.lock` holds the code
generator, which needs an older protobuf and therefore an environment of its own. Only names, versions and hashes are
written: where packages come from is the business of the machine that installs them.

Needs `uv` in PATH or named by the environment variable UV.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
REQUIREMENTS = ROOT / "requirements"
OURS = "cri-dispatcher"


def declared() -> list[str]:
    """Return the dependencies of all our distributions, without our own names."""
    found: set[str] = set()
    for path in [ROOT / "pyproject.toml", *sorted(ROOT.glob("plugins/*/pyproject.toml"))]:
        project = tomllib.loads(path.read_text())["project"]
        found.update(name for name in project.get("dependencies", []) if not name.startswith(OURS))
    return sorted(found)


def compile_lock(inputs: list[Path], output: Path, *, upgrade: bool) -> None:
    """Resolve `inputs` for every Python from 3.11 and write `output`; existing pins are kept unless `upgrade`."""
    argv = [os.environ.get("UV", "uv"), "pip", "compile", "--quiet", "--universal", "--python-version", "3.11"]
    argv += ["--generate-hashes", "--no-emit-index-url", "--no-header", "--no-annotate"]
    argv += ["--upgrade"] if upgrade else []
    subprocess.run([*argv, *map(str, inputs), "--output-file", str(output)], check=True, cwd=ROOT)


def main() -> None:
    """Write all three files; `--upgrade` moves to the newest versions."""
    upgrade = "--upgrade" in sys.argv[1:]
    with tempfile.TemporaryDirectory() as folder:
        ours = Path(folder) / "ours.in"
        ours.write_text("\n".join(declared()) + "\n")
        dev = REQUIREMENTS / "dev.lock"
        compile_lock([ours, REQUIREMENTS / "build.in", REQUIREMENTS / "dev.in"], dev, upgrade=upgrade)
        constrained = Path(folder) / "runtime.in"
        constrained.write_text(f"-r {ours}\n-r {REQUIREMENTS / 'build.in'}\n-c {dev}\n")
        compile_lock([constrained], REQUIREMENTS / "runtime.lock", upgrade=upgrade)
        compile_lock([REQUIREMENTS / "proto.in"], REQUIREMENTS / "proto.lock", upgrade=upgrade)


if __name__ == "__main__":
    main()
