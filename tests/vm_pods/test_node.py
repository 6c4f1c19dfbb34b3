"""Pods in virtual machines as a kubelet sees them: over the socket of a whole node, beside pods in Docker."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest

from dispatcher.config import OWN_PLUGINS
from dispatcher.cri import api_pb2 as pb
from tests.lab.child import wait_until
from tests.lab.client import ContainerHandle, CriClient, Pod
from tests.lab.images import TestImages
from tests.lab.node import Node

pytestmark = [pytest.mark.lab, pytest.mark.vm, pytest.mark.timeout(300)]
POLICY = {
    "apiVersion": "dispatcher/v1",
    "default": {"runtime": "hyper_vm"},
    "handlers": {"docker": {"runtime": "docker"}},
}


@pytest.fixture(scope="module")
def vm_node(node: Callable[..., Node], guests: Path, test_images: TestImages) -> Node:
    """A node whose pods go to virtual machines, but for those with the handler "docker"."""
    config = {
        "plugins": {"enabled": list(OWN_PLUGINS), "hyper_vm": {"guests_dir": str(guests), "agent_deadline_s": 60}}
    }
    return node(config=config, policy=POLICY)


@pytest.fixture(scope="module")
def cri(vm_node: Node) -> Iterator[CriClient]:
    client = vm_node.client(timeout_s=120)
    yield client
    client.remove_all_pods()


@pytest.fixture
def pod(cri: CriClient) -> Iterator[Pod]:
    with cri.run_pod() as pod:
        yield pod


def test_a_pod_has_a_kernel_of_its_own(pod: Pod) -> None:
    container = pod.run()
    assert container.sh("uname -r").strip() != os.uname().release
    assert pod.status().state == pb.SANDBOX_READY


def test_pods_in_machines_and_in_docker_reach_each_other(vm_node: Node, cri: CriClient, pod: Pod) -> None:
    serve = ["sh", "-c", "mkdir /www; hostname -i >/www/who; httpd -f -p 8080 -h /www"]
    machine = pod.run(command=serve)
    with vm_node.client(handler="docker") as docker, docker.run_pod() as other:
        beside = other.run(command=serve)
        for fetching, address in ((beside, pod.ip), (machine, other.ip)):
            wait_until(partial(_answers, fetching, address), timeout_s=60, what=f"no answer from {address}")


def _answers(client: ContainerHandle, address: str) -> bool:
    """Whether the page at an address says who it is."""
    ask = f"printf 'GET /who HTTP/1.0\\r\\n\\r\\n' | nc -w 5 {address} 8080 || true"
    return address in client.sh(ask)


def test_host_folders_empty_dirs_and_copied_files(pod: Pod, tmp_path: Path) -> None:
    shared, volumes = tmp_path / "shared", tmp_path / "pods/u/volumes"
    empty, config = volumes / "kubernetes.io~empty-dir/work", volumes / "kubernetes.io~configmap/conf"
    for folder in (shared, empty, config / "..v1"):
        folder.mkdir(parents=True)
    (shared / "in").write_text("from the host")
    (config / "..v1/key").write_text("one")
    (config / "..data").symlink_to("..v1")
    (config / "key").symlink_to("..data/key")
    mounts = [
        pb.Mount(host_path=str(shared), container_path="/shared"),
        pb.Mount(host_path=str(empty), container_path="/work"),
        pb.Mount(host_path=str(config), container_path="/conf", readonly=True),
    ]
    first, second = pod.run(mounts=mounts), pod.run(mounts=mounts)
    assert first.sh("cat /shared/in; echo from the guest >/shared/out; echo between >/work/x") == "from the host"
    assert (shared / "out").read_text() == "from the guest\n"
    assert second.sh("cat /work/x /conf/key") == "between\none"

    (config / "..v2").mkdir()
    (config / "..v2/key").write_text("two")
    (config / "..tmp").symlink_to("..v2")
    (config / "..tmp").rename(config / "..data")
    wait_until(lambda: second.sh("cat /conf/key") == "two", timeout_s=30, what="the changed file did not arrive")


def test_the_termination_message_is_there_when_the_exit_is(pod: Pod, tmp_path: Path) -> None:
    report = tmp_path / "report"
    report.touch()
    container = pod.create(
        command=["sh", "-c", "echo why >/dev/termination-log; exit 3"],
        mounts=[pb.Mount(host_path=str(report), container_path="/dev/termination-log")],
        annotations={"io.kubernetes.container.terminationMessagePath": "/dev/termination-log"},
    )
    container.start()
    assert container.wait_exited().exit_code == 3
    assert report.read_text() == "why\n"


def test_a_pod_that_uses_too_much_memory_is_ended_in_its_guest(cri: CriClient) -> None:
    """120 of 128 MiB live; 140 are too much for the container and for nobody else."""
    limit = pb.LinuxContainerResources(memory_limit_in_bytes=128 << 20)
    config = cri.pod_config()
    config.linux.resources.CopyFrom(limit)
    with cri.run_pod(config) as pod:
        beside = pod.run()
        lives = pod.run(command=["sh", "-c", f"{_allocate(120)}; echo allocated; sleep 1000"], resources=limit)
        lives.wait_log(lambda text: "allocated" in text, timeout_s=60)
        lives.remove()
        ended = pod.run(command=["sh", "-c", f"exec {_allocate(140)}"], resources=limit).wait_exited(timeout_s=60)
        assert (ended.exit_code, ended.reason) == (137, "OOMKilled")
        assert beside.status().state == pb.CONTAINER_RUNNING
        assert pod.status().state == pb.SANDBOX_READY


def _allocate(mebibytes: int) -> str:
    """A command that needs so much memory at once."""
    return f"dd if=/dev/zero of=/dev/null bs={mebibytes}M count=1"


def test_a_daemon_that_is_killed_loses_no_machine_and_no_line(vm_node: Node, cri: CriClient, pod: Pod) -> None:
    container = pod.run(command=["sh", "-c", "i=0; while :; do i=$((i+1)); echo line $i; sleep 0.02; done"])
    container.wait_log(lambda text: "line 20\n" in text)
    before = container.status()
    vm_node.kill()
    vm_node.start(timeout_s=60)
    after = container.status()
    assert (after.state, after.started_at) == (pb.CONTAINER_RUNNING, before.started_at)
    count = len(container.log_lines())
    wait_until(lambda: len(container.log_lines()) > count + 20, timeout_s=60, what="the log does not go on")
    container.stop()
    numbers = [int(line.split()[1]) for line in container.output().splitlines()]
    assert numbers == list(range(1, len(numbers) + 1))


def test_a_machine_that_is_killed_takes_its_own_pod_only(cri: CriClient, pod: Pod) -> None:
    with cri.run_pod() as other:
        container, witness = other.run(), pod.run()
        os.kill(_monitor(other), signal.SIGKILL)
        wait_until(lambda: other.status().state == pb.SANDBOX_NOTREADY, timeout_s=30, what="nobody noticed")
        wait_until(lambda: container.status().state != pb.CONTAINER_RUNNING, timeout_s=30, what="the container runs on")
        assert witness.status().state == pb.CONTAINER_RUNNING
        assert witness.sh("echo alive") == "alive"


def _monitor(pod: Pod) -> int:
    """The pid of the pod's monitor, as the verbose status tells it."""
    return int(json.loads(pod.status_reply(verbose=True).info["dispatcher"])["facts"]["pid"])
