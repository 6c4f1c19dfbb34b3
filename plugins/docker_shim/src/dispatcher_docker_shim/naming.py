"""Names and labels of our objects in the engine. Pure.

Only ids of ours and the node instance's uuid ever become a name or a label: pod labels and annotations never do.
"""

from __future__ import annotations

from collections.abc import Mapping

from dispatcher.model import ContainerId, ImageId, PodId

NODE_LABEL = "cri-dispatcher.node"
KIND_LABEL = "cri-dispatcher.kind"
ID_LABEL = "cri-dispatcher.id"
POD_LABEL = "cri-dispatcher.pod"

POD_KIND = "pod"
CONTAINER_KIND = "container"

_PREFIX = "cri_"


def engine_name(object_id: PodId | ContainerId | str) -> str:
    """The engine's name of a pod's pause container or of a container."""
    return _PREFIX + object_id


def object_id(name: str) -> str:
    """The id behind an engine name."""
    return name.removeprefix(_PREFIX)


def labels(node_uuid: str, kind: str, object_id: str, pod_id: str) -> dict[str, str]:
    """All labels that one of our engine objects carries."""
    return {NODE_LABEL: node_uuid, KIND_LABEL: kind, ID_LABEL: object_id, POD_LABEL: pod_id}


def is_ours(object_labels: Mapping[str, str] | None, node_uuid: str) -> bool:
    """True for an object of this node instance, complete with kind and id."""
    found = object_labels or {}
    return (
        found.get(NODE_LABEL) == node_uuid
        and found.get(KIND_LABEL) in {POD_KIND, CONTAINER_KIND}
        and bool(found.get(ID_LABEL))
    )


def image_tag(repository: str, node_uuid: str, image_id: ImageId) -> str:
    """The engine's name for its copy of an image."""
    return f"{image_repository(repository, node_uuid)}:{image_id.removeprefix('sha256:')}"


def image_repository(repository: str, node_uuid: str) -> str:
    """The repository of this node's copies; the uuid keeps two dispatchers apart on one engine."""
    return f"{repository}/{node_uuid.replace('-', '')[:12].lower()}"
