"""Network, images, sizer and streaming in memory: they behave, and they remember what was asked of them."""

from __future__ import annotations

import asyncio
import hashlib
import ipaddress
import secrets
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

from dispatcher.api import (
    EngineCopies,
    ExecSpec,
    ExecStream,
    ImageDisk,
    NetworkStatus,
    Process,
    StreamTarget,
    VmSize,
)
from dispatcher.errors import InvalidRequest, NetworkFailed, NotFound, PullFailed
from dispatcher.model import (
    Attachment,
    ContainerUser,
    Credentials,
    FilesystemUsage,
    GroupsPolicy,
    Image,
    ImageConfig,
    ImageId,
    Interface,
    NetworkPlan,
    PodId,
    PodSpec,
)

BUSYBOX = "docker.io/library/busybox:latest"
MIB = 1 << 20


class FakeNetwork:
    """Hands out addresses. `attached` is what stands, by namespace path; `failures` makes methods raise."""

    def __init__(self, *, name: str = "fake", subnet: str = "10.88.0.0/16") -> None:
        self.name = name
        self.ready = NetworkStatus(ready=True)
        self.attached: dict[str, Attachment] = {}
        self.failures: dict[str, Exception] = {}
        self.calls: list[tuple[str, str]] = []
        self.pod_cidr = ""
        self._addresses = ipaddress.ip_network(subnet).hosts()

    async def start(self) -> None:
        """See NetworkProvider.start."""

    async def aclose(self) -> None:
        """See NetworkProvider.aclose."""

    def status(self) -> NetworkStatus:
        """See NetworkProvider.status."""
        return self.ready

    def set_pod_cidr(self, cidr: str) -> None:
        """See NetworkProvider.set_pod_cidr."""
        self.pod_cidr = cidr

    def plan(self, pod_id: PodId, pod: PodSpec, netns_path: str) -> NetworkPlan:
        """See NetworkProvider.plan."""
        self._enter("plan", netns_path)
        return NetworkPlan(plugin=self.name, netns_path=netns_path, content={"pod": pod_id, "name": pod.metadata.name})

    async def add(self, plan: NetworkPlan) -> Attachment:
        """See NetworkProvider.add."""
        await asyncio.sleep(0)
        if plan.netns_path not in self.attached:
            address = str(next(self._addresses))
            self.attached[plan.netns_path] = Attachment(
                netns_path=plan.netns_path,
                ips=(address,),
                interfaces=(Interface(name="eth0", addresses=(f"{address}/16",)),),
                result={"fake": True},
            )
        await asyncio.sleep(0)
        self._enter("add", plan.netns_path)  # fails after the act, as a chain of plugins may
        return self.attached[plan.netns_path]

    async def check(self, plan: NetworkPlan, attachment: Attachment) -> tuple[str, ...]:
        """See NetworkProvider.check."""
        self._enter("check", plan.netns_path)
        return () if self.attached.get(plan.netns_path) == attachment else ("the pod is not attached",)

    async def delete(self, plan: NetworkPlan, attachment: Attachment | None) -> None:  # noqa: ARG002
        """See NetworkProvider.delete."""
        self._enter("delete", plan.netns_path)
        await asyncio.sleep(0)
        self.attached.pop(plan.netns_path, None)

    async def gc(self, plans: tuple[NetworkPlan, ...]) -> None:
        """See NetworkProvider.gc."""
        known = {plan.netns_path for plan in plans}
        self.attached = {path: found for path, found in self.attached.items() if path in known}

    def _enter(self, method: str, path: str) -> None:
        self.calls.append((method, path))
        if (error := self.failures.get(method)) is not None:
            raise error

    def break_down(self, method: str = "add") -> None:
        """Make a method fail as a broken CNI plugin would."""
        self.failures[method] = NetworkFailed(f"The fake network failed in {method}.")


def normalise(reference: str) -> str:
    """Return the full form of a short image reference; ids pass unchanged."""
    if reference.startswith("sha256:"):
        return reference
    name = reference
    head = name.partition("/")[0]
    if "/" not in name:
        name = f"docker.io/library/{name}"
    elif not ("." in head or ":" in head or head == "localhost"):
        name = f"docker.io/{name}"
    if "@" not in name and ":" not in name.rpartition("/")[2]:
        name += ":latest"
    return name


