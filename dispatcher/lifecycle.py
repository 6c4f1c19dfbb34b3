"""Taking pods and containers apart, in the one order that leaks nothing. Used by stop, remove, undo and recovery.

Order: containers, the runtime's sandbox, network DEL (while the namespace still exists), the namespace, our files, the
record. Every step is idempotent, so a retry after any failure resumes. Callers hold the pod's operation lock where
they remove; stop runs without it, since it may overlap a creation.
"""

from __future__ import annotations

import logging

from dispatcher.deps import Deps
from dispatcher.errors import NotFound
from dispatcher.model import ContainerRecord, PodRecord
from dispatcher.netns import remove_namespace
from dispatcher.pod_files import remove_pod_files
from dispatcher.transitions import ContainerEvent, ContainerState, PodEvent, PodState

log = logging.getLogger(__name__)

_MAY_RUN = frozenset({ContainerState.STARTING, ContainerState.RUNNING, ContainerState.UNKNOWN})


async def stop_pod(pod: PodRecord, deps: Deps) -> None:
    """Stop the sandbox, free its addresses, unmount its namespace. The record must be STOPPING already.

    Concurrent calls take turns, since a network plugin may not be run twice at once for one pod; the later ones find
    that all is done. What was undone is taken off the record, so that it is not undone again.

    Raises:
        RuntimeDown: its processes are not proven gone: nothing was freed, the pod stays STOPPING.
        NetworkFailed: DEL failed: the namespace stays, so that the next try can finish.
    """
    async with deps.locks.hold(f"stop {pod.id}"):
        current = deps.store.find_pod(pod.id)
        if current is not None and current.state is PodState.STOPPING:
            await _stop(current, deps)


async def _stop(pod: PodRecord, deps: Deps) -> None:
    runtime = deps.runtime_of(pod)
    alive = tuple(c for c in deps.store.list_containers(pod.id) if c.state in _MAY_RUN)
    await runtime.stop_pod(deps.pod_ref(pod))
    if alive:
        snapshot = await runtime.inspect((), tuple(deps.container_ref(c, pod) for c in alive))
        for observed in snapshot.containers:
            await deps.facts.apply_container(observed)
    await _detach(pod, deps)
    await deps.store.update_pod(
        pod.id, PodEvent.STOPPED, stopped_at_ns=deps.now_ns(), plan=None, attachment=None, ips=()
    )


async def remove_pod(pod: PodRecord, deps: Deps) -> None:
    """Stop what is not stopped, then remove all that was ever made for the pod, its record last."""
    if pod.state is not PodState.REMOVING:
        if pod.state is not PodState.STOPPED:
            await deps.store.update_pod(pod.id, PodEvent.STOP_REQUESTED)
            await stop_pod(pod, deps)
        pod = await deps.store.update_pod(pod.id, PodEvent.REMOVE_REQUESTED)
    await dispose_pod(pod, deps)


async def dispose_pod(pod: PodRecord, deps: Deps) -> None:
    """Undo a pod in any state from its record alone: also one whose creation was cut off anywhere."""
    runtime = deps.runtime_of(pod)
    await _end_logs(pod, deps)
    await runtime.remove_pod(deps.pod_ref(pod))
    await _drop(pod, deps)


async def forget_pod(pod: PodRecord, deps: Deps) -> None:
    """Drop a pod whose runtime is gone for good: all but what only that runtime could remove, which stays behind.

    The caller has been told by an operator that nothing of the pod runs any more.
    """
    log.warning(
        "forgetting a pod", extra={"pod_id": pod.id, "runtime": pod.route.runtime, "left_behind": dict(pod.facts)}
    )
    await _end_logs(pod, deps)
    await _drop(pod, deps)


async def _end_logs(pod: PodRecord, deps: Deps) -> None:
    for container in deps.store.list_containers(pod.id):
        await deps.logs.forget(container.id)


async def _detach(pod: PodRecord, deps: Deps) -> None:
    """Network DEL while the namespace still exists, then the namespace."""
    if pod.plan is not None:
        await deps.network.delete(pod.plan, pod.attachment)
        await remove_namespace(deps.netns_path(pod.id))


async def _drop(pod: PodRecord, deps: Deps) -> None:
    """Free what the dispatcher itself made for the pod, its record last."""
    await _detach(pod, deps)
    remove_pod_files(deps.state_dir(pod.id))
    for container in deps.store.list_containers(pod.id):
        deps.images.release(container.id)
    await deps.store.delete_pod(pod.id)


async def remove_container(container: ContainerRecord, pod: PodRecord, deps: Deps) -> None:
    """Remove a container in any state, its record last. The log file stays: it is the kubelet's."""
    container = await deps.store.update_container(container.id, ContainerEvent.REMOVE_REQUESTED)
    runtime = deps.runtime_of(pod)
    await runtime.remove_container(deps.container_ref(container, pod))
    await deps.logs.forget(container.id)
    deps.images.release(container.id)
    try:
        await deps.store.delete_container(container.id)
    except NotFound:
        log.debug("container was removed by another call", extra={"container_id": container.id})
