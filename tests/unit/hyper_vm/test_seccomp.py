"""Profiles are compiled into programs that the kernel obeys: each is loaded by a child process, which then calls."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest

from dispatcher.errors import InvalidRequest, NotSupported
from dispatcher_hyper_vm.seccomp import compile_profile, default_profile

NONE: frozenset[str] = frozenset()
ADMIN = frozenset({"CAP_SYS_ADMIN"})

# Loads the program from standard input, then evaluates its argument and prints what came of it.
_CHILD = """
import ctypes, os, socket, struct, sys
program = sys.stdin.buffer.read()
libc = ctypes.CDLL(None, use_errno=True)
buffer = ctypes.create_string_buffer(program, len(program))
fprog = struct.pack("HxxxxxxP", len(program) // 8, ctypes.addressof(buffer))
assert libc.prctl(38, 1, 0, 0, 0) == 0
assert libc.prctl(22, 2, fprog, 0, 0) == 0, os.strerror(ctypes.get_errno())
def call(*args):
    return "ok" if libc.syscall(*args) >= 0 else os.strerror(ctypes.get_errno())
print(eval(sys.argv[1]))
"""


def under(program: bytes, expression: str) -> str:
    done = subprocess.run([sys.executable, "-c", _CHILD, expression], input=program, capture_output=True, check=False)
    return done.stdout.decode().strip() or f"died {done.returncode}: {done.stderr.decode()[-300:]}"


def profile(*rules: dict[str, Any], default: str = "SCMP_ACT_ALLOW") -> dict[str, Any]:
    return {"defaultAction": default, "syscalls": list(rules)}


def test_a_refused_call_fails_with_the_errno_of_the_rule() -> None:
    program = compile_profile(profile({"names": ["mkdir"], "action": "SCMP_ACT_ERRNO", "errnoRet": 28}), NONE)
    assert under(program, "call(83, b'/proc/x', 0)") == "No space left on device"
    assert under(program, "os.getpid() > 0") == "True"


def test_a_rule_may_look_at_arguments() -> None:
    rule = {
        "names": ["personality"],
        "action": "SCMP_ACT_ERRNO",
        "args": [{"index": 0, "value": 0xFFFFFFFF, "op": "SCMP_CMP_NE"}],
    }
    program = compile_profile(profile(rule), NONE)
    assert under(program, "call(135, ctypes.c_ulong(0xffffffff))") == "ok"
    assert under(program, "call(135, ctypes.c_ulong(8))") == "Operation not permitted"


def test_an_argument_named_twice_is_either() -> None:
    arguments = [{"index": 0, "value": value, "op": "SCMP_CMP_EQ"} for value in (1, 2)]
    program = compile_profile(profile({"names": ["socket"], "action": "SCMP_ACT_ERRNO", "args": arguments}), NONE)
    assert [under(program, f"call(41, {family}, 1, 0)") for family in (1, 2, 10)][:2] == ["Operation not permitted"] * 2
    assert under(program, "call(41, 16, 3, 0)") == "ok"


@pytest.mark.parametrize(
    ("capabilities", "said"), [(NONE, "Operation not permitted"), (ADMIN, "ok")], ids=["without", "with"]
)
def test_includes_and_excludes_follow_the_capabilities(capabilities: frozenset[str], said: str) -> None:
    rules = (
        {"names": ["getpid"], "action": "SCMP_ACT_ERRNO", "excludes": {"caps": ["CAP_SYS_ADMIN"]}},
        {"names": ["getppid"], "action": "SCMP_ACT_ERRNO", "includes": {"caps": ["CAP_SYS_ADMIN"]}},
    )
    program = compile_profile(profile(*rules), capabilities)
    assert under(program, "call(39)") == said
    assert (under(program, "call(110)") == "ok") is (said != "ok")


def test_the_default_closes_namespaces_and_leaves_ordinary_work_alone() -> None:
    program = compile_profile(default_profile(), NONE)
    assert under(program, "call(272, 0x10000000)") == "Operation not permitted", "unshare(CLONE_NEWUSER)"
    assert under(program, "call(56, 0x10000000 | 17, 0, 0, 0, 0)") == "Operation not permitted", "clone(CLONE_NEWUSER)"
    assert under(program, "call(435, 0, 0)") == "Function not implemented", "clone3"
    assert under(program, "call(425, 1, 0)") == "Operation not permitted", "io_uring_setup"
    assert under(program, "os.waitstatus_to_exitcode(os.system('exit 3'))") == "3"
    assert under(program, "socket.socket().fileno() > 0") == "True"


def test_the_default_opens_to_those_who_administrate() -> None:
    program = compile_profile(default_profile(), ADMIN)
    assert under(program, "call(272, 0x04000000)") in {"ok", "Operation not permitted"}  # the kernel decides
    assert under(program, "call(435, 0, 0)") == "Invalid argument", "clone3 reaches the kernel"


def test_unknown_calls_are_passed_over() -> None:
    rule = {"names": ["no_such_call", "mkdir"], "action": "SCMP_ACT_ERRNO"}
    assert under(compile_profile(profile(rule), NONE), "call(83, b'/proc/x', 0)") == "Operation not permitted"


@pytest.mark.parametrize(
    ("bad", "kind", "words"),
    [
        ({}, InvalidRequest, "defaultAction"),
        (profile(default="SCMP_ACT_MAYBE"), InvalidRequest, "SCMP_ACT_MAYBE"),
        (profile({"names": ["mkdir"], "action": "NO"}), InvalidRequest, "NO"),
        (profile({"names": "mkdir", "action": "SCMP_ACT_KILL"}), InvalidRequest, "names"),
        (
            profile(
                {"names": ["mkdir"], "action": "SCMP_ACT_KILL", "args": [{"index": 9, "value": 1, "op": "SCMP_CMP_EQ"}]}
            ),
            InvalidRequest,
            "index",
        ),
        (
            profile({"names": ["mkdir"], "action": "SCMP_ACT_KILL", "args": [{"index": 1, "value": 1, "op": "="}]}),
            InvalidRequest,
            "operator",
        ),
        (profile({"names": ["mkdir"], "action": "SCMP_ACT_NOTIFY"}), NotSupported, "NOTIFY"),
        ({**profile(), "listenerPath": "/run/x"}, NotSupported, "listener"),
    ],
)
def test_bad_profiles_say_what_is_wrong(bad: dict[str, Any], kind: type[Exception], words: str) -> None:
    with pytest.raises(kind, match=words):
        compile_profile(bad, NONE)
