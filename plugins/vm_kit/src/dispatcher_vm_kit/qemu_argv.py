"""QEMU's argument list for a machine, from typed values only. Pure; golden files show what comes out.

The machine is a `microvm`: no PCI, no firmware tables to emulate, every device on virtio-mmio. All that a pod may need
is there from the start, because such devices cannot be added later: a serial port for the agent, a SCSI controller (disks
are hot-plugged behind it), network cards, balloon, random source, and a 9p export of the pod's own folder.

Files reach QEMU as descriptors wherever it can take one, so that it needs to see no path of the host.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

AGENT_PORT = "dispatcher.agent"
SHARE_TAG = "share"
SCSI_BUS = "scsi0.0"
CONSOLE_LOG_SET = 1
FIRST_FREE_SET = 16  # descriptor sets from here on are for disks
_MAC = re.compile(r"[0-9a-f]{2}(?::[0-9a-f]{2}){5}")
_WORD = re.compile(r"[\x21-\x7e]{1,256}")
_SANDBOX = "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny"

Accelerator = Literal["kvm", "tcg"]
_Values = dict[str, str | int | bool | Path]


@dataclass(frozen=True, slots=True, kw_only=True)
class Boot:
    """What a cold machine starts with. `words` are an operator's additions to the kernel's command line."""

    kernel: Path
    initrd: Path
    words: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Nic:
    """A network card. `tap_fd` of None leaves its cable unplugged, as in a template."""

    mac: str
    tap_fd: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class QemuMachine:
    """A machine to start, as QEMU has to hear of it.

    Attributes:
        binary: the program.
        accelerator: "kvm", or "tcg" for emulation.
        tsc_khz: the host's time stamp counter, which an emulated guest has to be told.
        memory_bytes: the guest's RAM, all of it.
        ram_fd: an open file of that size that holds it.
        ram_shared: True writes into that file (making a template), False maps it copy-on-write.
        vcpus: how many the guest sees; it starts with all of them.
        boot: the kernel, or None where a state is restored.
        monitor_fd, agent_fd, console_fd: listening sockets.
        console_log_fd: a file that gets what the guest prints, open for appending.
        nics: network cards, in the guest's order.
        share: the folder to export as QEMU sees it, or None for an empty machine without it.
        share_owner: QEMU may act for the owners of the shared files.
        emulation_buffer_mib: translated code kept, under "tcg".
    """

    binary: str
    accelerator: Accelerator
    tsc_khz: int = 0
    memory_bytes: int
    ram_fd: int
    ram_shared: bool
    vcpus: int
    boot: Boot | None
    monitor_fd: int
    agent_fd: int
    console_fd: int
    console_log_fd: int
    nics: tuple[Nic, ...] = ()
    share: Path | None = None
    share_owner: bool = False
    emulation_buffer_mib: int = 16


def qemu_argv(machine: QemuMachine) -> list[str]:
    """The whole argument list, program first. Pure.

    Raises:
        ValueError: a value that can be none: a MAC, a word of the command line, a size.
    """
    size = machine.memory_bytes
    if size <= 0 or size % 4096 or not 1 <= machine.vcpus <= 64:
        raise ValueError("the machine's size is none")
    emulated = machine.accelerator == "tcg"
    accelerator: _Values = {
        "tb-size": machine.emulation_buffer_mib,
        **({"thread": "multi"} if machine.vcpus > 1 else {}),
    }
    argv = [machine.binary, "-nodefaults", "-no-user-config", "-no-reboot", "-display", "none", "-sandbox", _SANDBOX]
    argv += [
        "-accel",
        option(machine.accelerator, accelerator if emulated else {}),
        "-cpu",
        "max" if emulated else "host",
    ]
    # Without the old timer a third of the idle load is gone. The real-time clock stays: a guest without boots 2 s longer.
    argv += ["-machine", "microvm,pit=off,rtc=on,isa-serial=on,memory-backend=ram"]
    argv += ["-m", f"size={size // 1024}k", "-smp", str(machine.vcpus)]
    ram: _Values = {"id": "ram", "size": size, "mem-path": f"/proc/self/fd/{machine.ram_fd}"}
    argv += ["-object", option("memory-backend-file", {**ram, "share": machine.ram_shared})]
    if machine.boot is not None:
        argv += ["-kernel", str(machine.boot.kernel), "-initrd", str(machine.boot.initrd)]
        argv += ["-append", kernel_command_line(machine.boot.words, tsc_khz=machine.tsc_khz if emulated else 0)]
    else:
        argv += ["-incoming", "defer"]
    argv += _consoles(machine)
    argv += ["-device", "virtio-serial-device,id=serial"]
    argv += ["-device", option("virtserialport", {"bus": "serial.0", "chardev": "agent", "name": AGENT_PORT})]
    argv += ["-device", "virtio-scsi-device,id=scsi0"]
    for number, nic in enumerate(machine.nics):
        argv += _nic(number, nic)
    argv += ["-device", "virtio-balloon-device,id=balloon"]
    argv += ["-object", "rng-builtin,id=random", "-device", "virtio-rng-device,rng=random"]
    if machine.share is not None:
        share: _Values = {"id": "share", "path": machine.share, "multidevs": "remap"}
        model = "passthrough" if machine.share_owner else "none"
        argv += ["-fsdev", option("local", {**share, "security_model": model})]
        argv += ["-device", option("virtio-9p-device", {"fsdev": "share", "mount_tag": SHARE_TAG})]
    return argv


def _consoles(machine: QemuMachine) -> list[str]:
    listening: _Values = {"server": True, "wait": False}
    log = f"/dev/fdset/{CONSOLE_LOG_SET}"
    console: _Values = {"id": "console", "fd": machine.console_fd, **listening, "logfile": log, "logappend": True}
    return [
        *("-add-fd", option("", {"fd": machine.console_log_fd, "set": CONSOLE_LOG_SET})),
        *("-chardev", option("socket", console), "-serial", "chardev:console"),
        *("-chardev", option("socket", {"id": "monitor", "fd": machine.monitor_fd, **listening})),
        *("-mon", "chardev=monitor,mode=control"),
        *("-chardev", option("socket", {"id": "agent", "fd": machine.agent_fd, **listening})),
    ]


def _nic(number: int, nic: Nic) -> list[str]:
    if not _MAC.fullmatch(nic.mac):
        raise ValueError(f"{nic.mac!r} is not a MAC")
    name = f"net{number}"
    if nic.tap_fd is None:  # a hub of its own, with nothing else plugged in
        backend = option("hubport", {"id": name, "hubid": number})
    else:
        backend = option("tap", {"id": name, "fd": nic.tap_fd, "vhost": False})
    return ["-netdev", backend, "-device", option("virtio-net-device", {"netdev": name, "mac": nic.mac})]


def kernel_command_line(words: tuple[str, ...] = (), *, tsc_khz: int = 0) -> str:
    """The guest kernel's command line. Pure.

    Under emulation (`tsc_khz` above 0) the guest is told its counter's speed, since its own measuring may hang, and to
    trust it: on a busy host it would find fault with it, fall back to counting ticks, and never be idle again.

    Raises:
        ValueError: a word with a blank or a character that no command line holds.
    """
    # A panic ends the machine at once, by the one way of a reset that this machine type has for sure.
    ours = ["console=ttyS0", "quiet", "panic=-1", "reboot=t", "cryptomgr.notests"]
    ours += [f"tsc_early_khz={tsc_khz}", "tsc=reliable"] if tsc_khz else []
    for word in words:
        if not _WORD.fullmatch(word):
            raise ValueError(f"{word!r} is not a word of a kernel's command line")
    return " ".join([*ours, *words])


def option(kind: str, values: _Values) -> str:
    """One option as QEMU reads it: `kind,key=value,...`, with commas in values doubled. Pure."""
    parts = [kind] if kind else []
    for key, value in values.items():
        text = ("on" if value else "off") if isinstance(value, bool) else str(value)
        parts.append(f"{key}={text.replace(',', ',,')}")
    return ",".join(parts)
