"""Which namespaces a container shares with its pod and with the host."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from dispatcher.cri import api_pb2 as pb
from tests.lab.child import find_program
from tests.lab.client import ContainerHandle, CriClient, Pod, pod_namespaces, refused
from tests.lab.registry import free_port


@contextmanager
def container_with(cri: CriClient, **namespaces: pb.NamespaceMode) -> Iterator[ContainerHandle]:
    """A running container, with the same namespace options on its pod."""
    options = pod_namespaces(**namespaces)
    hostname = "" if options.network == pb.NODE else "lab-host"
    security = pb.LinuxSandboxSecurityContext(namespace_options=options)
    with cri.run_pod(security=security, hostname=hostname) as pod:
        yield run_in(pod, options)


def run_in(pod: Pod, options: pb.NamespaceOption) -> ContainerHandle:
    return pod.run(security=pb.LinuxContainerSecurityContext(namespace_options=options))


def namespace_of(container: ContainerHandle, kind: str) -> str:
    return container.sh(f"readlink /proc/self/ns/{kind}")


def host_namespace(kind: str) -> str:
    return os.readlink(f"/proc/self/ns/{kind}")


def test_host_pid_shows_the_processes_of_the_host(cri: CriClient) -> None:
    with container_with(cri, pid=pb.NODE) as container:
        assert namespace_of(container, "pid") == host_namespace("pid")
        assert container.sh(f"cat /proc/{os.getpid()}/comm")


def test_host_ipc_shows_the_shared_memory_of_the_host(cri: CriClient) -> None:
    with shared_memory() as segment, container_with(cri, ipc=pb.NODE) as container:
        assert segment in segments(container)


def test_pod_ipc_does_not_show_the_shared_memory_of_the_host_but_that_of_the_pod(cri: CriClient) -> None:
    with shared_memory() as segment, container_with(cri) as container:
        assert segment not in segments(container)
        container.sh("ipcmk -M 4096")
        neighbour = run_in(container.pod, pod_namespaces())
        assert segments(neighbour) == segments(container) != set()


def test_pod_pid_is_shared_by_the_containers_of_a_pod(cri: CriClient) -> None:
    with container_with(cri, pid=pb.POD) as container:
        neighbour = run_in(container.pod, pod_namespaces(pid=pb.POD))
        assert namespace_of(neighbour, "pid") == namespace_of(container, "pid") != host_namespace("pid")
        assert container.sh("cat /proc/1/comm") != "top"
        assert container.sh("pgrep -c -x top") == "2"


def test_container_pid_makes_the_program_the_first_process(cri: CriClient) -> None:
    with container_with(cri) as container:
        neighbour = run_in(container.pod, pod_namespaces())
        assert namespace_of(neighbour, "pid") != namespace_of(container, "pid")
        assert container.sh("cat /proc/1/comm") == "top"


def test_target_pid_shows_the_processes_of_the_other_container(cri: CriClient) -> None:
    with container_with(cri) as container:
        options = pod_namespaces(pid=pb.TARGET, target_id=container.id)
        debugger = container.pod.run(
            command=["sleep", "1000"], security=pb.LinuxContainerSecurityContext(namespace_options=options)
        )
        assert namespace_of(debugger, "pid") == namespace_of(container, "pid")
        assert debugger.sh("cat /proc/1/comm") == "top"


def test_a_target_outside_the_pod_is_refused(cri: CriClient, pod: Pod) -> None:
    with container_with(cri) as stranger:
        options = pod_namespaces(pid=pb.TARGET, target_id=stranger.id)
        with refused():
            run_in(pod, options)


@pytest.mark.parametrize("mode", [pb.NODE, pb.POD], ids=["host", "pod"])
def test_listeners_of_the_host_are_seen_in_its_network_only(cri: CriClient, mode: pb.NamespaceMode) -> None:
    port = free_port()
    with listener(port), container_with(cri, network=mode) as container:
        seen = re.search(rf":{port}\b", container.sh("netstat -ln")) is not None
        assert seen == (mode == pb.NODE)
        assert (namespace_of(container, "net") == host_namespace("net")) == (mode == pb.NODE)


def test_a_host_network_pod_has_the_hosts_name(cri: CriClient) -> None:
    with container_with(cri, network=pb.NODE) as container:
        assert container.sh("hostname") == os.uname().nodename


@contextmanager
def listener(port: int) -> Iterator[None]:
    import socket

    with socket.create_server(("127.0.0.1", port)):
        yield


@contextmanager
def shared_memory() -> Iterator[str]:
    """A segment of the host whose key nobody else has; yields the key as ipcs prints it."""
    made = subprocess.run([find_program("ipcmk"), "-M", "4321"], capture_output=True, text=True, check=True).stdout
    segment = made.split()[-1]
    listed = subprocess.run([find_program("ipcs"), "-m"], capture_output=True, text=True, check=True).stdout
    key = next(line.split()[0] for line in listed.splitlines() if line.split()[1:2] == [segment])
    try:
        yield key
    finally:
        subprocess.run([find_program("ipcrm"), "-m", segment], check=True)


def segments(container: ContainerHandle) -> set[str]:
    return {line.split()[0] for line in container.sh("ipcs -m").splitlines() if line.startswith("0x")}