class FakeImages:
    """A store whose registry is a table. `publish` puts an image into the registry; busybox is there already."""

    def __init__(self, *, name: str = "fake") -> None:
        self.name = name
        self.registry: dict[str, ImageConfig] = {}
        self.pulls: list[str] = []
        self.gate: asyncio.Event | None = None  # when set, pulls wait for it
        self.leases: dict[str, set[ImageId]] = {}
        self._images: dict[ImageId, Image] = {}
        self._hidden: dict[ImageId, Image] = {}
        self._engines: list[EngineCopies] = []
        self.publish(BUSYBOX, ImageConfig(cmd=("sh",), env=("PATH=/bin",)))

    def publish(self, reference: str, config: ImageConfig) -> str:
        """Put an image into the registry; return the full reference."""
        full = normalise(reference)
        self.registry[full] = config
        return full

    async def start(self, leases: tuple[tuple[str, ImageId], ...]) -> None:
        """See ImageProvider.start."""
        for holder, image_id in leases:
            self.leases.setdefault(holder, set()).add(image_id)

    async def aclose(self) -> None:
        """See ImageProvider.aclose."""

    async def pull(self, reference: str, credentials: Credentials | None) -> Image:  # noqa: ARG002
        """See ImageProvider.pull."""
        full = normalise(reference)
        self.pulls.append(full)
        if self.gate is not None:
            await self.gate.wait()
        await asyncio.sleep(0)
        config = self.registry.get(full)
        if config is None:
            raise PullFailed(f"There is no image {full} in the registry.", reason="RegistryUnavailable")
        digest = hashlib.sha256(f"{full} {config}".encode()).hexdigest()
        image_id = ImageId(f"sha256:{digest}")
        name = full.partition("@")[0].rpartition(":")[0]
        image = self._images.get(image_id) or self._hidden.pop(image_id, None)
        if image is None:
            image = Image(
                id=image_id,
                repo_tags=(full,),
                repo_digests=(f"{name}@sha256:{digest}",),
                size_bytes=MIB,
                config=config,
                uid=int(config.user) if config.user.isdigit() else None,
                username="" if config.user.isdigit() else config.user,
            )
        for known in tuple(self._images.values()):  # the tag moves
            if full in known.repo_tags and known.id != image_id:
                tags = tuple(tag for tag in known.repo_tags if tag != full)
                self._images[known.id] = replace(known, repo_tags=tags)
        self._images[image_id] = image
        return image

    def list(self) -> tuple[Image, ...]:
        """See ImageProvider.list."""
        return tuple(sorted(self._images.values(), key=lambda image: image.id))

    def find(self, reference: str) -> Image | None:
        """See ImageProvider.find."""
        if not reference:
            return None
        full = normalise(reference)
        for image in self._images.values():
            if full in (image.id, *image.repo_tags, *image.repo_digests):
                return image
        found = [image for image in self._images.values() if image.id.removeprefix("sha256:").startswith(reference)]
        return found[0] if len(found) == 1 else None

    async def remove(self, reference: str) -> None:
        """See ImageProvider.remove."""
        image = self.find(reference)
        if image is None:
            return
        del self._images[image.id]
        if any(image.id in held for held in self.leases.values()):
            self._hidden[image.id] = image
        else:
            await self._reclaim(image.id)

    async def _reclaim(self, image_id: ImageId) -> None:
        self._hidden.pop(image_id, None)
        for engine in self._engines:
            await engine.forget_image(image_id)

    def get(self, image_id: ImageId) -> Image:
        """See ImageProvider.get."""
        image = self._images.get(image_id) or self._hidden.get(image_id)
        if image is None:
            raise NotFound(f"There is no image {image_id}.")
        return image

    def lease(self, holder: str, image_id: ImageId) -> None:
        """See ImageProvider.lease."""
        self.get(image_id)
        self.leases.setdefault(holder, set()).add(image_id)

    def release(self, holder: str) -> None:
        """See ImageProvider.release."""
        for image_id in self.leases.pop(holder, set()):
            if not any(image_id in held for held in self.leases.values()):
                self._hidden.pop(image_id, None)

    async def disk(self) -> ImageDisk:
        """See ImageProvider.disk."""
        images = (*self._images.values(), *self._hidden.values())
        usage = FilesystemUsage(
            timestamp_ns=time.time_ns(),
            mountpoint="/",
            used_bytes=sum(image.size_bytes for image in images),
            inodes_used=len(images),
        )
        return ImageDisk(image_filesystems=(usage,), container_filesystems=(usage,))

    def add_engine(self, copies: EngineCopies) -> None:
        """See ImageProvider.add_engine."""
        self._engines.append(copies)

    def _place(self, image_id: ImageId, kind: str) -> Path:
        self.get(image_id)
        return Path(tempfile.gettempdir()) / f"fake-image-{image_id.removeprefix('sha256:')[:12]}.{kind}"

    async def oci_dir(self, image_id: ImageId) -> Path:
        """See ImageProvider.oci_dir. The path exists in name only, here and below."""
        return self._place(image_id, "oci")

    async def docker_archive(self, image_id: ImageId, repo_tag: str) -> Path:  # noqa: ARG002
        """See ImageProvider.docker_archive."""
        return self._place(image_id, "tar")

    async def unpacked(self, image_id: ImageId) -> Path:
        """See ImageProvider.unpacked."""
        return self._place(image_id, "root")

    async def sub_path(self, image_id: ImageId, path: str) -> Path:
        """See ImageProvider.sub_path."""
        return await self.unpacked(image_id) / path

    async def erofs(self, image_id: ImageId) -> Path:
        """See ImageProvider.erofs."""
        return self._place(image_id, "erofs")

    async def resolve_user(
        self,
        image_id: ImageId,
        *,
        user: str,
        uid: int | None,
        gid: int | None,
        supplemental_groups: tuple[int, ...],
        policy: GroupsPolicy,  # noqa: ARG002 - no groups file here, so that both policies say the same
    ) -> ContainerUser:
        """See ImageProvider.resolve_user. Knows root and nobody."""
        self.get(image_id)
        names = {"": 0, "root": 0, "nobody": 65534}
        name, _, group = user.partition(":")
        if uid is None:
            if not name.isdigit() and name not in names:
                raise InvalidRequest(f"The image has no user {name!r}.")
            uid = int(name) if name.isdigit() else names[name]
        if gid is None:
            gid = int(group) if group.isdigit() else names.get(group, 0) if group else 0
        return ContainerUser(uid=uid, gid=gid, supplemental_groups=(gid, *supplemental_groups))


