"""Seccomp profiles made into the BPF program that the guest's agent loads: compiled on the host, by libseccomp.

A profile is JSON of the form that Kubernetes nodes keep below their seccomp folder: the OCI form, with `includes` and
`excludes` that depend on the container's capabilities. The guest runs the same architecture as the host, so the
program fits. The profile `RuntimeDefault` is ours, see `default_profile`.
"""

from __future__ import annotations

import ctypes
import functools
import os
import platform
from collections.abc import Iterator, Mapping
from typing import Any, Final

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from dispatcher.errors import InvalidRequest, NotSupported

_ACTIONS: Final = {
    "SCMP_ACT_KILL": 0x0,
    "SCMP_ACT_KILL_THREAD": 0x0,
    "SCMP_ACT_KILL_PROCESS": 0x80000000,
    "SCMP_ACT_TRAP": 0x00030000,
    "SCMP_ACT_ERRNO": 0x00050000,
    "SCMP_ACT_TRACE": 0x7FF00000,
    "SCMP_ACT_LOG": 0x7FFC0000,
    "SCMP_ACT_ALLOW": 0x7FFF0000,
}
_WITH_ERRNO: Final = {"SCMP_ACT_ERRNO", "SCMP_ACT_TRACE"}
_OPERATORS: Final = {
    "SCMP_CMP_NE": 1,
    "SCMP_CMP_LT": 2,
    "SCMP_CMP_LE": 3,
    "SCMP_CMP_EQ": 4,
    "SCMP_CMP_GE": 5,
    "SCMP_CMP_GT": 6,
    "SCMP_CMP_MASKED_EQ": 7,
}
_EPERM, _EEXIST = 1, 17
_NO_SUCH_CALL = -1
_ATTRIBUTE_NO_NEW_PRIVS, _ATTRIBUTE_OPTIMIZE = 3, 8
_BINARY_TREE = 2
_INSTRUCTION = 8  # bytes of struct sock_filter
_MAX_INSTRUCTIONS = 4096  # BPF_MAXINSNS, linux/bpf_common.h
# What a process of the machine's own architecture can also be: its 32-bit forms.
_ALSO: Final = {"x86_64": ("x86", "x32"), "aarch64": ("arm",)}

# Calls that a container has no business with, by what it needs to be allowed them all the same. The guest's kernel
# checks capabilities itself; this closes what it would leave to anybody, and takes away attack surface.
_NEED_CAPABILITY: Final[Mapping[str, tuple[str, ...]]] = {
    "CAP_SYS_ADMIN": (
        *(
            "bpf",
            "fanotify_init",
            "fsconfig",
            "fsmount",
            "fsopen",
            "fspick",
            "lookup_dcookie",
            "mount",
            "mount_setattr",
        ),
        *("move_mount", "open_tree", "perf_event_open", "pivot_root", "quotactl", "quotactl_fd", "setdomainname"),
        *("sethostname", "setns", "swapoff", "swapon", "umount", "umount2", "unshare"),
    ),
    "CAP_SYS_BOOT": ("kexec_file_load", "kexec_load", "reboot"),
    "CAP_SYS_MODULE": ("create_module", "delete_module", "finit_module", "init_module", "query_module"),
    "CAP_SYS_PACCT": ("acct",),
    "CAP_SYS_PTRACE": ("process_madvise", "userfaultfd"),
    "CAP_SYS_RAWIO": ("ioperm", "iopl"),
    "CAP_SYS_TIME": ("clock_adjtime", "clock_settime", "settimeofday", "stime"),
    "CAP_SYS_TTY_CONFIG": ("vhangup",),
    "CAP_DAC_READ_SEARCH": ("open_by_handle_at",),
}
_NEVER: Final = (
    *("add_key", "get_kernel_syms", "io_uring_enter", "io_uring_register", "io_uring_setup", "keyctl"),
    *("mbind", "move_pages", "nfsservctl", "request_key", "set_mempolicy", "set_mempolicy_home_node"),
    *("sysfs", "_sysctl", "uselib", "ustat", "vm86", "vm86old"),
)
_CLONE_NAMESPACES: Final = 0x7E020000  # CLONE_NEWNS | NEWCGROUP | NEWUTS | NEWIPC | NEWUSER | NEWPID | NEWNET


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore")


