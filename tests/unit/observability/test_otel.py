"""Calls reach a real OTLP receiver through the real SDK, and a missing or dead collector costs nobody anything."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from dispatcher.observability.otel import ExporterMissing, OtlpExporter
from dispatcher.observability.traces import TraceLog
from dispatcher.spans import step
from tests.lab.otlp import Receiver


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    receiver = Receiver()
    yield receiver
    receiver.close()


def make(endpoint: str, ratio: float = 1.0) -> OtlpExporter:
    return OtlpExporter(endpoint, sample_ratio=ratio, version="1.2.3", node_uuid="node-1")


def record(exporter: OtlpExporter, folder: Path, remote: str = "") -> None:
    log = TraceLog(folder / "traces.jsonl", keep=0, export=exporter.export)
    log.start()
    with suppress(ValueError), log.record("RunPodSandbox", remote=remote, pod="web", namespace="shop"):
        with step("network.add"), step("cni.exec", plugin="bridge"):
            pass
        raise ValueError("could not reach https://user:hunter22@registry/")
    log.close()
    exporter.close()


def attributes(span: Any) -> dict[str, Any]:
    return {a.key: a.value.string_value or a.value.int_value for a in span.attributes}


def test_a_call_arrives_as_a_tree(receiver: Receiver, tmp_path: Path) -> None:
    before_ns = time.time_ns()
    record(make(receiver.endpoint), tmp_path)
    after_ns = time.time_ns()
    spans = {span.name: span for span in receiver.spans}
    assert set(spans) == {"RunPodSandbox", "network.add", "cni.exec"}
    root, network, plugin = spans["RunPodSandbox"], spans["network.add"], spans["cni.exec"]
    assert (root.parent_span_id, network.parent_span_id) == (b"", root.span_id)
    assert plugin.parent_span_id == network.span_id
    assert {span.trace_id for span in receiver.spans} == {root.trace_id}
    assert attributes(root) == {
        "k8s.pod.name": "web",
        "k8s.namespace.name": "shop",
        "rpc.system": "grpc",
        "rpc.method": "RunPodSandbox",
    }
    assert attributes(plugin) == {"dispatcher.plugin": "bridge"}
    assert root.status.code == 2
    assert "hunter22" not in root.status.message
    assert "registry" in root.status.message
    for span in receiver.spans:
        assert before_ns <= span.start_time_unix_nano <= span.end_time_unix_nano <= after_ns
    resource = receiver.resources[0]
    assert (resource["service.name"], resource["service.version"]) == ("dispatcher", "1.2.3")
    assert resource["service.instance.id"] == "node-1"


def test_the_trace_of_a_kubelet_is_continued(receiver: Receiver, tmp_path: Path) -> None:
    record(make(receiver.endpoint, ratio=0.0), tmp_path, remote=f"00-{'ab' * 16}-{'cd' * 8}-01")
    (root,) = [span for span in receiver.spans if span.name == "RunPodSandbox"]
    assert (root.trace_id, root.parent_span_id) == (bytes.fromhex("ab" * 16), bytes.fromhex("cd" * 8))


@pytest.mark.parametrize("remote", ["", "nonsense", f"00-{'ab' * 16}-{'cd' * 8}-00"])
def test_what_is_not_sampled_is_not_sent(receiver: Receiver, tmp_path: Path, remote: str) -> None:
    record(make(receiver.endpoint, ratio=0.0), tmp_path, remote=remote)
    assert receiver.spans == []


def test_a_collector_that_is_away_does_not_hold_up_the_end(tmp_path: Path) -> None:
    receiver = Receiver()
    endpoint = receiver.endpoint
    receiver.close()
    record(make(endpoint), tmp_path)  # the test's timeout would end it


def test_without_the_extra_the_reason_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.startswith("opentelemetry.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "opentelemetry.sdk", None)
    monkeypatch.setitem(sys.modules, "opentelemetry.sdk.trace", None)
    monkeypatch.setitem(sys.modules, "opentelemetry.exporter", None)
    with pytest.raises(ExporterMissing, match=r"cri-dispatcher\[otel\]"):
        make("http://127.0.0.1:4318/v1/traces")


def test_the_sdk_is_not_imported_unless_it_is_configured() -> None:
    code = "import sys, dispatcher.app; sys.exit(any(name.startswith('opentelemetry') for name in sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
