"""The errors of the dispatcher: each class tells its caller what to do next.

One table in `dispatcher.cri.status_codes` maps them to gRPC codes; nothing else knows gRPC. A message is one sentence
for a person and says what to do where that is known. The cause travels by `raise ... from`, never in the text.
"""

from __future__ import annotations


class DispatcherError(Exception):
    """Base of every error that is meant for a caller. `data` holds the facts (pod_id, rule, runtime) for logs."""

    def __init__(self, message: str, **data: object) -> None:
        super().__init__(message)
        self.message = message
        self.data = data


class InvalidRequest(DispatcherError):
    """The request itself is wrong: fix it, do not retry."""


class NotFound(DispatcherError):
    """The named object does not exist (any more)."""


class AlreadyExists(DispatcherError):
    """Another object owns this identity."""


class WrongState(DispatcherError):
    """A legal call at the wrong moment, such as starting a container twice."""


class PolicyRefused(DispatcherError):
    """The policy file says no; the message names the rule."""


class NoRuntime(DispatcherError):
    """The pod's route names a runtime that is not loaded."""


class NotSupported(DispatcherError):
    """The pod's runtime lacks this ability, or cannot do this honestly; the message names the runtime.

    Answered as FAILED_PRECONDITION: it must look neither like a probe's timeout nor like a missing RPC.
    """


class OutOfResources(DispatcherError):
    """Later, or elsewhere: a limit of the node or of the dispatcher is reached."""


class TimedOut(DispatcherError):
    """ExecSync only: the command did not finish in its time and was killed."""


class Unsupported(DispatcherError):
    """The RPC does not exist here (UNIMPLEMENTED): the kubelet falls back on this code only."""


class PullFailed(DispatcherError):
    """An image could not be pulled. `reason` is a CRI reason such as "RegistryUnavailable", or "".

    The kubelet finds the reason as the prefix of the message, under the code UNKNOWN only.
    """

    def __init__(self, message: str, *, reason: str = "", **data: object) -> None:
        super().__init__(f"{reason}: {message}" if reason else message, **data)
        self.reason = reason


class RuntimeDown(DispatcherError):
    """An engine, daemon or agent that is needed is away: retry."""


class NetworkNotReady(DispatcherError):
    """No usable network configuration: the message says which folder is empty or which file is wrong. Retry."""


class NetworkFailed(DispatcherError):
    """A network plugin failed or hung; the message holds the plugin's name and its own words. Retry."""


class Internal(DispatcherError):
    """A bug of ours, caught: the client sees a correlation id, the log has the traceback."""