class FakeSizer:
    """Sizes by the pod's own limits, and one vCPU with 128 MiB where it has none."""

    def __init__(self, *, name: str = "fake") -> None:
        self.name = name
        self.asked: list[PodSpec] = []

    def size(self, pod: PodSpec) -> VmSize:
        """See Sizer.size."""
        self.asked.append(pod)
        limits = pod.resources
        memory = limits.memory_limit_bytes if limits else 0
        quota = limits.cpu_quota_us if limits else 0
        period = (limits.cpu_period_us if limits else 0) or 100_000
        return VmSize(
            vcpus=max(1, -(-quota // period)),
            guest_memory_bytes=memory + 64 * MIB if memory else 128 * MIB,
            limit_bytes=memory or None,
            cpu_quota_us=quota or None,
            cpu_period_us=period,
            charge="pod",
            charge_limit_bytes=None,
            notes=() if memory else ("no limit: 128 MiB",),
        )


class FakeStreaming:
    """Gives out one-time URLs; `open` does what a client that follows one would do, without any network."""

    def __init__(self, *, name: str = "fake") -> None:
        self.name = name
        self._target: StreamTarget | None = None
        self._sessions: dict[str, Callable[[StreamTarget], Mapping[str, object]]] = {}
        self._exec: dict[str, ExecStream] = {}
        self._attach: dict[str, ExecStream] = {}
        self._forward: dict[str, PodId] = {}

    async def start(self, target: StreamTarget) -> None:
        """See StreamingProvider.start."""
        self._target = target

    async def aclose(self) -> None:
        """See StreamingProvider.aclose."""
        self._target = None

    @staticmethod
    def _url(kind: str) -> str:
        return f"http://127.0.0.1:1/{kind}/{secrets.token_hex(8)}"

    def exec_url(self, request: ExecStream) -> str:
        """See StreamingProvider.exec_url."""
        url = self._url("exec")
        self._exec[url] = request
        return url

    def attach_url(self, request: ExecStream) -> str:
        """See StreamingProvider.attach_url."""
        url = self._url("attach")
        self._attach[url] = request
        return url

    def port_forward_url(self, pod_id: PodId, ports: tuple[int, ...]) -> str:  # noqa: ARG002
        """See StreamingProvider.port_forward_url."""
        url = self._url("portforward")
        self._forward[url] = pod_id
        return url

    async def open(self, url: str, port: int = 0) -> Process:
        """Follow a URL, once. Raises NotFound for one that was used or never given out."""
        assert self._target is not None, "not started"
        if (request := self._exec.pop(url, None)) is not None:
            spec = ExecSpec(
                command=request.command,
                tty=request.tty,
                stdin=request.stdin,
                stdout=request.stdout,
                stderr=request.stderr,
            )
            return await self._target.exec(request.container_id, spec)
        if (request := self._attach.pop(url, None)) is not None:
            return await self._target.attach(
                request.container_id, request.tty, request.stdin, request.stdout, request.stderr
            )
        if (pod_id := self._forward.pop(url, None)) is not None:
            return await self._target.connect(pod_id, port)
        raise NotFound("There is no such streaming session.")
