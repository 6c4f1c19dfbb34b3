"""PodSandboxStatus and ContainerStatus as bytes that are rendered once per version of a record.

After a restart, and whenever much has changed, a kubelet asks for the status of every pod and container; making the
messages anew costs more than everything else in these calls. A message on the wire is the concatenation of its fields,
so a pod's reply is its own status, its containers' statuses, and the rest (the moment, and the info of a verbose
question, which nobody asks often), each rendered by itself.
"""

from __future__ import annotations

from dispatcher.cri import api_pb2 as pb
from dispatcher.cri import convert
from dispatcher.cri.handlers.container_run import container_info
from dispatcher.cri.handlers.lookup import get_container, get_pod
from dispatcher.cri.handlers.pod_read import pod_info
from dispatcher.cri.lists import RenderedEntries
from dispatcher.deps import Deps
from dispatcher.model import ContainerRecord, PodRecord


class Statuses:
    """The two status calls. Subscribes to the store to forget what was removed."""

    def __init__(self, deps: Deps) -> None:
        self._store = deps.store
        self._pods: RenderedEntries[PodRecord] = RenderedEntries(
            lambda record: pb.PodSandboxStatusResponse(status=convert.pod_status(record))
        )
        self._in_pods: RenderedEntries[ContainerRecord] = RenderedEntries(
            lambda record: pb.PodSandboxStatusResponse(containers_statuses=[self._container_status(record)])
        )
        self._containers: RenderedEntries[ContainerRecord] = RenderedEntries(
            lambda record: pb.ContainerStatusResponse(status=self._container_status(record))
        )
        deps.store.subscribe(self._on_commit)

    def _container_status(self, record: ContainerRecord) -> pb.ContainerStatus:
        # Of the pod it shows the log folder only, which never changes, so the container's own version is enough.
        return convert.container_status(record, self._store.find_pod(record.pod_id))

    def _on_commit(self, old: PodRecord | ContainerRecord | None, new: PodRecord | ContainerRecord | None) -> None:
        if old is not None and new is None:
            for kept in (self._pods, self._in_pods, self._containers):
                kept.drop(old.id)

    async def pod(self, request: pb.PodSandboxStatusRequest, deps: Deps) -> bytes:
        """Answer from memory, with the containers' statuses and the moment, as evented PLEG wants them."""
        record = get_pod(request.pod_sandbox_id, deps)

        containers = convert.newest_first(deps.store.list_containers(record.id))
        info = pod_info(record, deps) if request.verbose else None
        rest = pb.PodSandboxStatusResponse(timestamp=deps.now_ns(), info=info).SerializeToString()
        return self._pods.join([record]) + self._in_pods.join(containers) + rest

    async def container(self, request: pb.ContainerStatusRequest, deps: Deps) -> bytes:
        """Answer from memory."""
        record = get_container(request.container_id, deps)

        info = container_info(record, deps.store.find_pod(record.pod_id)) if request.verbose else None
        return self._containers.join([record]) + pb.ContainerStatusResponse(info=info).SerializeToString()
