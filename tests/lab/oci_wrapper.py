"""OCI runtime for test hosts without CAP_SYS_RESOURCE: takes from a process what such a host cannot grant.

Usage: oci_wrapper.py RUNTIME ARGUMENT...   Edits the bundle of `create`/`run` or the process file of `exec`, then
becomes RUNTIME. Only these are changed: the capability itself, an oom score below our own, resource limits above ours.
Tests that ran through it say so in their header; the product never uses it.
"""

from __future__ import annotations

import json
import os
import resource
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

_UNGRANTABLE = "CAP_SYS_RESOURCE"


def clamp_process(process: dict[str, Any], *, own_oom_score: int, hard_limits: dict[str, int]) -> None:
    """Reduce an OCI `process` object in place to what the host grants.

    Args:
        process: The object as the engine wrote it.
        own_oom_score: Our oom_score_adj; without the capability nobody can go below it.
        hard_limits: Our hard limit per limit name (`RLIMIT_NOFILE`), -1 for none.
    """
    for names in (process.get("capabilities") or {}).values():
        if names and _UNGRANTABLE in names:
            names.remove(_UNGRANTABLE)
    if process.get("oomScoreAdj") is not None:
        process["oomScoreAdj"] = max(process["oomScoreAdj"], own_oom_score)
    for limit in process.get("rlimits") or []:
        ceiling = hard_limits.get(limit["type"], -1)
        if ceiling >= 0:
            limit["hard"] = min(limit["hard"], ceiling)
            limit["soft"] = min(limit["soft"], limit["hard"])


def _option(arguments: list[str], *names: str) -> str | None:
    for index, argument in enumerate(arguments):
        for name in names:
            if argument == name and index + 1 < len(arguments):
                return arguments[index + 1]
            if argument.startswith(name + "="):
                return argument.partition("=")[2]
    return None


def _edit(path: Path, pick: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    document = json.loads(path.read_text())
    clamp_process(
        pick(document),
        own_oom_score=int(Path("/proc/self/oom_score_adj").read_text()),
        hard_limits={
            name: resource.getrlimit(getattr(resource, name))[1] for name in dir(resource) if name.startswith("RLIMIT_")
        },
    )
    path.write_text(json.dumps(document))


def main(argv: list[str]) -> None:
    """Edit what the engine wrote, then become the real runtime."""
    runtime, arguments = argv[1], argv[2:]
    if "create" in arguments or "run" in arguments:
        bundle = _option(arguments, "--bundle", "-b") or "."
        _edit(Path(bundle) / "config.json", lambda document: document["process"])
    elif "exec" in arguments and (process_file := _option(arguments, "--process", "-p")):
        _edit(Path(process_file), lambda document: document)
    os.execv(runtime, [runtime, *arguments])


if __name__ == "__main__":
    main(sys.argv)
