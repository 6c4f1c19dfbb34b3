"""What the end of a session says, turned into an exit code."""

from __future__ import annotations

import json

import pytest

from dispatcher.commands.output import Failure
from dispatcher.commands.stream_session import exit_code_of


def failure(**fields: object) -> bytes:
    return json.dumps({"status": "Failure", **fields}).encode()


def test_codes() -> None:
    causes = [{"reason": "Other", "message": "x"}, {"reason": "ExitCode", "message": "7"}]
    assert exit_code_of(b'{"metadata":{},"status":"Success"}') == 0
    assert exit_code_of(failure(reason="NonZeroExitCode", message="m", details={"causes": causes})) == 7


@pytest.mark.parametrize(
    "status",
    [
        b"",
        b"{",
        b"[]",
        b"{}",
        failure(reason="NonZeroExitCode"),
        failure(),
        failure(reason="NonZeroExitCode", details=3),
    ],
)
def test_no_code_is_invented(status: bytes) -> None:
    with pytest.raises(Failure, match="without a result") as error:
        exit_code_of(status)
    assert error.value.code == 125


def test_a_command_that_could_not_run_says_why() -> None:
    with pytest.raises(Failure, match="no such file"):
        exit_code_of(failure(reason="InternalError", message="no such file"))
