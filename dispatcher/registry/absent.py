"""What stands in for a provider that could not be loaded, so that the node still answers and says what is wrong."""

from __future__ import annotations

from pathlib import Path
from typing import NoReturn

from dispatcher.api import EngineCopies, ExecStream, ImageDisk, NetworkStatus, StreamTarget
from dispatcher.errors import NetworkNotReady, NotFound, NotSupported, RuntimeDown
from dispatcher.model import (
    Attachment,
    ContainerUser,
    Credentials,
    GroupsPolicy,
    Image,
    ImageId,
    NetworkPlan,
    PodId,
    PodSpec,
)

NAME = "none"


class AbsentNetwork:
    """No network provider: the node is not ready, and only pods on the host's network can be made."""

    name = NAME

    def __init__(self, why: str) -> None:
        self._why = why

    async def start(self) -> None:
        """Nothing to do."""

    async def aclose(self) -> None:
        """Nothing to do."""

    def status(self) -> NetworkStatus:
        """Not ready."""
        return NetworkStatus(ready=False, reason="NoNetworkProvider", message=self._why)

    def set_pod_cidr(self, cidr: str) -> None:
        """Ignored."""

    def plan(self, pod_id: PodId, pod: PodSpec, netns_path: str) -> NetworkPlan:  # noqa: ARG002
        """Refuse."""
        raise NetworkNotReady(self._why)

    async def add(self, plan: NetworkPlan) -> Attachment:  # noqa: ARG002
        """Refuse."""
        raise NetworkNotReady(self._why)

    async def check(self, plan: NetworkPlan, attachment: Attachment) -> tuple[str, ...]:  # noqa: ARG002
        """Say that nothing can be said."""
        return (self._why,)

    async def delete(self, plan: NetworkPlan, attachment: Attachment | None) -> None:  # noqa: ARG002
        """Refuse: what another provider attached stays attached until it is loaded again."""
        raise NetworkNotReady(self._why)

    async def gc(self, plans: tuple[NetworkPlan, ...]) -> None:
        """Nothing to do."""


class AbsentImages:
    """No image provider: nothing can be pulled and no container can be made."""

    name = NAME

    def __init__(self, why: str) -> None:
        self._why = why

    def _refuse(self) -> NoReturn:
        raise RuntimeDown(self._why)

    async def start(self, leases: tuple[tuple[str, ImageId], ...]) -> None:
        """Nothing to do."""

    async def aclose(self) -> None:
        """Nothing to do."""

    async def pull(self, reference: str, credentials: Credentials | None) -> Image:  # noqa: ARG002
        """Refuse."""
        self._refuse()

    def list(self) -> tuple[Image, ...]:
        """Nothing."""
        return ()

    def find(self, reference: str) -> Image | None:  # noqa: ARG002
        """Nothing."""
        return None

    async def remove(self, reference: str) -> None:  # noqa: ARG002
        """Refuse."""
        self._refuse()

    def get(self, image_id: ImageId) -> Image:
        """Nothing."""
        raise NotFound(f"The image {image_id} cannot be looked up: {self._why}")

    def lease(self, holder: str, image_id: ImageId) -> None:  # noqa: ARG002
        """Refuse."""
        self._refuse()

    def release(self, holder: str) -> None:
        """Nothing to do: leases are worked out anew at the next start."""

    async def disk(self) -> ImageDisk:
        """Nothing."""
        return ImageDisk(image_filesystems=(), container_filesystems=())

    def add_engine(self, copies: EngineCopies) -> None:
        """Ignored."""

    async def oci_dir(self, image_id: ImageId) -> Path:  # noqa: ARG002
        """Refuse."""
        self._refuse()

    async def docker_archive(self, image_id: ImageId, repo_tag: str) -> Path:  # noqa: ARG002
        """Refuse."""
        self._refuse()

    async def unpacked(self, image_id: ImageId) -> Path:  # noqa: ARG002
        """Refuse."""
        self._refuse()

    async def sub_path(self, image_id: ImageId, path: str) -> Path:  # noqa: ARG002
        """Refuse."""
        self._refuse()

    async def erofs(self, image_id: ImageId) -> Path:  # noqa: ARG002
        """Refuse."""
        self._refuse()

    async def resolve_user(
        self,
        image_id: ImageId,  # noqa: ARG002
        *,
        user: str,  # noqa: ARG002
        uid: int | None,  # noqa: ARG002
        gid: int | None,  # noqa: ARG002
        supplemental_groups: tuple[int, ...],  # noqa: ARG002
        policy: GroupsPolicy,  # noqa: ARG002
    ) -> ContainerUser:
        """Refuse."""
        self._refuse()


class AbsentStreaming:
    """No streaming provider: exec, attach and port-forward are refused by name; ExecSync works."""

    name = NAME

    def __init__(self, why: str) -> None:
        self._why = why

    async def start(self, target: StreamTarget) -> None:
        """Nothing to do."""

    async def aclose(self) -> None:
        """Nothing to do."""

    def exec_url(self, request: ExecStream) -> str:  # noqa: ARG002
        """Refuse."""
        raise NotSupported(self._why)

    def attach_url(self, request: ExecStream) -> str:  # noqa: ARG002
        """Refuse."""
        raise NotSupported(self._why)

    def port_forward_url(self, pod_id: PodId, ports: tuple[int, ...]) -> str:  # noqa: ARG002
        """Refuse."""
        raise NotSupported(self._why)
