"""From the engine's description of a container to our facts. Pure: no guess becomes a fact.

An exit code is believed unless the engine itself did not see the exit: after its restart it writes 255 for a process
that it lost. Such a container has EXITED without an exit code, with the reason.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from dispatcher.model import ContainerId, Liveness, ObservedContainer, ObservedPod, PodId
from dispatcher_docker_shim import naming
from dispatcher_docker_shim.log_formats import parse_time

ENGINE_RESTARTED = "EngineRestarted"
START_ERROR = "StartError"
_LOST_CODE = 255  # what the engine writes for a process that ended while nobody watched
_KILLED_CODES = frozenset({128 + 9, 128 + 15})  # what the engine's own signals lead to
_RESTORE_NS = 120 * 1_000_000_000  # an engine sorts out what it finds within this time after its own start
_SHUTDOWN_NS = 60 * 1_000_000_000  # and stops its containers within this time before its end


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineAge:
    """When the engine's process started (0: not known), and whether it keeps containers over a restart."""

    started_at_ns: int = 0
    live_restore: bool = False


def container_facts(found: Mapping[str, Any], age: EngineAge) -> ObservedContainer:
    """Facts of one of our containers from its inspection."""
    object_id = ContainerId(found["Config"]["Labels"][naming.ID_LABEL])
    state = found["State"]
    started, finished = parse_time(state.get("StartedAt", "")), parse_time(state.get("FinishedAt", ""))
    liveness = _liveness(state)
    message = str(state.get("Error") or "")
    if liveness is Liveness.CREATED and message and state.get("ExitCode"):
        return ObservedContainer(
            id=object_id,
            liveness=Liveness.EXITED,
            finished_at_ns=finished or parse_time(found.get("Created", "")),
            exit_code=128,
            reason=START_ERROR,
            message=message,
        )
    if liveness is not Liveness.EXITED:
        started = 0 if liveness is Liveness.CREATED else started
        reason = "EngineState" if liveness is Liveness.UNKNOWN else ""
        return ObservedContainer(id=object_id, liveness=liveness, started_at_ns=started, reason=reason, message=message)
    code = int(state["ExitCode"])
    restarted = _ended_by_restart(started, finished, age)
    if restarted and code == _LOST_CODE and finished >= age.started_at_ns:
        return ObservedContainer(
            id=object_id,
            liveness=Liveness.EXITED,
            started_at_ns=started,
            finished_at_ns=max(finished, started),
            exit_code=None,
            reason=ENGINE_RESTARTED,
            message="the container ended while the Docker Engine was down; its exit code is not known",
        )
    killed_by_engine = restarted and not age.live_restore and code in _KILLED_CODES
    oom = bool(state.get("OOMKilled")) and code != 0
    return ObservedContainer(
        id=object_id,
        liveness=Liveness.EXITED,
        started_at_ns=started,
        finished_at_ns=max(finished, started),  # the engine notes a start when it hears of it, which may be later
        exit_code=code,
        oom_killed=oom,
        reason=ENGINE_RESTARTED if killed_by_engine and not oom else "",
        message="the Docker Engine restarted without live-restore" if killed_by_engine and not oom else message,
    )


def pod_facts(found: Mapping[str, Any], age: EngineAge) -> ObservedPod:
    """Facts of a pod from the inspection of its pause container."""
    object_id = PodId(found["Config"]["Labels"][naming.ID_LABEL])
    state = found["State"]
    liveness = _liveness(state)
    if liveness is Liveness.RUNNING:
        return ObservedPod(id=object_id, liveness=liveness)
    if liveness is Liveness.CREATED and not state.get("Error"):
        return ObservedPod(id=object_id, liveness=liveness)
    if liveness is Liveness.UNKNOWN:
        return ObservedPod(id=object_id, liveness=liveness, reason="EngineState", message=str(state.get("Status")))
    started, finished = parse_time(state.get("StartedAt", "")), parse_time(state.get("FinishedAt", ""))
    if _ended_by_restart(started, finished, age):
        advice = "" if age.live_restore else "; set live-restore in daemon.json to keep pods over restarts"
        return ObservedPod(
            id=object_id,
            liveness=Liveness.EXITED,
            reason=ENGINE_RESTARTED,
            message=f"the Docker Engine restarted and the pod's first process ended{advice}",
        )
    message = str(state.get("Error") or "") or f"the pod's first process ended with code {state.get('ExitCode')}"
    if state.get("ExitCode") == 0:
        message = "the pod's first process was asked to end, by an engine that shuts down or by hand"
    return ObservedPod(id=object_id, liveness=Liveness.EXITED, reason="PauseExited", message=message)


def _liveness(state: Mapping[str, Any]) -> Liveness:
    status = state.get("Status")
    if status in {"running", "paused"}:
        return Liveness.RUNNING
    if status == "created":
        return Liveness.CREATED
    if status in {"exited", "dead", "removing"}:
        return Liveness.EXITED
    return Liveness.UNKNOWN  # "restarting": we never ask for it, so somebody else touched the container


def _ended_by_restart(started: int, finished: int, age: EngineAge) -> bool:
    """True when the container began under an earlier engine process and the present one found or made it dead.

    An engine that stops in order, without live-restore, kills its containers shortly before it goes.
    """
    if not (age.started_at_ns and started and started < age.started_at_ns):
        return False
    if finished >= age.started_at_ns:
        return finished <= age.started_at_ns + _RESTORE_NS
    return not age.live_restore and finished >= age.started_at_ns - _SHUTDOWN_NS
