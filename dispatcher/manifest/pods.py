"""What a manifest holds once it is read: pods, each with the ConfigMaps and Secrets that it may use."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Literal

from dispatcher.manifest import schema

ObjectKind = Literal["ConfigMap", "Secret"]


class ContainerKind(StrEnum):
    """When a container runs: init containers one after the other, sidecars from their turn on, main ones last."""

    INIT = "init"
    SIDECAR = "sidecar"
    MAIN = "main"


@dataclass(frozen=True, slots=True, kw_only=True)
class ObjectData:
    """The contents of a ConfigMap or Secret. `text` holds what may become a variable, `files` everything."""

    text: Mapping[str, str] = field(default_factory=dict, repr=False)
    files: Mapping[str, bytes] = field(default_factory=dict, repr=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class PodManifest:
    """A checked pod, and the objects of its namespace that the same file holds."""

    pod: schema.Pod
    objects: Mapping[tuple[ObjectKind, str], ObjectData] = field(default_factory=dict)

    @property
    def spec(self) -> schema.PodSpecification:
        """Shorthand for `pod.spec`."""
        return self.pod.spec

    @property
    def containers(self) -> tuple[tuple[ContainerKind, schema.Container], ...]:
        """All containers in the order in which they start."""
        first = [
            (ContainerKind.SIDECAR if container.restart_policy == "Always" else ContainerKind.INIT, container)
            for container in self.spec.init_containers
        ]
        return (*first, *((ContainerKind.MAIN, container) for container in self.spec.containers))
