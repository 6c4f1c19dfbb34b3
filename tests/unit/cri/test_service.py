"""Every RPC of the contract is either served or in the explicit set of those that are not."""

from __future__ import annotations

import inspect
from typing import Any

import grpc
import pytest

from dispatcher import errors
from dispatcher.cri import api_pb2 as pb
from dispatcher.cri.service import UNIMPLEMENTED, handlers, streamed
from dispatcher.cri.status_codes import CODES, code_for, text_for


class _Anything:
    def __getattr__(self, name: str) -> None:
        return None


_any: Any = _Anything()
SERVED = {*handlers(_any, _any, _any), *streamed(_any, _any, _any)}
ALL = {method.name for service in pb.DESCRIPTOR.services_by_name.values() for method in service.methods}


def test_every_rpc_is_served_or_named_as_not() -> None:
    assert SERVED | UNIMPLEMENTED == ALL
    assert not SERVED & UNIMPLEMENTED


def test_what_is_not_served_is_exactly_this() -> None:
    assert {"CheckpointContainer", "CheckpointPod", "RestorePod"} == UNIMPLEMENTED


def test_every_error_class_has_a_code() -> None:
    """A new error without a row would silently be INTERNAL, a bug in the client's eyes."""
    classes = {
        value
        for _, value in inspect.getmembers(errors, inspect.isclass)
        if issubclass(value, errors.DispatcherError) and value not in (errors.DispatcherError, errors.Internal)
    }
    assert classes == set(CODES)


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (errors.NotFound("gone"), grpc.StatusCode.NOT_FOUND),
        (errors.TimedOut("late"), grpc.StatusCode.DEADLINE_EXCEEDED),
        (errors.PullFailed("no", reason="RegistryUnavailable"), grpc.StatusCode.UNKNOWN),
        (ValueError("a bug"), grpc.StatusCode.INTERNAL),
        (errors.Internal("a bug of a plugin"), grpc.StatusCode.INTERNAL),
    ],
)
def test_codes(error: Exception, code: grpc.StatusCode) -> None:
    assert code_for(error) is code


def test_a_bug_tells_the_client_only_where_to_look() -> None:
    assert "secret" not in text_for(ValueError("secret"), "abc123")
    assert "abc123" in text_for(ValueError("secret"), "abc123")


def test_a_pull_reason_is_the_prefix_that_the_kubelet_looks_for() -> None:
    text = text_for(errors.PullFailed("The registry is away.", reason="RegistryUnavailable"), "x")
    assert text.startswith("RegistryUnavailable: ")
