"""The whole daemon on fakes, spoken to as a kubelet does: each provider is swapped by one line of dispatcher.yaml."""

from __future__ import annotations

import asyncio
import json
import os
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from dispatcher.app import App
from dispatcher.config import parse_config
from dispatcher.cri.client import CallFailed, CriClient
from dispatcher.testing import FakeImages, FakePlugin, FakeRuntime, FakeSizer, FakeStreaming
from tests.lab.otlp import Receiver

FAKES = Path(__file__).parents[2] / "plugins"

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="making network namespaces needs root")

Serve = Callable[[str], AbstractAsyncContextManager[CriClient]]


@pytest.fixture
def serve(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Serve:
    """Serve with lines added to a dispatcher.yaml that enables both plugins of fakes."""
    monkeypatch.syspath_prepend(str(FAKES))
    policy = tmp_path / "policy.yaml"
    policy.write_text("apiVersion: dispatcher/v1\ndefault: {runtime: fake}\n")

    @asynccontextmanager
    async def serve(lines: str) -> AsyncIterator[CriClient]:
        socket = tmp_path / "run" / "cri.sock"
        text = (
            f"socket: {{path: {socket}}}\nstate_dir: {tmp_path}/state\nrun_dir: {tmp_path}/run\npolicy: {policy}\n"
            f"metrics: {{enabled: false}}\nplugins: {{enabled: [fake, other]}}\n{lines}"
        )
        stop = asyncio.Event()
        daemon = asyncio.create_task(App(parse_config(text, "dispatcher.yaml")).run(stop))
        try:
            async with asyncio.timeout(20):
                while not socket.exists() and not daemon.done():
                    await asyncio.sleep(0.01)
            if daemon.done():
                await daemon
            async with CriClient(f"unix://{socket}", timeout_s=20) as client:
                yield client
        finally:
            stop.set()
            await daemon

    return serve


def plugin(name: str) -> FakePlugin:
    module = "dispatcher.testing.plugin" if name == "fake" else "other_fakes"
    found: FakePlugin = sys.modules[module].plugin
    return found


def newest(name: str, kind: type[Any]) -> Any:
    return plugin(name).newest(kind)


def providers(**chosen: str) -> str:
    names = {"network": "fake", "images": "fake", "sizer": "fake", "streaming": "fake"} | chosen
    return "providers:\n" + "".join(f"  {kind}: {name}\n" for kind, name in names.items())


async def run_pod(client: CriClient) -> tuple[str, str]:
    """Pull, make a pod and start a container in it, as a kubelet does; return both ids."""
    metadata = {"name": "web", "namespace": "shop", "uid": "u", "attempt": 0}
    config = {"metadata": metadata, "hostname": "web", "linux": {}}
    await client.call("PullImage", image={"image": "busybox"})
    pod = (await client.call("RunPodSandbox", config=config)).pod_sandbox_id
    container = await client.call(
        "CreateContainer",
        pod_sandbox_id=pod,
        sandbox_config=config,
        config={
            "metadata": {"name": "main"},
            "image": {"image": "busybox"},
            "command": ["sh", "-c", "sleep 1d"],
            "linux": {},
        },
    )
    await client.call("StartContainer", container_id=container.container_id)
    return pod, container.container_id


async def remove_pod(client: CriClient, pod: str) -> None:
    await client.call("StopPodSandbox", pod_sandbox_id=pod)
    await client.call("RemovePodSandbox", pod_sandbox_id=pod)


@pytest.mark.parametrize(("name", "address"), [("fake", "10.88.0.1"), ("other", "10.99.0.1")])
async def test_the_network_is_swapped_by_one_line(serve: Serve, name: str, address: str) -> None:
    async with serve(providers(network=name)) as client:
        pod, _ = await run_pod(client)
        status = await client.call("PodSandboxStatus", pod_sandbox_id=pod)
        assert status.status.network.ip == address
        await remove_pod(client, pod)


@pytest.mark.parametrize("name", ["fake", "other"])
async def test_the_image_store_is_swapped_by_one_line(serve: Serve, name: str) -> None:
    async with serve(providers(images=name)) as client:
        pod, container = await run_pod(client)
        images: FakeImages = newest(name, FakeImages)
        assert images.pulls == ["docker.io/library/busybox:latest"]
        assert set(images.leases) == {container}
        await remove_pod(client, pod)
        assert images.leases == {}


@pytest.mark.parametrize("name", ["fake", "other"])
async def test_the_sizer_is_swapped_by_one_line(serve: Serve, name: str) -> None:
    async with serve(providers(sizer=name)) as client:
        pod, _ = await run_pod(client)
        sizer: FakeSizer = newest(name, FakeSizer)
        assert [spec.metadata.name for spec in sizer.asked] == ["web"]
        await remove_pod(client, pod)


@pytest.mark.parametrize("name", ["fake", "other"])
async def test_the_stream_provider_is_swapped_by_one_line(serve: Serve, name: str) -> None:
    async with serve(providers(streaming=name)) as client:
        pod, container = await run_pod(client)
        reply = await client.call("Exec", container_id=container, cmd=["echo", "hello"], stdout=True)
        streaming: FakeStreaming = newest(name, FakeStreaming)
        process = await streaming.open(reply.url)
        assert [bytes(data) async for _, data in process.output()] == [b"hello\n"]
        assert await process.wait() == 0
        await remove_pod(client, pod)


async def test_calls_of_all_kinds_reach_a_collector_below_the_client_s_own_span(serve: Serve) -> None:
    receiver = Receiver()
    try:
        async with serve(providers() + f"tracing: {{otlp_endpoint: {receiver.endpoint}}}\n") as client:
            kubelet = (("traceparent", f"00-{'ab' * 16}-{'cd' * 8}-01"),)
            await client.call("Version", metadata=kubelet)
            pod, _ = await run_pod(client)
            await remove_pod(client, pod)
            assert [item async for item in client.stream("StreamImages")]
    finally:
        receiver.close()
    spans = {span.name: span for span in receiver.spans}
    called = {"Version", "PullImage", "RunPodSandbox", "CreateContainer", "StartContainer", "StreamImages"}
    assert called | {"StopPodSandbox", "RemovePodSandbox"} <= set(spans)
    assert {"netns.ensure", "network.add", "runtime.create_pod", "images.pull"} <= set(spans)
    assert spans["Version"].trace_id == bytes.fromhex("ab" * 16)
    assert spans["network.add"].trace_id == spans["RunPodSandbox"].trace_id


async def test_a_start_is_told_to_our_own_commands_only(serve: Serve) -> None:
    async with serve(providers()) as client:
        pod, container = await run_pod(client)
        assert "traces" not in (await client.call("Status", verbose=True)).info
        reply = await client.call("Status", metadata=(("dispatcher-topic", "traces"),))
        calls = json.loads(reply.info["traces"])
        assert [call["call"] for call in calls] == [
            "PullImage",
            "RunPodSandbox",
            "CreateContainer",
            "StartContainer",
        ]
        assert calls[1]["facts"]["pod_id"] == pod
        assert calls[3]["facts"]["container_id"] == container
        with pytest.raises(CallFailed, match="logs, metrics"):
            await client.call("Status", metadata=(("dispatcher-topic", "nonsense"),))
        await remove_pod(client, pod)


async def test_a_failing_plugin_costs_the_node_nothing_but_itself(serve: Serve) -> None:
    """One runtime cannot make pods; its condition says so, the other one works, and nothing is left of the failure."""
    async with serve(providers() + "required_runtimes: [fake]\n") as client:
        newest("other", FakeRuntime).engine.go_away()
        pod, _ = await run_pod(client)
        status = await client.call("Status")
        conditions = {condition.type: condition.status for condition in status.status.conditions}
        assert conditions["RuntimeReady"]
        assert conditions["NetworkReady"]
        assert conditions["Runtime/fake"]
        await remove_pod(client, pod)
        assert newest("fake", FakeRuntime).engine.leftovers() == []
