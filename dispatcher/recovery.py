"""What happens to records when the daemon starts: undo what was cut off, adopt what runs, say what was found.

Nothing is killed that is not on record, and nothing that merely could not be asked. What a runtime that is away holds
stays at its last known state; its watcher brings the facts when it is back.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from dispatcher import lifecycle
from dispatcher.deps import Deps
from dispatcher.errors import DispatcherError
from dispatcher.model import PodRecord
from dispatcher.netns import list_namespaces, remove_namespace
from dispatcher.pod_files import remove_pod_files
from dispatcher.transitions import ContainerState, PodEvent, PodState
from dispatcher.watcher import sync_runtime

log = logging.getLogger(__name__)

BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


@dataclass(slots=True)
class RecoveryReport:
    """What recovery did, for the log and `dispatcher status`. Ids in lists, so that an operator can follow each one."""

    rebooted: bool = False
    adopted: list[str] = field(default_factory=list)
    cleaned: list[str] = field(default_factory=list)
    not_ready: list[str] = field(default_factory=list)
    waiting: dict[str, str] = field(default_factory=dict)  # id: why it could not be settled yet
    swept: list[str] = field(default_factory=list)  # folders and namespaces of no record
    set_aside: list[str] = field(default_factory=list)
    duration_s: float = 0.0

    def counts(self) -> dict[tuple[str, str], int]:
        """How many records met which outcome, for the metrics."""
        return {
            ("record", "adopted"): len(self.adopted),
            ("record", "cleaned"): len(self.cleaned),
            ("record", "not-ready"): len(self.not_ready),
            ("record", "waiting"): len(self.waiting),
            ("record", "set-aside"): len(self.set_aside),
            ("leftover", "swept"): len(self.swept),
        }


async def recover(deps: Deps) -> RecoveryReport:
    """Bring the record and the world together. Bounded by the runtimes' own deadlines; never raises for one pod."""
    began = asyncio.get_running_loop().time()
    report = RecoveryReport(set_aside=[f"{item.kind} {item.id}: {item.reason}" for item in deps.store.set_aside])
    await _note_reboot(deps, report)
    await asyncio.gather(*(_settle_pod(pod, deps, report) for pod in deps.store.list_pods()))
    await asyncio.gather(*(_settle_containers(pod, deps, report) for pod in deps.store.list_pods()))
    await _adopt(deps, report)
    await _sweep(deps, report)
    report.duration_s = asyncio.get_running_loop().time() - began
    log.info(
        "recovered",
        extra={
            "adopted": len(report.adopted),
            "cleaned": len(report.cleaned),
            "not_ready": len(report.not_ready),
            "waiting": len(report.waiting),
            "swept": len(report.swept),
            "set_aside": len(report.set_aside),
            "rebooted": report.rebooted,
            "duration_s": round(report.duration_s, 3),
        },
    )
    return report


async def _note_reboot(deps: Deps, report: RecoveryReport) -> None:
    """After a reboot no sandbox runs: every READY becomes NOTREADY without asking anybody."""
    boot_id = BOOT_ID.read_text(encoding="ascii").strip()
    known = deps.store.get_setting("boot_id")
    if known == boot_id:
        return
    if known is not None:
        report.rebooted = True
        for pod in deps.store.list_pods():
            if pod.state is PodState.READY:
                await deps.store.update_pod(
                    pod.id, PodEvent.DIED, reason="NodeRebooted", message="The node was restarted."
                )
    await deps.store.set_setting("boot_id", boot_id)


async def _settle_pod(pod: PodRecord, deps: Deps, report: RecoveryReport) -> None:
    """Finish what a crash cut off: undo a creation, complete a removal."""
    if pod.state not in (PodState.CREATING, PodState.REMOVING):
        return
    try:
        async with deps.locks.hold(pod.id):
            await lifecycle.dispose_pod(pod, deps)
        report.cleaned.append(pod.id)
    except DispatcherError as error:
        report.waiting[pod.id] = error.message
        if pod.state is PodState.CREATING:
            # Visible as NOTREADY, so that the kubelet removes it once its runtime is back.
            await deps.store.update_pod(
                pod.id, PodEvent.CREATE_FAILED, reason="CreateInterrupted", message=error.message
            )


async def _settle_containers(pod: PodRecord, deps: Deps, report: RecoveryReport) -> None:
    for container in deps.store.list_containers(pod.id):
        if container.state not in (ContainerState.CREATING, ContainerState.REMOVING):
            continue
        try:
            async with deps.locks.hold(pod.id):
                await lifecycle.remove_container(container, pod, deps)
            report.cleaned.append(container.id)
        except DispatcherError as error:
            report.waiting[container.id] = error.message


async def _adopt(deps: Deps, report: RecoveryReport) -> None:
    """Ask each runtime about its pods, and carry on their logs."""
    by_runtime: dict[str, list[PodRecord]] = {}
    for pod in deps.store.list_pods():
        by_runtime.setdefault(pod.route.runtime, []).append(pod)
    await asyncio.gather(*(_adopt_from(name, pods, deps, report) for name, pods in by_runtime.items()))


async def _adopt_from(name: str, pods: Sequence[PodRecord], deps: Deps, report: RecoveryReport) -> None:
    try:
        await sync_runtime(deps.registry.runtime(name), deps)
    except DispatcherError as error:
        report.waiting.update({pod.id: error.message for pod in pods})
        return
    for pod in pods:
        current = deps.store.find_pod(pod.id)
        if current is not None and current.state is PodState.READY:
            report.adopted.append(current.id)
        elif current is not None:
            report.not_ready.append(current.id)


async def _sweep(deps: Deps, report: RecoveryReport) -> None:
    """Remove folders and namespaces of ours that belong to no record (a record is written first, so these are left over
    from a removal that was cut off between its last acts), and let the network provider do the same.
    """
    try:  # first: network plugins want to see the namespaces that they are to leave
        await deps.network.gc(tuple(pod.plan for pod in deps.store.list_pods() if pod.plan is not None))
    except DispatcherError as error:
        log.warning("network gc failed", extra={"cause": error.message})
    known = {pod.id for pod in deps.store.list_pods()}
    for name in list_namespaces(deps.netns_dir):
        if name not in known:
            await remove_namespace(deps.netns_dir / name)
            report.swept.append(f"netns {name}")
    if deps.pods_dir.is_dir():
        for folder in deps.pods_dir.iterdir():
            if folder.name not in known:
                remove_pod_files(folder)
                report.swept.append(f"folder {folder.name}")
