"""Metrics stay bounded and true, the endpoints answer, and systemd is told."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import socket
import time
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from dispatcher.errors import Internal, NetworkFailed, PullFailed
from dispatcher.observability import Health, HealthServer, LoopProbe, Metrics, Notifier
from dispatcher.observability.metrics import outcome_of


def sample(metrics: Metrics, name: str, **labels: str) -> float | None:
    for family in text_string_to_metric_families(metrics.render().decode()):
        for found in family.samples:
            if found.name == name and found.labels == labels:
                return found.value
    return None


def test_rpc_latency_and_code() -> None:
    metrics = Metrics("1.2.3")
    metrics.rpc_finished("Version", "OK", 0.01)
    assert sample(metrics, "dispatcher_rpc_total", rpc="Version", code="OK") == 1
    assert sample(metrics, "dispatcher_rpc_duration_seconds_count", rpc="Version") == 1
    assert sample(metrics, "dispatcher_info", version="1.2.3") == 1


def test_hostile_labels_do_not_grow_the_exposition() -> None:
    metrics = Metrics("1")
    for index in range(5000):
        metrics.route_decided(rule=f"rule-{index}", runtime=f"rt-{index}")
        metrics.provider_called("runtime", f"p{index}\n", "create_pod", 0.1, NetworkFailed("x"))
        metrics.observe("cni.step", 0.1, {"plugin": f"c{index}", "command": "ADD", "outcome": f"o{index}"})
        metrics.observe(f"unknown{index}", 0.1, {})
        metrics.plugin_failed(f"x{index}", "load")
    assert len(metrics.render().splitlines()) < 6000
    assert sample(
        metrics, "dispatcher_route_decisions_total", rule="other", runtime="other", phase="pod", outcome="routed"
    )


def test_names_and_units_are_those_of_the_field() -> None:
    """Base units, `_total` on what only rises, a sentence of help: what a dashboard's author expects."""
    metrics = Metrics("1")
    metrics.count_records_by(lambda: {("pod", "ready"): 1})
    for family in text_string_to_metric_families(metrics.render().decode()):
        if not family.name.startswith("dispatcher"):
            continue
        assert family.documentation.endswith("."), family.name
        assert re.fullmatch(r"dispatcher(_[a-z]+)+", family.name)
        assert not re.search(r"_(ms|milliseconds|us|minutes|kb|mb|kib|mib|percent)(_|$)", family.name)
        if family.type == "histogram":
            assert family.name.endswith("_seconds")
        if family.type == "counter":
            assert all(item.name.endswith(("_total", "_created")) for item in family.samples)


def test_a_plugin_s_own_error_counts_as_the_class_it_stands_for() -> None:
    class PluginFailed(NetworkFailed):
        pass

    assert outcome_of(PluginFailed("x")) == "NetworkFailed"
    assert outcome_of(PullFailed("x")) == "PullFailed"
    assert outcome_of(ValueError()) == "bug"
    assert outcome_of(asyncio.CancelledError()) == "cancelled"
    assert outcome_of(None) == "ok"


def test_calls_in_flight_and_readiness_are_read_at_the_scrape() -> None:
    metrics = Metrics("1")
    metrics.rpc_began("Version")
    metrics.rpc_began("Version")
    metrics.rpc_finished("Version", "OK", 0.1)
    assert sample(metrics, "dispatcher_rpc_in_flight", rpc="Version") == 1
    states = {("runtime", "docker"): True}
    metrics.read_readiness_by(lambda: states)
    assert sample(metrics, "dispatcher_provider_ready", kind="runtime", provider="docker") == 1
    states["runtime", "docker"] = False
    assert sample(metrics, "dispatcher_provider_ready", kind="runtime", provider="docker") == 0


def test_records_are_read_at_the_scrape() -> None:
    metrics = Metrics("1")
    counts = {("pod", "ready"): 3}
    metrics.count_records_by(lambda: counts)
    assert sample(metrics, "dispatcher_records", kind="pod", state="ready") == 3
    counts["pod", "ready"] = 4
    assert sample(metrics, "dispatcher_records", kind="pod", state="ready") == 4


def test_two_daemons_in_one_process_share_nothing() -> None:
    first, second = Metrics("1"), Metrics("1")
    first.policy_reloaded(ok=False, generation=7)
    assert sample(first, "dispatcher_policy_generation") == 7
    assert sample(first, "dispatcher_policy_in_sync") == 0
    assert sample(second, "dispatcher_policy_generation") == 0


async def get(address: tuple[str, int], request: bytes) -> tuple[int, bytes]:
    reader, writer = await asyncio.open_connection(*address)
    writer.write(request)
    await writer.drain()
    reply = await reader.read()
    writer.close()
    head, _, body = reply.partition(b"\r\n\r\n")
    return int(head.split()[1]), body


