"""Pods and containers for tests of builders."""

from __future__ import annotations

from dispatcher.api import ContainerRef, PodRef
from dispatcher.model import (
    Attachment,
    ContainerId,
    ContainerMetadata,
    ContainerSpec,
    ImageConfig,
    ImageId,
    PodId,
    PodMetadata,
    PodSpec,
)


def pod(**fields: object) -> PodRef:
    metadata = PodMetadata(name="web", namespace="default", uid="u-1")
    spec = PodSpec(metadata=metadata, **{"hostname": "web-0", "labels": {"app": "web"}, **fields})  # type: ignore[arg-type]
    return PodRef(id=PodId("a" * 64), spec=spec, attachment=Attachment(netns_path="/run/netns/p"))


def container(owner: PodRef | None = None, *, image: ImageConfig | None = None, **fields: object) -> ContainerRef:
    fields.setdefault("command", ("server", "--port", "80"))
    spec = ContainerSpec(metadata=ContainerMetadata(name="main"), image_ref="sha256:0", **fields)  # type: ignore[arg-type]
    return ContainerRef(
        id=ContainerId("b" * 64),
        pod=owner or pod(),
        spec=spec,
        image_id=ImageId("sha256:" + "c" * 64),
        image=image or ImageConfig(cmd=("default",)),
    )
