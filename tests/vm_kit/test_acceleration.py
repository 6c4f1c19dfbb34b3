"""How guests run on this node is found out by running one, with the real QEMU and with programs that pretend."""

from __future__ import annotations

import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from dispatcher.errors import NotSupported
from dispatcher_vm_kit.acceleration import measure_tsc_khz, probe_acceleration
from dispatcher_vm_kit.launcher import NodePrograms

QEMU = "qemu-system-x86_64"
needs_qemu = pytest.mark.skipif(shutil.which(QEMU) is None, reason=f"{QEMU} is not installed")
pytestmark = pytest.mark.timeout(300)


@needs_qemu
async def test_a_guest_runs(programs: NodePrograms, tmp_path: Path) -> None:
    """By KVM or by emulation, with a reason; the answer is kept, and asked anew when the question changes."""
    cache = tmp_path / "acceleration.json"
    found = await probe_acceleration(programs, binary=QEMU, cache=cache, deadline_s=60)
    assert bool(found.reason) == (found.accelerator == "tcg")
    assert (found.tsc_khz > 100_000) == (found.accelerator == "tcg")
    assert found.version
    kept = cache.read_text()
    cache.write_text(kept.replace(found.version, "kept"))
    assert await probe_acceleration(programs, binary=QEMU, cache=cache) == replace(found, version="kept")
    asked = await probe_acceleration(programs, binary=QEMU, wanted="tcg", cache=cache, deadline_s=60)
    assert (asked.accelerator, asked.reason) == ("tcg", "emulation was asked for")


def pretend(folder: Path, script: str) -> str:
    program = folder / "qemu"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)
    return str(program)


async def test_a_monitor_that_runs_no_guest(programs: NodePrograms, tmp_path: Path) -> None:
    """Starting well is not enough, neither is saying so on the wrong channel."""
    for script in ("exit 0", "echo guest ran >&2", "exit 1"):
        with pytest.raises(NotSupported, match="runs no guest"):
            await probe_acceleration(programs, binary=pretend(tmp_path, script))


async def test_a_guest_that_hangs(programs: NodePrograms, tmp_path: Path) -> None:
    """The deadline counts as no."""
    binary = pretend(tmp_path, '[ "$1" != --version ] || exit 0; exec sleep 1000')
    with pytest.raises(NotSupported):
        await probe_acceleration(programs, binary=binary, deadline_s=0.3)


async def test_kvm_and_nothing_else(programs: NodePrograms, tmp_path: Path) -> None:
    """An operator who asks for KVM gets no emulation in its place; where KVM runs nothing, it is not taken."""
    says_tcg = 'for a in "$@"; do [ "$a" = tcg ] && echo guest ran; done; true'
    binary = pretend(tmp_path, says_tcg)
    found = await probe_acceleration(programs, binary=binary)
    assert found.accelerator == "tcg"
    if os.access("/dev/kvm", os.R_OK | os.W_OK):
        assert "although /dev/kvm opens" in found.reason
    with pytest.raises(NotSupported, match="KVM is asked for"):
        await probe_acceleration(programs, binary=binary, wanted="kvm")


async def test_no_monitor(programs: NodePrograms) -> None:
    """What to install is said."""
    with pytest.raises(NotSupported, match="apt-get install"):
        await probe_acceleration(programs, binary="qemu-system-none")


async def test_no_compiler(tmp_path: Path) -> None:
    """Likewise."""
    with pytest.raises(NotSupported, match="install gcc"):
        await NodePrograms(tmp_path, compilers=("no-cc",)).launcher()


async def test_counter_is_measured_finely(programs: NodePrograms) -> None:
    """Two readings agree to a few parts in a million, also on a busy machine."""
    first, second = await measure_tsc_khz(programs), await measure_tsc_khz(programs)
    assert abs(first - second) < first / 10_000
