"""One run of the guest: an exchange disk in, live output, the exchange disk's results out, and nothing left behind.

The image is never written (QEMU puts changes into an unlinked file), and the guest has no network. What a job leaves in
its results folder is read without mounting, so a broken file system can hurt nobody.
"""

from __future__ import annotations

import os
import selectors
import shutil
import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Final

from tests.vm.image import CACHE, GUEST, BuildError, Image, copy_repository, say

EXCHANGE_BYTES: Final = 8 << 30
# Beside the job's own time: boot, journal, power off.
MARGIN_S: Final = 300
_PROBE_S: Final = 15


class NoResultError(Exception):
    """The guest ended, or was ended, without saying how the job went."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Size:
    """What the machine gets."""

    cpus: int = 2
    memory_mib: int = 4096


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """What the guest runs.

    Attributes:
        script: Lines for a POSIX shell, run in the copy of the repository; its exit code is the job's.
        deadline_s: When the script is ended.
        share: A folder that the guest gets a copy of, as $VM_SHARE.
        results: Where the guest's $VM_RESULTS is put; made anew.
    """

    script: str
    deadline_s: float
    results: Path
    share: Path | None = None


def run(image: Image, job: Job, *, size: Size, accelerator: str) -> int:
    """Boot, run the job, switch off. Returns the job's exit code; 124 means that its deadline ended it.

    Raises:
        NoResultError: The guest did not come to the job's end.
    """
    folder = Path(tempfile.mkdtemp(prefix="running-", dir=CACHE))
    try:
        disk = _make_exchange(folder, job)
        argv = qemu_argv(image, disk, console=folder / "console.log", size=size, accelerator=accelerator)
        try:
            _play(argv, deadline_s=job.deadline_s + MARGIN_S, cwd=folder)
        finally:
            _fetch_results(folder, disk, job.results)
        return _exit_code(job.results)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def qemu_argv(image: Image, exchange: Path, *, console: Path, size: Size, accelerator: str) -> list[str]:
    """The command line. The kernel is given directly: the disk needs no boot loader."""
    return [
        *_common_argv(image, accelerator),
        "-smp", str(size.cpus),
        "-m", str(size.memory_mib),
        "-initrd", str(image.initrd),
        "-append", "root=LABEL=root rw console=ttyS0 panic=-1 loglevel=4 systemd.show_status=0 fsck.mode=skip",
        "-serial", f"file:{console}",
        "-drive", f"file={image.disk},if=virtio,format=raw,snapshot=on,cache=unsafe",
        "-drive", f"file={exchange},if=virtio,format=raw,cache=unsafe",
        "-device", "virtio-rng-pci",
        "-device", "virtio-serial-pci",
        "-chardev", "stdio,id=output,signal=off",
        "-device", "virtserialport,chardev=output,name=vm.output",
    ]  # fmt: skip


def _common_argv(image: Image, accelerator: str) -> list[str]:
    emulated = accelerator == "tcg"
    return [
        "qemu-system-x86_64",
        "-nodefaults", "-no-user-config", "-no-reboot", "-display", "none", "-monitor", "none", "-nic", "none",
        "-machine", "q35",
        "-accel", "tcg,thread=multi,tb-size=1024" if emulated else accelerator,
        "-cpu", "max" if emulated else "host",
        "-kernel", str(image.kernel),
    ]  # fmt: skip


def choose_accelerator(image: Image) -> str:
    """Return "kvm" where it really runs this guest's kernel up to its end, which is a panic without a disk; else "tcg".

    The answer is kept until the next boot. DISPATCHER_VM_ACCEL decides instead of the probe.
    """
    chosen = os.environ.get("DISPATCHER_VM_ACCEL")
    if chosen:
        return chosen
    if not os.access("/dev/kvm", os.R_OK | os.W_OK):
        return "tcg"
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    known = CACHE / "accelerator"
    if known.exists():
        answer, _, when = known.read_text().partition(" ")
        if when == boot:
            return answer
    answer = "kvm" if _kvm_boots(image) else "tcg"
    known.write_text(f"{answer} {boot}")
    return answer


def _kvm_boots(image: Image) -> bool:
    argv = [*_common_argv(image, "kvm"), "-m", "512", "-serial", "stdio", "-append", "console=ttyS0 panic=-1"]
    try:
        done = subprocess.run(argv, stdin=subprocess.DEVNULL, capture_output=True, timeout=_PROBE_S, check=False)
    except subprocess.TimeoutExpired:
        say("KVM opens but does not run a guest: software emulation it is")
        return False
    return done.returncode == 0 and b"Kernel panic - not syncing: VFS" in done.stdout


# ------------------------------------------------------------------------------------------------------------ exchange
def _make_exchange(folder: Path, job: Job) -> Path:
    tree = folder / "exchange"
    (tree / "results").mkdir(parents=True)
    copy_repository(tree / "repo")
    if job.share is None:
        (tree / "share").mkdir()
    else:
        shutil.copytree(job.share, tree / "share", symlinks=True)
    shutil.copyfile(GUEST / "start", tree / "start")
    (tree / "job").write_text(job.script)
    (tree / "deadline").write_text(f"{job.deadline_s:.0f}\n")
    disk = folder / "exchange.disk"
    with disk.open("wb") as file:
        file.truncate(EXCHANGE_BYTES)
    _tool("mke2fs", "-q", "-F", "-t", "ext4", "-L", "exchange", "-E", "root_owner=0:0", "-d", str(tree), str(disk))
    shutil.rmtree(tree)
    return disk


def _fetch_results(folder: Path, disk: Path, results: Path) -> None:
    shutil.rmtree(results, ignore_errors=True)
    results.mkdir(parents=True)
    # The journal of a file system that was not unmounted has to be replayed first. 1: errors were corrected.
    subprocess.run(["e2fsck", "-fy", str(disk)], capture_output=True, check=False)
    _tool("debugfs", "-R", f"rdump /results {folder}", str(disk))
    for path in (folder / "results").iterdir():
        shutil.move(path, results / path.name)
    if (folder / "console.log").exists():
        shutil.move(folder / "console.log", results / "console.log")


def _exit_code(results: Path) -> int:
    try:
        return int((results / "exit-code").read_text())
    except (OSError, ValueError):
        console = results / "console.log"
        tail = console.read_text(errors="replace").splitlines()[-25:] if console.exists() else []
        raise NoResultError("\n".join(["the guest ended without a result; its console said:", *tail])) from None


def _tool(*argv: str) -> None:
    environment: Mapping[str, str] = {**os.environ, "PATH": os.environ.get("PATH", "") + ":/usr/sbin:/sbin"}
    done = subprocess.run(argv, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise BuildError(f"{argv[0]} failed with {done.returncode}: {done.stderr.strip()}")


# ------------------------------------------------------------------------------------------------------------- playing
def _play(argv: Sequence[str], *, deadline_s: float, cwd: Path) -> None:
    """Run QEMU, showing the guest's output as it comes with the seconds since the start, and end it at the deadline.

    QEMU dies with us, also where nobody could end it.
    """
    begun = time.monotonic()
    environment = {**os.environ, "TMPDIR": str(cwd)}
    with subprocess.Popen(
        ["setpriv", "--pdeathsig", "KILL", "--", *argv],
        stdin=subprocess.PIPE,  # never written; its end would close the guest's port for output
        stdout=subprocess.PIPE,
        cwd=cwd,
        env=environment,
        start_new_session=True,
    ) as process:
        assert process.stdout is not None
        try:
            if _show(process.stdout, begun=begun, deadline_s=deadline_s):
                process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            say("the guest does not switch off: it is ended")
        finally:
            process.kill()


def _show(output: IO[bytes], *, begun: float, deadline_s: float) -> bool:
    """Pass lines on until the output ends; False where the deadline came first."""
    pending = b""
    with selectors.DefaultSelector() as selector:
        selector.register(output, selectors.EVENT_READ)
        while (left := begun + deadline_s - time.monotonic()) > 0:
            if not selector.select(timeout=left):
                break
            data = os.read(output.fileno(), 65536)
            if not data:
                return True
            *lines, pending = (pending + data).split(b"\n")
            for line in lines:
                print(f"[{time.monotonic() - begun:5.0f}] {line.decode(errors='replace').rstrip()}", flush=True)
    say(f"the deadline of {deadline_s:.0f} s is over: the guest is ended")
    return False
