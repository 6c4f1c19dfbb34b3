"""Finding what a request names. CRI clients may send a unique prefix of an id (crictl does)."""

from __future__ import annotations

from dispatcher.cri import validate
from dispatcher.deps import Deps
from dispatcher.errors import NotFound, WrongState
from dispatcher.model import ContainerRecord, PodRecord
from dispatcher.transitions import ContainerState, PodState


def find_pod(text: str, deps: Deps) -> PodRecord | None:
    """The pod with this id or unique prefix, or None. A pod that is still being created has no id for clients."""
    pod_id = deps.store.resolve_pod_id(validate.identifier(text, "pod_sandbox_id"))
    record = deps.store.find_pod(pod_id) if pod_id else None
    return None if record is None or record.state is PodState.CREATING else record


def get_pod(text: str, deps: Deps) -> PodRecord:
    """As `find_pod`; raises NotFound."""
    record = find_pod(text, deps)
    if record is None:
        raise NotFound(f"There is no pod sandbox {text!r}.", pod_id=text)
    return record


def find_container(text: str, deps: Deps) -> ContainerRecord | None:
    """The container with this id or unique prefix, or None. One that is still being created has no id for clients."""
    container_id = deps.store.resolve_container_id(validate.identifier(text, "container_id"))
    record = deps.store.find_container(container_id) if container_id else None
    return None if record is None or record.state is ContainerState.CREATING else record


def get_container(text: str, deps: Deps) -> ContainerRecord:
    """As `find_container`; raises NotFound."""
    record = find_container(text, deps)
    if record is None:
        raise NotFound(f"There is no container {text!r}.", container_id=text)
    return record


def require_ready(pod: PodRecord) -> PodRecord:
    """The same pod; raises WrongState where its sandbox is not ready."""
    if pod.state is not PodState.READY:
        raise WrongState(f"The sandbox {pod.id} is {pod.state}, not ready.", pod_id=pod.id)
    return pod


def require_running(container: ContainerRecord) -> ContainerRecord:
    """The same container; raises WrongState where it is not running."""
    if container.state is not ContainerState.RUNNING:
        raise WrongState(f"The container {container.id} is {container.state}, not running.", container_id=container.id)
    return container
