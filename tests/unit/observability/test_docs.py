"""docs/observability.md names every metric, with its labels, and none that is not there."""

from __future__ import annotations

import re
from pathlib import Path

from dispatcher.observability import Metrics

PAGE = Path(__file__).parents[3] / "docs/observability.md"
ROW = re.compile(r"^\| `(dispatcher_\w+)` \|([^|]*)\|", re.MULTILINE)


def test_the_page_and_the_program_agree() -> None:
    told = {name: set(re.findall(r"`(\w+)`", labels)) for name, labels in ROW.findall(PAGE.read_text())}
    there = {}
    for metric in Metrics("1").registry._collector_to_names:
        name = str(getattr(metric, "_name", ""))
        if name.startswith("dispatcher"):
            suffix = {"counter": "_total", "info": "_info"}.get(str(getattr(metric, "_type", "")), "")
            there[name + suffix] = set(getattr(metric, "_labelnames", ()))
    there["dispatcher_info"] = {"version"}
    there["dispatcher_records"] = {"kind", "state"}
    there["dispatcher_provider_ready"] = {"kind", "provider"}
    there["dispatcher_rpc_in_flight"] = {"rpc"}
    assert told == there