async def test_endpoints() -> None:
    metrics, health = Metrics("1"), Health()
    well = True
    health.add_readiness("docker", lambda: (well, "" if well else "dockerd is away"))
    server = HealthServer(metrics, health)
    await server.start()
    try:
        assert (await get(server.address, b"GET /readyz HTTP/1.1\r\nHost: x\r\n\r\n")) == (200, b"ok\n")
        well = False
        status, body = await get(server.address, b"GET /readyz HTTP/1.1\r\nHost: x\r\n\r\n")
        assert (status, json.loads(body)["checks"]["docker"]) == (503, "dockerd is away")
        assert (await get(server.address, b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n"))[0] == 200
        status, body = await get(server.address, b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n")
        assert status == 200
        assert b"dispatcher_info" in body
        assert (await get(server.address, b"POST /metrics HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\n\r\n"))[0] == 405
        assert (await get(server.address, b"GET /nope HTTP/1.0\r\n\r\n"))[0] == 404
        assert (await get(server.address, b"HEAD /metrics HTTP/1.1\r\nHost: x\r\n\r\n"))[1] == b""
    finally:
        await server.aclose()


async def test_a_check_that_raises_is_a_failed_check() -> None:
    health = Health()
    health.add_readiness("odd", lambda: 1 / 0)  # type: ignore[arg-type, return-value]
    well, said = health.readiness()
    assert not well
    assert "ZeroDivisionError" in said["odd"]


async def test_silent_and_noisy_clients_do_not_stop_the_others() -> None:
    server = HealthServer(Metrics("1"), Health())
    await server.start()
    silent = [await asyncio.open_connection(*server.address) for _ in range(10)]
    reader, writer = await asyncio.open_connection(*server.address)
    writer.write(b"GET /" + b"a" * 100_000)
    with contextlib.suppress(ConnectionError):
        await writer.drain()
        await reader.read()
    writer.close()
    assert (await get(server.address, b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n"))[0] == 200
    await asyncio.wait_for(server.aclose(), 2)
    for _, other in silent:
        other.close()


def test_only_loopback_is_served() -> None:
    with pytest.raises(ValueError, match="loopback"):
        HealthServer(Metrics("1"), Health(), host="0.0.0.0")


async def test_a_held_loop_is_seen_with_its_culprit(caplog: pytest.LogCaptureFixture) -> None:
    metrics = Metrics("1")
    probe = LoopProbe(metrics, interval_s=0.01, alarm_s=0.1)
    task = asyncio.create_task(probe.run())
    await asyncio.sleep(0.03)
    time.sleep(0.4)
    await asyncio.sleep(0.03)
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await task
    assert (sample(metrics, "dispatcher_loop_lag_alarms_total") or 0) >= 1
    held = [record for record in caplog.records if "held" in record.message]
    assert held
    assert "time.sleep(0.4)" in held[0].__dict__["data"]["stack"]


@pytest.mark.parametrize("abstract", [False, True])
def test_systemd_is_told(tmp_path: Path, abstract: bool) -> None:
    address = f"@dispatcher-test-{os.getpid()}" if abstract else str(tmp_path / "notify")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listener:
        listener.bind("\0" + address[1:] if abstract else address)
        notifier = Notifier.from_environment({"NOTIFY_SOCKET": address, "WATCHDOG_USEC": "2000000"})
        assert notifier.watchdog_s == 2
        assert notifier.ready("3 pods\nadopted")
        assert listener.recv(4096) == b"READY=1\nSTATUS=3 pods adopted"
        assert notifier.stopping()
        assert listener.recv(4096) == b"STOPPING=1"


async def test_watchdog_is_silent_when_the_daemon_is_not_well(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listener:
        listener.bind(str(tmp_path / "n"))
        listener.setblocking(False)
        task = asyncio.create_task(Notifier(str(tmp_path / "n"), watchdog_s=0.02).run_watchdog(lambda: False))
        await asyncio.sleep(0.1)
        task.cancel()
        with pytest.raises(BlockingIOError):
            listener.recv(100)


def test_without_a_service_manager_nothing_happens() -> None:
    assert not Notifier.from_environment({}).ready()
    assert not Notifier("/nowhere/notify").ready()
    assert Notifier.from_environment({"WATCHDOG_USEC": "1000000", "WATCHDOG_PID": "1"}).watchdog_s == 0


def test_pulls_and_faults_are_counted_from_calls() -> None:
    metrics = Metrics("1")
    metrics.provider_called("images", "oci", "pull", 0.5)
    metrics.provider_called("images", "oci", "pull", 0.5, PullFailed("no", reason="RegistryUnavailable"))
    metrics.provider_called("runtime", "docker", "create_pod", 0.5, Internal("a plugin's bug"))
    metrics.observe("image.bytes", 100, {})
    assert sample(metrics, "dispatcher_image_pulls_total", outcome="ok") == 1
    assert sample(metrics, "dispatcher_image_pulls_total", outcome="PullFailed") == 1
    assert sample(metrics, "dispatcher_image_pull_bytes_total") == 100
    assert sample(metrics, "dispatcher_plugin_failures_total", plugin="docker", stage="call") == 1
    assert sample(metrics, "dispatcher_plugin_failures_total", plugin="oci", stage="call") is None
