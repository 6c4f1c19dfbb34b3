"""CNI_ARGS: who the pod is, told to every plugin in one flat string. Pure.

The string has separators but no way to quote them, so a pod's name with a `;` in it could add arguments of its own
(an address, say). Names are therefore checked here even though an API server has checked them before: other clients
talk CRI too.
"""

from __future__ import annotations

import re

from dispatcher.errors import InvalidRequest
from dispatcher.model import PodId, PodSpec

Arguments = tuple[tuple[str, str], ...]
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,252}")


def make_arguments(pod_id: PodId, pod: PodSpec) -> Arguments:
    """Return the arguments that CNI plugins for Kubernetes expect, in their usual order.

    Raises:
        InvalidRequest: a name or uid that could be taken for more than one argument.
    """
    metadata = pod.metadata
    pairs = {
        "K8S_POD_NAMESPACE": metadata.namespace,
        "K8S_POD_NAME": metadata.name,
        "K8S_POD_INFRA_CONTAINER_ID": str(pod_id),
        "K8S_POD_UID": metadata.uid,
    }
    for key, value in pairs.items():
        if value and not _NAME.fullmatch(value):
            raise InvalidRequest(f"{value[:80]!r} cannot be handed to network plugins as {key}.", pod_id=pod_id)
    return (("IgnoreUnknown", "1"), *((key, value) for key, value in pairs.items() if value))


def join_arguments(arguments: Arguments) -> str:
    """Write arguments, already checked, as the value of CNI_ARGS."""
    return ";".join(f"{key}={value}" for key, value in arguments)
