"""Show where the time of a pod's start went, step by step.

A start is RunPodSandbox, and the PullImage, CreateContainer and StartContainer calls for its containers, each with the
steps below it: validation, the route, commits to the record, the network namespace, each network plugin, the runtime's
acts, the image's lease. Starts that failed, and those under way, are shown as far as they came. Times are milliseconds;
a bar shows when within its call a step ran. Without a pod, recent starts are listed.

The daemon keeps the newest `tracing.keep` calls, also over its own restart.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

from dispatcher.commands.connection import add_endpoint, add_json, ask_topics, connect, match_pod
from dispatcher.commands.output import Console, Exit, Failure, age, short_id

EPILOG = """\
examples:
  dispatcher trace
  dispatcher trace web
  dispatcher trace kube-system/proxy -o json
"""

_BAR = 24


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the options."""
    parser.add_argument("pod", nargs="?", metavar="POD", help="an id, its beginning, a name or namespace/name")
    add_json(parser)
    add_endpoint(parser)


async def execute(args: argparse.Namespace, console: Console) -> int:
    """Run the command."""
    async with connect(args) as client:
        starts = group(json.loads((await ask_topics(client, "traces"))["traces"]))
    if not args.pod:
        _list(starts, console)
        return Exit.OK
    found = match_pod(args.pod, starts)
    if found is None:
        raise Failure(
            f"no start of a pod {args.pod!r} is kept",
            hint="`dispatcher trace` lists those that are",
            code=Exit.NOT_FOUND,
        )
    if console.as_json:
        console.data(found.as_dict())
    else:
        _show(found, console)
    return Exit.OK


@dataclass(slots=True)
class Start:
    """The calls that belong to one attempt of one pod, in the order in which they began.

    `id`, `metadata` and `created_at` are named as in a CRI listing, so that pods are found here as they are there.
    """

    metadata: SimpleNamespace
    calls: list[dict[str, Any]] = field(default_factory=list)

    @property
    def id(self) -> str:
        """The sandbox's id; empty where the start failed before it had one."""
        return str(self._fact("pod_id"))

    @property
    def created_at(self) -> int:
        """When the first call began, in nanoseconds."""
        return min(int(call["began_ns"]) for call in self.calls)

    @property
    def total_ms(self) -> float:
        """From the beginning of the first call to the end of the last."""
        return round(max(self.offset_ms(call) + float(call["duration_ms"]) for call in self.calls), 3)

    @property
    def state(self) -> str:
        """How it stands: running, failed or ok."""
        states = {call["state"] for call in self.calls}
        return next((state for state in ("running", "failed") if state in states), "ok")

    def offset_ms(self, call: Mapping[str, Any]) -> float:
        """When a call began, after the first."""
        return round((int(call["began_ns"]) - self.created_at) / 1e6, 3)

    def _fact(self, name: str) -> Any:
        return next((call["facts"][name] for call in self.calls if call["facts"].get(name)), "")

    def as_dict(self) -> dict[str, Any]:
        """Return everything for `-o json`."""
        return {
            "namespace": self.metadata.namespace,
            "name": self.metadata.name,
            "uid": self.metadata.uid,
            "attempt": self.metadata.attempt,
            "id": self.id,
            "runtime": self._fact("runtime"),
            "rule": self._fact("rule"),
            "state": self.state,
            "began_ns": self.created_at,
            "total_ms": self.total_ms,
            "calls": [{"offset_ms": self.offset_ms(call), **call} for call in self.calls],
        }


def group(calls: Sequence[dict[str, Any]]) -> list[Start]:
    """Put calls together by the pod that they are about, the newest pod first; calls about no pod are left out."""
    starts: dict[tuple[Any, ...], Start] = {}
    for call in sorted(calls, key=lambda call: call["began_ns"]):
        facts = call["facts"]
        if not facts.get("pod"):
            continue
        key = tuple(facts.get(name, "") for name in ("namespace", "pod", "uid", "attempt"))
        names = SimpleNamespace(namespace=key[0], name=key[1], uid=key[2], attempt=key[3] or 0)
        starts.setdefault(key, Start(names)).calls.append(call)
    return sorted(starts.values(), key=lambda start: start.created_at, reverse=True)


def _list(starts: Sequence[Start], console: Console) -> None:
    rows = [start.as_dict() for start in starts]
    if console.as_json:
        console.data([{key: value for key, value in row.items() if key != "calls"} for row in rows])
        return
    console.table(
        ("POD", "NAMESPACE", "NAME", "ATTEMPT", "RUNTIME", "STATE", "CALLS", "TOTAL MS", "AGE"),
        [
            (
                short_id(row["id"]),
                row["namespace"],
                row["name"],
                row["attempt"],
                row["runtime"],
                row["state"],
                len(row["calls"]),
                f"{row['total_ms']:.1f}",
                age(row["began_ns"]),
            )
            for row in rows
        ],
    )


def _show(start: Start, console: Console) -> None:
    shown = start.as_dict()
    console.fields(
        [
            ("pod", f"{shown['namespace']}/{shown['name']}"),
            ("id", shown["id"]),
            ("attempt", shown["attempt"]),
            ("runtime", shown["runtime"]),
            ("rule", shown["rule"]),
            ("state", shown["state"]),
            ("total", f"{shown['total_ms']:.1f} ms"),
        ]
    )
    console.line()
    console.table(
        ("     AT", "     MS", "WITHIN THE CALL".ljust(_BAR), "STEP", ""),
        [row for call in shown["calls"] for row in _rows(call)],
    )
    left_out = sum(int(call.get("dropped") or 0) for call in shown["calls"])
    if left_out:
        console.say(f"{left_out} more steps were not recorded one by one")


def _rows(call: Mapping[str, Any]) -> Iterator[tuple[str, str, str, str, str]]:
    whole = float(call["duration_ms"])
    facts = call["facts"]
    about = {key: facts[key] for key in ("image", "container") if key in facts}
    yield _row(call, call["offset_ms"], bar(0, whole, whole), call["call"], about)
    for item in call["steps"]:
        name = "  " * int(item["depth"]) + item["name"] + (f" x{item['count']}" if item.get("count", 1) > 1 else "")
        marks = bar(item["offset_ms"], item["duration_ms"], whole)
        yield _row(item, call["offset_ms"] + item["offset_ms"], marks, name, item.get("facts") or {})


def _row(
    item: Mapping[str, Any], at_ms: float, marks: str, name: str, facts: Mapping[str, Any]
) -> tuple[str, str, str, str, str]:
    notes = [f"{key}={value}" for key, value in facts.items()]
    if item.get("running") or item.get("state") == "running":
        notes.append("under way")
    if item.get("error"):
        notes.append(str(item["error"]))
    return f"{at_ms:7.1f}", f"{item['duration_ms']:7.1f}", marks, name, " ".join(notes)


def bar(offset_ms: float, duration_ms: float, whole_ms: float) -> str:
    """Return a bar of fixed width with the part of the whole marked that a step took, at least one mark."""
    if whole_ms <= 0:
        return "█" * _BAR
    first = min(_BAR - 1, int(offset_ms / whole_ms * _BAR))
    last = min(_BAR, max(first + 1, round((offset_ms + duration_ms) / whole_ms * _BAR)))
    return "·" * first + "█" * (last - first) + "·" * (_BAR - last)