class _Argument(_Part):
    index: int = Field(ge=0, le=5)
    value: int = Field(ge=0, lt=1 << 64)
    value_two: int = Field(default=0, ge=0, lt=1 << 64, alias="valueTwo")
    op: str


class _When(_Part):
    caps: tuple[str, ...] = ()
    arches: tuple[str, ...] = ()


class _Rule(_Part):
    names: tuple[str, ...] = ()
    name: str = ""
    action: str
    errno: int | None = Field(default=None, ge=0, le=4095, alias="errnoRet")
    args: tuple[_Argument, ...] | None = None
    includes: _When | None = None
    excludes: _When | None = None


class _Profile(_Part):
    default_action: str = Field(alias="defaultAction")
    default_errno: int | None = Field(default=None, ge=0, le=4095, alias="defaultErrnoRet")
    listener_path: str = Field(default="", alias="listenerPath")
    flags: tuple[str, ...] | None = None
    syscalls: tuple[_Rule, ...] | None = None


class _Comparison(ctypes.Structure):
    """`struct scmp_arg_cmp` of seccomp.h."""

    _fields_ = [
        ("arg", ctypes.c_uint),
        ("op", ctypes.c_int),
        ("datum_a", ctypes.c_uint64),
        ("datum_b", ctypes.c_uint64),
    ]


def default_profile() -> dict[str, Any]:
    """The profile `RuntimeDefault`: everything is allowed but what is refused with EPERM.

    Refused are calls that only a capability makes useful, unless the container has it; new namespaces without
    CAP_SYS_ADMIN; and calls of the kernel that were a way out of containers before. `clone3` says ENOSYS without
    CAP_SYS_ADMIN, since its flags cannot be seen by a filter: libraries then use `clone`.
    """
    rules: list[dict[str, Any]] = [
        {"names": calls, "action": "SCMP_ACT_ERRNO", "excludes": {"caps": [capability]}}
        for capability, calls in _NEED_CAPABILITY.items()
    ]
    rules.append({"names": _NEVER, "action": "SCMP_ACT_ERRNO"})
    rules += [
        {
            "names": ["clone"],
            "action": "SCMP_ACT_ERRNO",
            "args": [{"index": 0, "value": flag, "valueTwo": flag, "op": "SCMP_CMP_MASKED_EQ"}],
            "excludes": {"caps": ["CAP_SYS_ADMIN"]},
        }
        for flag in (1 << bit for bit in range(32) if _CLONE_NAMESPACES >> bit & 1)
    ]
    rules.append(
        {"names": ["clone3"], "action": "SCMP_ACT_ERRNO", "errnoRet": 38, "excludes": {"caps": ["CAP_SYS_ADMIN"]}}
    )
    return {"defaultAction": "SCMP_ACT_ALLOW", "syscalls": rules}


def compile_profile(profile: Mapping[str, Any], capabilities: frozenset[str], *, machine: str = "") -> bytes:
    """Return the program of a profile: an array of `struct sock_filter`, at most 4096 of them.

    `capabilities` are those of the container's bounding set, with CAP_. Names of calls that this architecture or
    libseccomp does not know are passed over, as every runtime does. Pure but for loading libseccomp.

    Raises:
        InvalidRequest: the profile is malformed or too large.
        NotSupported: it asks for a listener, or libseccomp is missing.
    """
    try:
        parsed = _Profile.model_validate(dict(profile))
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise InvalidRequest(f"the seccomp profile is malformed at {where}: {first['msg']}") from error
    if parsed.listener_path:
        raise NotSupported("a seccomp listener cannot be reached from inside a virtual machine")
    machine = machine or platform.machine()
    default = _action(parsed.default_action, parsed.default_errno)
    library = _library()
    context = library.seccomp_init(default)
    if not context:
        raise InvalidRequest(f"the seccomp default action {parsed.default_action} cannot be used")
    try:
        for name in _ALSO.get(machine, ()):
            library.seccomp_arch_add(context, library.seccomp_arch_resolve_name(name.encode()))
        library.seccomp_attr_set(context, _ATTRIBUTE_NO_NEW_PRIVS, 0)
        library.seccomp_attr_set(context, _ATTRIBUTE_OPTIMIZE, _BINARY_TREE)
        for rule in parsed.syscalls or ():
            if _applies(rule, capabilities, machine):
                _add(library, context, rule, default)
        return _export(library, context)
    finally:
        library.seccomp_release(context)


