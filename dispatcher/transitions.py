"""What may follow what in the life of a pod and of a container. Two tables; a missing key is WrongState.

Pods (shown to CRI as READY only when READY, else NOTREADY):

    CREATING --BOOTED--> READY --DIED--> NOTREADY
    CREATING --CREATE_FAILED--> FAILED
    any live state --STOP_REQUESTED--> STOPPING --STOPPED--> STOPPED
    any state --REMOVE_REQUESTED--> REMOVING
    any state but REMOVING --CONTRADICTED--> UNKNOWN

Containers (CREATING is not shown, STARTING is shown as CREATED, REMOVING as EXITED):

    CREATING --MADE--> CREATED --START_REQUESTED--> STARTING --STARTED--> RUNNING --EXITED--> EXITED
    STARTING --NOT_STARTED--> CREATED
    any state --REMOVE_REQUESTED--> REMOVING
    any state but REMOVING --CONTRADICTED--> UNKNOWN
"""

from __future__ import annotations

from enum import StrEnum

from dispatcher.errors import WrongState


class PodState(StrEnum):
    """State of a sandbox on record."""

    CREATING = "creating"
    READY = "ready"
    NOTREADY = "notready"
    FAILED = "failed"
    STOPPING = "stopping"
    STOPPED = "stopped"
    REMOVING = "removing"
    UNKNOWN = "unknown"


class PodEvent(StrEnum):
    """What happened to a sandbox."""

    BOOTED = "booted"
    CREATE_FAILED = "create-failed"
    DIED = "died"
    STOP_REQUESTED = "stop-requested"
    STOPPED = "stopped"
    REMOVE_REQUESTED = "remove-requested"
    CONTRADICTED = "contradicted"


class ContainerState(StrEnum):
    """State of a container on record."""

    CREATING = "creating"
    CREATED = "created"
    STARTING = "starting"
    RUNNING = "running"
    EXITED = "exited"
    REMOVING = "removing"
    UNKNOWN = "unknown"


class ContainerEvent(StrEnum):
    """What happened to a container."""

    MADE = "made"
    START_REQUESTED = "start-requested"
    NOT_STARTED = "not-started"
    STARTED = "started"
    EXITED = "exited"
    REMOVE_REQUESTED = "remove-requested"
    CONTRADICTED = "contradicted"


def _pod_table() -> dict[tuple[PodState, PodEvent], PodState]:
    s, e = PodState, PodEvent
    table = {
        (s.CREATING, e.BOOTED): s.READY,
        (s.READY, e.BOOTED): s.READY,
        (s.CREATING, e.CREATE_FAILED): s.FAILED,
        (s.READY, e.DIED): s.NOTREADY,
        (s.NOTREADY, e.DIED): s.NOTREADY,
        (s.CREATING, e.DIED): s.FAILED,
        (s.STOPPING, e.DIED): s.STOPPING,
        (s.STOPPED, e.DIED): s.STOPPED,
        (s.STOPPING, e.STOPPED): s.STOPPED,
        (s.STOPPED, e.STOPPED): s.STOPPED,
        (s.STOPPED, e.STOP_REQUESTED): s.STOPPED,
    }
    for state in (s.CREATING, s.READY, s.NOTREADY, s.FAILED, s.STOPPING, s.UNKNOWN):
        table[state, e.STOP_REQUESTED] = s.STOPPING
    for state in s:
        table[state, e.REMOVE_REQUESTED] = s.REMOVING
        if state is not s.REMOVING:
            table[state, e.CONTRADICTED] = s.UNKNOWN
    return table


def _container_table() -> dict[tuple[ContainerState, ContainerEvent], ContainerState]:
    s, e = ContainerState, ContainerEvent
    table = {
        (s.CREATING, e.MADE): s.CREATED,
        (s.CREATED, e.START_REQUESTED): s.STARTING,
        (s.STARTING, e.NOT_STARTED): s.CREATED,
        (s.STARTING, e.STARTED): s.RUNNING,
        (s.RUNNING, e.STARTED): s.RUNNING,
        (s.UNKNOWN, e.STARTED): s.RUNNING,
        (s.CREATED, e.STARTED): s.RUNNING,
    }
    for state in (s.CREATED, s.STARTING, s.RUNNING, s.UNKNOWN, s.EXITED):
        table[state, e.EXITED] = s.EXITED
    for state in s:
        table[state, e.REMOVE_REQUESTED] = s.REMOVING
        if state is not s.REMOVING:
            table[state, e.CONTRADICTED] = s.UNKNOWN
    return table


NEXT_POD = _pod_table()
NEXT_CONTAINER = _container_table()


def next_pod_state(state: PodState, event: PodEvent) -> PodState:
    """Return the state that follows, or raise WrongState where the table has no such step."""
    try:
        return NEXT_POD[state, event]
    except KeyError:
        raise WrongState(f"A pod that is {state} cannot take the step {event}.", state=state, event=event) from None


def next_container_state(state: ContainerState, event: ContainerEvent) -> ContainerState:
    """Return the state that follows, or raise WrongState where the table has no such step."""
    try:
        return NEXT_CONTAINER[state, event]
    except KeyError:
        raise WrongState(
            f"A container that is {state} cannot take the step {event}.", state=state, event=event
        ) from None
