"""Whether this node runs guests by KVM or by emulation, found out by running one.

A /dev/kvm that opens proves nothing: nested and paravirtual ones exist in which no ordinary kernel comes up. So the
smallest guest is started with the arguments of a real one, with a deadline; only its own words count. The answer is
kept until the next boot of the host, or until QEMU or the question changes.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from dispatcher.api import effect
from dispatcher.errors import NotSupported
from dispatcher_vm_kit.exec import run_tool
from dispatcher_vm_kit.launcher import NodePrograms
from dispatcher_vm_kit.qemu_argv import Accelerator

_WORDS = b"guest ran"
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
_KVM = Path("/dev/kvm")
_TSC_S = 10.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Acceleration:
    """How guests run on this node.

    `reason` says in one sentence why it is not KVM ("" with KVM). `version` is QEMU's. `tsc_khz` is the host's counter,
    which an emulated guest is told.
    """

    accelerator: Accelerator
    reason: str
    version: str
    tsc_khz: int


async def probe_acceleration(
    programs: NodePrograms,
    *,
    binary: str,
    wanted: Literal["auto", "kvm", "tcg"] = "auto",
    cache: Path | None = None,
    deadline_s: float = 20.0,
) -> Acceleration:
    """Find out how guests run here.

    Args:
        programs: gives the probing guest.
        binary: QEMU, by name or path.
        wanted: "auto" takes KVM if a guest runs in it, "tcg" does not try, "kvm" takes nothing else.
        cache: a file that keeps the answer; None asks anew.
        deadline_s: how long the guest may take under KVM; it takes a tenth of a second.

    Raises:
        NotSupported: no QEMU, no guest runs at all, or KVM was asked for and runs none.
    """
    path = shutil.which(binary)
    if path is None:
        raise NotSupported(f"{binary} is not installed; install it (apt-get install qemu-system-x86)")
    question = _question(path, wanted)
    if cache is not None and (kept := _read_cache(cache, question)) is not None:
        return kept
    version = await _version(path)
    reason = "emulation was asked for" if wanted == "tcg" else await _why_not_kvm(programs, path, deadline_s)
    if not reason:
        found = Acceleration(accelerator="kvm", reason="", version=version, tsc_khz=0)
    elif wanted == "kvm":
        raise NotSupported(f"KVM is asked for, but {reason}")
    else:
        if not await _runs(programs, path, "tcg", "max", deadline_s):
            raise NotSupported(f"{path} runs no guest, not even by emulation; it needs the machine type microvm")
        found = Acceleration(accelerator="tcg", reason=reason, version=version, tsc_khz=await measure_tsc_khz(programs))
    if cache is not None:
        _write_cache(cache, question, found)
    return found


async def measure_tsc_khz(programs: NodePrograms) -> int:
    """Measure the speed of the host's time stamp counter, in a tenth of a second, to a few parts in a million.

    Raises:
        NotSupported: no compiler, or a machine without such a counter.
    """
    output = await run_tool([str(await programs.tsc())], timeout_s=_TSC_S)
    if output.exit_code != 0 or not output.stdout.strip().isdigit():
        raise NotSupported("the speed of this machine's time stamp counter cannot be measured")
    return int(output.stdout)


async def _why_not_kvm(programs: NodePrograms, path: str, deadline_s: float) -> str:
    if not _KVM.exists():
        return "this host has no /dev/kvm"
    if not os.access(_KVM, os.R_OK | os.W_OK):
        return "/dev/kvm may not be opened"
    if await _runs(programs, path, "kvm", "host", deadline_s):
        return ""
    return "a guest that was started in KVM did not run, although /dev/kvm opens"


async def _runs(programs: NodePrograms, path: str, accelerator: str, cpu: str, deadline_s: float) -> bool:
    argv = [path, "-nodefaults", "-no-user-config", "-no-reboot", "-display", "none", "-m", "16M", "-cpu", cpu]
    argv += ["-machine", "microvm,pit=off,isa-serial=on", "-accel", accelerator, "-kernel", str(await programs.probe())]
    try:
        output = await run_tool([*argv, "-chardev", "stdio,id=out", "-serial", "chardev:out"], timeout_s=deadline_s)
    except TimeoutError:
        return False
    return _WORDS in output.stdout


async def _version(path: str) -> str:
    try:
        output = await run_tool([path, "--version"], timeout_s=_TSC_S)
    except (OSError, TimeoutError) as error:
        raise NotSupported(f"{path} does not run") from error
    first = output.stdout.decode("utf-8", "replace").splitlines()[:1]
    return first[0].removeprefix("QEMU emulator version ")[:128] if first else ""


def _question(path: str, wanted: str) -> dict[str, str]:
    """What the answer depends on."""
    status = os.stat(path)
    binary = f"{path} {status.st_ino} {status.st_size} {status.st_mtime_ns}"
    kvm = f"{_KVM.stat().st_rdev} {os.access(_KVM, os.R_OK | os.W_OK)}" if _KVM.exists() else ""
    return {"boot": _BOOT_ID.read_text(encoding="ascii").strip(), "binary": binary, "wanted": wanted, "kvm": kvm}


def _read_cache(cache: Path, question: dict[str, str]) -> Acceleration | None:
    try:
        kept = json.loads(cache.read_bytes())
        if kept["question"] == question and kept["answer"]["accelerator"] in {"kvm", "tcg"}:
            return Acceleration(**kept["answer"])
    except (OSError, ValueError, KeyError, TypeError):
        pass
    return None


@effect("vm.keep_acceleration")
def _write_cache(cache: Path, question: dict[str, str], found: Acceleration) -> None:
    cache.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    new = cache.with_name(f".{cache.name}.new")
    with contextlib.suppress(OSError):  # asked again next time
        new.write_text(json.dumps({"question": question, "answer": asdict(found)}), encoding="utf-8")
        os.replace(new, cache)