def _applies(rule: _Rule, capabilities: frozenset[str], machine: str) -> bool:
    arch = {"x86_64": "amd64", "aarch64": "arm64"}.get(machine, machine)
    needs, bars = rule.includes, rule.excludes
    if needs is not None and not (set(needs.caps) <= capabilities and (not needs.arches or arch in needs.arches)):
        return False
    return bars is None or not (set(bars.caps) & capabilities or arch in bars.arches)


def _add(library: ctypes.CDLL, context: int, rule: _Rule, default: int) -> None:
    action = _action(rule.action, rule.errno)
    if action == default:
        return  # libseccomp refuses a rule that changes nothing
    for name in (*rule.names, *filter(None, (rule.name,))):
        number = library.seccomp_syscall_resolve_name(name.encode("utf-8", "replace"))
        if number == _NO_SUCH_CALL:
            continue
        for arguments in _alternatives(rule.args or ()):
            array = (_Comparison * len(arguments))(*arguments)
            result = library.seccomp_rule_add_array(context, action, number, len(arguments), array)
            if result not in (0, -_EEXIST):
                raise InvalidRequest(f"the seccomp rule for {name!r} cannot be used: {os.strerror(-result)}")


def _alternatives(arguments: tuple[_Argument, ...]) -> Iterator[tuple[_Comparison, ...]]:
    """All conditions at once; where one argument occurs twice, each condition for itself, as OCI runtimes read it."""
    made = []
    for item in arguments:
        if item.op not in _OPERATORS:
            raise InvalidRequest(f"{item.op!r} is not an operator of a seccomp rule")
        made.append(_Comparison(item.index, _OPERATORS[item.op], item.value, item.value_two))
    if len({item.index for item in arguments}) == len(arguments):
        yield tuple(made)
    else:
        yield from ((one,) for one in made)


def _action(name: str, errno: int | None) -> int:
    if name == "SCMP_ACT_NOTIFY":
        raise NotSupported("the seccomp action SCMP_ACT_NOTIFY cannot be used inside a virtual machine")
    if name not in _ACTIONS:
        raise InvalidRequest(f"{name!r} is not a seccomp action")
    return _ACTIONS[name] | ((_EPERM if errno is None else errno) if name in _WITH_ERRNO else 0)


def _export(library: ctypes.CDLL, context: int) -> bytes:
    fd = os.memfd_create("seccomp", os.MFD_CLOEXEC)
    try:
        result = library.seccomp_export_bpf(context, fd)
        if result != 0:
            raise InvalidRequest(f"the seccomp profile cannot be compiled: {os.strerror(-result)}")
        size = os.lseek(fd, 0, os.SEEK_END)
        if size > _MAX_INSTRUCTIONS * _INSTRUCTION:
            raise InvalidRequest(
                f"the seccomp profile needs {size // _INSTRUCTION} instructions, the kernel takes 4096"
            )
        return os.pread(fd, size, 0)
    finally:
        os.close(fd)


@functools.cache
def _library() -> ctypes.CDLL:
    try:
        library = ctypes.CDLL("libseccomp.so.2")
    except OSError as error:
        raise NotSupported("seccomp profiles need libseccomp: install the package libseccomp2") from error
    library.seccomp_init.restype = ctypes.c_void_p
    library.seccomp_init.argtypes = [ctypes.c_uint32]
    library.seccomp_release.argtypes = [ctypes.c_void_p]
    library.seccomp_arch_add.argtypes = [ctypes.c_void_p, ctypes.c_uint32]
    library.seccomp_arch_resolve_name.restype = ctypes.c_uint32
    library.seccomp_arch_resolve_name.argtypes = [ctypes.c_char_p]
    library.seccomp_attr_set.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_uint32]
    library.seccomp_syscall_resolve_name.argtypes = [ctypes.c_char_p]
    library.seccomp_rule_add_array.argtypes = [
        *(ctypes.c_void_p, ctypes.c_uint32, ctypes.c_int, ctypes.c_uint, ctypes.POINTER(_Comparison))
    ]
    library.seccomp_export_bpf.argtypes = [ctypes.c_void_p, ctypes.c_int]
    return library
