"""A runtime of virtual machines with the real image store, real QEMU and a guest that was built for the tests."""

from __future__ import annotations

import shutil
import time
import uuid
from dataclasses import dataclass, replace
from pathlib import Path

from dispatcher.api import ContainerRef, PodRef, Services, ensure_namespace, remove_namespace
from dispatcher.model import Attachment, ContainerSpec, PodSpec, make_container_id, make_pod_id
from dispatcher_hyper_vm.assembly import make_runtime
from dispatcher_hyper_vm.config import parse
from dispatcher_hyper_vm.runtime import HyperVmRuntime
from dispatcher_images.config import ImagesConfig
from dispatcher_images.provider import OciImages
from dispatcher_vm_sizing.config import SizingConfig
from dispatcher_vm_sizing.provider import VmSizer
from tests.lab.images import UPSTREAM_HOSTS
from tests.lab.registry import Registry


@dataclass
class VmWorld:
    """One runtime and what it was made of."""

    folder: Path
    images: OciImages
    services: Services
    section: dict[str, object]
    runtime: HyperVmRuntime

    @classmethod
    async def open(cls, registry: Registry, folder: Path, guests: Path, **section: object) -> VmWorld:
        """Start an image store and a runtime."""
        mirrors = {host: [f"http://{registry.address}"] for host in UPSTREAM_HOSTS}
        base = Services(
            state_dir=folder / "images",
            run_dir=folder / "run",
            node_uuid=str(uuid.uuid4()),
            now_ns=time.time_ns,
        )
        base.state_dir.mkdir(parents=True)
        images = OciImages(ImagesConfig.model_validate({"mirrors": mirrors}), base)
        await images.start(())
        sizer = VmSizer(SizingConfig())
        services = replace(base, state_dir=folder / "vm", images=images, sizer=sizer)
        settings = {"guests_dir": str(guests), **section}
        world = cls(folder, images, services, settings, make_runtime(parse(settings), services))
        await world.runtime.start()
        return world

    async def restart(self) -> None:
        """As a restart of the daemon: a new runtime that knows nothing."""
        await self.runtime.aclose()
        self.runtime = make_runtime(parse(self.section), self.services)
        await self.runtime.start()

    async def close(self) -> None:
        """Let go of everything."""
        await self.runtime.aclose()
        await self.images.aclose()

    async def make_pod(self, spec: PodSpec) -> PodRef:
        """Prepare a pod as the core does, unknown to the runtime yet."""
        pod_id = make_pod_id()
        netns = self.folder / "run" / "netns" / pod_id
        await ensure_namespace(netns)
        folder = self.folder / "pods" / pod_id
        folder.mkdir(parents=True)
        return PodRef(
            id=pod_id,
            spec=spec,
            attachment=Attachment(netns_path=str(netns)),
            netns_path=str(netns),
            state_dir=str(folder),
        )

    async def release_pod(self, pod: PodRef) -> None:
        """Take back what `make_pod` prepared."""
        await remove_namespace(Path(pod.netns_path))
        shutil.rmtree(pod.state_dir)

    async def refer(self, pod: PodRef, reference: str, spec: ContainerSpec) -> ContainerRef:
        """A container's reference, with nothing made yet."""
        found = self.images.find(reference) or await self.images.pull(reference, None)
        container_id = make_container_id()
        self.images.lease(container_id, found.id)
        return ContainerRef(id=container_id, pod=pod, spec=spec, image_id=found.id, image=found.config)
