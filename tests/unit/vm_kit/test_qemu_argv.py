"""The argument list of a machine, compared with files that a person can read; one argument a line."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from dispatcher_vm_kit.qemu_argv import Boot, Nic, QemuMachine, kernel_command_line, option, qemu_argv

GOLDEN = Path(__file__).parent / "golden"

COLD = QemuMachine(
    binary="/usr/bin/qemu-system-x86_64",
    accelerator="tcg",
    tsc_khz=2596126,
    memory_bytes=512 << 20,
    ram_fd=9,
    ram_shared=True,
    vcpus=2,
    boot=Boot(kernel=Path("/proc/self/fd/20"), initrd=Path("/proc/self/fd/21"), words=("loglevel=3",)),
    monitor_fd=10,
    agent_fd=11,
    console_fd=12,
    console_log_fd=13,
    nics=(Nic(mac="02:00:00:00:00:01", tap_fd=14), Nic(mac="02:00:00:00:00:02")),
    share=Path("/share"),
)
MACHINES = {
    "cold": COLD,
    "restored": replace(
        COLD, boot=None, ram_shared=False, nics=(Nic(mac="02:00:00:00:00:01", tap_fd=14),), share_owner=True
    ),
    "kvm": replace(COLD, accelerator="kvm", tsc_khz=0, vcpus=1, nics=(), share=None),
}


@pytest.mark.parametrize("name", MACHINES)
def test_golden(name: str) -> None:
    """Each machine has exactly the arguments that were reviewed."""
    assert qemu_argv(MACHINES[name]) == (GOLDEN / f"{name}.txt").read_text().splitlines()


def test_every_machine_is_bare_and_sandboxed() -> None:
    """No default device, no user configuration, and the system call filter, whatever the machine."""
    for machine in MACHINES.values():
        argv = qemu_argv(machine)
        assert {"-nodefaults", "-no-user-config", "-no-reboot"} <= set(argv)
        sandbox = argv[argv.index("-sandbox") + 1]
        assert sandbox == "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny"


def test_commas_are_escaped() -> None:
    """A path with commas stays one value, and brings no option of its own."""
    assert option("local", {"path": Path("/a,id=x,/b"), "share": True}) == "local,path=/a,,id=x,,/b,share=on"
    argv = qemu_argv(replace(COLD, share=Path("/s,security_model=none")))
    assert any("path=/s,,security_model=none,multidevs" in argument for argument in argv)


@pytest.mark.parametrize("mac", ["02:00:00:00:00:01,id=x", "", "02-00-00-00-00-01", "02:00:00:00:00:0G"])
def test_odd_mac_is_refused(mac: str) -> None:
    """A MAC is a MAC."""
    with pytest.raises(ValueError, match="MAC"):
        qemu_argv(replace(COLD, nics=(Nic(mac=mac),)))


@pytest.mark.parametrize("word", ["a b", "", "init=/x\n", "ä", "x" * 300])
def test_odd_word_is_refused(word: str) -> None:
    """A word of the command line is one word of printable ASCII."""
    with pytest.raises(ValueError, match="not a word"):
        kernel_command_line((word,))


@pytest.mark.parametrize(("memory", "vcpus"), [(0, 1), (4095, 1), (-4096, 1), (1 << 20, 0), (1 << 20, 65)])
def test_odd_size_is_refused(memory: int, vcpus: int) -> None:
    """A machine has some memory in whole pages, and 1 to 64 CPUs."""
    with pytest.raises(ValueError, match="size"):
        qemu_argv(replace(COLD, memory_bytes=memory, vcpus=vcpus))


def test_emulated_guest_is_told_its_clock() -> None:
    """Only an emulated guest hears of the host's counter; under KVM it has a better clock."""
    assert "tsc_early_khz=2596126 tsc=reliable" in kernel_command_line(tsc_khz=2596126)
    assert "tsc" not in kernel_command_line()
