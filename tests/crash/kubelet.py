"""A client that behaves as a kubelet does when the runtime dies under it: every call is retried until it succeeds.

A retry is the same request again, so that the daemon can tell it from a new one. What came back is checked by the
caller: the point of these tests is that a retry finds or finishes what the first try began.
"""

from __future__ import annotations

import itertools
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import grpc

from dispatcher.cri import api_pb2 as pb
from tests.lab.child import wait_until
from tests.lab.client import CriClient, pod_namespaces
from tests.lab.images import BUSYBOX
from tests.lab.node import Node

RETRIED = {grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED, grpc.StatusCode.CANCELLED}
_numbers = itertools.count(1)


@dataclass
class Kubelet:
    """One worker. A call waits for the socket to come back; somebody else (`Supervisor`) restarts the daemon."""

    client: CriClient
    retries: int = 0

    def call(self, method: str, request: Any, *, limit_s: float = 300) -> Any:
        """Call until it succeeds. Bounded in time; other errors than those of a dead daemon are raised."""
        end = time.monotonic() + limit_s
        while True:
            try:
                return self.client.rpc(method, request, timeout_s=20)
            except grpc.RpcError as error:
                if error.code() not in RETRIED or time.monotonic() > end:
                    raise
                self.retries += 1


class Supervisor:
    """Starts the daemon again whenever it has died, as a service manager does. A context manager."""

    def __init__(self, node: Node) -> None:
        self.node = node
        self.restarts = 0
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._run, name="supervisor", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        self._thread.join()

    def wait_for(self, restarts: int, *, limit_s: float = 60) -> None:
        """Wait until the daemon was started again so many times."""
        wait_until(lambda: self.restarts >= restarts, timeout_s=limit_s, what="the daemon was not restarted")

    def _run(self) -> None:
        while not self._end.wait(0.02):
            if not self.node.running:
                self.node.start()
                self.restarts += 1


@dataclass
class Life:
    """The life of one pod with one container, step by step; each step may be cut off and tried again."""

    kubelet: Kubelet
    folder: Path
    name: str = ""
    lines: int = 20
    removes_image: bool = True
    pod_id: str = ""
    container_id: str = ""
    ip: str = ""

    def __post_init__(self) -> None:
        self.name = self.name or f"life-{next(_numbers)}"
        self.logs = self.folder / self.name
        self.logs.mkdir(parents=True)
        self.config = pb.PodSandboxConfig(
            metadata=pb.PodSandboxMetadata(name=self.name, uid=self.name, namespace="crash"),
            hostname=self.name,
            log_directory=str(self.logs),
            labels={"io.kubernetes.pod.uid": self.name},
            linux=pb.LinuxPodSandboxConfig(
                security_context=pb.LinuxSandboxSecurityContext(namespace_options=pod_namespaces())
            ),
        )

    def begin(self) -> None:
        """Image, sandbox, container, start; then the container is RUNNING."""
        call = self.kubelet.call
        call("PullImage", pb.PullImageRequest(image=pb.ImageSpec(image=BUSYBOX)))
        self.pod_id = call("RunPodSandbox", pb.RunPodSandboxRequest(config=self.config)).pod_sandbox_id
        self.ip = self.status().network.ip
        assert self.ip
        script = f"i=0; while [ $i -lt {self.lines} ]; do i=$((i+1)); echo line $i; done; echo done; exec sleep 1000"
        request = pb.CreateContainerRequest(
            pod_sandbox_id=self.pod_id,
            sandbox_config=self.config,
            config=pb.ContainerConfig(
                metadata=pb.ContainerMetadata(name="c"),
                image=pb.ImageSpec(image=BUSYBOX),
                command=["sh", "-c", script],
                log_path="c/0.log",
            ),
        )
        self.container_id = call("CreateContainer", request).container_id
        self.start()

    def start(self) -> None:
        """StartContainer as a kubelet retries it: one that is found running was started by the first try."""
        try:
            self.kubelet.call("StartContainer", pb.StartContainerRequest(container_id=self.container_id))
        except grpc.RpcError as error:
            if error.code() is not grpc.StatusCode.FAILED_PRECONDITION:
                raise
        assert self.container().state == pb.CONTAINER_RUNNING

    def status(self) -> pb.PodSandboxStatus:
        """The sandbox's status."""
        reply = self.kubelet.call("PodSandboxStatus", pb.PodSandboxStatusRequest(pod_sandbox_id=self.pod_id))
        status: pb.PodSandboxStatus = reply.status
        return status

    def container(self) -> pb.ContainerStatus:
        """The container's status."""
        reply = self.kubelet.call("ContainerStatus", pb.ContainerStatusRequest(container_id=self.container_id))
        status: pb.ContainerStatus = reply.status
        return status

    def exec(self, *words: str) -> bytes:
        """ExecSync, its output."""
        request = pb.ExecSyncRequest(container_id=self.container_id, cmd=words, timeout=15)
        reply = self.kubelet.call("ExecSync", request)
        assert reply.exit_code == 0, reply.stderr
        output: bytes = reply.stdout
        return output

    def check(self) -> None:
        """The pod lives as it was begun: ready, same address, container running, every line in the log once."""
        status = self.status()
        assert status.state == pb.SANDBOX_READY
        assert status.network.ip == self.ip, "the pod's address changed"
        assert self.container().state == pb.CONTAINER_RUNNING
        assert self.exec("echo", "hello") == b"hello\n"
        listed = self.kubelet.call(
            "ListContainers",
            pb.ListContainersRequest(filter=pb.ContainerFilter(label_selector={}, pod_sandbox_id=self.pod_id)),
        ).containers
        assert [c.id for c in listed] == [self.container_id], "a container was doubled or lost"

    def wait_logged(self, *, limit_s: float = 20) -> None:
        """Wait until the last line is in the log, then hold the whole log against what was printed."""
        expected = [f"line {i}" for i in range(1, self.lines + 1)] + ["done"]
        end = time.monotonic() + limit_s
        while time.monotonic() < end and self.logged()[-1:] != ["done"]:
            time.sleep(0.02)
        assert self.logged() == expected

    def logged(self) -> list[str]:
        """The contents of the log's records, in order."""
        path = self.logs / "c/0.log"
        if not path.exists():
            return []
        return [line.split(" ", 3)[3] for line in path.read_text().splitlines() if line.count(" ") >= 3]

    def end(self) -> None:
        """Stop and remove, as a kubelet deletes a pod."""
        call = self.kubelet.call
        call("StopContainer", pb.StopContainerRequest(container_id=self.container_id, timeout=0))
        status = self.container()
        assert (status.state, status.exit_code) == (pb.CONTAINER_EXITED, 137)
        call("StopPodSandbox", pb.StopPodSandboxRequest(pod_sandbox_id=self.pod_id))
        call("RemoveContainer", pb.RemoveContainerRequest(container_id=self.container_id))
        call("RemovePodSandbox", pb.RemovePodSandboxRequest(pod_sandbox_id=self.pod_id))
        if self.removes_image:
            call("RemoveImage", pb.RemoveImageRequest(image=pb.ImageSpec(image=BUSYBOX)))
