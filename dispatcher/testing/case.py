"""What the contract suite asks of a runtime's surroundings: a small adapter, and the one for the fake."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, Protocol

from dispatcher.api import CanPodStats, ContainerRef, PodRef, Runtime
from dispatcher.model import (
    ContainerMetadata,
    ContainerSecurity,
    ContainerSpec,
    ImageConfig,
    ImageId,
    NamespaceMode,
    NamespaceOptions,
    PodMetadata,
    PodSpec,
    make_container_id,
    make_pod_id,
)
from dispatcher.testing.fake_engine import FakeEngine
from dispatcher.testing.fake_runtime import USUAL, make_runtime


class RuntimeCase(Protocol):
    """A runtime under test with what the core would have prepared for it.

    The image has a POSIX shell and busybox's cat, sleep, seq, head, nc and env; scripts run as `sh -c SCRIPT`.
    """

    deadline_s: float  # how long any one step may take on this machine

    @property
    def runtime(self) -> Runtime:
        """The runtime, started. Another object after `restart`."""

    async def restart(self) -> None:
        """As a restart of the daemon: close the runtime and make another one that knows nothing."""

    async def make_pod(self, spec: PodSpec) -> PodRef:
        """Prepare a pod as the core does (id, namespace, attachment, state folder), unknown to the runtime yet."""

    async def release_pod(self, pod: PodRef) -> None:
        """Take back what `make_pod` prepared, after `remove_pod`."""

    async def make_container(self, pod: PodRef, spec: ContainerSpec) -> ContainerRef:
        """Prepare a container of the busybox image, unknown to the runtime yet."""

    async def leftovers(self) -> list[str]:
        """Return, in words, what exists in the engine for this runtime: empty when all pods were removed."""


def pod_spec(name: str = "contract", **fields: Any) -> PodSpec:
    """Return a plain pod."""
    metadata = PodMetadata(name=name, namespace="contract", uid=f"uid-{name}")
    return PodSpec(metadata=metadata, hostname="contract", **fields)


def container_spec(*command: str, name: str = "main", **fields: Any) -> ContainerSpec:
    """Return a container that runs a command, with a PID namespace of its own, as the kubelet asks for by default."""
    metadata = ContainerMetadata(name=name)
    fields.setdefault("security", ContainerSecurity(namespaces=NamespaceOptions(pid=NamespaceMode.CONTAINER)))
    return ContainerSpec(metadata=metadata, image_ref="busybox", command=command, **fields)


class FakeCase:
    """The fake runtime under test: proof that the contract can be kept, and that the fake keeps it."""

    deadline_s = 10.0

    def __init__(self) -> None:
        self.engine = FakeEngine()
        self._runtime = make_runtime(self.engine, abilities=USUAL | {CanPodStats})

    @property
    def runtime(self) -> Runtime:
        """See RuntimeCase."""
        return self._runtime

    async def restart(self) -> None:
        """See RuntimeCase."""
        await self._runtime.aclose()
        self._runtime = make_runtime(self.engine, abilities=USUAL | {CanPodStats})
        await self._runtime.start()

    async def make_pod(self, spec: PodSpec) -> PodRef:
        """See RuntimeCase."""
        return PodRef(id=make_pod_id(), spec=spec)

    async def release_pod(self, pod: PodRef) -> None:
        """See RuntimeCase."""

    async def make_container(self, pod: PodRef, spec: ContainerSpec) -> ContainerRef:
        """See RuntimeCase."""
        image = ImageConfig(cmd=("sh",), env=("PATH=/bin",))
        image_id = ImageId("sha256:" + "b" * 64)
        return ContainerRef(id=make_container_id(), pod=pod, spec=spec, image_id=image_id, image=image)

    async def leftovers(self) -> list[str]:
        """See RuntimeCase."""
        return self.engine.leftovers()


async def fake_case(folder: Path) -> AsyncIterator[RuntimeCase]:  # noqa: ARG001 - the shape of all case functions
    """Yield the fake's case."""
    case = FakeCase()
    await case.runtime.start()
    yield case
    await case.runtime.aclose()
    await case.engine.aclose()
