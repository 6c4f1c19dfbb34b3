"""Facts from the engine's description: nothing is invented."""

from __future__ import annotations

from typing import Any

import pytest

from dispatcher.model import Liveness
from dispatcher_docker_shim.naming import labels
from dispatcher_docker_shim.observe import EngineAge, container_facts, pod_facts
from dispatcher_docker_shim.oom import KernelLog, OomWitness, find_victims

T0 = 1_795_423_578_000_000_000  # 2026-11-23T08:46:18Z
MINUTE = 60 * 1_000_000_000
OLD_ENGINE = EngineAge(started_at_ns=T0 - 60 * MINUTE, live_restore=True)


def at(minutes: int) -> str:
    return f"2026-11-23T08:{46 + minutes:02}:18Z"


def described(kind: str = "container", **state: Any) -> dict[str, Any]:
    base = {"Status": "exited", "ExitCode": 0, "StartedAt": at(0), "FinishedAt": at(1), "Error": "", "OOMKilled": False}
    return {
        "Config": {"Labels": labels("node", kind, "i" * 64, "p" * 64)},
        "Created": at(0),
        "State": {**base, **state},
    }


@pytest.mark.parametrize("code", [0, 1, 137, 255])
def test_exit_codes_are_the_engines(code: int) -> None:
    """Any code that the engine saw itself is believed, 255 too."""
    facts = container_facts(described(ExitCode=code), OLD_ENGINE)
    assert (facts.liveness, facts.exit_code, facts.reason) == (Liveness.EXITED, code, "")
    assert (facts.started_at_ns, facts.finished_at_ns) == (T0, T0 + MINUTE)


def test_lost_exit_has_no_code() -> None:
    """A 255 that an engine wrote right after its own start, for a process of its predecessor, is no exit code."""
    restarted = EngineAge(started_at_ns=T0 + MINUTE - 1, live_restore=True)
    facts = container_facts(described(ExitCode=255), restarted)
    assert (facts.liveness, facts.exit_code, facts.reason) == (Liveness.EXITED, None, "EngineRestarted")
    assert container_facts(described(ExitCode=5), restarted).exit_code == 5
    late = described(ExitCode=255, FinishedAt=at(9))
    assert container_facts(late, restarted).exit_code == 255


def test_killed_by_a_restart_without_live_restore() -> None:
    """The code is real; the reason says who killed."""
    restarted = EngineAge(started_at_ns=T0 + MINUTE - 1, live_restore=False)
    assert container_facts(described(ExitCode=137), restarted).reason == "EngineRestarted"
    assert container_facts(described(ExitCode=0), restarted).reason == ""
    assert container_facts(described(ExitCode=137, OOMKilled=True), restarted).reason == ""
    assert pod_facts(described("pod"), restarted).reason == "EngineRestarted"
    assert "live-restore" in pod_facts(described("pod"), restarted).message
    assert pod_facts(described("pod"), OLD_ENGINE).reason == "PauseExited"


def test_start_error() -> None:
    """A container that never ran because its command cannot is an exit with 128."""
    never = "0001-01-01T00:00:00Z"
    state = described(Status="created", ExitCode=127, Error="no such file", StartedAt=never, FinishedAt=never)
    facts = container_facts(state, OLD_ENGINE)
    assert (facts.liveness, facts.exit_code, facts.reason) == (Liveness.EXITED, 128, "StartError")
    assert (facts.message, facts.started_at_ns, facts.finished_at_ns) == ("no such file", 0, T0)


def test_other_states() -> None:
    """Created and running carry no exit; a state that we never cause is UNKNOWN with its reason."""
    assert container_facts(described(Status="created"), OLD_ENGINE).started_at_ns == 0
    running = container_facts(described(Status="running"), OLD_ENGINE)
    assert (running.liveness, running.exit_code, running.finished_at_ns) == (Liveness.RUNNING, None, 0)
    odd = container_facts(described(Status="restarting"), OLD_ENGINE)
    assert (odd.liveness, odd.reason) == (Liveness.UNKNOWN, "EngineState")
    assert container_facts(described(OOMKilled=True), OLD_ENGINE).oom_killed is False
    assert container_facts(described(OOMKilled=True, ExitCode=1), OLD_ENGINE).oom_killed is True


def test_oom_witness_waits_only_after_a_kill_of_the_kernel() -> None:
    """An exit by SIGKILL waits for the engine's flag when the kernel's count rose just now, and not for long."""
    count, clock = [5], [100.0]
    witness = OomWitness(1.0, count=lambda: count[0], clock=lambda: clock[0], log=KernelLog("/dev/null"))
    killed = {"Status": "exited", "ExitCode": 137, "OOMKilled": False}
    assert not witness.may_be_late("a", killed)
    count[0] = 6
    assert witness.may_be_late("a", killed)
    assert witness.may_be_late("b", killed)
    assert not witness.may_be_late("c", {**killed, "ExitCode": 1})
    assert not witness.may_be_late("a", {**killed, "OOMKilled": True})
    clock[0] += 1.1
    assert not witness.may_be_late("b", killed)
    clock[0] += 10
    assert not witness.may_be_late("b", killed)
    witness.close()


VICTIM = "oom-kill:constraint=CONSTRAINT_MEMCG,nodemask=(null),cpuset=x,oom_memcg=/a,task_memcg={},task={},pid=7,uid=0"
ID, OTHER = "c" * 64, "d" * 64


@pytest.mark.parametrize(
    ("record", "expected"),
    [
        ("6,1,2,-;" + VICTIM.format(f"/kubepods/pod1/{ID}", "dd"), {ID}),
        ("6,1,2,-;" + VICTIM.format(f"/kubepods.slice/docker-{ID}.scope/inner", "dd"), {ID}),
        ("6,1,2,-;" + VICTIM.format("/system.slice/x.service", "dd"), set()),
        ("6,1,2,-;" + VICTIM.format(f"/kubepods/{ID}", f"{OTHER},task="), {ID}),
        ("14,1,2,-;" + VICTIM.format(f"/kubepods/{ID}", "dd"), set()),  # written by a process into the log
        ("6,1,2,-;a process named " + VICTIM.format(f"/kubepods/{ID}", "dd"), set()),
        ("junk", set()),
    ],
)
def test_victims_in_the_kernels_log(record: str, expected: set[str]) -> None:
    """The kernel's own record of a kill names the container; nobody else can."""
    assert find_victims([record.encode()]) == expected


def test_engine_that_missed_the_kill_is_corrected() -> None:
    """What the kernel tells is added to the engine's word, before anybody sees the exit."""

    class Log(KernelLog):
        def read(self) -> list[bytes]:
            return [b"6,1,2,-;" + VICTIM.format(f"/kubepods/{ID}", "dd").encode()]

    witness = OomWitness(1.0, count=lambda: 1, log=Log("/dev/null"))
    for engine_id, expected in ((ID, True), (OTHER, False)):
        found = {**described(ExitCode=137), "Id": engine_id}
        witness.complete(found)
        assert container_facts(found, OLD_ENGINE).oom_killed is expected
    witness.close()
