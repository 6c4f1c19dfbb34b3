"""The one table from our errors to gRPC codes, and what a client is told."""

from __future__ import annotations

from grpc import StatusCode

from dispatcher import errors

CODES: dict[type[BaseException], StatusCode] = {
    errors.InvalidRequest: StatusCode.INVALID_ARGUMENT,
    errors.NotFound: StatusCode.NOT_FOUND,
    errors.AlreadyExists: StatusCode.ALREADY_EXISTS,
    errors.WrongState: StatusCode.FAILED_PRECONDITION,
    errors.PolicyRefused: StatusCode.PERMISSION_DENIED,
    errors.NoRuntime: StatusCode.FAILED_PRECONDITION,
    errors.NotSupported: StatusCode.FAILED_PRECONDITION,
    errors.OutOfResources: StatusCode.RESOURCE_EXHAUSTED,
    errors.TimedOut: StatusCode.DEADLINE_EXCEEDED,
    errors.Unsupported: StatusCode.UNIMPLEMENTED,
    errors.PullFailed: StatusCode.UNKNOWN,
    errors.RuntimeDown: StatusCode.UNAVAILABLE,
    errors.NetworkNotReady: StatusCode.UNAVAILABLE,
    errors.NetworkFailed: StatusCode.UNAVAILABLE,
}


def code_for(error: BaseException) -> StatusCode:
    """Return the code of the nearest class in the table; INTERNAL for whatever is not in it, which is a bug of ours."""
    return next((CODES[cls] for cls in type(error).__mro__ if cls in CODES), StatusCode.INTERNAL)


def text_for(error: BaseException, correlation_id: str) -> str:
    """Return what the client reads: our own sentence, or for a bug only the id under which the log has it."""
    if isinstance(error, errors.DispatcherError) and code_for(error) is not StatusCode.INTERNAL:
        return error.message
    return f"Internal error {correlation_id}: see the dispatcher's log."
